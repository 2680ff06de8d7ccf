"""Judging an erasure by pictures: suite → plan → paired pictures → judges → metrics → report.

report = evaluate(pipe, erase(pipe, "cat"), load_suite("emoji"), judges, "evaluation")
save(report, "evaluation")                            # index.html, report.json, results.md
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..adapter import ErasureAdapter
from ..errors import EraseError
from ..status import erasure_status
from ..verbs import load_erasure, unload_erasure
from . import images, parts
from .beside import Beside, setting_of
from .evaluation import Evaluation, looking
from .judges import Judge, Verdict, sees
from .looks import Looks, null_drift
from .metrics import Estimate, share_kept
from .page import save
from .plan import BATCH, WHOLE, Shard
from .probes import BUDGET, run_probes
from .report import Report, Trial
from .suites import ASPECTS, Part, Prompt, Settings, Suite, load_suite

__all__ = [
    "WHOLE", "Estimate", "Evaluation", "Judge", "Looks", "Part", "Prompt", "Report", "Settings", "Shard", "Suite", "Trial", "Verdict",
    "evaluate", "examine", "load_suite", "planned", "save", "share_kept", "work",
]  # fmt: skip

NO_LOOKS = Looks()

Adapters = ErasureAdapter | Mapping[str, ErasureAdapter | None]


def evaluate(
    pipe: Any,
    adapters: Adapters,
    suite: Suite,
    judges: Mapping[str, Judge],
    folder: str | Path,
    *,
    concepts: tuple[str, ...] = (),
    looks: Looks = NO_LOOKS,
    probes: Sequence[str] = (),
    budget: int = BUDGET,
    partial: bool = False,
    batch: int = BATCH,
    model: str = "",
    command: str = "",
    on_picture: Callable[[int], Any] = lambda n: None,
) -> Report:
    """Draw `suite` without and with each adapter, let `judges` say what is seen, and report. The pipe is left as it was.

    Pictures and verdicts are kept in `folder`: those of the unedited model serve every adapter, a killed run goes on, and what
    shards have done (see `work`) is not done again.

    Args:
        adapters: an erasure, or several by name, each tried alone. None instead of one is the control: nothing is erased.
        judges: aspect ("shows", "style") -> who finds that label of a prompt in a picture.
        concepts: what to judge; by default what each adapter erases, and for the control what all of them erase.
        looks: measures beyond labels: text scores, perceptual distance, FID.
        probes, budget: names of probes to run on each adapter (docs/probes.md), and the denoiser forwards that each may take.
        partial: draw nothing, report what is there; what is missing is unknown and lowers the coverage.
        batch: pictures that are drawn together; it decides how sums are rounded, so another number draws everything again.
        model, command: for the record: what the pipeline is called, and how to do this again.
        on_picture: called with the number of pictures that were found or drawn.

    Raises:
        EraseError: the pipe is edited already, the suite does not know a concept, or a judge lacks a label.

    Example:
        >>> judges = {"shows": emoji_objects(), "style": emoji_styles()}
        >>> report = evaluate(pipe, {"ridge": a, "no edit": None}, load_suite("emoji-mini"), judges, "evaluation")
        >>> print(report.trials[0].dimensions[0].share)
        0% [0%, 19%], n = 16
    """
    start = time.monotonic()
    evaluation = planned(pipe, adapters, suite, judges, concepts, batch=batch, model=model, command=command)
    if not partial:
        work(pipe, evaluation, adapters, judges, folder, on_picture=on_picture)
        examine(pipe, evaluation, adapters, judges, folder, looks=looks, probes=probes, budget=budget)
    return evaluation.report(folder, partial=partial, seconds=time.monotonic() - start)


def planned(
    pipe: Any,
    adapters: Adapters,
    suite: Suite,
    judges: Mapping[str, Judge],
    concepts: tuple[str, ...] = (),
    *,
    batch: int = BATCH,
    model: str = "",
    command: str = "",
) -> Evaluation:
    """What `evaluate` will do, checked before a picture is drawn. Arguments and errors are those of `evaluate`."""
    if erasure_status(pipe).requested:
        raise EraseError(
            "the pipe carries erasures already: unload_erasure(pipe) first, so that before means unedited"
        )
    tried = _named(adapters)
    if not tried:
        raise EraseError("nothing to evaluate: expected an adapter, or several by name")
    judged = {name: suite.known(concepts or _erased(adapter, tried)) for name, adapter in tried.items()}
    for names in judged.values():
        _check(suite, names, judges)
    return Evaluation(
        suite,
        {name: (None if adapter is None else facts(adapter), judged[name]) for name, adapter in tried.items()},
        {aspect: {"digest": judge.digest, **judge.to_json()} for aspect, judge in judges.items()},
        {"name": model or type(pipe).__name__, "digest": images.model_digest(pipe)},
        batch,
        command,
    )


def work(
    pipe: Any,
    evaluation: Evaluation,
    adapters: Adapters,
    judges: Mapping[str, Judge],
    folder: str | Path,
    shard: Shard = WHOLE,
    on_picture: Callable[[int], Any] = lambda n: None,
) -> None:
    """Draw and judge one shard of everything that was planned, unless it is there already; all plans are written first.

    Example, one of four workers, and whoever comes last:
        >>> evaluation = planned(pipe, adapter, suite, judges)
        >>> work(pipe, evaluation, adapter, judges, "pictures", Shard.parse("1/4"))
        >>> if not evaluation.unanswered("pictures"):
        ...     save(evaluation.report("pictures"), "evaluation")
    """
    for plan in evaluation.plans:
        plan.save(folder)
    named = _named(adapters)
    jobs = ((plan, put) for t in evaluation.tries for plan, put in ((t.before, None), (t.after, named[t.name])))
    for plan, adapter in {plan.digest: (plan, adapter) for plan, adapter in jobs}.values():
        with in_force(pipe, adapter):
            images.draw(pipe, plan, folder, shard, on_picture)
        for judge in judges.values():
            parts.ask(plan, folder, judge.digest, looking(judge, plan, folder), shard)


def examine(
    pipe: Any,
    evaluation: Evaluation,
    adapters: Adapters,
    judges: Mapping[str, Judge],
    folder: str | Path,
    *,
    looks: Looks = NO_LOOKS,
    probes: Sequence[str] = (),
    budget: int = BUDGET,
) -> None:
    """Measure the pictures of every try, and run `probes` on its adapter, unless they were run; kept beside the pictures.

    Everything has been drawn before (`work`).
    """
    named = _named(adapters)
    for each in evaluation.tries:
        adapter, found = named[each.name], Beside.load(folder, each.after)
        files = [images.paths(plan, folder) for plan in (each.before, each.after)]
        measures = looks.measured(each.suite, each.concepts, *files)
        if adapter is not None and adapter.kind == "rows":
            measures["null-prompt drift"] = null_drift(pipe, adapter)
        found = replace(found, measures=measures, by=looks.to_json())
        found.save(folder, each.after)
        for concept in each.concepts if adapter is not None else ():
            judge = next(judges[a] for a in judges if concept in each.suite.concepts_of(a))
            for name in probes:
                if not found.probed(name, concept, budget):
                    setting, pictures = (
                        setting_of(each.suite, concept),
                        Path(folder) / "probes" / each.after.digest[:24],
                    )
                    with in_force(pipe, adapter):
                        [result] = run_probes(
                            pipe, concept, sees(judge, concept), [name], budget, pictures, setting=setting
                        )
                    found = found.with_probe(result.to_json())
                    found.save(folder, each.after)


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
    labels = [label for edit in adapter.edits.values() for label in edit.labels]
    gates = {label.concept: {"gate": list(label.gate)} for label in labels if label.gate}
    recipes = [asdict(recipe) | gates.get(recipe.concept, {}) for recipe in adapter.recipes]
    packs = sorted({edit.pack for edit in adapter.edits.values()})
    return {"digest": adapter.digest, "kind": adapter.kind, "bytes": adapter.size, "packs": packs, "recipes": recipes}


def _named(adapters: Adapters) -> dict[str, ErasureAdapter | None]:
    return dict(adapters) if isinstance(adapters, Mapping) else {"erasure": adapters}


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
        raise EraseError(
            f"no judge can say whether {', '.join(concepts)} is seen: judges were given for {', '.join(judges) or 'nothing'}"
        )
    for aspect, judge in judges.items():
        if judge.labels is not None and (lacking := [n for n in drawn.labels(aspect) if n not in judge.labels]):
            raise EraseError(
                f"judge {judge.name!r} has no label {lacking[0]!r} ({len(lacking)} of suite {suite.name} are missing): "
                f"it could never say that it sees one. Give a judge with these labels."
            )
