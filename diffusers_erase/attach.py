"""Erasures in force on a pipeline: the registry, the hook, fused weights, and the way back. Only this file changes a pipeline.

The default form is a top-level forward pre-hook on every component that reads text. It maps the embeddings, so nothing that
is done to the model inside (LoRA, IP-Adapter, fused projections, quantisation, compilation) can switch it off. Fused form
writes plain weights and keeps the original bits; it restores from what was kept, never by subtraction.

State lives on the modules, not on the pipeline: pipelines that share a UNet share its erasures, and mapping happens once.
Every change is computed whole before anything is touched.
"""

import functools
import hashlib
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import edits
from .adapter import ErasureAdapter, compose
from .edits import Edit, Gate
from .errors import EraseError, MismatchError
from .sites import (
    ATTRIBUTE,
    TEXT,
    check_fusable,
    family_of,
    feeds_controlnet,
    fused_pairs,
    reads_images,
    sites,
    text_readers,
    unwrapped,
    widths,
    with_text,
)
from .solve import edited_weight
from .text import Encoder

EFFECT_TOLERANCE = 0.15
"""How far the effect measured at load may lie from the one recorded when the concept was erased."""

ROW_SIZES = (8, 32, 128, 512)
"""Maps are padded to these numbers of rows, so that changing a set rarely changes a shape."""


class EmbeddingMap:
    """e ↦ e + φ(e Aᵀ) D in float32, cast back once. φ is the identity, or each row's gate. Pure: no counters, no memo.

    Beyond half the width in rows the product AᵀD is one dense matrix, unless a gate needs the detectors apart.
    """

    def __init__(self, edit: Edit):
        moving = edit.moving
        A, D = edit.detectors()[moving], edit.offsets.double()[moving]
        gates = [label.gate for label in edit.labels if label.targets is not None]
        self.gates: Tensor | None = None
        if any(gates):
            # A row without a gate has a threshold so low that its sigmoid is 1 in float32.
            self.gates = _padded(torch.tensor([gate or Gate(-100.0, 1.0) for gate in gates])).float()
            self.gates[len(gates) :, 1] = 1.0
        dense = self.gates is None and len(A) > edit.width // 2
        self.left = (A.mT @ D if dense else _padded(A).mT).float().contiguous()
        self.right = None if dense else _padded(D).float()

    def __call__(self, states: Tensor) -> Tensor:
        """Mapped states, same shape and dtype as `states [..., d]`."""
        e = states.float()
        x = e @ self.left.to(e.device)
        if self.gates is not None:
            threshold, width = self.gates.to(e.device).unbind(-1)
            x = x * torch.sigmoid((x.abs() - threshold) / width)
        moved = x if self.right is None else x @ self.right.to(e.device)
        return (e + moved).to(states.dtype)


@dataclass(frozen=True)
class Entry:
    """One loaded adapter."""

    adapter: ErasureAdapter
    strength: float = 1.0
    active: bool = True
    verified: bool = True
    """False where it was loaded with `strict=False` and its checks did not pass or did not run."""


class Rules(NamedTuple):
    """What loading was allowed to do (see `compose`); changing what is active later is held to the same."""

    chains: str = "error"
    residual_max: float | None = 0.2

    def loosened(self, other: "Rules") -> "Rules":
        """Whatever one of the two allows."""
        limits = [rules.residual_max for rules in (self, other) if rules.residual_max is not None]
        follow = "follow" in (self.chains, other.chains)
        return Rules("follow" if follow else "error", max(limits) if len(limits) == 2 else None)


@dataclass(eq=False)
class Registry:
    """What is loaded on a set of modules and in which form. One registry is shared by all text readers of a pipeline."""

    entries: dict[str, Entry] = field(default_factory=dict)
    enabled: bool = True
    fused: bool = False
    rules: Rules = Rules()
    edits: dict[str, Edit] = field(default_factory=dict)
    """What acts now, by space of text states; empty where nothing does."""
    maps: dict[str, EmbeddingMap] = field(default_factory=dict)
    """Its map form, empty while fused."""
    modules: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet)
    """Every module it is attached to, through whichever pipeline: all of them follow each change."""
    names: set[str] = field(default_factory=set)
    """As what they are attached. Plain strings, which a compiled hook may read."""

    @property
    def in_force(self) -> tuple[str, ...]:
        """Names of the adapters that act now."""
        return tuple(n for n, e in self.entries.items() if e.active and e.strength > 0) if self.enabled else ()

    def __getstate__(self) -> dict[str, Any]:
        """A copy acts the same but is attached to nothing yet: its own attachments join it (see `Attachment`)."""
        return {**vars(self), "entries": dict(self.entries), "modules": None, "names": set()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, modules=weakref.WeakSet())


@dataclass
class Kept:
    """The original bits of a fused weight, and the digest of what was written instead."""

    base: Tensor
    written: str


class Attachment:
    """The pre-hook on one module. An object rather than a closure, so that a deep copy of the module carries its own."""

    def __init__(self, registry: Registry, module: nn.Module, name: str):
        self.module = module
        self.name = name
        self.spaces = family_of(module).spaces
        self.kept: dict[nn.Linear, Kept] = {}
        self.handle = module.register_forward_pre_hook(self, with_kwargs=True)
        self.join(registry)

    def join(self, registry: Registry) -> None:
        """Follow `registry` from now on."""
        self.registry = registry
        registry.modules.add(self.module)
        registry.names.add(self.name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.join(self.registry)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        registry = self.registry
        if not registry.edits:
            return None
        if feeds_controlnet(kwargs) and not any(name.startswith("controlnet") for name in registry.names):
            raise EraseError(
                "a ControlNet feeds this UNet and reads the prompt without the erasure: call enable_erasure on the pipeline "
                "that has the ControlNet, so that it is attached there too"
            )
        return with_text(self.spaces, args, kwargs, registry.maps) if registry.maps else None


class SaveGuard:
    """Stands in for a module's `save_pretrained` while an unfused erasure is in force: the files would hold the un-erased model."""

    def __init__(self, attachment: Attachment, module: Any):
        self.attachment = attachment
        self.module = module
        functools.update_wrapper(self, type(module).save_pretrained)  # a pipeline asks which arguments it takes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.attachment.registry.maps:
            raise EraseError(
                "save_pretrained would write the model without its erasure: call fuse_erasure() first to save an erased model, "
                "save_erasure(folder) to save the adapter, or unload_erasure() to save the plain model"
            )
        return type(self.module).save_pretrained(self.module, *args, **kwargs)


@dataclass(frozen=True)
class ErasureStatus:
    """What was requested of a pipeline, and what is in force."""

    requested: dict[str, dict[str, Any]]
    """By adapter name: concepts, digest, origin (a repository with its commit), strength, active, verified."""
    in_force: tuple[str, ...]
    mode: str
    """`map`, `fused`, or `none` where nothing is in force."""
    components: tuple[str, ...]
    """The components of this pipeline that carry the erasure."""
    residuals: dict[str, float]
    """Of each concept in force, the share that is left in this set."""
    overruled: tuple[str, ...]
    """Names that one adapter preserves and another erases: they are erased."""
    notes: tuple[str, ...]
    """What a text-side erasure cannot see here, and what was waived."""

    def __str__(self) -> str:
        if not self.requested:
            return "no erasures loaded"
        lines = [
            f"erasures in force ({self.mode}) on {', '.join(self.components)}: {', '.join(self.in_force) or 'none'}"
        ]
        for name, entry in self.requested.items():
            left = ", ".join(
                f"{c} (left {self.residuals[c]:.3f})" if c in self.residuals else c for c in entry["concepts"]
            )
            state = "in force" if name in self.in_force else "off"
            origin = f" from {entry['origin']}" if entry["origin"] else ""
            lines.append(f"  {name}: {left}; strength {entry['strength']:g}; {state}; {entry['digest'][:12]}{origin}")
        lines += [f"  preserved by one, erased by another (erased): {name}" for name in self.overruled]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def load_erasure(
    pipe: Any,
    source: Any,
    adapter_name: str | Sequence[str] | None = None,
    *,
    strength: float = 1.0,
    mode: str = "auto",
    strict: bool = True,
    chains: str = "error",
    residual_max: float | None = 0.2,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> None:
    """Attach erasures to `pipe`; everything that is checked is checked before anything changes.

    Args:
        source: a folder, a file, a repository on the Hub (`"user/repo"`, `"user/repo@revision"`), an `ErasureAdapter`, or a list
            of them.
        adapter_name: name, or one for each source; by default made from the concepts.
        strength: 1 is the adapter's own residual r; w gives the residual 1 − w(1 − r).
        mode: `"map"`, `"fused"`, or `"auto"` (fused if the pipe's erasures are fused already, else map).
        strict: False loads an adapter whose text encoder or effect does not match; the status says so for as long as it is there.
        chains, residual_max: see `compose`.
        revision, token, subfolder, cache_dir, local_files_only: for every source, see `ErasureAdapter.from_pretrained`.

    Raises:
        EraseError: and nothing is attached.

    Example:
        >>> load_erasure(pipe, "erase-van-gogh")
        >>> image = pipe("a painting by Van Gogh").images[0]
    """
    if chains not in ("error", "follow"):
        raise EraseError(f"chains is 'error' or 'follow': got {chains!r}")
    if mode not in ("auto", "map", "fused"):
        raise EraseError(f"mode is 'auto', 'map' or 'fused': got {mode!r}; for a stock LoRA use adapter.to_lora(pipe)")
    _check_strengths([strength])
    readers = text_readers(pipe)
    registry = _registry(readers) or Registry()
    sources = list(source) if isinstance(source, (list, tuple)) else [source]
    where = {"revision": revision, "token": token, "subfolder": subfolder, "cache_dir": cache_dir}
    where["local_files_only"] = local_files_only
    adapters = [s if isinstance(s, ErasureAdapter) else ErasureAdapter.from_pretrained(s, **where) for s in sources]
    if not adapters:
        raise EraseError(
            "no erasure given: expected a folder, a file, a repository, an ErasureAdapter, or a list of them"
        )
    if factors := [a for a in adapters if a.kind == "factors"]:
        raise EraseError(
            f"the erasure of {', '.join(factors[0].concepts)} is factors, which this version does not attach yet: use its LoRA twin"
        )
    names = _names(adapters, adapter_name, registry.entries)
    for adapter in adapters:
        _check_width(adapter, readers)
    entries = {n: Entry(a, strength, True, _verify(pipe, a, strict)) for n, a in zip(names, adapters, strict=True)}
    fused = registry.fused if mode == "auto" else mode == "fused"
    rules = registry.rules.loosened(Rules(chains, residual_max))
    _check_set(registry.entries | entries, rules)
    _commit(readers, registry, registry.entries | entries, registry.enabled, fused)
    registry.rules = rules


def unload_erasure(pipe: Any) -> None:
    """Detach every erasure: weights, hooks and outputs are bit for bit what they were. Does nothing where there is none."""
    readers = text_readers(pipe)
    if registry := _registry(readers):
        _commit(readers, registry, {}, True, False)


def delete_erasures(pipe: Any, adapter_names: str | Iterable[str]) -> None:
    """Detach some erasures; the others are solved again without their rows."""
    readers, registry = _loaded(pipe)
    gone = _known(registry, adapter_names)
    left = {name: entry for name, entry in registry.entries.items() if name not in gone}
    _commit(readers, registry, left, registry.enabled or not left, registry.fused and bool(left))


def set_erasures(
    pipe: Any, adapter_names: str | Iterable[str], strengths: float | Sequence[float] | None = None
) -> None:
    """Make exactly these erasures active, each with its strength (None: as it was loaded)."""
    readers, registry = _loaded(pipe)
    names = _known(registry, adapter_names)
    given = [strengths] * len(names) if strengths is None or isinstance(strengths, (int, float)) else list(strengths)
    if len(given) != len(names):
        raise EraseError(f"{len(names)} erasures but {len(given)} strengths: give one strength, or one for each name")
    _check_strengths([s for s in given if s is not None])
    chosen = {n: registry.entries[n].strength if s is None else float(s) for n, s in zip(names, given, strict=True)}
    entries = {
        name: replace(entry, active=name in chosen, strength=chosen.get(name, entry.strength))
        for name, entry in registry.entries.items()
    }
    _check_set(entries, registry.rules)
    _commit(readers, registry, entries, registry.enabled, registry.fused)


def enable_erasure(pipe: Any) -> None:
    """Put the active erasures in force again, on every component of this pipeline that reads text."""
    readers, registry = _loaded(pipe)
    _commit(readers, registry, registry.entries, True, registry.fused)


def disable_erasure(pipe: Any) -> AbstractContextManager[None]:
    """Put all erasures out of force. Used as a context manager, what was in force is again at its end.

    Example:
        >>> with disable_erasure(pipe):
        ...     before = pipe("a painting by Van Gogh").images[0]
    """
    readers, registry = _loaded(pipe)
    was = registry.enabled
    _commit(readers, registry, registry.entries, False, registry.fused)
    return _Restored(pipe, was)


def fuse_erasure(pipe: Any) -> None:
    """Write the erasures in force into the weights; later changes of the set are written as well, each from the original bits."""
    readers, registry = _loaded(pipe)
    _commit(readers, registry, registry.entries, registry.enabled, True)


def unfuse_erasure(pipe: Any) -> None:
    """Give back the original bits of every weight; the erasures stay in force as a map."""
    readers, registry = _loaded(pipe)
    _commit(readers, registry, registry.entries, registry.enabled, False)


def get_active_erasures(pipe: Any) -> list[str]:
    """Names of the erasures in force."""
    registry = _registry(text_readers(pipe))
    return list(registry.in_force) if registry else []


def edits_in_force(pipe: Any) -> dict[str, Edit]:
    """The rows that act now, all adapters composed, by space of text states; empty where none do."""
    registry = _registry(text_readers(pipe))
    return dict(registry.edits) if registry else {}


def get_list_erasures(pipe: Any) -> dict[str, list[str]]:
    """Names of the loaded erasures, by component."""
    found = {name: _attachment(reader) for name, reader in text_readers(pipe).items()}
    return {name: list(a.registry.entries) for name, a in found.items() if a and a.registry.entries}


def save_erasure(pipe: Any, directory: str | Path, adapter_name: str | None = None) -> Path:
    """Save a loaded erasure, or without a name the composition of all that are in force, at the strength they were made with."""
    _, registry = _loaded(pipe)
    names = registry.in_force if adapter_name is None else _known(registry, adapter_name)
    if not names:
        raise EraseError("no erasure is in force: name the one to save, or enable_erasure() first")
    adapters = (registry.entries[n].adapter for n in names)
    return compose(*adapters, chains=registry.rules.chains, residual_max=None).save_pretrained(directory)


def erasure_status(pipe: Any) -> ErasureStatus:
    """What was requested of `pipe` and what is in force, without changing anything."""
    readers = text_readers(pipe)
    registry = _registry(readers) or Registry()
    active = [edit for n in registry.in_force for edit in registry.entries[n].adapter.edits.values()]
    attached = tuple(n for n, r in readers.items() if _attachment(r) is not None)
    return ErasureStatus(
        requested={
            name: {
                "concepts": entry.adapter.concepts,
                "digest": entry.adapter.digest,
                "origin": str(entry.adapter.origin or ""),
                "strength": entry.strength,
                "active": entry.active,
                "verified": entry.verified,
            }
            for name, entry in registry.entries.items()
        },
        in_force=registry.in_force,
        mode="none" if not registry.edits else "fused" if registry.fused else "map",
        components=attached,
        residuals=_residuals(registry.edits),
        overruled=edits.overruled(active),
        notes=tuple(_notes(readers, registry, set(readers) - set(attached))) if registry.entries else (),
    )


class _Restored:
    """Puts erasures back in force at the end of a `with`; outside of one it does nothing."""

    def __init__(self, pipe: Any, enabled: bool):
        self.pipe, self.enabled = pipe, enabled

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        if self.enabled and get_list_erasures(self.pipe):
            enable_erasure(self.pipe)


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
        shares.append(float((mapping(e) - e) @ D / (D @ D)))
    return sum(shares) / len(shares)


def _commit(
    readers: dict[str, nn.Module],
    registry: Registry,
    entries: dict[str, Entry],
    enabled: bool,
    fused: bool,
) -> None:
    """Make this the state of all readers. Computes and checks first; from the first write on nothing can fail."""
    acting = _edits(entries, enabled)
    maps = {} if fused else {space: EmbeddingMap(edit) for space, edit in acting.items()}
    modules = {unwrapped(reader): name for name, reader in readers.items()}
    modules |= {m: _attachment(m).name for m in registry.modules if m not in modules}  # type: ignore[union-attr]
    plans = {m: _weight_plan(m, _attachment(m), acting if fused else {}) for m in modules}
    for module, plan in plans.items():
        attachment = _attachment(module) or _attach(registry, module, modules[module])
        attachment.join(registry)
        attachment.kept = _write(plan, keep=fused and bool(acting))
    registry.entries, registry.enabled, registry.fused = dict(entries), enabled, fused
    registry.edits, registry.maps, registry.names = acting, maps, set(modules.values())
    if not entries:
        for module in modules:
            _detach(module)


def _edits(entries: dict[str, Entry], enabled: bool) -> dict[str, Edit]:
    """The composed edits of the active entries, by space; empty where nothing acts."""
    acting = [e for e in entries.values() if e.active and e.strength > 0] if enabled else []
    soft = [{s: edit.softened(e.strength) for s, edit in e.adapter.edits.items()} for e in acting]
    return edits.compose_spaces(soft, chains="follow", residual_max=None)


def _residuals(acting: Mapping[str, Edit]) -> dict[str, float]:
    """Of each concept the share that is left, of several spaces the largest."""
    found: dict[str, float] = {}
    for edit in acting.values():
        found |= {concept: max(left, found.get(concept, 0.0)) for concept, left in edit.residuals().items()}
    return found


def _check_set(entries: dict[str, Entry], rules: Rules) -> None:
    """Raise unless the active entries go together, whether or not erasures are enabled now.

    Only loading and activating can bring in a chain, crowd a set, or join two encoders, so only they ask.
    """
    if acting := [e.adapter for e in entries.values() if e.active and e.strength > 0]:
        compose(*acting, chains=rules.chains, residual_max=rules.residual_max)


def _weight_plan(
    module: nn.Module, attachment: Attachment | None, acting: Mapping[str, Edit]
) -> dict[nn.Linear, tuple[Tensor, Tensor]]:
    """(original, new) bits of every weight to write; without edits it restores. Empty where no weight is or becomes fused."""
    kept = attachment.kept if attachment else {}
    if not acting and not kept:
        return {}
    was = attachment.registry.edits if attachment else {}
    spaces = dict.fromkeys(kept, TEXT)  # a copy that the host no longer reads is not a site now
    spaces |= {linear: space for space in {**was, **acting} for linear in sites(module, space).values()}
    base = {linear: _original(linear.weight, record, was.get(spaces[linear])) for linear, record in kept.items()}
    check_fusable(module, acting)
    for pair, key, value in fused_pairs(module):
        if pair not in base and key in base:  # the host copied our fused weights: the copy's original is theirs
            base[pair] = torch.cat([base[key], base[value]])
    base |= {
        linear: linear.weight.detach().clone()
        for linear, space in spaces.items()
        if space in acting and linear not in base
    }
    return {linear: (bits, _edited(bits, acting.get(spaces[linear]))) for linear, bits in base.items()}


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
    if _fingerprint(weight) == record.written:
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


@torch.no_grad()
def _write(plan: dict[nn.Linear, tuple[Tensor, Tensor]], keep: bool) -> dict[nn.Linear, Kept]:
    for linear, (_, new) in plan.items():
        linear.weight.copy_(new)
    return {linear: Kept(base, _fingerprint(new)) for linear, (base, new) in plan.items()} if keep else {}


def _fingerprint(weight: Tensor) -> str:
    bits = weight.detach().cpu().contiguous().view(torch.uint8)
    return hashlib.sha256(bits.numpy().tobytes()).hexdigest()


def _attachment(reader: nn.Module) -> Attachment | None:
    return unwrapped(reader).__dict__.get(ATTRIBUTE)


def _attach(registry: Registry, module: nn.Module, name: str) -> Attachment:
    attachment = Attachment(registry, module, name)
    module.__dict__[ATTRIBUTE] = attachment
    module.__dict__["save_pretrained"] = SaveGuard(attachment, module)
    return attachment


def _detach(module: nn.Module) -> None:
    attachment = module.__dict__.pop(ATTRIBUTE)
    attachment.handle.remove()
    attachment.registry.modules.discard(module)
    module.__dict__.pop("save_pretrained")


def _registry(readers: dict[str, nn.Module]) -> Registry | None:
    """The registry that these modules share, found on any of them."""
    found = [a.registry for a in map(_attachment, readers.values()) if a is not None]
    if any(registry is not found[0] and registry.entries for registry in found):
        raise EraseError(
            f"the components of this pipeline ({', '.join(readers)}) carry erasures that were loaded on different pipelines: "
            f"unload_erasure on those pipelines first, then load here"
        )
    return found[0] if found else None


def _loaded(pipe: Any) -> tuple[dict[str, nn.Module], Registry]:
    readers = text_readers(pipe)
    registry = _registry(readers)
    if registry is None:
        raise EraseError("no erasures are loaded on this pipeline: load_erasure first")
    return readers, registry


def _known(registry: Registry, names: str | Iterable[str]) -> tuple[str, ...]:
    wanted = (names,) if isinstance(names, str) else tuple(names)
    if missing := [n for n in wanted if n not in registry.entries]:
        raise EraseError(
            f"no erasure named {missing[0]!r} is loaded: expected one of {', '.join(registry.entries) or 'none'}"
        )
    return wanted


def _check_strengths(strengths: Iterable[float]) -> None:
    for s in strengths:
        if not 0 <= s <= 1:
            raise EraseError(
                f"a strength lies between 0 and 1: got {s}; to erase more, erase again with a smaller residual"
            )


def _names(adapters: list[ErasureAdapter], given: str | Sequence[str] | None, taken: dict[str, Entry]) -> list[str]:
    names = [given] if isinstance(given, str) else list(given or [])
    if given is None:
        for adapter in adapters:
            stem = re.sub(r"[^a-z0-9]+", "-", "-".join(adapter.concepts).lower()).strip("-") or "erasure"
            free = (f"{stem}{n}" for n in ["", *(f"-{i}" for i in range(2, 10_000))])
            names.append(next(n for n in free if n not in taken and n not in names))
    if len(names) != len(adapters) or len(set(names)) != len(names):
        raise EraseError(f"{len(adapters)} erasures need as many different names: got {names}")
    for name in names:
        if name in taken:
            raise EraseError(
                f"an erasure named {name!r} is loaded already: choose another adapter_name, or delete_erasures({name!r})"
            )
    return names


def _check_width(adapter: ErasureAdapter, readers: dict[str, nn.Module]) -> None:
    made = {space: edit.width for space, edit in adapter.edits.items()}
    for name, reader in readers.items():
        if wrong := [space for space, width in made.items() if widths(reader).get(space) != width]:
            raise MismatchError(
                f"the adapter edits {wrong[0]} states of width {made[wrong[0]]}, {name} reads width {widths(reader).get(wrong[0])}: it was "
                f"made for another base model; erase the concept again on this one (an SDXL refiner needs its own adapter)"
            )


def _verify(pipe: Any, adapter: ErasureAdapter, strict: bool) -> bool:
    """Whether the pipe's encoder is the adapter's and every concept's name still lands on its target; raises if `strict`."""
    try:
        encoder = Encoder(pipe)
        adapter.encoder.check(encoder.fingerprint())
        for recipe in adapter.recipes:
            if recipe.effect is None:
                continue
            found = effect(encoder, adapter.edits, recipe.concept)
            if abs(found - recipe.effect) > EFFECT_TOLERANCE:
                raise MismatchError(
                    f"under this adapter {recipe.concept!r} goes {found:.2f} of the way to its target here, {recipe.effect:.2f} where it "
                    f"was made: the text side of this pipeline differs; erase the concept again on it"
                )
    except EraseError:
        if strict:
            raise
        return False
    return True


def _notes(readers: dict[str, nn.Module], registry: Registry, bare: set[str]) -> Iterable[str]:
    denoiser = next(iter(readers.values()))
    for name, entry in registry.entries.items():
        if not entry.verified:
            yield f"{name} was loaded with strict=False and does not match this pipeline's text encoder"
        if registry.fused and any(label.gate for label in entry.adapter.edit.labels):
            yield f"{name} has a gate, which exists only as a map: its fused form is the linear part"
        bare_spaces = (
            family_of(denoiser).spaces.keys() - entry.adapter.edits.keys() if entry.adapter.kind == "rows" else ()
        )
        for space in bare_spaces:
            yield f"{name} does not act on {space} states, which this model reads too: its concepts come through by them"
    if bare:
        yield f"not attached to {', '.join(sorted(bare))}: call enable_erasure() on this pipeline"
    if (family := family_of(denoiser)).experimental:
        yield f"{family.name} is experimental: given embeddings are mapped where they enter, nothing was measured on pictures"
    if reads_images(denoiser):
        yield "an IP-Adapter is loaded: a concept in an image prompt is not seen by a text-side erasure"


def _padded(rows: Tensor) -> Tensor:
    """`rows` with zero rows added up to the next of a few sizes; a zero row acts on nothing."""
    size = next((s for s in ROW_SIZES if s >= len(rows)), len(rows))
    return torch.cat([rows, rows.new_zeros(size - len(rows), rows.shape[1])])
