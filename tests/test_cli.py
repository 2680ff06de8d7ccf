"""The command line: what a person types, what is printed, and one line with exit code 2 for bad input."""

import json
import shutil

import pytest
from conftest import make_pipe
from typer.testing import CliRunner

from diffusers_erase import ErasureAdapter, compose
from diffusers_erase.cli import app


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_pipe(tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    """Two adapters made by the command line: cat → dog, boat → the empty prompt."""
    folder = tmp_path_factory.mktemp("adapters")
    run("erase", model, "cat", "--target", "dog", "--preserve", "wolf", "--out", str(folder / "cat"))
    run("erase", model, "boat", "--gate", "0.7", "--out", str(folder / "boat"))
    return folder


def run(*args, expect=0):
    result = CliRunner().invoke(app, list(args), env={"COLUMNS": "200"})
    assert result.exit_code == expect, result.output
    return result


def refused(*args):
    """The one line that bad input gets."""
    result = run(*args, expect=2)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.output
    return lines[0]


def test_erase_saves_what_it_says(model, adapters):
    adapter = ErasureAdapter.from_pretrained(adapters / "cat")
    assert adapter.concepts == ("cat",)
    assert adapter.recipes[0].targets == ("dog",)
    assert adapter.edit.preserved == ("wolf",)
    assert {p.name for p in (adapters / "cat").iterdir()} == {
        "cat_kohya.safetensors",
        "erasure.safetensors",
        "erasure_config.json",
        "README.md",
        "pytorch_lora_weights.safetensors",
    }


def test_several_concepts_take_one_target_or_one_each(model, tmp_path):
    run("erase", model, "cat", "boat", "--target", "dog", "--target", "car", "--out", str(tmp_path / "each"))
    each = {r.concept: r.targets for r in ErasureAdapter.from_pretrained(tmp_path / "each").recipes}
    assert each == {"cat": ("dog",), "boat": ("car",)}
    run("erase", model, "cat", "boat", "--target", "dog", "--out", str(tmp_path / "one"))
    one = {r.concept: r.targets for r in ErasureAdapter.from_pretrained(tmp_path / "one").recipes}
    assert one == {"cat": ("dog",), "boat": ("dog",)}


def test_targets_ranks_and_says_why_others_are_refused(model):
    told = [argument for name in ("castle", "street", "house", "tree", "cats") for argument in ("--candidate", name)]
    lines = run("targets", model, "cat", *told, "--erased", "tree").stdout.splitlines()
    table = lines[1 : lines.index(next(x for x in lines if x.startswith("(the empty")))]
    ranked = [line.split()[0] for line in table if not line.startswith(" ")]  # a long cell goes on in the next line
    assert "collateral" in lines[0] and ranked and set(ranked) <= {"castle", "street", "house"}
    assert "refused: cats: it contains the concept" in lines and "refused: tree: it is erased too" in lines
    assert "no candidate is left for 'cat'" in refused("targets", model, "cat", "--candidate", "cats")
    assert "a template holds the name once" in refused("targets", model, "cat", *told, "--template", "a cat")
    run("targets", model, "cat", "--coreference", "auto", *told)  # not a name of its own


def test_erase_searches_its_target(model, tmp_path):
    names = ("castle", "street", "house")
    told = [argument for name in names for argument in ("--candidate", name)]
    told += ["--template", "a painting of a {}", "--template", "{}"]
    run("erase", model, "cat", "--target", "auto", "--preserve", "auto", *told, "--out", str(tmp_path / "auto"))
    recipe = ErasureAdapter.from_pretrained(tmp_path / "auto").recipes[0]
    assert recipe.templates == ("a painting of a {}", "{}")
    assert recipe.targets in {(name,) for name in names} and len(recipe.preserve) > 1


def test_options_of_a_method(model, tmp_path):
    out = ("--out", str(tmp_path / "uce"))
    run("erase", model, "cat", "--method", "uce", "--option", "lamb=0.25", "--option", "erase_scale=2", *out)
    options = ErasureAdapter.from_pretrained(tmp_path / "uce").recipes[0].options
    assert options == {"lamb": 0.25, "erase_scale": 2, "preserve_scale": 1.0}
    for option, said in (
        ("lamb", "is NAME=VALUE, such as updates=100: got 'lamb'"),
        ("strength=1", "has no option 'strength'"),
        ("tokens=last", "tokens is no option of a method: give it as --tokens"),
        ("lamb=little", "lamb of method 'uce' is a number: got 'little'"),
    ):
        assert said in refused("erase", model, "cat", "--method", "uce", "--option", option, *out)


def test_one_target_is_that_target(model, tmp_path):
    for target, expected in (("null", ()), ("dog", ("dog",))):
        run("erase", model, "cat", "--target", target, "--out", str(tmp_path / target))
        assert ErasureAdapter.from_pretrained(tmp_path / target).recipes[0].targets == expected


def test_graph_writes_a_page(model, tmp_path):
    shown = run("graph", model, "cat,dog", "boat, ship", "--out", str(tmp_path)).stdout
    assert "within groups" in shown and "asymmetry" in shown and "fragile" in shown
    told = json.loads((tmp_path / "graph.json").read_text())
    assert told["names"] == ["cat", "dog", "boat", "ship"] and told["groups"] == ["cat", "cat", "boat", "boat"]
    assert told["measured"] is None and (tmp_path / "index.html").is_file() and (tmp_path / "matrix.svg").is_file()
    assert "each once: got cat" in run("graph", model, "cat", "--out", str(tmp_path), expect=2).stderr


def test_show_tells_concept_target_and_digest(adapters):
    shown = run("show", str(adapters / "cat")).stdout
    digest = ErasureAdapter.from_pretrained(adapters / "cat").digest
    assert "cat" in shown and "dog" in shown and digest[:16] in shown and "preserved: wolf" in shown


def test_compose_is_the_librarys(adapters, tmp_path):
    run("compose", str(adapters / "cat"), str(adapters / "boat"), "--out", str(tmp_path / "both"))
    both = compose(*(ErasureAdapter.from_pretrained(adapters / name) for name in ("boat", "cat")))
    assert ErasureAdapter.from_pretrained(tmp_path / "both").digest == both.digest


def test_load_check_says_what_is_in_force(model, adapters):
    said = run("load-check", model, str(adapters / "cat"), str(adapters / "boat")).stdout
    assert "in force (map) on unet: cat, boat" in said


def test_generate_draws_with_and_without(model, adapters, tmp_path):
    from PIL import Image, ImageChops

    draw = ["generate", model, "a photo of a cat", "--steps", "2", "--seed", "3"]
    run(*draw, "--out", str(tmp_path / "before"))
    run(*draw, "--out", str(tmp_path / "again"))
    run(*draw, "--adapter", str(adapters / "cat"), "--out", str(tmp_path / "after"))
    before, again, after = (
        Image.open(tmp_path / d / "000-seed3.png").convert("RGB") for d in ("before", "again", "after")
    )
    assert ImageChops.difference(before, again).getbbox() is None
    assert ImageChops.difference(before, after).getbbox() is not None


def test_methods_are_listed(adapters):
    listed = run("methods").stdout
    assert "ridge" in listed and "uce" in listed and "lamb=0.5" in listed


@pytest.mark.parametrize(
    ("concept", "options", "said"),
    [
        ("", [], "empty name"),
        ("cat " * 80, [], "tokens"),
        ("猫", [], "knows no part"),
        ("cat", ["--target", "Cat"], "itself"),
        ("cat", ["--preserve", "cat"], "erased and preserved"),
        ("cat", ["--residual", "1.5"], "between 0 and 1"),
        ("cat", ["--method", "magic"], "unknown method"),
        ("cat", ["--tokens", "first"], "unknown token policy"),
        ("cat", ["--pack", "nowhere.json"], "no base pack"),
    ],
)
def test_bad_requests_get_one_line(model, tmp_path, concept, options, said):
    assert said in refused("erase", model, concept, *options, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_missing_and_foreign_folders_get_one_line(model, adapters, tmp_path):
    assert "no model folder" in refused("erase", str(tmp_path / "nowhere"), "cat", "--out", str(tmp_path / "out"))
    assert "no erasure at" in refused("show", str(tmp_path / "nowhere"))
    assert "no erasure at" in refused("load-check", model, model)
    (tmp_path / "empty").mkdir()
    refused("generate", str(tmp_path / "empty"), "a cat", "--out", str(tmp_path / "out"))
    shutil.copytree(adapters / "cat", tmp_path / "cut")
    (tmp_path / "cut" / "erasure.safetensors").write_bytes(
        (adapters / "cat" / "erasure.safetensors").read_bytes()[:-7]
    )
    assert "not a whole" in refused("show", str(tmp_path / "cut"))


def test_another_base_is_refused(adapters, tokenizer, tmp_path):
    make_pipe(tokenizer, width=48).save_pretrained(tmp_path / "wide")
    assert "width" in refused("load-check", str(tmp_path / "wide"), str(adapters / "cat"))
    make_pipe(tokenizer, seed=9).save_pretrained(tmp_path / "other")
    assert "encoder answers differently" in refused("load-check", str(tmp_path / "other"), str(adapters / "cat"))


def test_another_tools_file_becomes_an_adapter(model, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(f"{model}/unet/diffusion_pytorch_model.safetensors")
    state = {
        k: w + 0.1 * torch.randn(w.shape)
        for k, w in weights.items()
        if k.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    }
    save_file(state, tmp_path / "esd.safetensors")
    done = run(
        "import", model, str(tmp_path / "esd.safetensors"), "cat", "--rank", "2", "--out", str(tmp_path / "cat")
    )
    made = ErasureAdapter.from_pretrained(tmp_path / "cat")
    assert made.kind == "factors" and made.concepts == ("cat",)
    lost = made.recipes[0].options["error"]
    told = " ".join(done.output.split())  # the console breaks lines
    assert f"{lost:.2%}" in told and "not tested" in told and lost > 0.1
    assert "factors of 8 layers" in run("show", str(tmp_path / "cat")).output
    assert "nothing to import" in refused(
        "import", model, f"{model}/unet/diffusion_pytorch_model.safetensors", "cat", "--out", str(tmp_path / "none")
    )
    assert not (tmp_path / "none").exists()


def test_export_writes_a_plain_folder(model, adapters, tmp_path):
    run("export", model, str(adapters / "cat"), "--unet-file", "--out", str(tmp_path / "plain"))
    assert {"model_index.json", "erasures.json", "unet", "unet_erased.safetensors"} <= {
        p.name for p in (tmp_path / "plain").iterdir()
    }
    assert "linear=True" in refused("export", model, str(adapters / "boat"), "--out", str(tmp_path / "gated"))
    run("export", model, str(adapters / "boat"), "--linear", "--out", str(tmp_path / "gated"))


def test_evaluate_refuses_in_one_line_before_it_loads_a_model(model, adapters, tmp_path):
    given = ["--adapter", str(adapters / "cat"), "--out", str(tmp_path / "report")]
    assert "netfive" in refused("evaluate", model, "--suite", "sd-everything", *given)
    assert "name a judge by --clip" in refused("evaluate", model, "--suite", "cifar", *given)
    assert "unknown probe 'magic'" in refused("evaluate", model, "--suite", "cifar", "--probe", "magic", *given)
    assert "two adapters have one name" in refused("evaluate", model, "--suite", "cifar", *given, *given[:2])
    assert not (tmp_path / "report").exists()
