"""Factors as a value: a low-rank pair for each linear layer, for edits that are no single map of text states.

Trained erasers and filters that differ from layer to layer change every weight in its own way: W becomes W + B A. Such an
edit lives in the weights of one base model; it has a fused form and a LoRA form, and no form as a map.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import ConflictError, EraseError, MismatchError

BASE_TOLERANCE = 0.05
"""Relative error within which the layers of a model are those that factors were made for.

Measured on tiny UNets: fp16 2e-4, bf16 2e-3; another initialisation more than 1.
"""


class Pair(NamedTuple):
    """The change B A of one layer's weight `[out, in]`."""

    down: Tensor
    """A `[r, in]`."""
    up: Tensor
    """B `[out, r]`."""

    @property
    def change(self) -> Tensor:
        """B A `[out, in]` in float64."""
        return self.up.double() @ self.down.double()


@dataclass(frozen=True, eq=False)  # tensors have no useful ==; compare .digest
class Factors:
    """Low-rank changes of linear layers and 1×1 convolutions, by module path. Frozen, checked; its identity is `digest`.

    Example:
        >>> both = add(esd_nudity.factors, spm_snoopy.factors)  # inexact: see `add`
    """

    pairs: Mapping[str, Pair]
    """By path in the UNet, without `.weight`; float32."""
    base: tuple[float, ...]
    """`probe` of each layer that they were made for, in the order of the sorted paths."""

    def __post_init__(self):
        if not self.pairs or len(self.base) != len(self.pairs):
            raise EraseError(
                f"factors hold at least one layer and one probe for each: got {len(self.pairs)} layers and {len(self.base)} probes"
            )
        for path, (down, up) in self.pairs.items():
            if not path or not all(part.isidentifier() or part.isdigit() for part in path.split(".")):
                raise EraseError(f"factors name a layer by its module path, such as 'mid_block.x.to_k': got {path!r}")
            if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1] or down.shape[0] == 0:
                raise EraseError(
                    f"factors of {path} are A [r, in] and B [out, r]: got {tuple(down.shape)} and {tuple(up.shape)}"
                )
            if not (bool(down.isfinite().all()) and bool(up.isfinite().all())):
                raise EraseError(
                    f"factors hold finite numbers only: found NaN or infinity in {path}; import them again"
                )
        if not all(map(math.isfinite, self.base)):
            raise EraseError("the probes of factors are finite numbers: found NaN or infinity; import them again")

    @property
    def paths(self) -> tuple[str, ...]:
        """The layers, sorted."""
        return tuple(sorted(self.pairs))

    @property
    def size(self) -> int:
        """Bytes of all pairs."""
        return sum(tensor.nbytes for pair in self.pairs.values() for tensor in pair)

    @property
    def digest(self) -> str:
        """sha256 over paths, probes and the bytes of all terms in canonical order."""
        digest = hashlib.sha256(repr(self.base).encode())
        for path in self.paths:
            terms = _terms([self.pairs[path]])
            digest.update(f"{path} {tuple(terms.shape)} {terms.dtype}".encode() + terms.numpy().tobytes())
        return digest.hexdigest()

    def softened(self, strength: float) -> "Factors":
        """These factors with `strength` w of their effect: W + w B A."""
        return replace(self, pairs={path: Pair(down, up * strength) for path, (down, up) in self.pairs.items()})

    def check(self, weights: Mapping[str, Tensor], *, same: bool = True) -> None:
        """Raise unless `weights` (`[out, in]`, by path) are those that these factors were made for; of `same` False, have their shapes.

        Raises:
            MismatchError: a layer is missing, has another shape, or holds other weights.
        """
        for path, (down, up) in self.pairs.items():
            expected = (up.shape[0], down.shape[1])
            found = tuple(weights[path].shape) if path in weights else "no such layer"
            if found != expected:
                raise MismatchError(
                    f"the factors change {path} of shape {expected}, this model has {found}: they were made for another base model"
                )
        if not same:
            return
        found = tuple(probe(weights[path]) for path in self.paths)
        error = math.dist(found, self.base) / max(math.hypot(*self.base), 1e-12)
        if not error <= BASE_TOLERANCE:
            raise MismatchError(
                f"this model's weights are not those that the factors were made for (relative error {error:.2f}, allowed "
                f"{BASE_TOLERANCE}): use the same base model, or strict=False to try them on a relative of it"
            )


def add(*factors: Factors) -> Factors:
    """The sum of separately made changes: every rank-one term once, in canonical order.

    Commutative, associative and idempotent to the last bit, but *inexact* as a joint erasure: each was made as if the others
    were not there, and what they do to each other's concepts is not corrected. Rows are solved together instead.

    Raises:
        ConflictError: they were made for other weights of one layer.
    """
    if not factors:
        raise EraseError("adding factors needs at least one of them")
    base: dict[str, float] = {}
    for one in factors:
        for path, value in zip(one.paths, one.base, strict=True):
            known = base.setdefault(path, value)
            if abs(known - value) > BASE_TOLERANCE * max(abs(known), abs(value), _spread(one)):
                raise ConflictError(
                    f"factors for different base models cannot be added: they were made for other weights of {path}"
                )
            base[path] = min(known, value)  # two dtypes of one model give almost the same number
    pairs = {}
    for path in sorted(base):
        found = [one.pairs[path] for one in factors if path in one.pairs]
        shapes = {(pair.up.shape[0], pair.down.shape[1]) for pair in found}
        if len(shapes) > 1:
            raise ConflictError(
                f"factors for different base models cannot be added: {path} has shapes {sorted(shapes)}"
            )
        terms = _terms(found)
        out = found[0].up.shape[0]
        pairs[path] = Pair(terms[:, out:].contiguous(), terms[:, :out].mT.contiguous())
    return Factors(pairs, tuple(base[path] for path in sorted(base)))


def probe(weight: Tensor) -> float:
    """uᵀ W v with fixed waves u and v, four significant digits: one number that every entry of `weight` takes part in."""
    u, v = (torch.cos(torch.arange(1, n + 1, dtype=torch.float64) * math.sqrt(2)) for n in weight.shape)
    value = float(u @ weight.detach().cpu().double() @ v)
    return float(f"{value:.4g}")


def truncated(change: Tensor, *, rank: int | None, tolerance: float) -> tuple[Pair, float]:
    """The best pair of a given rank, or of the smallest rank within `tolerance`, and its relative error ‖Δ − B A‖_F / ‖Δ‖_F.

    Args:
        change: Δ `[out, in]`, not zero.
        rank: None to let `tolerance` decide.
    """
    U, S, Vh = torch.linalg.svd(change.double(), full_matrices=False)
    left = S.square().flip(0).cumsum(0).flip(0).sqrt() / S.norm()  # left[r]: error of rank r
    if rank is None:
        within = (left <= tolerance).nonzero()
        rank = max(1, int(within[0]) if len(within) else len(S))
    rank = min(rank, len(S))
    root = S[:rank].sqrt()
    error = float(left[rank]) if rank < len(S) else 0.0
    return Pair((root[:, None] * Vh[:rank]).float().contiguous(), (U[:, :rank] * root).float().contiguous()), error


def _terms(pairs: list[Pair]) -> Tensor:
    """Rank-one terms `[r, out + in]` of all pairs, each once, sorted: B's column beside A's row; zero terms are left out."""
    table = torch.cat([torch.cat([up.mT, down], dim=1) for down, up in pairs]).detach().cpu()
    terms = torch.unique(table, dim=0)
    out = pairs[0].up.shape[0]
    acting = (terms[:, :out] != 0).any(dim=1) & (terms[:, out:] != 0).any(dim=1)
    return (terms[acting] if bool(acting.any()) else terms[:1]).contiguous()


def _spread(factors: Factors) -> float:
    return math.hypot(*factors.base) / math.sqrt(len(factors.base))
