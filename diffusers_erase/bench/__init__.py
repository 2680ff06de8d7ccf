"""Judging an erasure by pictures: suite → plan → paired pictures → judges → metrics → report.

    report = evaluate(pipe, erase(pipe, "cat"), load_suite("emoji"), judges, "evaluation")
    report.save("evaluation")                              # index.html, report.json, results.md
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..adapter import ErasureAdapter
from ..attach import erasure_status, load_erasure, unload_erasure
from ..errors import EraseError
from . import images
from .judges import Judge, Verdict, verdicts
from .metrics import Estimate, share_kept
from .plan import Plan
from .report import Report, Trial, made_now
from .suites import ASPECTS, Part, Prompt, Settings, Suite, load_suite

__all__ = [
    "Estimate", "Judge", "Part", "Prompt", "Report", "Settings", "Suite", "Trial", "Verdict", "evaluate", "load_suite", "share_kept",
]  # fmt: skip

Adapters = ErasureAdapter | Mapping[str, ErasureAdapter | None]

LOOK = 64
"""Pictures that are in memory at a time, while they are judged."""


def evaluate(
    pipe: Any,
    adapters: Adapters,
    suite: Suite,
    judges: Mapping[str, Judge],
    folder: str | Path,
    *,
    concepts: tuple[str, ...] = (),
    model: str = "",
    command: str = "",
    on_picture: Callable[[int], Any] = lambda n: None,
) -> Report:
    """Draw `suite` without and with each adapter, let `judges` say what is seen, and report. The pipe is left as it was.

    Pictures are cached in `folder`: those of the unedited model serve every adapter, and a killed run goes on.

    Args:
        adapters: an erasure, or several by name, each tried alone. None instead of one is the control: nothing is erased.
        judges: aspect ("shows", "style") -> who finds that label of a prompt in a picture.
        concepts: what to judge; by default what each adapter erases, and for the control what all of them erase.
        model, command: for the record: what the pipeline is called, and how to do this again.
        on_picture: called with the number of pictures that were found or drawn.

    Raises:
        EraseError: the pipe is edited already, the suite does not know a concept, or a judge lacks a label.

    Example:
        >>> judges = {"shows": emoji_objects(), "style": emoji_styles()}
        >>> report = evaluate(pipe, {"ridge": a, "no edit": None}, load_suite("emoji-mini"), judges, "evaluation")
        >>> report.trials[0].dimensions[0].share
        Estimate(value=0.0, low=0.0, high=0.19, n=16, ...)
    """
    if erasure_status(pipe).requested:
        raise EraseError("the pipe carries erasures already: unload_erasure(pipe) first, so that before means unedited")
    tried = {"erasure": adapters} if isinstance(adapters, ErasureAdapter) else dict(adapters)
    judged = {name: suite.known(concepts or _erased(adapter, tried)) for name, adapter in tried.items()}
    for names in judged.values():
        _check(suite, names, judges)
    trials = []
    for name, adapter in tried.items():
        trials.append(_trial(pipe, name, adapter, judged[name], suite, judges, Path(folder), on_picture))
    told = {aspect: {"digest": judge.digest, **judge.to_json()} for aspect, judge in judges.items()}
    drawn = {"name": model or _name(pipe), "digest": images.model_digest(pipe)}
    return Report(tuple(trials), suite, told, drawn, command, made=made_now())


def _trial(
    pipe: Any,
    name: str,
    adapter: ErasureAdapter | None,
    concepts: tuple[str, ...],
    suite: Suite,
    judges: Mapping[str, Judge],
    folder: Path,
    on_picture: Callable[[int], Any],
) -> Trial:
    """One adapter against the unedited model, on the part of the suite that its concepts need."""
    start, drawn = time.monotonic(), suite.selected(concepts)
    files, seen = [], []
    for put in (None, adapter):
        with in_force(pipe, put):
            plan = images.plan_for(pipe, drawn.prompts, drawn.settings)
            images.draw(pipe, plan, folder, on_picture=on_picture)
        files.append(images.paths(plan, folder))
        seen.append({aspect: _seen(judge, plan, folder) for aspect, judge in judges.items()})
    return Trial(
        name, concepts, None if adapter is None else facts(adapter), drawn, tuple(zip(*files, strict=True)), *seen,
        seconds=time.monotonic() - start,
    )  # fmt: skip


@contextmanager
def in_force(pipe: Any, adapter: ErasureAdapter | None) -> Iterator[None]:
    """`pipe` with `adapter` alone in force, or with nothing; afterwards with nothing again."""
    try:
        if adapter is not None:
            load_erasure(pipe, adapter)
        yield
    finally:
        unload_erasure(pipe)


def facts(adapter: ErasureAdapter) -> dict[str, Any]:
    """What a report tells of an adapter: digest, size, base pack, and how each concept was erased."""
    gates = {label.concept: list(label.gate) for label in adapter.edit.labels if label.gate}
    recipes = [asdict(recipe) | ({"gate": gates[recipe.concept]} if recipe.concept in gates else {}) for recipe in adapter.recipes]
    return {"digest": adapter.digest, "bytes": adapter.size, "pack": adapter.edit.pack, "recipes": recipes}


def _seen(judge: Judge, plan: Plan, folder: Path) -> tuple[Verdict, ...]:
    files = images.paths(plan, folder)
    return tuple(v for i in range(0, len(files), LOOK) for v in verdicts(judge, images.read(files[i : i + LOOK])))


def _erased(adapter: ErasureAdapter | None, tried: Mapping[str, ErasureAdapter | None]) -> tuple[str, ...]:
    if adapter is not None:
        return adapter.concepts
    names = tuple(dict.fromkeys(c for other in tried.values() if other is not None for c in other.concepts))
    if not names:
        raise EraseError("nothing is erased here: say what to judge, concepts=('cat',)")
    return names


def _check(suite: Suite, concepts: tuple[str, ...], judges: Mapping[str, Judge]) -> None:
    """Before a picture is drawn: every label that will be looked for is one that its judge has."""
    if odd := set(judges) - set(ASPECTS):
        raise EraseError(f"a judge of {min(odd)!r}: expected a judge for each of {', '.join(ASPECTS)}")
    drawn = suite.selected(concepts)
    if not any(part.aspect in judges for part in drawn.parts(concepts) if part.name == "efficacy"):
        raise EraseError(f"no judge can say whether {', '.join(concepts)} is seen: judges were given for {', '.join(judges) or 'nothing'}")
    for aspect, judge in judges.items():
        if judge.labels is not None and (lacking := [n for n in drawn.labels(aspect) if n not in judge.labels]):
            raise EraseError(
                f"judge {judge.name!r} has no label {lacking[0]!r} ({len(lacking)} of suite {suite.name} are missing): "
                f"it could never say that it sees one. Give a judge with these labels."
            )


def _name(pipe: Any) -> str:
    return str(getattr(pipe, "name_or_path", "") or type(pipe).__name__)
