"""Evaluating on a tiny pipeline: pairs, several adapters against one base, shards, and everything that is refused beforehand."""

import json

import pytest
from conftest import bits, same_bits

from diffusers_erase import bench, erase, load_erasure
from diffusers_erase.bench.judges import by_function
from diffusers_erase.bench.suites import Prompt, Settings, Suite
from diffusers_erase.errors import EraseError


@pytest.fixture(scope="module")
def suite():
    drawn = [Prompt("a photo of a cat", seed, "cat", "photo") for seed in (0, 1)]
    drawn += [Prompt("a photo of a wolf", 0, "wolf", "photo"), Prompt("a photo of a boat", 0, "boat", "photo")]
    return Suite(
        "tiny", "1", "this test", "Apache-2.0", tuple(drawn), {"cat": {"visual": ("wolf",)}}, Settings(2, 3.0)
    )


def always(label, labels=("cat", "wolf", "boat")):
    return by_function(lambda images: [label] * len(images), name=f"always {label}", version="1", labels=labels)


@pytest.fixture
def judges():
    return {"shows": always("cat"), "style": always("photo", ("photo",))}


def shares(trial):
    return {(d.part.name, d.part.aspect): (d.share.value, d.share.n) for d in trial.dimensions if d.share.n}


def test_evaluate_leaves_the_pipe_as_it_was_and_reports(sd1, suite, judges, tmp_path):
    before = bits(sd1.unet)
    report = bench.evaluate(sd1, erase(sd1, "cat", target="dog"), suite, judges, tmp_path)
    assert same_bits(sd1.unet, before) and not sd1.unet._forward_pre_hooks
    [trial] = report.trials
    assert shares(trial) == {
        ("efficacy", "shows"): (1.0, 2), ("across/inside", "style"): (1.0, 2), ("across/outside", "style"): (1.0, 2)
    }  # fmt: skip
    assert any(a.read_bytes() != b.read_bytes() for a, b in trial.pictures)  # control: something was drawn otherwise


def test_adapters_are_tried_alone_against_one_base(sd1, suite, judges, tmp_path):
    tried = {
        "to dog": erase(sd1, "cat", target="dog"),
        "to nothing": erase(sd1, "cat", target="null"),
        "no edit": None,
    }
    report = bench.evaluate(sd1, tried, suite, judges, tmp_path)
    first, second, control = report.trials
    assert [before for before, _ in first.pictures] == [before for before, _ in second.pictures]
    assert all(a == b for a, b in control.pictures) and control.concepts == ("cat",)
    assert len(list(tmp_path.glob("*.png"))) == 3 * len(suite.prompts)
    assert {key[:2] for key in report.comparisons} == {("to dog", "to nothing")}
    alone = bench.evaluate(sd1, {"to nothing": tried["to nothing"]}, suite, judges, tmp_path / "alone")
    assert [after.read_bytes() for _, after in alone.trials[0].pictures] == [
        after.read_bytes() for _, after in second.pictures
    ]


def test_a_judge_that_fails_never_makes_a_concept_gone(sd1, suite, tmp_path):
    def broken(images):
        raise ValueError("no weights")

    judges = {"shows": by_function(broken, name="broken", version="1")}
    [trial] = bench.evaluate(sd1, erase(sd1, "cat"), suite, judges, tmp_path).trials
    efficacy = trial.dimensions[0]
    assert efficacy.share.n == 0 and efficacy.share.coverage == 0 and efficacy.verdict == "not known"
    assert {pair.outcome for pair in trial.pairs(efficacy.part)} == {"unknown"}


def test_what_cannot_work_is_refused_before_a_picture_is_drawn(sd1, suite, judges, tmp_path):
    adapter = erase(sd1, "cat")
    cases = [
        ({"concepts": ("unicorn",)}, "does not know 'unicorn': it knows cat, wolf, boat, photo"),
        ({"adapters": {}}, "nothing to evaluate"),
        ({"adapters": {"no edit": None}}, "say what to judge"),
        ({"judges": {"shows": always("cat", ("cat", "wolf"))}}, "no label 'boat'"),
        ({"judges": {"style": always("photo", ("photo",))}}, "no judge can say whether cat is seen"),
        ({"judges": {"mood": always("sad", ("sad",))}}, "a judge of 'mood'"),
    ]
    for change, said in cases:
        given = {"adapters": adapter, "suite": suite, "judges": judges, "folder": tmp_path} | change
        with pytest.raises(EraseError, match=said):
            bench.evaluate(sd1, **given)
    load_erasure(sd1, erase(sd1, "boat"))
    with pytest.raises(EraseError, match="carries erasures already"):
        bench.evaluate(sd1, adapter, suite, judges, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_evaluation_is_one_folder_that_says_how_to_do_it_again(sd1, suite, judges, tmp_path):
    report = bench.evaluate(
        sd1,
        erase(sd1, "cat"),
        suite,
        judges,
        tmp_path / "pictures",
        model="tiny",
        command="diffusers-erase evaluate tiny",
    )
    assert bench.save(report, tmp_path) == tmp_path / "index.html"
    assert {p.name for p in tmp_path.iterdir()} == {"index.html", "report.json", "results.md", "pictures"}
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["command"] == "diffusers-erase evaluate tiny" and told["suite"]["digest"] == suite.digest
    assert told["trials"][0]["adapter"]["recipes"][0]["concept"] == "cat"
    assert "diffusers-erase evaluate tiny" in (tmp_path / "results.md").read_text()
