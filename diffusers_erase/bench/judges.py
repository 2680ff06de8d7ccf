"""Who says what a picture shows. A judge owns its preprocessing, weights and threshold, and is recorded with its digest.

A judge that fails on a picture (an exception, NaN, too few answers, a label that it does not have, a score below its
threshold) answers "unknown" for that picture, with the reason; never "nothing there". Unknown answers lower the coverage.

    judge = judges.emoji_objects()
    judge(pictures)[0].label                    # "cat", or None: unknown
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from .. import hub, world
from ..errors import EraseError

Picture = Image.Image
Ranking = Sequence[tuple[str, float]]
"""Labels with their scores, the likeliest first."""

RANKS = 5
"""Labels that a verdict keeps of a ranking: ESR-k and PSR-k ask for up to five."""


@dataclass(frozen=True)
class Verdict:
    """A judge's answer for one picture."""

    label: str | None
    """What the picture shows, in the judge's words; None is unknown."""
    score: float = math.nan
    """How sure the judge is, 0 to 1: of the label or, where it was below the threshold, of its best guess. NaN: no answer."""
    top: tuple[str, ...] = ()
    """Labels, the likeliest first."""
    reason: str = ""
    """Why the answer is unknown."""


class Judge(Protocol):
    """Whatever gives every picture one verdict. Objects and styles are two judges. `verdicts` asks one, whatever happens."""

    @property
    def name(self) -> str: ...
    @property
    def labels(self) -> tuple[str, ...] | None:
        """All that it can answer; None if that is not known beforehand."""
        ...

    @property
    def digest(self) -> str:
        """sha256 of all that decides its answers."""
        ...

    def __call__(self, images: list[Picture]) -> list[Verdict]: ...
    def to_json(self) -> dict[str, Any]: ...


def verdicts(judge: Callable[[list[Picture]], list[Verdict]], images: Sequence[Picture]) -> list[Verdict]:
    """One verdict for every picture. Where the judge fails on several, each is shown to it alone; what still fails is unknown.

    Example:
        >>> [v.label for v in verdicts(emoji_objects(), [cat, not_a_picture])]
        ['cat', None]
    """
    images = list(images)
    try:
        answers = list(judge(images))
        if len(answers) != len(images) or not all(isinstance(a, Verdict) for a in answers):
            raise EraseError(f"{len(answers)} answers for {len(images)} pictures, or other things than verdicts")
    except Exception as error:  # a broken judge must never look like a clean picture, nor end a run of hours
        if len(images) > 1:
            return [verdict for image in images for verdict in verdicts(judge, [image])]
        return [Verdict(None, reason=f"{type(error).__name__}: {error}") for _ in images]
    return answers


def sees(judge: Judge, label: str) -> Callable[[list[Picture]], list[bool | None]]:
    """Of each picture, whether `judge` sees `label` in it; None where it cannot tell.

    Raises:
        EraseError: the judge has no such label, so it could never say yes.
    """
    if judge.labels is not None and label not in judge.labels:
        raise EraseError(f"judge {judge.name!r} cannot see {label!r}: it has {', '.join(judge.labels[:8])}, ...")

    def found(images: list[Picture]) -> list[bool | None]:
        return [None if v.label is None else v.label == label for v in verdicts(judge, images)]

    return found


@dataclass(frozen=True, eq=False)
class RankingJudge:
    """A judge made of a function that ranks labels for a batch of pictures; it may fail on some.

    Every judge of this file is one.
    """

    name: str
    labels: tuple[str, ...] | None
    rank: Callable[[list[Picture]], Sequence[Ranking]]
    settings: Mapping[str, Any]
    """What decides its answers, as JSON: weights digest, preprocessing, label mapping."""
    threshold: float = 0.0
    """A best score below this is unknown."""
    batch: int = 32

    def __post_init__(self):
        if not 0 <= self.threshold <= 1:
            raise EraseError(f"a judge's threshold is a score from 0 to 1: got {self.threshold}")
        if self.batch < 1:
            raise EraseError(f"a judge looks at batches of at least one picture: got {self.batch}")

    def __call__(self, images: list[Picture]) -> list[Verdict]:
        parts = [images[i : i + self.batch] for i in range(0, len(images), self.batch)]
        return [verdict for part in parts for verdict in verdicts(self._answer, part)]

    def to_json(self) -> dict[str, Any]:
        """Name, labels, threshold and settings: what the report says of it."""
        labels = None if self.labels is None else list(self.labels)
        return {"name": self.name, "labels": labels, "threshold": self.threshold, **self.settings}

    @property
    def digest(self) -> str:
        """sha256 of `to_json()`. The batch size is not part of it."""
        return hub.digest(self.to_json())

    def _answer(self, images: list[Picture]) -> list[Verdict]:
        return [self._verdict(ranking) for ranking in self.rank(images)]

    def _verdict(self, ranking: Ranking) -> Verdict:
        if not ranking or not all(math.isfinite(score) for _, score in ranking):
            return Verdict(None, reason="no finite score")
        (label, score), top = ranking[0], tuple(label for label, _ in ranking[:RANKS])
        if self.labels is not None and not set(top) <= set(self.labels):
            return Verdict(None, score, reason=f"{label!r} is none of its labels")
        if score < self.threshold:
            return Verdict(None, score, top, f"{label!r} with {score:.2f} is below the threshold {self.threshold:g}")
        return Verdict(label, score, top)


def emoji_objects(*, threshold: float = 0.0, batch: int = 256) -> RankingJudge:
    """emoji-sd's judge of objects: its 64 names and "other". Reads 64 x 64 pictures and fails on all others."""
    return _emoji("objects", (*world.OBJECTS, "other"), threshold, batch)


def emoji_styles(*, threshold: float = 0.0, batch: int = 256) -> RankingJudge:
    """emoji-sd's judge of styles. Reads 64 x 64 pictures and fails on all others."""
    return _emoji("styles", world.STYLES, threshold, batch)


def _emoji(what: str, labels: tuple[str, ...], threshold: float, batch: int) -> RankingJudge:
    judge = world.judge()
    column, network = (0, judge.object_net) if what == "objects" else (1, judge.style_net)

    def rank(images: list[Picture]) -> list[Ranking]:
        return ranked(judge.probabilities(images)[column], labels)

    settings = {"weights": weights_digest(network), "preprocessing": "64 x 64 RGB, [0, 1]"}
    return RankingJudge(f"emoji-sd {what}", labels, rank, settings, threshold, batch)


def ranked(scores: Tensor, labels: Sequence[str]) -> list[Ranking]:
    """The best labels of each row of `scores` `[n, labels]`, in float. A row with NaN stays unranked."""
    values, order = scores.double().topk(min(RANKS, len(labels)), dim=1)
    rankings = [
        [(str(labels[i]), float(v)) for i, v in zip(best, row, strict=True)]
        for best, row in zip(order.tolist(), values.tolist(), strict=True)
    ]
    return [() if bad else ranking for bad, ranking in zip(scores.isnan().any(dim=1), rankings, strict=True)]


def by_function(
    function: Callable[[list[Picture]], Sequence[Any]],
    *,
    name: str,
    version: str,
    labels: Sequence[str] | None = None,
    threshold: float = 0.0,
    batch: int = 32,
) -> RankingJudge:
    """A judge of your own: `function` gets pictures and returns, for each, a label, a (label, score), or None for unknown.

    Args:
        version: recorded; change it whenever the function would answer otherwise.

    Example:
        >>> dark = by_function(lambda images: ["dark" if mean(i) < 50 else "light" for i in images], name="light", version="1")
    """

    def rank(images: list[Picture]) -> list[Ranking]:
        return [_own(answer) for answer in function(images)]

    settings = {"function": f"{function.__module__}.{getattr(function, '__qualname__', '')}", "version": version}
    return RankingJudge(name, None if labels is None else tuple(labels), rank, settings, threshold, batch)


def _own(answer: Any) -> Ranking:
    """A user's answer as a ranking; anything that is no answer fails."""
    if answer is None:
        return []
    label, score = (answer, 1.0) if isinstance(answer, str) else answer
    if not isinstance(label, str):
        raise EraseError(f"expected a label, a (label, score) or None for each picture: got {answer!r}")
    return [(label, float(score))]


def weights_digest(module: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of all weights: the same for the same weights in any file format."""
    digest = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        weight = weight.detach().cpu().contiguous()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
