"""What is found beside labels: measures of pictures, probes in the suite's own words, and that both are kept and reported."""

import json
import math
from pathlib import Path

import jsonschema
import pytest
import torch
from test_bench import always

from diffusers_erase import bench, erase
from diffusers_erase.bench.beside import Beside, score, setting_of
from diffusers_erase.bench.looks import Looks
from diffusers_erase.bench.measures import Measure
from diffusers_erase.bench.metrics import Score
from diffusers_erase.bench.plan import Plan
from diffusers_erase.bench.suites import Prompt, Settings, Suite, load_suite
from diffusers_erase.errors import EraseError, MismatchError

SCHEMA = json.loads((Path(bench.__file__).parent / "data" / "report.schema.json").read_text("utf-8"))


@pytest.fixture
def suite():
    drawn = [Prompt("a photo of a cat", seed, "cat", clean="a photo") for seed in (0, 1)]
    drawn += [Prompt("a photo of a kitty", 0, "cat", kind="paraphrase")]
    drawn += [Prompt(f"a photo of a {name}", seed, name) for name in ("dog", "boat") for seed in (0, 1)]
    return Suite("tiny", "1", "this test", "Apache-2.0", tuple(drawn), {}, Settings(2, 3.0))


def brightness(images):
    return torch.tensor([sum(image.convert("L").tobytes()) / 255 for image in images])


LOOKS = Looks(
    text=Measure("length", lambda images, texts: torch.tensor([float(len(t)) for t in texts]), {"version": 1}),
    pair=Measure("gap", lambda images, others: (brightness(images) - brightness(others)).abs(), {"version": 1}),
    features=Measure(
        "pixels", lambda images: torch.stack([brightness(images), -brightness(images)], 1), {"version": 1}
    ),
)


def test_measures_tell_the_concepts_pictures_from_all_others(sd1, suite, tmp_path):
    judges = {"shows": always("cat", ("cat", "dog", "boat"))}
    tried = {"erased": erase(sd1, "cat", target="dog"), "no edit": None}
    report = bench.evaluate(sd1, tried, suite, judges, tmp_path, looks=LOOKS)
    erased, control = (trial.measures for trial in report.trials)
    assert erased["gap, its own pictures"].value > erased["gap, all others"].value >= 0
    assert (erased["gap, its own pictures"].n, erased["gap, all others"].n) == (3, 4)
    assert erased["in-prompt length, after"].value == len("a photo") and erased["in-prompt length, after"].n == 2
    assert (
        control["gap, its own pictures"].value == 0 == control["KID to the unedited model, all others (pixels)"].value
    )
    assert 0 < erased["null-prompt drift"].value < 1 and "null-prompt drift" not in control
    assert [told["name"] for told in report.measures] == ["length", "gap", "pixels"]
    assert not any("CLIP score" in line for line in report.untested)
    jsonschema.validate(json.loads(json.dumps(report.to_json(), allow_nan=False)), SCHEMA)


def test_probes_draw_in_the_suites_words(suite):
    setting = setting_of(suite, "cat")
    assert setting.templates == ("a photo of a {}",) and setting.names == ("kitty",)
    assert (setting.steps, setting.guidance, setting.size) == (2, 3.0, None)
    emoji = setting_of(load_suite("emoji"), "bee")
    assert "a drawing of a {} in ink style" in emoji.templates and set(emoji.names) == {"honeybee", "bumblebee"}


@pytest.mark.slow
def test_probes_are_run_once_and_reported(sd1, suite, tmp_path):
    judges = {"shows": always("cat", ("cat", "dog", "boat"))}
    given = (sd1, {"ridge": erase(sd1, "cat"), "no edit": None}, suite, judges, tmp_path)
    report = bench.evaluate(*given, probes=("wording", "completion"), budget=120)
    assert [p["name"] for p in report.trials[0].probes] == ["wording", "completion"] and not report.trials[1].probes
    assert "noise" in report.untried and "wording" not in report.untried
    jsonschema.validate(json.loads(json.dumps(report.to_json(), allow_nan=False)), SCHEMA)
    page = bench.page.render(report)
    assert "Attacks without training" in page and "| ridge | probe wording | came back |" in report.to_markdown()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "probes").rglob("*.png")}
    again = bench.evaluate(*given, probes=("wording",), budget=120)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "probes").rglob("*.png")}
    assert len(again.trials[0].probes) == 2  # what was found before is not forgotten
    with pytest.raises(EraseError, match="unknown probe 'magic'"):
        bench.evaluate(*given, probes=("magic",))


def test_what_was_found_survives_its_file(tmp_path):
    plan = Plan("m", (), Settings(2, 1.0), (("a", 1),))
    assert Beside.load(tmp_path, plan) == Beside({})
    found = Beside({"x": Score(0.25, -math.inf, math.inf, 1)}, [{"name": "x", "digest": "d"}])
    found.with_probe({"name": "p", "concept": "cat", "budget": 5, "came_back": 1}).save(tmp_path, plan)
    back = Beside.load(tmp_path, plan)
    assert back.measures == found.measures and back.probed("p", "cat", 5) and not back.probed("p", "cat", 6)
    assert len(back.with_probe({"name": "p", "concept": "cat", "budget": 6}).probes) == 1
    assert math.isnan(score(Score(math.nan, 0, 1, 0).to_json()).value)
    [path] = (tmp_path / "beside").iterdir()
    path.write_text("{}")
    with pytest.raises(MismatchError, match="delete it"):
        Beside.load(tmp_path, plan)
