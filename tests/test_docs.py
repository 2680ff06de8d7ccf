"""What docs/ tells people to type works: marked Python blocks, and every command of the recipes, on a tiny pipeline."""

import re
import shlex
from pathlib import Path

import pytest

from diffusers_erase import METHODS, get_active_erasures

DOCS = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))


def runnable(markdown):
    """Python blocks with the marker `<!-- runnable -->` on the line before their fence, each with the line on which its code begins."""
    blocks = re.finditer(r"^<!-- runnable -->\n```python\n(.*?)^```$", markdown, re.MULTILINE | re.DOTALL)
    return [(markdown[: block.start(1)].count("\n"), block[1]) for block in blocks]


BLOCKS = [
    pytest.param(doc, line, code, id=f"{doc.stem}-{line}")
    for doc in DOCS
    for line, code in runnable(doc.read_text("utf-8"))
]


def test_blocks_are_found():
    text = "a\n<!-- runnable -->\n```python\nx = 1\n```\n```python\ny\n```\n<!-- runnable -->\n```python\nz = 2\n```\n"
    assert runnable(text) == [(3, "x = 1\n"), (10, "z = 2\n")]
    assert BLOCKS


@pytest.mark.parametrize(("doc", "line", "code"), BLOCKS)
def test_block_runs(doc, line, code, sd1, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = dict(METHODS)
    try:
        exec(compile("\n" * line + code, doc.name, "exec"), {"pipe": sd1})
    finally:
        METHODS.clear()
        METHODS.update(before)
    assert "load_erasure" not in code or get_active_erasures(sd1)


def test_links_lead_somewhere():
    for doc in DOCS:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", doc.read_text("utf-8")):
            assert (doc.parent / target).exists(), f"{doc.name} links to {target}, which is not there"


def commands(markdown):
    """Every `diffusers-erase` command of the bash blocks, as its arguments."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", markdown, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("diffusers-erase ")]


def test_recipes_run(sd1, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from diffusers_erase.cli import app

    sd1.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    made = [["erase", "MODEL", name, "--target", "a person", "--out", f"erase-{name}"] for name in ("first", "second")]
    told = commands(next(doc for doc in DOCS if doc.name == "recipes.md").read_text("utf-8"))
    assert {line[0] for line in told} >= {"erase", "show", "generate", "compose"}
    for line in made + told:
        line = ["model" if word == "MODEL" else word for word in line] + (
            ["--steps", "2"] if line[0] == "generate" else []
        )
        done = CliRunner().invoke(app, line)
        assert done.exit_code == 0, (line, done.output, done.exception)
