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
from .sites import TEXT, check_fusable, fused_pairs, sites
from .solve import edited_weight


class Kept(NamedTuple):
    """The original bits of a fused weight, and the digest of what was written instead."""

    base: Tensor
    written: str


class Change(NamedTuple):
    """Original and new bits of one weight."""

    base: Tensor
    new: Tensor


def plan(
    module: nn.Module, kept: Mapping[nn.Linear, Kept], was: Mapping[str, Edit], acting: Mapping[str, Edit]
) -> dict[nn.Linear, Change]:
    """What to write so that `acting` is fused into `module`; empty where no weight is or becomes fused.

    Args:
        kept: the weights that are fused now.
        was: the edits, by space, that were written into them.
        acting: the edits to write; none restores.

    Raises:
        EraseError: a weight cannot hold the edit, or cannot be given back.
    """
    if not acting and not kept:
        return {}
    spaces = dict.fromkeys(kept, TEXT)  # a copy that the host no longer reads is not a site now
    spaces |= {linear: space for space in {**was, **acting} for linear in sites(module, space).values()}
    base = {linear: _original(linear.weight, record, was.get(spaces[linear])) for linear, record in kept.items()}
    check_fusable(module, acting)
    for pair, key, value in fused_pairs(module):
        if pair not in base and key in base:  # the host copied our fused weights: the copy's original is theirs
            base[pair] = torch.cat([base[key], base[value]])
    for linear, space in spaces.items():
        if space in acting and linear not in base:
            base[linear] = linear.weight.detach().clone()
    return {linear: Change(bits, _edited(bits, acting.get(spaces[linear]))) for linear, bits in base.items()}


def lora(module: nn.Module, changes: Mapping[nn.Linear, Change], acting: Mapping[str, Edit]) -> dict[str, Tensor]:
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


def _original(weight: Tensor, record: Kept, edit: Edit | None) -> Tensor:
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
        now, written = weight.detach().cpu(), _edited(record.base, edit).cpu()
        if torch.equal(now.float(), written.to(now.dtype).float()):
            return base
        rounding = 4 * torch.finfo(now.dtype).eps * written.abs().max()
        if record.base.dtype == now.dtype and bool(((now.double() - written.double()).abs() <= rounding).all()):
            return base
    raise EraseError(
        "a fused weight was changed since fuse_erasure (by fuse_lora, or by hand), so its original bits cannot be given "
        "back: undo that change first (unfuse_lora), or reload the model"
    )


def _edited(bits: Tensor, edit: Edit | None) -> Tensor:
    """The weight `bits` with its columns for text states edited; those are the first ones, and mostly all."""
    if edit is None:
        return bits
    moving, d = edit.moving, edit.width
    A, D = edit.detectors()[moving].to(bits.device), edit.offsets.double()[moving].to(bits.device)
    new = bits.clone()
    new[:, :d] = edited_weight(bits[:, :d], D, A).to(bits.dtype)
    if not bool(new.isfinite().all()):
        raise EraseError(
            f"the edited weights overflow {bits.dtype}: keep the erasure as a map, or fuse in a wider dtype"
        )
    return new
