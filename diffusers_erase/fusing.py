"""The weight forms of an edit: what to write into plain linear layers and how to give them back, and the LoRA of a set.

Computes only; attach.py writes. Weights are restored from the bits that were kept, never by subtraction, which would not
give them back.
"""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .adapter import lora_pair
from .edits import Edit
from .errors import EraseError
from .factors import Factors, Pair
from .sites import Layer, check_fusable, fused_pairs, layer, matrix, sites
from .solve import edited_weight


class Kept(NamedTuple):
    """The original bits of a fused weight, and the digest of what was written instead."""

    base: Tensor
    written: str
    space: str | None
    """What its layer reads; None for one that reads no text states, or is changed by factors alone."""


class Change(NamedTuple):
    """Original and new bits of one weight."""

    base: Tensor
    new: Tensor
    space: str | None


def plan(
    module: nn.Module,
    kept: Mapping[Layer, Kept],
    was: Mapping[str, Edit],
    acting: Mapping[str, Edit],
    was_added: Factors | None = None,
    added: Factors | None = None,
) -> dict[Layer, Change]:
    """What to write so that `acting` is fused into `module`; empty where no weight is or becomes fused.

    Rows and factors together: W(I + DᵀA) + B A, the original weight edited by the rows, plus the factors.

    Args:
        kept: the weights that are fused now.
        was: the edits, by space, that were written into them.
        acting: the edits to write; none restores.
        was_added, added: the factors that were written, and those to write.

    Raises:
        EraseError: a weight cannot hold the edit, or cannot be given back.
    """
    if not acting and added is None and not kept:
        return {}
    before, after = ({layer(module, p): f.pairs[p] for p in f.paths} if f else {} for f in (was_added, added))
    check_fusable(module, acting, {path for f in (was_added, added) if f for path in f.paths})
    spaces: dict[Layer, str | None] = dict.fromkeys(after)
    spaces |= {
        linear: record.space for linear, record in kept.items()
    }  # a copy that the host no longer reads is not a site now
    spaces |= {linear: space for space in {**was, **acting} for linear in sites(module, space).values()}
    base = {
        linear: _original(linear.weight, record, _of(was, spaces[linear]), before.get(linear))
        for linear, record in kept.items()
    }
    for pair, key, value in fused_pairs(module):
        if (
            pair not in base and key in base and pair in spaces
        ):  # the host copied our fused weights: the copy's original is theirs
            base[pair] = torch.cat([base[key], base[value]])
    for linear, space in spaces.items():
        if (space in acting or linear in after) and linear not in base:
            base[linear] = linear.weight.detach().clone()
    return {
        linear: Change(bits, _edited(bits, _of(acting, spaces[linear]), after.get(linear)), spaces[linear])
        for linear, bits in base.items()
    }


def lora(module: nn.Module, changes: Mapping[Layer, Change], acting: Mapping[str, Edit]) -> dict[str, Tensor]:
    """The LoRA of `acting` for the original weights of `module`, under diffusers' names without a prefix.

    Args:
        changes: what will have been written by the time it is loaded (see `plan`).
    """
    rank = max(int(edit.moving.sum()) for edit in acting.values())
    state = {}
    for space, edit in acting.items():
        for path, linear in sites(module, space).items():
            weight = changes[linear].base if linear in changes else linear.weight
            down, up = lora_pair(weight, edit, rank)
            state |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
    return state


def fingerprint(weight: Tensor) -> str:
    """sha256 of a weight's bits."""
    bits = weight.detach().cpu().contiguous().view(torch.uint8)
    return hashlib.sha256(bits.numpy().tobytes()).hexdigest()


def _original(weight: Tensor, record: Kept, edit: Edit | None, pair: Pair | None) -> Tensor:
    """The original bits of a fused `weight`, in the dtype that it has now.

    Raises:
        EraseError: it no longer holds what was written: neither that in another dtype, nor that with a LoRA merged and subtracted again.
    """
    base = record.base.to(weight.dtype)
    if weight.is_meta:
        raise EraseError(
            "a fused weight is offloaded to the meta device, where it cannot be given back: remove the offloading hooks first"
        )
    if fingerprint(weight) == record.written:
        return base
    if weight.shape == base.shape:
        now, written = weight.detach().cpu(), _edited(record.base, edit, pair).cpu()
        if torch.equal(now.float(), written.to(now.dtype).float()):
            return base
        rounding = 4 * torch.finfo(now.dtype).eps * written.abs().max()
        if record.base.dtype == now.dtype and bool(((now.double() - written.double()).abs() <= rounding).all()):
            return base
    raise EraseError(
        "a fused weight was changed since fuse_erasure (by fuse_lora, or by hand), so its original bits cannot be given "
        "back: undo that change first (unfuse_lora), or reload the model"
    )


def _of(edits: Mapping[str, Edit], space: str | None) -> Edit | None:
    return None if space is None else edits.get(space)


def _edited(bits: Tensor, edit: Edit | None, pair: Pair | None) -> Tensor:
    """The weight `bits` with its columns for text states edited (those are the first ones, and mostly all), plus a pair's change."""
    if edit is None and pair is None:
        return bits
    W = matrix(bits).double().clone()
    if edit is not None:
        moving, d = edit.moving, edit.width
        A, D = edit.detectors()[moving].to(bits.device), edit.offsets.double()[moving].to(bits.device)
        W[:, :d] = edited_weight(W[:, :d], D, A)
    if pair is not None:
        W += pair.change.to(bits.device)
    new = W.to(bits.dtype).view_as(bits)
    if not bool(new.isfinite().all()):
        raise EraseError(
            f"the edited weights overflow {bits.dtype}: keep the erasure as a map, or fuse in a wider dtype"
        )
    return new
