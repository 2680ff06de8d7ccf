"""Probes: does the concept come back when somebody tries, by words, by the sampler, or by learning?

    from diffusers_erase.bench.probes import PROBES, Setting, run_probes

    load_erasure(pipe, "erase-van-gogh")
    for result in run_probes(pipe, "Van Gogh", found):
        print(result)

Each probe is a function from a `Subject` to ways of trying, in a file of its own; what all share (choosing the strongest way,
measuring it on other seeds, the unedited control, the same without aim, the budget) stands in probe.py.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...errors import EraseError
from . import (  # noqa: F401 - importing a probe registers it
    completion,
    concept_vector,
    embeds,
    guidance,
    inpainting,
    inversion,
    negatives,
    noise,
    prefixes,
    relearning,
    searching,
    wording,
)
from .probe import BUDGET, PROBES, Found, Probe
from .result import Example, ProbeResult, Tried
from .subject import Setting

__all__ = ["BUDGET", "PROBES", "Example", "Found", "Probe", "ProbeResult", "Setting", "Tried", "run_probes"]


def run_probes(
    pipe: Any,
    concept: str,
    found: Found,
    names: Iterable[str] | None = None,
    budget: int = BUDGET,
    folder: str | Path | None = None,
    *,
    setting: Setting | None = None,
) -> tuple[ProbeResult, ...]:
    """Run some probes, or all, one after the other; `budget` is each one's.

    Args:
        names: of `PROBES`; None for all.
        folder: where each probe's strongest pictures go, in a folder of its name.

    Raises:
        EraseError: an unknown probe, before any is run; and what a probe raises.
    """
    chosen = tuple(PROBES) if names is None else tuple(names)
    if unknown := [name for name in chosen if name not in PROBES]:
        raise EraseError(f"unknown probe {unknown[0]!r}: expected one of {', '.join(PROBES)}")
    return tuple(
        PROBES[name](pipe, concept, found, budget, setting=setting, folder=folder and Path(folder) / name)
        for name in chosen
    )
