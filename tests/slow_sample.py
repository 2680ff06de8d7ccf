"""pytest plugin: which slow tests run, and the dated result file of a whole slow tier.

    --slow sample   (default) a seeded tenth of the tests marked `slow`, at least one
    --slow all      every one; a run that nothing narrows down writes tests/results/slow-DATE.md
    --slow none     none

The seed is the ISO week: every slow test gets its turn without anybody asking, and a failure can be repeated all week,
or later with `--slow-seed`.
"""

import hashlib
import math
import os
import platform
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path

import pytest

SHARE = 0.1
RESULTS = Path(__file__).parent / "results"
HOSTS = ("torch", "diffusers", "transformers", "peft", "huggingface_hub", "safetensors")


def pytest_addoption(parser):
    group = parser.getgroup("slow tests")
    group.addoption("--slow", choices=("none", "sample", "all"), default="sample", help="which slow tests run")
    group.addoption("--slow-seed", default=None, help="seed of the sample; by default the ISO week, as 2026-W47")


def pytest_configure(config):
    if config.option.slow_seed is None:  # set here once, so that xdist's workers get the controller's
        year, week, _ = date.today().isocalendar()
        config.option.slow_seed = f"{year}-W{week:02}"


def pytest_report_header(config):
    return [
        f"slow tests: {config.option.slow} (seed {config.option.slow_seed})",
        "hosts: " + ", ".join(f"{name} {version(name)}" for name in HOSTS),
    ]


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config, items):
    slow = [item for item in items if item.get_closest_marker("slow")]
    chosen = {"none": [], "sample": sample(slow, config.option.slow_seed), "all": slow}[config.option.slow]
    left_out = set(slow) - set(chosen)
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def sample(items, seed):
    """A tenth of `items`, rounded up: those whose names hash lowest with the seed, whatever their order."""
    ranked = sorted(items, key=lambda item: hashlib.sha256(f"{seed} {item.nodeid}".encode()).digest())
    return ranked[: math.ceil(SHARE * len(ranked))]


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    narrowed = config.option.keyword or config.option.markexpr
    if config.option.slow != "all" or not whole or narrowed or hasattr(config, "workerinput"):
        return
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"slow-{date.today()}.md"
    path.write_text(result(terminalreporter, int(exitstatus)), encoding="utf-8")
    terminalreporter.write_line(f"slow tier: wrote {path.relative_to(config.rootpath)}")


def result(terminalreporter, exitstatus):
    """The result file: what ran on what, how it ended, what took longest."""
    stats = terminalreporter.stats
    counts = ", ".join(
        f"{len(stats[outcome])} {outcome}"
        for outcome in ("passed", "failed", "error", "skipped", "xfailed")
        if outcome in stats
    )
    seconds = {}
    for report in (r for reports in stats.values() for r in reports if isinstance(r, pytest.TestReport)):
        seconds[report.nodeid] = seconds.get(report.nodeid, 0) + report.duration
    failed = [report.nodeid for outcome in ("failed", "error") for report in stats.get(outcome, [])]
    slow = sum("slow" in report.keywords for report in stats.get("passed", []) + stats.get("failed", []))
    longest = sorted(seconds, key=seconds.get, reverse=True)[:20]
    lines = [
        f"# Slow tier, {date.today()}",
        "",
        f"{counts}; {slow} of them marked slow; exit status {exitstatus}.",
        f"{sum(seconds.values()):.0f} s of tests, {os.cpu_count()} cores, Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in HOSTS)
        + f", commit {commit()}.",
        "",
        *(f"- FAILED `{name}`" for name in failed),
        *([""] if failed else []),
        "| seconds | test |",
        "|--:|--|",
        *(f"| {seconds[name]:.1f} | `{name}` |" for name in longest),
    ]
    return "\n".join(lines) + "\n"


def commit():
    """The commit that was tested, with a plus when the files differ from it; "unknown" outside a git checkout."""
    here = Path(__file__).parent
    found = subprocess.run(
        ["git", "describe", "--always", "--abbrev=10", "--dirty=+"], cwd=here, capture_output=True, text=True
    )
    return found.stdout.strip() or "unknown"
