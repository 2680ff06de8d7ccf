"""The map form of an edit: e ↦ e + φ(e Aᵀ) D on text states, one set for a whole batch or one for each of its rows.

Pure arithmetic: it knows no pipeline and changes nothing.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .edits import Edit, Gate
from .text import Encoder

ROW_SIZES = (8, 32, 128, 512)
"""Maps are padded to these numbers of rows, so that changing a set rarely changes a shape."""

OPEN = Gate(-100.0, 1.0)
"""The gate of a row that has none: a threshold so low that its sigmoid is 1 in float32."""


class EmbeddingMap:
    """e ↦ e + φ(e Aᵀ) D in float32, cast back once. φ is the identity, or each row's gate. Pure: no counters, no memo.

    Several sets lie side by side, each solved for itself; `share` says which of them acts on which row of the batch.
    A single set of more than half the width in rows is one dense matrix AᵀD, unless a gate needs the detectors apart.

    Args:
        sets: the edit of each set, None for the empty one.
        width: d, where no set says it.
    """

    def __init__(self, *sets: Edit | None, width: int = 0):
        width = next((edit.width for edit in sets if edit is not None), width)
        solved = [_factors(edit, width) for edit in sets]
        A, D = (torch.cat(parts) for parts in zip(*((A, D) for A, D, _ in solved), strict=True))
        gates = [gate for _, _, each in solved for gate in each]
        size = next((s for s in ROW_SIZES if s >= len(A)), len(A))
        tensors: dict[str, Tensor] = {}
        if len(sets) == 1 and not any(gates) and size > width // 2:
            tensors["left"] = A.mT @ D
        else:
            tensors |= {"left": _padded(A, size).mT, "right": _padded(D, size)}
        if any(gates):
            tensors["gates"] = _padded(torch.tensor([gate or OPEN for gate in gates]), size, fill=1.0)
        if len(sets) > 1:
            owner = torch.cat([torch.full((len(A),), i) for i, (A, _, _) in enumerate(solved)])
            tensors["members"] = _padded(torch.nn.functional.one_hot(owner, len(sets)), size).mT
        cpu = torch.device("cpu")
        self.tensors = {cpu: {name: t.to(cpu, torch.float32).contiguous() for name, t in tensors.items()}}

    def place(self, device: torch.device) -> dict[str, Tensor]:
        """This map's tensors on `device`; copied there once."""
        if device not in self.tensors:
            moved = {name: t.to(device) for name, t in self.tensors[torch.device("cpu")].items()}
            if torch.compiler.is_compiling():
                return moved  # what a graph computes may not outlive its run
            self.tensors[device] = moved
        return self.tensors[device]

    def __call__(self, states: Tensor, share: Tensor | None = None) -> Tensor:
        """Mapped states, same shape and dtype as `states` `[n, ..., d]`.

        Args:
            share: `[n, sets]`, 1 where a set acts on a row of the batch, else 0; None where the only set acts on all.
        """
        on = self.place(states.device)
        e = states.float()
        x = e @ on["left"]
        if "gates" in on:
            threshold, width = on["gates"].unbind(-1)
            x = x * torch.sigmoid((x.abs() - threshold) / width)
        if share is not None:
            share = share @ on["members"] if "members" in on else share
            x = x * share.view(len(share), *[1] * (x.ndim - 2), share.shape[-1])
        moved = x @ on["right"] if "right" in on else x
        return (e + moved).to(states.dtype)


def effect(encoder: Encoder, edits: Mapping[str, Edit], concept: str) -> float:
    """Share of the way to its target that the bare name of `concept` goes under its own rows alone, averaged over token
    roles; of several spaces the smallest share."""
    return min(_effect(encoder, edit.only(concept), concept) for edit in edits.values())


def _effect(encoder: Encoder, edit: Edit, concept: str) -> float:
    mapping = EmbeddingMap(edit)
    rows = [i for i, label in enumerate(edit.labels) if label.name == concept]
    states = encoder.rows(concept, tuple(edit.labels[i].role for i in rows), ("{}",))
    shares = []
    for i in rows:
        e, D = states[edit.labels[i].role].float(), edit.offsets[i].float()
        shares.append(float((mapping(e[None])[0] - e) @ D / (D @ D)))
    return sum(shares) / len(shares)


def _factors(edit: Edit | None, width: int) -> tuple[Tensor, Tensor, list[Gate | None]]:
    """(A `[k, d]`, D `[k, d]`, gates) of the moving rows; none for the empty set."""
    if edit is None:
        empty = torch.zeros(0, width, dtype=torch.float64)
        return empty, empty, []
    moving = edit.moving
    gates = [label.gate for label in edit.labels if label.targets is not None]
    return edit.detectors()[moving], edit.offsets.double()[moving], gates


def _padded(rows: Tensor, size: int, fill: float = 0.0) -> Tensor:
    """`rows` with constant rows added up to `size`; a zero row of a map acts on nothing."""
    return torch.cat([rows, rows.new_full((size - len(rows), rows.shape[1]), fill)])
