"""Every Python block of README.md runs, in order and in one namespace, as a reader would paste them.

A block that cannot run here says why on the line before its fence: `<!-- no test: needs SD 1.4's weights -->`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from diffusers_erase.cli import app

README = Path(__file__).parents[1] / "README.md"

RUN = "import pathlib, sys; exec(compile(pathlib.Path(sys.argv[1]).read_text('utf-8'), 'README.md', 'exec'))"


def python_of(markdown: str) -> str:
    """The text with all but its Python blocks blanked, so that a traceback shows the README's own line numbers."""
    lines, inside, before = [], False, ""
    for line in markdown.splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        if fence:
            skipped = re.match(r"<!-- no test: \S.* -->$", before)
            inside = line.strip() == "```python" and not inside and not skipped
        before = line
    return "\n".join(lines)


def test_blocks_are_found():
    text = "a\n```python\nx = 1\n```\n<!-- no test: no -->\n```python\ny\n```\n```bash\nz\n```\n```python\nx += 1\n```"
    assert python_of(text).split("\n") == ["", "", "x = 1", *[""] * 9, "x += 1", ""]


def test_readme_snippets_run(tmp_path):
    script = tmp_path / "snippets.txt"
    script.write_text(python_of(README.read_text(encoding="utf-8")), encoding="utf-8")
    folder = tmp_path / "cwd"
    adapter = folder / "erase-demo" / "adapter"  # what the README's first command leaves behind
    CliRunner().invoke(app, ["erase", "emoji-sd", "butterfly", "--out", str(adapter)], catch_exceptions=False)
    found = subprocess.run(
        [sys.executable, "-c", RUN, script],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
