"""Every script in examples/ runs to its end, offline and in an empty folder.

A script that needs arguments for that says so in a line of its own: `# In CI: --dry-run`. Folders are run by hand
(emoji_world trains for hours).
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_example_runs(script, tmp_path):
    arguments = re.search(r"^# In CI: (.*)$", script.read_text(encoding="utf-8"), re.MULTILINE)
    found = subprocess.run(
        [sys.executable, script, *shlex.split(arguments[1] if arguments else "")],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr
