"""From judged pairs of pictures to numbers: what is left of a concept, what was kept of everything else, what was not tested.

A `Report` holds one or several trials, each an erasure on its own against the same unedited model. As data it is described by
data/report.schema.json.
"""

import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from ..version import __version__
from . import metrics
from .judges import Verdict
from .metrics import Comparison, Estimate, Share
from .suites import ASPECTS, EFFICACY, GENERALITY, PARTS, SHOWS, STYLE, UNRELATED, Part, Suite

FORMAT = 1

DRAWS = 500
"""Resamples of the bootstrap over labels, for each dimension."""

MISSING = "not drawn or not judged"
"""The reason of a verdict that stands for a picture which no shard has done."""

ALWAYS_UNTESTED = (
    "attacks that train: textual inversion, fine-tuning, UnlearnDiffAtk",
    "image prompts (IP-Adapter), ControlNets, LoRAs beside it",
    "prompts in other languages",
    "other models, schedulers, sizes, steps and guidance",
)

LOOKED_FOR = (GENERALITY, "sensitivity/visual", "sensitivity/subset-superset", "sensitivity/pair")
"""Parts that an erasure of an object should have; where one is empty, the report says so."""


class Dimension(NamedTuple):
    """One line of the result: of its pictures that were right before, the share that still are."""

    part: Part
    share: Estimate

    @property
    def title(self) -> str:
        """In words; `across/…` parts tell the other aspect."""
        title = PARTS[self.part.name]
        return title.replace("other aspect", {SHOWS: "objects", STYLE: "styles"}[self.part.aspect])

    @property
    def verdict(self) -> str:
        """In a word: left shares up to 10 % are "gone", kept shares from 95 % on "kept"."""
        if not self.share.n:
            return "not known" if self.share.coverage < 1 else "not seen before"
        steps = GONE if self.part.gone else KEPT
        return next(word for least, word in steps if self.share.value >= least)


GONE = ((0.9, "still there"), (0.5, "mostly left"), (0.1000001, "mostly gone"), (0.0, "gone"))
KEPT = ((0.95, "kept"), (0.8, "mostly kept"), (0.5, "hurt"), (0.0, "lost"))


class Pair(NamedTuple):
    """A prompt before and after, as one aspect's judge saw it; True: as expected, None: the judge could not tell."""

    index: int
    part: Part
    before: bool | None
    after: bool | None

    @property
    def outcome(self) -> str:
        """ "bad" a failure of the erasure, "good" as it should be, "unknown", or "void": wrong before already."""
        if self.before is False:
            return "void"
        if self.before is None or self.after is None:
            return "unknown"
        return "bad" if self.after == self.part.gone else "good"


OUTCOMES = ("bad", "unknown", "good", "void")
"""The worst first."""


@dataclass(frozen=True, eq=False)
class Trial:
    """One erasure: its pictures before and after, what the judges saw in them, and what probes brought back."""

    name: str
    concepts: tuple[str, ...]
    adapter: Mapping[str, Any] | None
    """What the adapter says of itself; None for the control, where nothing is erased."""
    suite: Suite
    """The part of the suite that was drawn for these concepts."""
    pictures: tuple[tuple[Path, Path], ...]
    """(before, after) of every prompt."""
    before: Mapping[str, Sequence[Verdict]]
    """Aspect -> a verdict for every prompt; only aspects that have a judge."""
    after: Mapping[str, Sequence[Verdict]]
    measures: Mapping[str, Estimate] = field(default_factory=dict)
    probes: Sequence[Mapping[str, Any]] = ()
    """`ProbeResult.to_json()` of each."""

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """The parts that were judged."""
        return tuple(part for part in self.suite.parts(self.concepts) if part.aspect in self.before)

    @cached_property
    def shares(self) -> dict[tuple[str, str], Share]:
        """(part, aspect) -> partial sums: of its pictures that were right before, those that still are."""
        return {(part.name, part.aspect): _counted(self.pairs(part)) for part in self.parts}

    @cached_property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Every part's share, its interval by bootstrap over the labels (pictures of one object stand and fall together)."""
        return tuple(Dimension(part, self._share(part)) for part in self.parts)

    @cached_property
    def scores(self) -> dict[str, Estimate]:
        """The papers' scores, from accuracies that do not look at the pictures before (see docs/bench.md)."""
        aspect = next((part.aspect for part in self.parts if part.name == EFFICACY), None)
        if aspect is None:
            return {}
        own, other = self._accuracy(aspect, EFFICACY), self._accuracy(aspect, GENERALITY)
        near, far = self._accuracy(aspect, "sensitivity"), self._accuracy(aspect, UNRELATED)
        across = self._accuracy(next(a for a in ASPECTS if a != aspect), "across")
        found = {**metrics.ua_ira_cra(own, near + far, across)}
        found["H_o"] = metrics.h_o(own.estimate(), (near + far).estimate())
        if other.n:
            found["H"] = metrics.h_general(own.estimate(), (near + far).estimate(), other.estimate())
        if near.n:
            found["ERB"] = metrics.erb(own.estimate(), near.estimate())
        return {name: estimate for name, estimate in found.items() if estimate.n}

    @cached_property
    def labels(self) -> dict[tuple[str, str], Share]:
        """(aspect, label) -> what is left or kept of it, over all its pictures: a row of the neighbour matrix."""
        found: dict[tuple[str, str], list[Pair]] = {}
        for part in self.parts:
            for pair in self.pairs(part):
                found.setdefault((part.aspect, getattr(self.suite.prompts[pair.index], part.aspect)), []).append(pair)
        return {key: _counted(pairs) for key, pairs in found.items()}

    def relation(self, aspect: str, label: str) -> str:
        """What `label` is to the erased concepts: "erased", a relation, or "" for unrelated."""
        if label in self.concepts:
            return "erased"
        related = {other: r for c in reversed(self.concepts) for other, r in self.suite.related(c).items()}
        return related.get(label, "")

    def pairs(self, part: Part) -> list[Pair]:
        """The pairs of a part, in the suite's order."""
        before, after = self.before[part.aspect], self.after[part.aspect]
        return [
            Pair(i, part, self._right(part.aspect, i, before[i]), self._right(part.aspect, i, after[i]))
            for i in part.indices
        ]

    def _right(self, aspect: str, index: int, verdict: Verdict) -> bool | None:
        accepted = self.suite.accepts(getattr(self.suite.prompts[index], aspect))
        return None if verdict.label is None else verdict.label in accepted

    def _share(self, part: Part) -> Estimate:
        by_label: dict[str, list[Pair]] = {}
        for pair in self.pairs(part):
            by_label.setdefault(getattr(self.suite.prompts[pair.index], part.aspect), []).append(pair)
        sums = {label: (_counted(pairs),) for label, pairs in by_label.items()}
        return metrics.clustered(sums, Share.estimate, draws=DRAWS)

    def _accuracy(self, aspect: str, name: str) -> Share:
        """Share of the pictures of all parts whose name begins with `name` that are right after the erasure."""
        parts = [part for part in self.parts if part.aspect == aspect and part.name.startswith(name)]
        return Share.of(pair.after for part in parts for pair in self.pairs(part))


def _counted(pairs: Sequence[Pair]) -> Share:
    """`metrics.kept` of pairs that know whether they were right."""
    seen = {True: "right", False: "wrong", None: None}
    return metrics.kept(
        ["right"] * len(pairs), [seen[pair.before] for pair in pairs], [seen[pair.after] for pair in pairs]
    )


@dataclass(frozen=True, eq=False)
class Report:
    """Trials on one model with one suite, and everything that is needed to read or repeat them."""

    trials: tuple[Trial, ...]
    suite: Suite
    """The whole suite."""
    judges: Mapping[str, Mapping[str, Any]]
    """Aspect -> what its judge says of itself, with its digest."""
    model: Mapping[str, Any]
    """Name and digest of the unedited pipeline."""
    command: str
    """How to run it again."""
    seconds: float = 0.0
    """How long this run took; what was cached took none."""
    measures: Sequence[Mapping[str, Any]] = ()
    """What each measure says of itself, with its digest."""
    untried: tuple[str, ...] = ()
    """Names of the probes that were not run."""
    made: Mapping[str, str] = field(default_factory=dict)
    """Versions of what drew and judged, and the date."""

    @cached_property
    def comparisons(self) -> dict[tuple[str, str, str], Comparison]:
        """(first, second, part) -> paired test of two trials that erase the same concepts, on the pictures right before."""
        found = {}
        for a, b in combinations([t for t in self.trials if t.adapter is not None], 2):
            if set(a.concepts) == set(b.concepts):
                for part in a.parts:
                    before = [pair.before for pair in a.pairs(part)]
                    first, second = (
                        [pair.after for pair, was in zip(t.pairs(part), before, strict=True) if was] for t in (a, b)
                    )
                    if first:
                        found[a.name, b.name, f"{part.name} ({part.aspect})"] = metrics.mcnemar(first, second)
        return found

    @property
    def untested(self) -> tuple[str, ...]:
        """What this report says nothing about."""
        return tuple(dict.fromkeys([*self._untested(), *ALWAYS_UNTESTED]))

    def _untested(self) -> Iterator[str]:
        for trial in self.trials:
            names = {part.name for part in trial.parts}
            if SHOWS in self.judges and not set(trial.concepts) & set(trial.suite.labels(STYLE)):
                for name in LOOKED_FOR:
                    if name not in names:
                        yield f"{PARTS[name]}: the suite has none for {', '.join(trial.concepts)}"
        seen = [verdict for trial in self.trials for verdicts in trial.after.values() for verdict in verdicts]
        if missing := sum(verdict.reason == MISSING for verdict in seen):
            yield f"{missing} of {len(seen)} answers of judges, since not all shards were done: they count neither way"
        if unknown := sum(verdict.label is None for verdict in seen) - missing:
            yield f"{unknown} pictures that a judge could not tell: they count neither way"
        if not self.measures:
            yield "looks and meaning beyond labels: no CLIP score, LPIPS or FID was taken"
        for aspect in ASPECTS:
            if aspect not in self.judges and self.suite.labels(aspect):
                yield f"labels of {aspect!r}: no judge was given for them"
        if self.untried:
            yield f"attacks without training: {', '.join(self.untried)}"

    def to_json(self) -> dict[str, Any]:
        """Everything but the pictures' bytes, as data/report.schema.json describes it."""
        suite = self.suite
        return {
            "format": FORMAT,
            "made": dict(self.made),
            "command": self.command,
            "seconds": round(self.seconds, 1),
            "model": dict(self.model),
            "suite": {
                "name": suite.name, "version": suite.version, "digest": suite.digest, "source": suite.source,
                "licence": suite.licence, "settings": asdict(suite.settings),
            },
            "judges": {aspect: dict(told) for aspect, told in self.judges.items()},
            "measures": [dict(told) for told in self.measures],
            "trials": [_trial_json(trial) for trial in self.trials],
            "comparisons": [
                {"first": a, "second": b, "part": part, "p": c.p, "test": c.test, "difference": c.difference.to_json()}
                for (a, b, part), c in self.comparisons.items()
            ],
            "not_tested": list(self.untested),
        }  # fmt: skip

    def to_markdown(self) -> str:
        """The result in a form that fits a model card."""
        rows = [row for trial in self.trials for row in _markdown_rows(trial)]
        given = {k: v for k, v in asdict(self.suite.settings).items() if v is not None}
        settings = ", ".join(f"{k} {v}" for k, v in given.items())
        judges = "; ".join(f"{told['name']} (`{told['digest'][:12]}`)" for told in self.judges.values())
        return MARKDOWN.format(
            suite=self.suite.name, version=self.suite.version, digest=self.suite.digest[:12], model=self.model["name"],
            model_digest=self.model["digest"][:12], settings=settings, judges=judges, date=self.made.get("date", ""),
            rows="\n".join(rows), untested="\n".join(f"- {line}" for line in self.untested), command=self.command,
        )  # fmt: skip


MARKDOWN = """## Evaluation

Suite `{suite}` {version} (`{digest}`) on {model} (`{model_digest}`): {settings}. Judges: {judges}. {date}.

Pairs of one prompt and one seed; of the pictures that the unedited model got right, the share that still shows what it should.
For the concept itself that is what is *left* (lower is better), for everything else what is *kept*. Intervals are 95 %.

| erasure | pictures of | left or kept | share | interval | n | coverage |
|---|---|---|---|---|---|---|
{rows}

Not tested:

{untested}

```bash
{command}
```
"""


def _markdown_rows(trial: Trial) -> list[str]:
    rows = [
        f"| {trial.name} | {d.title} | {'left' if d.part.gone else 'kept'} | {percent(d.share.value)} "
        f"| {percent(d.share.low)} – {percent(d.share.high)} | {d.share.n} | {percent(d.share.coverage)} |"
        for d in trial.dimensions
    ]
    for probe in trial.probes:
        value, low, high = (
            percent(math.nan if (v := probe["came_back"][k]) is None else v) for k in ("value", "low", "high")
        )
        told = probe["came_back"]
        rows.append(
            f"| {trial.name} | probe {probe['name']} | came back | {value} | {low} – {high} | {told['n']} | {percent(told['coverage'])} |"
        )
    return rows


def percent(value: float) -> str:
    """A share in per cent; no decimals, except next to 0 and 100 where they tell something."""
    if math.isnan(value):
        return "–"
    return f"{value:.1%}" if 0 < value < 0.01 or 0.99 < value < 1 else f"{value:.0%}"


def _trial_json(trial: Trial) -> dict[str, Any]:
    return {
        "name": trial.name,
        "concepts": list(trial.concepts),
        "adapter": None if trial.adapter is None else dict(trial.adapter),
        "dimensions": [
            {"part": d.part.name, "aspect": d.part.aspect, "title": d.title, "should_be": "gone" if d.part.gone else "kept",
             "verdict": d.verdict, "share": d.share.to_json()}
            for d in trial.dimensions
        ],
        "scores": {name: estimate.to_json() for name, estimate in trial.scores.items()},
        "measures": {name: estimate.to_json() for name, estimate in trial.measures.items()},
        "labels": [
            {"aspect": aspect, "label": label, "relation": trial.relation(aspect, label), "share": share.estimate().to_json()}
            for (aspect, label), share in trial.labels.items()
        ],
        "probes": [dict(result) for result in trial.probes],
        "pictures": [_picture_json(trial, i) for i in range(len(trial.suite.prompts))],
    }  # fmt: skip


def _picture_json(trial: Trial, index: int) -> dict[str, Any]:
    prompt = trial.suite.prompts[index]
    told = {k: v for k, v in asdict(prompt).items() if v not in ("", "always")}
    for when, path, seen in zip(("before", "after"), trial.pictures[index], (trial.before, trial.after), strict=True):
        told[when] = {"file": path.name} | {
            aspect: _verdict_json(verdicts[index]) for aspect, verdicts in seen.items()
        }
    return told


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    told: dict[str, Any] = {
        "label": verdict.label,
        "score": None if math.isnan(verdict.score) else round(verdict.score, 4),
    }
    return told | ({"reason": verdict.reason} if verdict.reason else {})


def made_now() -> dict[str, str]:
    """Date and versions."""
    from importlib.metadata import version

    packages = ("torch", "diffusers", "transformers")
    return {"date": datetime.date.today().isoformat(), "diffusers-erase": __version__} | {
        p: version(p) for p in packages
    }
