"""What an evaluation is, as one file: enough for every worker to take its share, and to report without model, adapters or judges."""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .. import hub
from ..errors import EraseError, MismatchError
from . import images, parts
from .beside import Beside
from .judges import Judge, Verdict, verdicts
from .plan import BATCH, WHOLE, Plan, Shard
from .probes import PROBES
from .report import MISSING, Report, Trial, made_now
from .suites import Suite

RECORD = "evaluation.json"
FORMAT = 1


class Try(NamedTuple):
    """One adapter, what is judged of it, and what is drawn for that."""

    name: str
    adapter: Mapping[str, Any] | None
    """What the adapter says of itself; None for the control, where nothing is erased."""
    concepts: tuple[str, ...]
    suite: Suite
    """The part of the suite that is drawn for these concepts."""
    before: Plan
    after: Plan


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Tries on one model with one suite, and who judges them: settled before a picture is drawn."""

    suite: Suite
    tried: Mapping[str, tuple[Mapping[str, Any] | None, tuple[str, ...]]]
    """By name: what an adapter says of itself (None for the control), and the concepts that are judged."""
    judges: Mapping[str, Mapping[str, Any]]
    """Aspect -> what its judge says of itself, with its digest."""
    model: Mapping[str, Any]
    """Name and digest of the unedited pipeline."""
    batch: int = BATCH
    command: str = ""
    """How to do this again."""

    @functools.cached_property
    def tries(self) -> tuple[Try, ...]:
        """Each adapter with its plans, in the order in which they were given."""
        return tuple(self._try(name, *asked) for name, asked in self.tried.items())

    @property
    def digest(self) -> str:
        """sha256 over everything but the command."""
        return hub.digest({key: value for key, value in self._told().items() if key != "command"})

    @property
    def plans(self) -> tuple[Plan, ...]:
        """What is drawn, each plan once: that of the unedited model often serves several tries."""
        return tuple({plan.digest: plan for each in self.tries for plan in (each.before, each.after)}.values())

    def undrawn(self, folder: str | Path, shard: Shard = WHOLE) -> int:
        """How many pictures of this shard have to be drawn."""
        return sum(images.undrawn(plan, folder, shard) for plan in self.plans)

    def unanswered(self, folder: str | Path, shard: Shard = WHOLE) -> int:
        """How many pictures of this shard a judge has not seen."""
        return sum(
            parts.unanswered(plan, folder, judge["digest"], shard)
            for plan in self.plans
            for judge in self.judges.values()
        )

    def report(self, folder: str | Path, *, partial: bool = False, seconds: float = 0.0) -> Report:
        """The report on what all shards have drawn and judged in `folder`.

        Args:
            partial: whether something may be missing; it is unknown then, and lowers the coverage.

        Raises:
            EraseError: something is missing.
        """
        trials = tuple(self._trial(each, Path(folder), partial) for each in self.tries)
        by = {told["digest"]: told for each in self.tries for told in Beside.load(folder, each.after).by}
        run = {probe["name"] for trial in trials for probe in trial.probes}
        untried = tuple(name for name in PROBES if name not in run)
        return Report(
            trials, self.suite, self.judges, self.model, self.command, seconds, tuple(by.values()), untried, made_now()
        )

    def save(self, folder: str | Path, *, replace: bool = True) -> Path:
        """Write `evaluation.json`, the same from every worker.

        Args:
            replace: whether the folder may hold another evaluation.

        Raises:
            EraseError: it does, and may not.
        """
        path = Path(folder) / RECORD
        if not replace and path.is_file() and Evaluation.load(folder).digest != self.digest:
            raise EraseError(
                f"{path} is of another evaluation (model, suite, adapters, judges or batch differ): start every worker with the "
                f"same command, or give another folder"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        hub.write_text(path, json.dumps(self._told(), indent=1, ensure_ascii=False) + "\n")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> "Evaluation":
        """The evaluation whose `evaluation.json` lies in `folder`.

        Raises:
            EraseError: there is none.
            MismatchError: it is not one of this version.
        """
        path = Path(folder) / RECORD
        if not path.is_file():
            raise EraseError(f"no {RECORD} in {folder}: expected the folder that `evaluate` was told to write")
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            if told["format"] != FORMAT:
                raise MismatchError(
                    f"{path} has format {told['format']!r}, this version reads {FORMAT}: evaluate again"
                )
            suite = Suite.from_json(told["suite"])
            tried = {name: (adapter, tuple(concepts)) for name, (adapter, concepts) in told["tried"].items()}
            found = cls(suite, tried, told["judges"], told["model"], told["batch"], told["command"])
            if not found.tries:
                raise TypeError("nothing was tried")
            return found
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise MismatchError(f"{path} lacks or garbles a part ({error!r}): evaluate again") from error

    def _told(self) -> dict[str, Any]:
        tried = {name: [adapter, list(concepts)] for name, (adapter, concepts) in self.tried.items()}
        return {
            "format": FORMAT, "command": self.command, "model": self.model, "batch": self.batch, "judges": self.judges,
            "tried": tried, "suite": self.suite.to_json(),
        }  # fmt: skip

    def _try(self, name: str, adapter: Mapping[str, Any] | None, concepts: tuple[str, ...]) -> Try:
        drawn = self.suite.selected(concepts)
        prompts = tuple((prompt.text, prompt.seed) for prompt in drawn.prompts)
        before = Plan(self.model["digest"], (), self.suite.settings, prompts, self.batch)
        after = before if adapter is None else before.erased([(adapter["digest"], 1.0)])
        return Try(name, adapter, concepts, drawn, before, after)

    def _trial(self, each: Try, folder: Path, partial: bool) -> Trial:
        before, after = (
            {aspect: _seen(plan, folder, judge["digest"], partial) for aspect, judge in self.judges.items()}
            for plan in (each.before, each.after)
        )
        files = zip(images.paths(each.before, folder), images.paths(each.after, folder), strict=True)
        found = Beside.load(folder, each.after)
        return Trial(
            each.name,
            each.concepts,
            each.adapter,
            each.suite,
            tuple(files),
            before,
            after,
            found.measures,
            found.probes,
        )


def looking(judge: Judge, plan: Plan, folder: str | Path) -> Callable[[Sequence[int]], list[Any]]:
    """From indices of the plan's pictures to the judge's verdicts, as JSON; one batch is in memory."""
    files = dict(zip(plan.places, images.paths(plan, folder), strict=True))

    def look(batch: Sequence[int]) -> list[Any]:
        seen = verdicts(judge, images.read([files[i] for i in batch]))
        return [[v.label, None if math.isnan(v.score) else v.score, list(v.top), v.reason] for v in seen]

    return look


def _seen(plan: Plan, folder: Path, judge: str, partial: bool) -> tuple[Verdict, ...]:
    """The verdicts on the plan's pictures, in its order."""
    missing = [None, None, [], MISSING]
    told = parts.answers(plan, folder, judge, partial=partial)
    return tuple(
        Verdict(label, math.nan if score is None else score, tuple(top), reason)
        for label, score, top, reason in (answer or missing for answer in told)
    )
