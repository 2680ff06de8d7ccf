"""What labels do not tell: how far pictures moved, how well they still fit their text, how far the empty prompt is from where it was."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter import ErasureAdapter
from ..mapping import EmbeddingMap
from ..text import Encoder
from . import distances, images
from .measures import Measure
from .metrics import Estimate, Mean, Score
from .suites import Suite

CHUNK = 64
"""Pictures that are in memory at a time."""


@dataclass(frozen=True)
class Looks:
    """The measures of an evaluation; None leaves one out."""

    text: Measure | None = None
    """Of a picture and a text: a CLIP score."""
    pair: Measure | None = None
    """Of two pictures: a perceptual distance such as LPIPS."""
    features: Measure | None = None
    """Rows of a network, for FID and KID to the unedited model."""

    def to_json(self) -> list[dict[str, Any]]:
        """What each measure says of itself, with its digest."""
        return [{"digest": m.digest, **m.to_json()} for m in (self.text, self.pair, self.features) if m is not None]

    def measured(
        self, suite: Suite, concepts: Sequence[str], before: Sequence[Path], after: Sequence[Path]
    ) -> dict[str, Estimate]:
        """Every measure on the pictures of `suite`, drawn before and after an erasure of `concepts`.

        "All others" are the prompts that neither show nor are drawn in what is erased.
        """
        prompts = suite.prompts
        own = [i for i, p in enumerate(prompts) if p.shows in concepts or p.style in concepts]
        others = sorted(set(range(len(prompts))) - set(own))
        found: dict[str, Estimate] = {}
        if self.pair is not None:
            for whose, indices in (("its own pictures", own), ("all others", others)):
                gaps = _rows(self.pair, indices, after, lambda part: [images.read([before[i] for i in part])])
                found[f"{self.pair.name}, {whose}"] = Mean.of(gaps.tolist()).estimate()
        if self.features is not None and len(others) > 1:
            x, y = (_rows(self.features, others, files, lambda part: []) for files in (before, after))
            labels = [prompts[i].shows or prompts[i].text for i in others]
            if len(others) > 2 * x.shape[1]:  # else its covariance is singular, or nearly: the number would tell of n
                found[f"FID to the unedited model, all others ({self.features.name})"] = distances.fid(x, y, labels)
            found[f"KID to the unedited model, all others ({self.features.name})"] = distances.kid(x, y, labels)
        if self.text is not None:
            clean = [i for i in own if prompts[i].clean]
            for when, files in (("before", before), ("after", after)):
                scores = _rows(self.text, clean, files, lambda part: [[prompts[i].clean for i in part]])
                found[f"in-prompt {self.text.name}, {when}"] = Mean.of(scores.tolist()).estimate()
            x, y = (
                _rows(self.text, others, f, lambda part: [[prompts[i].text for i in part]]) for f in (before, after)
            )
            found[f"{self.text.name}, all others, after minus before"] = Mean.of((y - x).tolist()).estimate()
        return {name: estimate for name, estimate in found.items() if estimate.n}


def _rows(
    measure: Measure, indices: Sequence[int], files: Sequence[Path], beside: Callable[[Sequence[int]], list[Any]]
) -> Tensor:
    """The measure of the pictures at `indices`, a chunk at a time."""
    parts = [indices[i : i + CHUNK] for i in range(0, len(indices), CHUNK)]
    rows = [measure(images.read([files[i] for i in part]), *beside(part)) for part in parts]
    return torch.cat(rows) if rows else torch.zeros(0)


def null_drift(pipe: Any, adapter: ErasureAdapter) -> Estimate:
    """How far the map moves the states of the empty prompt, as a share of their norm: ‖(T − I)e_∅‖ / ‖e_∅‖, exact."""
    states = Encoder(pipe).encode([""]).rows
    moved = distances.drift(states, EmbeddingMap(adapter.edit)(states))
    return Score(moved, moved, moved, 1)
