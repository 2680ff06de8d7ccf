"""One evaluation by many workers: killed anywhere and gone on with, in shards, under a launcher; one report comes of it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_pipe
from test_parts import worker
from typer.testing import CliRunner

from diffusers_erase import bench, cli, erase, world
from diffusers_erase.bench import Evaluation, Prompt, Settings, Shard, Suite
from diffusers_erase.bench.judges import by_function
from diffusers_erase.errors import EraseError

WORDS = ("cat", "dog", "wolf", "car", "ship", "tree")


SETTINGS = Settings(steps=1, guidance=3.0)


def suite(settings=SETTINGS, words=WORDS, styles=("photo",)):
    drawn = [
        Prompt(f"a {style} of a {word}", seed, word, style) for word in words for style in styles for seed in (0, 1)
    ]
    return Suite("small", "1", "a test", "Apache-2.0", tuple(drawn), {"cat": {"visual": ("dog", "wolf")}}, settings)


@pytest.fixture(scope="module")
def asked(tokenizer):
    """The arguments of `evaluate`, on a tiny pipeline, with a judge that answers to a picture's bits."""
    pipe = make_pipe(tokenizer)
    adapters = {"cat": erase(pipe, "cat", target="tree"), "no edit": None}
    judge = by_function(
        lambda pictures: [WORDS[sum(p.tobytes()) % 6] for p in pictures], name="bits", version="1", labels=WORDS
    )
    return {"pipe": pipe, "adapters": adapters, "suite": suite(), "judges": {"shows": judge}}


def result(report):
    """Everything that a report says, but for when and how long."""
    told = json.loads(json.dumps(report.to_json()))
    return {key: value for key, value in told.items() if key not in ("made", "seconds", "command")}


@pytest.fixture(scope="module")
def undisturbed(asked, tmp_path_factory):
    return result(bench.evaluate(**asked, folder=tmp_path_factory.mktemp("undisturbed"), batch=4))


@pytest.fixture(scope="module")
def seconds(asked, undisturbed, tmp_path_factory):
    """How long an undisturbed run takes here: within this time others are killed."""
    start = time.monotonic()
    bench.evaluate(**asked, folder=tmp_path_factory.mktemp("timed"), batch=4)
    return time.monotonic() - start


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_an_evaluation_killed_at_any_point_ends_in_the_same_report(asked, undisturbed, seconds, tmp_path, seed):
    with worker(lambda: bench.evaluate(**asked, folder=tmp_path, batch=4)) as process:
        time.sleep(random.Random(seed).random() * seconds)
        os.kill(process, signal.SIGKILL)
    assert result(bench.evaluate(**asked, folder=tmp_path, batch=4)) == undisturbed


def test_shards_end_in_the_same_report_and_a_merge_refuses_missing_ones(asked, undisturbed, tmp_path):
    pipe, adapters, judges = asked["pipe"], asked["adapters"], asked["judges"]
    evaluation = bench.planned(pipe, adapters, asked["suite"], judges, batch=4)
    evaluation.save(tmp_path)
    pictures = tmp_path / "pictures"
    assert evaluation.undrawn(pictures) == 2 * len(asked["suite"].prompts)  # the control draws nothing of its own
    bench.work(pipe, evaluation, adapters, judges, pictures, Shard(0, 2))
    with pytest.raises(EraseError, match="1 of 3 batches have not been looked at yet, batch 2 the first"):
        Evaluation.load(tmp_path).report(pictures)
    partial = Evaluation.load(tmp_path).report(pictures, partial=True)
    assert sum(verdict.label is None for verdict in partial.trials[0].after["shows"]) == 4
    assert any(dimension.share.coverage < 1 for dimension in partial.trials[0].dimensions)
    assert "8 of 24 answers of judges, since not all shards were done: they count neither way" in partial.untested
    assert "since not all shards" in bench.save(partial, tmp_path / "partial").read_text()
    bench.work(pipe, evaluation, adapters, judges, pictures, Shard(1, 2))
    assert not evaluation.unanswered(pictures) and not evaluation.undrawn(pictures)
    bench.examine(pipe, evaluation, adapters, judges, pictures)  # measures of whole sets: whoever ends last
    whole = result(Evaluation.load(tmp_path).report(pictures))
    assert whole == undisturbed
    assert result(partial) != whole  # control


def test_workers_of_another_evaluation_are_refused(asked, tmp_path):
    pipe, adapters, judges = asked["pipe"], asked["adapters"], asked["judges"]
    first = bench.planned(pipe, adapters, asked["suite"], judges, batch=4, command="one")
    first.save(tmp_path)
    bench.planned(pipe, adapters, asked["suite"], judges, batch=4, command="two").save(tmp_path, replace=False)
    other = bench.planned(pipe, {"cat": adapters["cat"]}, asked["suite"], judges, batch=4)
    with pytest.raises(EraseError, match="of another evaluation"):
        other.save(tmp_path, replace=False)
    other.save(tmp_path)
    assert Evaluation.load(tmp_path).digest == other.digest != first.digest


def test_a_record_is_whole_or_refused(asked, tmp_path):
    with pytest.raises(EraseError, match="no evaluation.json"):
        Evaluation.load(tmp_path)
    path = bench.planned(asked["pipe"], asked["adapters"], asked["suite"], asked["judges"]).save(tmp_path)
    told = json.loads(path.read_text())
    for change in ({"format": 9}, {"tried": [1]}, {"batch": None}):
        path.write_text(json.dumps(told | change))
        with pytest.raises(EraseError):
            Evaluation.load(tmp_path).report(tmp_path)


# The command line, on the embedded model: its judges ship with the package.

SMALL = suite(Settings(steps=1, guidance=1.0), ("cat", "dog", world.OBJECTS[-1]), world.STYLES[:2])
SMALL = Suite("small", "1", "a test", "Apache-2.0", SMALL.prompts[::2], {"cat": {"visual": ("dog",)}}, SMALL.settings)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    (folder / "suite.json").write_text(json.dumps(SMALL.to_json()))
    erase(world.load(), "cat").save_pretrained(folder / "cat")
    return [
        "evaluate",
        "emoji-sd",
        "--suite",
        str(folder / "suite.json"),
        "--adapter",
        str(folder / "cat"),
        "--batch",
        "2",
    ]


def told(folder):
    return {
        k: v
        for k, v in json.loads((folder / "report.json").read_text()).items()
        if k not in ("made", "seconds", "command")
    }


def run(*words):
    done = CliRunner().invoke(cli.app, [str(word) for word in words])
    assert done.exit_code == 0, (words, done.output, done.exception)
    return done.output


@pytest.mark.slow
def test_the_last_shard_writes_the_report(command, tmp_path):
    run(*command, "--out", tmp_path / "whole")
    said = run(*command, "--out", tmp_path / "shards", "--shard", "1/2")
    assert "others are not" in said and not (tmp_path / "shards" / "report.json").exists()
    refused = CliRunner().invoke(cli.app, ["merge", str(tmp_path / "shards")])
    assert refused.exit_code == 2
    run("merge", tmp_path / "shards", "--partial")
    assert told(tmp_path / "shards") != told(tmp_path / "whole")
    said = run(*command, "--out", tmp_path / "shards", "--shard", "2/2")
    assert "look at" in said and told(tmp_path / "shards") == told(tmp_path / "whole")
    run("merge", tmp_path / "shards")
    assert told(tmp_path / "shards") == told(tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_of_a_launcher_share_the_work(command, tmp_path):
    """`--multi_gpu` only makes accelerate start several processes; they draw on the CPU here."""
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--module", "diffusers_erase.cli"]
    done = subprocess.run([*launch, *command, "--out", tmp_path / "two"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    run(*command, "--out", tmp_path / "one")
    assert told(tmp_path / "two") == told(tmp_path / "one")
    names = [sorted(p.name for p in (tmp_path / n / "pictures").glob("*.png")) for n in ("one", "two")]
    assert names[0] == names[1] and len(names[0]) == 2 * len(SMALL.prompts)


@pytest.mark.slow
def test_a_gated_adapter_is_tried_beside_its_linear_part(command, tmp_path):
    """Fused weights and twins are the linear part, so its card states both."""
    gated = erase(world.load(), "cat", gate=0.5)
    gated.save_pretrained(tmp_path / "gated")
    run(*command[:4], "--adapter", tmp_path / "gated", "--linear", "--batch", "2", "--out", tmp_path / "out")
    found = {t["name"]: t["adapter"]["digest"] for t in told(tmp_path / "out")["trials"]}
    assert found == {"gated": gated.digest, "gated (linear part)": gated.linear.digest}
    assert gated.digest != gated.linear.digest
    gated.save_pretrained(tmp_path / "gated", report=tmp_path / "out")
    card = (tmp_path / "gated" / "README.md").read_text()
    assert "| gated |" in card and "| gated (linear part) |" in card


@pytest.mark.slow
def test_memory_does_not_grow_over_ten_thousand_pictures():
    script = Path(__file__).parents[1] / "examples" / "benchmarks" / "many_pictures.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    rows = [line.split("|")[1:4] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    held = [(stage.strip(), int(n.replace(",", "")), int(mib)) for stage, n, mib in rows]
    assert held[-1][:2] == ("merged", 10_000)
    early = max(mib for stage, n, mib in held if stage == "drawn" and n < 2500)
    assert max(mib for _, _, mib in held) < early + 50  # pictures that were kept would be 88 MiB from there on
