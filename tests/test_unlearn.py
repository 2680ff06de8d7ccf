"""eval-unlearn finds our technique, calls it as it calls its own, and reports what it saw; pictures can be repeated."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from conftest import make_pipe

from diffusers_erase import MismatchError, erase
from diffusers_erase.errors import EraseError

GROUP, NAME = "eval_unlearn.techniques", "diffusers_erase"


@pytest.fixture(scope="module")
def config(tokenizer, tmp_path_factory):
    """A technique's config: a local model and an adapter made on it."""
    folder, pipe = tmp_path_factory.mktemp("unlearn"), make_pipe(tokenizer)
    pipe.save_pretrained(folder / "model")
    erase(pipe, "cat", target="tree").save_pretrained(folder / "adapter")
    return {
        "base_model": str(folder / "model"), "adapters": [str(folder / "adapter")], "erase_concept": "cat", "steps": 2,
        "guidance_scale": 3.0,
    }  # fmt: skip


def technique(config, **changes):
    """Made as eval-unlearn makes it: loaded by the entry point in pyproject.toml, called with the config's keywords."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    value = project["project"]["entry-points"][GROUP][NAME]
    return EntryPoint(NAME, value, GROUP).load()(**(config | changes))


def pixels(pictures):
    return [picture.tobytes() for picture in pictures]


PROMPTS = ["a photo of a cat", "a boat", "a photo of a cat"]


def test_it_draws_with_the_erasure_and_repeatably(config):
    found = pixels(technique(config).generate(prompts=PROMPTS, seed=None))
    assert pixels(technique(config).generate(prompts=PROMPTS, seed=None)) == found
    assert found[0] != found[2]  # the same prompt again is another picture, not a copy
    control = pixels(technique(config, adapters=[]).generate(prompts=PROMPTS, seed=None))
    assert all(a != b for a, b in zip(found, control, strict=True))
    assert pixels(technique(config, seed=1).generate(prompts=PROMPTS, seed=None))[0] != found[0]
    assert pixels(technique(config).generate(prompts=PROMPTS, seed=1))[0] != found[0]


def test_pictures_do_not_depend_on_the_callers_batches(config):
    whole = technique(config).generate(prompts=PROMPTS, seed=None)
    drawing = technique(config)
    split = [p for prompt in PROMPTS for p in drawing.generate(prompts=[prompt], seed=None)]
    assert pixels(split) == pixels(whole)


def test_the_log_tells_how_to_draw_a_picture_again(config, tmp_path):
    log = tmp_path / "log.jsonl"
    drawing = technique(config, log=str(log))
    drawing.generate(prompts=PROMPTS[:2], seed=None)
    drawing.generate(prompts=PROMPTS[2:], seed=None)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS and len({row["seed"] for row in rows}) == 3
    assert all(len(row["erasures"]) == 1 for row in rows)


def test_a_safety_checker_takes_no_part(config, tokenizer, tmp_path):
    """Its black pictures would count as erased."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = sizes | {"image_size": 16, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(text_config=sizes, vision_config=vision, projection_dim=8)
    ).eval()
    checker.concept_embeds_weights.fill_(-2.0)  # no cosine is lower: everything is unsafe
    pipe = make_pipe(tokenizer)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pipe.register_modules(safety_checker=checker, feature_extractor=images)
    pipe.save_pretrained(tmp_path)
    black = pipe(PROMPTS[0], num_inference_steps=1).images[0]
    assert not any(black.tobytes())  # control
    (picture,) = technique(config, base_model=str(tmp_path)).generate(prompts=PROMPTS[:1])
    assert any(picture.tobytes())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scale": 1.0}, "unknown key 'scale'"),
        ({"adapters": "folder"}, "a list of folders"),
        ({"dtype": "half precision"}, "float32 or float16"),
        ({"batch_size": 0}, "at least 1"),
        ({"adapters": ["no-such-adapter"]}, "no-such-adapter"),
    ],
)
def test_what_it_cannot_do_as_asked_it_refuses(config, changes, said):
    with pytest.raises(EraseError, match=said):
        technique(config, **changes)


def test_a_config_is_whole(config):
    for name in ("base_model", "adapters", "erase_concept"):
        with pytest.raises(EraseError, match=f"lacks '{name}'"):
            technique({key: value for key, value in config.items() if key != name})


def test_an_adapter_of_another_model_is_refused(config, tokenizer, tmp_path):
    erase(make_pipe(tokenizer, seed=1), "cat").save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match="text encoder answers differently"):
        technique(config, adapters=[str(tmp_path)])


METRIC = """
    class Brightness:
        '''A metric as eval-unlearn documents it: the mean grey of all pictures.'''

        def __init__(self, **config):
            self.prompts, self.seen = config["prompts"], []

        def load_dataset(self):
            from eval_unlearn.types import Dataset

            return [Dataset(self.prompts[i : i + 2], {"source": "a test"}) for i in range(0, len(self.prompts), 2)]

        def update(self, images, prompts, metadata):
            assert len(images) == len(prompts)
            self.seen += [sum(image.convert("L").tobytes()) / (image.width * image.height) for image in images]

        def compute(self):
            from eval_unlearn.types import MetricResult

            return MetricResult("brightness", sum(self.seen) / len(self.seen), {"each": self.seen})
"""


@pytest.fixture
def environment(tmp_path):
    """A path with a metric of our own, and with our entry point, as an installed distribution has them."""
    (tmp_path / "brightness.py").write_text(textwrap.dedent(METRIC))
    for name, points in {
        "brightness": "[eval_unlearn.metrics]\nbrightness = brightness:Brightness\n",
        "erase_here": f"[{GROUP}]\n{NAME} = diffusers_erase.bench.unlearn:Technique\n",
    }.items():
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(points)
    package = str(Path(__file__).parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), package]), "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("eval_unlearn") is None or importlib.util.find_spec("dotenv") is None,
    reason="eval-unlearn is not installed: tests/run installs it into an environment of its own",
)
def test_its_command_line_lists_us_and_reports_on_us(config, environment, tmp_path):
    cli = [sys.executable, "-m", "eval_unlearn.cli"]
    listed = subprocess.run(
        [*cli, "plugins"], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert f"  {NAME}\n" in listed.stdout and "  brightness\n" in listed.stdout
    values = {}
    for who, adapters in {"erased": config["adapters"], "control": []}.items():
        told = {
            "output_dir": str(tmp_path / who),
            "technique": {
                "name": NAME,
                "config": config | {"adapters": adapters, "log": str(tmp_path / f"{who}.jsonl")},
            },
            "metrics": [{"name": "brightness", "config": {"prompts": PROMPTS}}],
        }
        (tmp_path / "config.json").write_text(json.dumps(told))
        subprocess.run([*cli, "run", "--config", "config.json"], env=environment, check=True, cwd=tmp_path)
        report = json.loads((tmp_path / who / f"{NAME}_cat_latest_report.json").read_text())
        assert report["erase_concept"] == "cat"
        assert len(list((tmp_path / who).rglob("*.png"))) == len(PROMPTS)
        values[who] = report["metric_results"]["brightness"]["details"]["each"]
    assert len(values["erased"]) == len(PROMPTS) and values["erased"] != values["control"]
    seeds = [[json.loads(line)["seed"] for line in (tmp_path / f"{who}.jsonl").open()] for who in values]
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == len(PROMPTS)


def test_the_documented_config_is_accepted():
    from diffusers_erase.bench.unlearn import Options

    page = (Path(__file__).parents[1] / "docs" / "eval-unlearn.md").read_text(encoding="utf-8")
    told = json.loads(page.split("```json\n")[1].split("```")[0])
    assert told["technique"]["name"] == NAME
    options = Options.of(told["technique"]["config"])
    assert all(f"`{name}`" in page for name in vars(options))
