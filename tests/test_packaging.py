"""What pyproject.toml promises is what the second leg of tests/run installs."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import diffusers_erase.version

ROOT = Path(__file__).parents[1]
PINS = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "tests/requirements-oldest.txt").read_text(), re.MULTILINE))


def test_lower_bounds_are_what_the_oldest_leg_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = dict(requirement.split(">=") for requirement in project["dependencies"])
    del bounds["torch"]  # one copy serves both legs: requirements-oldest.txt says why
    assert bounds.items() <= PINS.items()


def test_one_version():
    assert version("diffusers-erase") == diffusers_erase.version.__version__
