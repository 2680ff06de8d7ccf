"""Judging an erasure by pictures: suite → paired pictures → judge → metrics → report."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ..adapter import ErasureAdapter
from ..attach import erasure_status, load_erasure, unload_erasure
from ..errors import EraseError
from . import images
from .metrics import Estimate, share_kept
from .report import Judged, Report
from .suites import Part, Prompt, Settings, Suite, load_suite

__all__ = [
    "Estimate", "Judge", "Judged", "Part", "Prompt", "Report", "Settings", "Suite", "evaluate", "load_suite", "share_kept",
]  # fmt: skip


class Judge(Protocol):
    """Whatever names the object and the style in pictures (PIL, RGB)."""

    def objects(self, images: list[Any]) -> list[str]: ...
    def styles(self, images: list[Any]) -> list[str]: ...


def evaluate(
    pipe: Any,
    adapter: ErasureAdapter,
    suite: Suite,
    judge: Judge,
    folder: str | Path,
    *,
    on_picture: Callable[[int], Any] = lambda n: None,
) -> Report:
    """Draw `suite` without and with `adapter`, let `judge` name what is seen, and report. The pipe is left as it was.

    Pictures are cached in `folder`: those of the unedited model serve every adapter, and a killed run goes on.
    """
    if erasure_status(pipe).requested:
        raise EraseError(
            "the pipe carries erasures already: unload_erasure(pipe) first, so that before means unedited"
        )
    start = time.monotonic()
    suite = suite.selected(adapter.concepts)
    before = images.generate(pipe, suite, folder, on_picture)
    load_erasure(pipe, adapter)
    try:
        after = images.generate(pipe, suite, folder, on_picture)
    finally:
        unload_erasure(pipe)
    seen_before, seen_after = (
        Judged(tuple(judge.objects(p)), tuple(judge.styles(p))) for p in (images.read(before), images.read(after))
    )
    recipe = adapter.recipes[0]
    facts = {
        "sent to": " + ".join(recipe.targets) or "the empty prompt",
        "method": f"{recipe.method}, tokens {recipe.tokens}, residual {recipe.residual:g}" + _gate(adapter),
        "adapter": f"{adapter.size:,} bytes of rows",
        "drawn with": f"{suite.settings.steps} steps, guidance {suite.settings.guidance:g}, {len(suite.prompts)} pairs",
        "seconds": f"{time.monotonic() - start:.0f}",
        "digest": adapter.digest[:24],
    }
    return Report(suite, adapter.concepts, seen_before, seen_after, tuple(zip(before, after, strict=True)), facts)


def _gate(adapter: ErasureAdapter) -> str:
    gate = next((label.gate for label in adapter.edit.labels if label.gate), None)
    return f", gate {gate.threshold:g}" if gate else ""
