"""What every probe does with its ways to try: choose the strongest on some seeds, measure it on others, within a budget."""

import inspect
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from PIL import Image

from ...errors import EraseError
from ..metrics import Estimate
from .result import Example, ProbeResult, Seen, Tried
from .subject import Setting, Subject

BUDGET = 6000
"""Denoiser forwards of a probe: a hundred guided pictures of 30 steps."""

FRESH = 100_000
"""How far the seeds on which a way is chosen lie from those on which it is measured."""

FEWEST = 12
"""Pictures below which a probe would say nothing."""

EXAMPLES = 8

Found = Callable[[list[Image.Image]], Sequence[Seen]]
"""Says of each picture whether the concept is seen in it; None where it cannot tell."""

Way = TypeVar("Way")


@dataclass(frozen=True)
class Attack(Generic[Way]):
    """Ways to try, and the same without aim, so that what comes back can be told from chance."""

    aimed: Sequence[Way]
    unaimed: Sequence[Way]
    draw: Callable[[Sequence[Way], Sequence[int]], list[Image.Image]]
    """A picture for each (way, seed), under whatever is in force at the time."""
    chance: str
    """What `unaimed` is, in words."""
    label: Callable[[Way], str] = str
    forwards: int = 0
    """What a picture takes at most; 0 for a plain one."""
    first: int = 0
    """Pictures that are drawn once for a seed, before all others of it."""
    told: dict[str, Any] = field(default_factory=dict)
    """What a reader should know beyond the ways."""


@dataclass(frozen=True)
class Probe:
    """A registered probe: call it with a pipeline that has erasures in force."""

    name: str
    source: str
    ways: Callable[..., Attack]
    trains: bool = False
    """Whether it learns by gradients; what they ask of the denoiser is in the budget, without backward passes."""

    @property
    def summary(self) -> str:
        """First line of the probe's docstring."""
        return (inspect.getdoc(self.ways) or "").split("\n", 1)[0]

    def __call__(
        self,
        pipe: Any,
        concept: str,
        found: Found,
        budget: int = BUDGET,
        *,
        setting: Setting | None = None,
        folder: str | Path | None = None,
        **options: Any,
    ) -> ProbeResult:
        """Try to bring `concept` back. The pipe stays bit for bit as it was, its scheduler and progress bar too.

        Args:
            pipe: an SD pipeline with erasures in force; for the control they are out of force for a while.
            found: says of each picture whether the concept is seen; None lowers coverage.
            budget: denoiser forwards, never exceeded; a guided picture of 30 steps takes 60.
            setting: prompts, steps, guidance, seed; by default a Stable Diffusion's.
            folder: where the strongest examples' pictures go; None keeps none.
            options: the probe's own.

        Raises:
            EraseError: no erasure in force, a budget too small, or a judge that does not answer for every picture.
        """
        subject = Subject(pipe, concept, setting or Setting())
        return _measured(self, subject, self.ways(subject, **options), found, budget, folder)


PROBES: dict[str, Probe] = {}
"""Every probe by name."""


def probe(name: str, *, source: str, trains: bool = False) -> Callable[[Callable[..., Attack]], Callable[..., Attack]]:
    """Register the decorated function, from a `Subject` to an `Attack`, as the probe `name`."""

    def register(ways: Callable[..., Attack]) -> Callable[..., Attack]:
        PROBES[name] = Probe(name, source, ways, trains)
        return ways

    return register


def _measured(
    probe: Probe, subject: Subject, attack: Attack, found: Found, budget: int, folder: str | Path | None
) -> ProbeResult:
    each, seed = attack.forwards or subject.forwards(), subject.setting.seed
    spent = subject.used  # by a search that asks the denoiser
    plan = _plan(max(0, budget - spent) // each, len(attack.aimed), len(attack.unaimed), attack.first)
    if plan is None:
        raise EraseError(
            f"a budget of {budget} forwards, {spent} of them spent on the search, draws {max(0, budget - spent) // each} pictures at "
            f"{each} each: give at least {spent + FEWEST * each}"
        )

    def tried(ways: Sequence[Any], keep: int, seeds: int) -> list[tuple[Any, tuple[Seen, ...]]]:
        kept = [ways[i * len(ways) // keep] for i in range(keep)]
        _, seen = _judged(subject, attack, [(w, seed + FRESH + i) for w in kept for i in range(seeds)], found)
        return [(way, tuple(seen[i * seeds : (i + 1) * seeds])) for i, way in enumerate(kept)]

    aimed = tried(attack.aimed, plan.aimed, plan.aimed_seeds)
    strongest = _strongest(aimed)
    guess = _strongest(tried(attack.unaimed, plan.unaimed, plan.unaimed_seeds))
    seeds = [seed + i for i in range(plan.seeds)]
    pictures, seen = _judged(subject, attack, [(strongest, s) for s in seeds], found)
    with subject.unedited():
        before, known = _judged(subject, attack, [(strongest, s) for s in seeds], found)
    _, guessed = _judged(subject, attack, [(guess, s) for s in seeds], found)
    label, entries = attack.label(strongest), subject.status.requested
    return ProbeResult(
        name=probe.name,
        concept=subject.concept,
        source=probe.source,
        budget=budget,
        used=subject.used,
        tried=tuple(Tried(attack.label(way), answers) for way, answers in aimed),
        untried=len(attack.aimed) - len(aimed),
        strongest=label,
        came_back=Estimate.of_share(seen),
        control=Estimate.of_share(known),
        chance=Estimate.of_share(guessed),
        settings=asdict(subject.setting)
        | {
            "erasures": {name: entries[name]["digest"] for name in subject.status.in_force},
            "mode": subject.status.mode,
        }
        | {"chance": f"{attack.chance}: {attack.label(guess)}"}
        | attack.told,
        trains=probe.trains,
        examples=tuple(
            Example(label, seeds[i], seen[i], *_saved(folder, probe.name, seeds[i], pictures[i], before[i]))
            for i in sorted(range(len(seeds)), key=lambda i: (True, None, False).index(seen[i]))[:EXAMPLES]
        ),
    )


class Plan(NamedTuple):
    """How many ways of each side are tried, on how many seeds each, and on how many the strongest are measured."""

    aimed: int
    aimed_seeds: int
    unaimed: int
    unaimed_seeds: int
    seeds: int


def _plan(pictures: int, aimed: int, unaimed: int, first: int = 0) -> Plan | None:
    """A quarter of the pictures for choosing on each side, what is left for measuring; None where they are too few."""

    quarter = (pictures - first) // 4  # what is drawn first is not chosen by

    def side(ways: int) -> tuple[int, int]:
        kept = min(ways, quarter) if ways > 1 else 1
        return kept, quarter // max(1, kept) if ways > 1 else 0

    (a, sa), (u, su) = side(aimed), side(unaimed)
    seeds = (pictures - a * sa - u * su - first * max(sa, su)) // (3 + first)
    return Plan(a, sa, u, su, seeds) if pictures >= FEWEST and seeds > 0 else None


def _strongest(tried: Iterable[tuple[Any, tuple[Seen, ...]]]) -> Any:
    """The way that was seen most often; of several the first."""
    return max(tried, key=lambda pair: sum(v is True for v in pair[1]))[0]


def _judged(
    subject: Subject, attack: Attack, pairs: Sequence[tuple[Any, int]], found: Found
) -> tuple[list[Image.Image], list[Seen]]:
    pictures, seen, size = [], [], subject.setting.batch
    for part in (pairs[i : i + size] for i in range(0, len(pairs), size)):
        drawn = attack.draw([way for way, _ in part], [seed for _, seed in part])
        answers = list(found(drawn))
        if len(answers) != len(drawn):
            raise EraseError(
                f"the judge was shown {len(drawn)} pictures and gave {len(answers)} answers: one for each"
            )
        pictures += drawn
        seen += [None if answer is None else bool(answer) for answer in answers]
    return pictures, seen


def _saved(
    folder: str | Path | None, name: str, seed: int, picture: Image.Image, unedited: Image.Image
) -> tuple[str | None, str | None]:
    """File names of a pair of pictures, which appear whole or not at all."""
    if folder is None:
        return None, None
    Path(folder).mkdir(parents=True, exist_ok=True)
    names = (f"{name}-{seed}.png", f"{name}-{seed}-unedited.png")
    for file, image in zip(names, (picture, unedited), strict=True):
        part = Path(folder) / f"{file}.{os.getpid()}.part"
        image.save(part, format="PNG")
        os.replace(part, Path(folder) / file)
    return names
