"""The map form of an edit: e ↦ e + φ(e Aᵀ) D on text states, one set for a whole batch or one for each of its rows.

Pure arithmetic: it knows no pipeline and changes nothing.
"""

from collections.abc import Mapping, Sequence

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
        tensors = _dense(*sets) or _side_by_side(sets, width)
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


def effects(encoder: Encoder, asked: Sequence[tuple[Mapping[str, Edit], str]]) -> list[float]:
    """Of each (edits by space, concept): share of the way to its target that the bare name of the concept goes under its own
    rows alone, averaged over token roles; of several spaces the smallest share. All names are encoded in shared batches."""
    alone = [(name, [edit.only(name) for edit in edits.values()]) for edits, name in asked]
    named = [(name, edit, tuple(row.role for row in _own(edit, name).labels)) for name, some in alone for edit in some]
    states: dict[tuple[str, tuple[str, ...]], Tensor] = {}
    for roles in dict.fromkeys(roles for _, _, roles in named):
        names = list(dict.fromkeys(name for name, _, own in named if own == roles))
        rows = encoder.table(names, roles, ("{}",), brief=True)
        states |= dict(zip(((name, roles) for name in names), rows, strict=True))
    shares = iter(_share(edit, _own(edit, name).offsets, states[name, roles]) for name, edit, roles in named)
    return [min(next(shares) for _ in some) for _, some in alone]


def effect(encoder: Encoder, edits: Mapping[str, Edit], concept: str) -> float:
    """`effects` of one concept."""
    return effects(encoder, [(edits, concept)])[0]


def _own(edit: Edit, concept: str) -> Edit:
    """Rows whose key is the concept's own name, not a coreference."""
    return edit.take(i for i, label in enumerate(edit.labels) if label.name == concept)


def _share(edit: Edit, offsets: Tensor, states: Tensor) -> float:
    """Mean over rows of ⟨moved, d⟩ / ‖d‖² for `states` and their offsets `[roles, d]`."""
    e, D = states.float(), offsets.float()
    return float((((EmbeddingMap(edit)(e) - e) * D).sum(-1) / (D * D).sum(-1)).mean())


def _dense(*sets: Edit | None) -> dict[str, Tensor]:
    """The one matrix of a single set of many rows; empty where it would cost more, or a gate needs the detectors apart."""
    edit = sets[0] if len(sets) == 1 else None
    if edit is None or any(_gates(edit)) or _size(int(edit.moving.sum())) <= edit.width // 2:
        return {}
    return {"left": edit.matrix}


def _side_by_side(sets: Sequence[Edit | None], width: int) -> dict[str, Tensor]:
    """Aᵀ and D of all sets, each solved for itself, with their gates and which set a row belongs to."""
    none = torch.zeros(0, width, dtype=torch.float64)
    A = [none if edit is None else edit.detectors()[edit.moving] for edit in sets]
    D = [none if edit is None else edit.offsets.double()[edit.moving] for edit in sets]
    gates = [gate for edit in sets if edit is not None for gate in _gates(edit)]
    size = _size(sum(map(len, A)))
    tensors = {"left": _padded(torch.cat(A), size).mT, "right": _padded(torch.cat(D), size)}
    if any(gates):
        tensors["gates"] = _padded(torch.tensor([gate or OPEN for gate in gates]), size, fill=1.0)
    if len(sets) > 1:
        owner = torch.cat([torch.full((len(rows),), i) for i, rows in enumerate(A)])
        tensors["members"] = _padded(torch.nn.functional.one_hot(owner, len(sets)), size).mT
    return tensors


def _gates(edit: Edit) -> list[Gate | None]:
    return [label.gate for label in edit.labels if label.targets is not None]


def _size(rows: int) -> int:
    return next((size for size in ROW_SIZES if size >= rows), rows)


def _padded(rows: Tensor, size: int, fill: float = 0.0) -> Tensor:
    """`rows` with constant rows added up to `size`; a zero row of a map acts on nothing."""
    return torch.cat([rows, rows.new_full((size - len(rows), rows.shape[1]), fill)])
