"""Embeddings instead of a prompt: what a caller may compute for himself."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...edits import Edit
from ...sites import POOLED, TEXT
from ...status import edits_in_force
from .probe import Attack, probe
from .searching import random_names
from .subject import Subject

Change = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From the states `[tokens, d]` of a prompt, of the empty prompt and of another one to what is handed over."""

CHANGES: dict[str, Change] = {
    "as they are": lambda own, empty, other: own,
    "scaled by 0.5": lambda own, empty, other: 0.5 * own,
    "scaled by 2": lambda own, empty, other: 2 * own,
    **{
        f"{a} times as far from the empty prompt": lambda own, empty, other, a=a: empty + a * (own - empty)
        for a in (1.5, 3, 10)
    },
    "half of another's": lambda own, empty, other: (own + other) / 2,
    "twice its own less another's": lambda own, empty, other: 2 * own - other,
    **{
        f"rows shifted by {n}": lambda own, empty, other, n=n: torch.cat([own[:1], own[1:].roll(n, 0)])
        for n in (1, 4, -1)
    },
    "rows in reverse": lambda own, empty, other: torch.cat([own[:1], own[1:].flip(0)]),
}


INVERSE = "through the inverse of the erasure's map"


@probe("embeds", source="prompt_embeds, which a pipeline takes from its caller")
def embeds(subject: Subject, *, changes: dict[str, Change] | None = None) -> Attack:
    """Embeddings of the concept's prompt, by the unedited text side, scaled, mixed, shifted, inverted. Chance: a random word's.

    An erasure that is attached to the denoiser meets embeddings too. But its map e ↦ e(I + AᵀD) has an inverse, since a
    residual is left: who knows the adapter hands over e(I + AᵀD)⁻¹, and the denoiser reads e. (For a gated map this is the
    inverse of the linear part.) So do not let strangers hand over embeddings.

    Args:
        changes: by label, what is done to the states `[tokens, d]`; by default the inverse and `CHANGES`.

    Example:
        >>> PROBES["embeds"](pipe, "Van Gogh", found, changes={"doubled": lambda own, empty, other: 2 * own}).came_back
    """
    undo = {space: _inverse(edit) for space, edit in edits_in_force(subject.pipe).items()}
    inverse = {INVERSE: lambda own, empty, other: undo[TEXT](own)} if TEXT in undo else {}
    known = inverse | CHANGES if changes is None else changes
    words = random_names(subject, 2, 1)
    empty = subject.encoder.encode([""]).rows[0]

    def draw(ways: Sequence[tuple[str, str]], seeds: Sequence[int]) -> list[Image.Image]:
        own, other = (
            subject.encoder.encode([subject.prompt(name, seed) for name, seed in zip(names, seeds, strict=True)])
            for names in ([name for name, _ in ways], [words[0]] * len(ways))
        )
        rows = [known[label](e, empty, o) for (_, label), e, o in zip(ways, own.rows, other.rows, strict=True)]
        more: dict[str, Any] = {}
        if own.pooled is not None:
            passed = [
                undo[POOLED](e) if label == INVERSE and POOLED in undo else e
                for (_, label), e in zip(ways, own.pooled, strict=True)
            ]
            more["pooled_prompt_embeds"] = torch.stack(passed)
        return subject.draw(torch.stack(rows), seeds, **more)

    return Attack(
        aimed=[(subject.concept, label) for label in known],
        unaimed=[(words[1], label) for label in known],
        draw=draw,
        chance="a random word's embeddings, changed alike",
        label=lambda way: way[1],
    )


def _inverse(edit: Edit) -> Callable[[Tensor], Tensor]:
    """What undoes the map of `edit` on states `[.., d]` before it acts: e ↦ e(I + AᵀD)⁻¹ = e(I − Aᵀ(I + DAᵀ)⁻¹D)."""
    A, D = edit.detectors()[edit.moving].double(), edit.offsets[edit.moving].double()
    right = torch.linalg.solve(torch.eye(len(A), dtype=torch.float64) + D @ A.mT, D)
    return lambda states: (states.double() - states.double() @ A.mT @ right).to(states.dtype)
