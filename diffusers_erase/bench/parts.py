"""What was found in the pictures, on disk: a small file for each batch and question, whole or not there, merged at the end.

A *question* is whatever looks at pictures and answers something that JSON can hold: a judge's verdicts, a measure's scores, a
network's features. Its name is the digest of all that decides the answers. Together with the pictures' names it names the
*part*, so answers are found again as pictures are, by later runs, other workers and other adapters. Nothing but one batch
is ever in memory.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import hub
from ..errors import EraseError, MismatchError
from .plan import WHOLE, Plan, Shard

Answers = list[Any]
"""For each picture one JSON value; None stands for "no answer"."""


def ask(
    plan: Plan,
    folder: str | Path,
    question: str,
    look: Callable[[Sequence[int]], Sequence[Any]],
    shard: Shard = WHOLE,
    on_picture: Callable[[int], Any] = lambda n: None,
) -> None:
    """Answer `question` for every batch of this shard that has no part yet.

    Args:
        question: digest of all that decides the answers.
        look: from the indices (into `plan.items`) of a batch to one JSON value for each.

    Example:
        >>> files = paths(plan, "pictures")
        >>> ask(plan, "pictures", "brightness-1", lambda batch: [sum(p.histogram()) for p in read([files[i] for i in batch])])
        >>> answers(plan, "pictures", "brightness-1")
    """
    for batch in shard.of(plan.batches):
        part = _part(plan, folder, question, batch)
        if not part.is_file():
            found = list(look(batch))
            if len(found) != len(batch):
                raise EraseError(
                    f"{question} gave {len(found)} answers for {len(batch)} pictures: expected one for each"
                )
            part.parent.mkdir(parents=True, exist_ok=True)
            lines = (hub.canonical([plan.names[i], answer]) for i, answer in zip(batch, found, strict=True))
            hub.write_text(part, "".join(f"{line}\n" for line in lines))
        on_picture(len(batch))


def answers(plan: Plan, folder: str | Path, question: str, *, partial: bool = False) -> Answers:
    """The answers for each of the plan's prompts, in their order: the merge of all shards' parts.

    Args:
        partial: whether parts may be missing; their pictures then have no answer (None), which lowers the coverage.

    Raises:
        EraseError: parts are missing.
        MismatchError: a part is not what its name says.
    """
    missing = [n for n, batch in enumerate(plan.batches, 1) if not _part(plan, folder, question, batch).is_file()]
    if missing and not partial:
        raise EraseError(
            f"{len(missing)} of {len(plan.batches)} batches have not been looked at yet, batch {missing[0]} the first: run the "
            f"missing shards, or merge what there is with partial=True, which lowers the coverage"
        )
    found: dict[str, Any] = {}
    for n, batch in enumerate(plan.batches, 1):
        if n not in missing:
            found |= _read(_part(plan, folder, question, batch), [plan.names[i] for i in batch])
    return [found.get(plan.names[i]) for i in plan.places]


def unanswered(plan: Plan, folder: str | Path, question: str, shard: Shard = WHOLE) -> int:
    """How many pictures of this shard have no answer yet."""
    return sum(len(b) for b in shard.of(plan.batches) if not _part(plan, folder, question, b).is_file())


def _part(plan: Plan, folder: str | Path, question: str, batch: Sequence[int]) -> Path:
    pictures = hub.digest([plan.names[i] for i in batch])
    return Path(folder) / "parts" / question[:24] / f"{pictures[:24]}.jsonl"


def _read(path: Path, names: Sequence[str]) -> Iterator[tuple[str, Any]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if [name for name, _ in rows] != list(names):
            raise ValueError("other pictures than expected")
    except (ValueError, TypeError) as error:
        raise MismatchError(
            f"{path} does not hold the answers that its name says ({error}): delete it and run again"
        ) from error
    return ((name, answer) for name, answer in rows)
