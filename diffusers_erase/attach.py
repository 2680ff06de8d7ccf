"""Attaching: what puts a set of erasures in force on a pipeline, and takes it off. Only this file changes a pipeline.

Three forms: the *map* on text states (the default), which nothing that is done to the model inside (LoRA, IP-Adapter, fused
projections, quantisation, compilation) can switch off; *fused*, plain weights whose original bits are kept; and *LoRA*, beside
the user's own. Every change is computed whole before anything is touched. The verbs that people call stand in verbs.py.
"""

import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import edits, fusing, loras
from .edits import Edit
from .errors import EraseError
from .factors import Factors, add
from .fusing import Change, Kept
from .hook import OPENED, Attachment, Entry, PerCall, Pools, Registry, Rules, check_text_side, check_twins, follows
from .mapping import EmbeddingMap
from .sites import ATTRIBUTE, Layer, text_readers, unwrapped
from .status import registry_of
from .text import TextSide


class SaveGuard:
    """Stands in for a module's `save_pretrained` while an unfused erasure is in force: the files would hold the un-erased model."""

    def __init__(self, attachment: Attachment, module: Any):
        self.attachment = attachment
        self.module = module
        functools.update_wrapper(self, type(module).save_pretrained)  # a pipeline asks which arguments it takes

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        registry = self.attachment.registry
        if registry.maps or (registry.edits and registry.mode == "lora"):
            raise EraseError(
                "save_pretrained would write the model without its erasure: call fuse_erasure() first to save an erased model, "
                "save_erasure(folder) to save the adapter, or unload_erasure() to save the plain model"
            )
        return type(self.module).save_pretrained(self.module, *args, **kwargs)


def commit(
    pipe: Any,
    registry: Registry,
    entries: dict[str, Entry],
    *,
    checked: bool = False,
    enabled: bool | None = None,
    mode: str | None = None,
    branch: str | None = None,
    rules: Rules | None = None,
    side: TextSide | None = None,
) -> None:
    """Make this the state of all readers of `pipe`, and of all modules that follow `registry`; None leaves a part as it is.

    Computes and checks first; from the first write on nothing can fail.

    Args:
        checked: whether the active entries must go together. Only loading and activating can bring in a chain, crowd a set, or
            join two encoders, so only they ask.
        side: the text side of `pipe`, where it was verified just now.
    """
    fresh = Registry()  # without erasures nothing is remembered
    enabled = fresh.enabled if not entries else registry.enabled if enabled is None else enabled
    mode = fresh.mode if not entries else mode or registry.mode
    branch = fresh.branch if not entries else branch or registry.branch
    rules = fresh.rules if not entries else rules or registry.rules
    pools = Pools(dict(registry.pools.full), dict(registry.pools.soft)) if entries else Pools({}, {})
    _check_free(registry, entries, enabled)
    if branch == "cond" and mode != "map":
        raise EraseError(
            f"branch='cond' exists only as a map: {mode} weights act on both halves; use mode='map' or branch='both'"
        )
    acting, added = _acting(entries, pools, rules, enabled, checked), _added(entries, enabled)
    if added is not None and mode != "fused":
        named = next(name for name, entry in entries.items() if entry.acts and entry.adapter.factors is not None)
        raise EraseError(
            f"{named!r} is factors, changes of single layers: they exist in fused form only, not as {mode}; use mode='fused' or "
            f"fuse_erasure(), or delete_erasures({named!r})"
        )
    readers = {unwrapped(reader): name for name, reader in text_readers(pipe).items()}
    modules = readers | {m: m.__dict__[ATTRIBUTE].name for m in registry.modules if m not in readers}
    if entries and side is None and registry.home() is not pipe and not rules.text_changes:
        check_text_side(registry.side, pipe)
    for module in modules:
        check_twins(module, acting, entries)
    maps = _maps([acting], {space: edit.width for space, edit in acting.items()}, modules) if mode == "map" else {}
    changes = {m: _changes(m, name, acting if mode == "fused" else {}, added) for m, name in modules.items()}
    twins = {m: _twin(m, changes[m], acting) for m in modules} if mode == "lora" and acting else {}
    for module, name in modules.items():
        found = module.__dict__.get(ATTRIBUTE) or _attach(registry, module, name)
        found.join(registry)
        if registry.mode == "lora":
            loras.take(module)
        found.kept = _write(changes[module], keep=mode == "fused" and (bool(acting) or added is not None))
        if module in twins:
            loras.put(module, twins[module])
    registry.entries, registry.enabled, registry.mode, registry.branch = dict(entries), enabled, mode, branch
    registry.rules, registry.pools, registry.edits, registry.maps = rules, pools, acting, maps
    registry.factors = added
    registry.side, registry.home = side or registry.side, weakref.ref(registry.home() or pipe)
    if not entries:
        for module in modules:
            _detach(module)


@contextmanager
def sets_in_force(pipe: Any, sets: Sequence[Sequence[str]], which: tuple[int, ...] | None) -> Iterator[None]:
    """Inside, these sets of loaded erasures are in force instead of the active ones; other threads wait for the end.

    Args:
        which: for each row of a batch the number of its set; None where there is one set for all.
    """
    registry = loaded(pipe)
    with registry.lock:
        _check_free(registry, registry.entries, registry.enabled)
        if registry.mode != "map":
            raise EraseError(
                f"the erasures of this pipeline are in {registry.mode} form, which is one for all calls: unfuse_erasure() first"
            )
        readers = text_readers(pipe)
        if bare := [name for name, reader in readers.items() if not follows(reader, registry)]:
            raise EraseError(f"{', '.join(bare)} of this pipeline is not attached: call enable_erasure() first")
        chosen = [{n: replace(registry.entries[n], active=True) for n in known(registry, names)} for names in sets]
        acting = [_acting(entries, registry.pools, registry.rules, True, checked=True) for entries in chosen]
        spaces = {space: edit.width for e in registry.entries.values() for space, edit in e.adapter.edits.items()}
        maps, token = _maps(acting, spaces, map(unwrapped, readers.values())), object()
        was, opened = registry.maps, OPENED.set(token)
        registry.maps, registry.call = maps, PerCall(which, token)
        try:
            yield
        finally:
            registry.maps, registry.call = was, None
            OPENED.reset(opened)


def hold(pipe: Any, mandatory: dict[str, float] | None, optional: frozenset[str]) -> None:
    """Keep these erasures in force with at least these strengths, whatever verb is called; None lets all go."""
    registry = loaded(pipe)
    _check_free(replace(registry, mandatory=mandatory), registry.entries, registry.enabled)
    registry.mandatory, registry.optional = mandatory, optional


def loaded(pipe: Any) -> Registry:
    """The registry of a pipeline that has erasures."""
    registry = registry_of(text_readers(pipe))
    if registry is None:
        raise EraseError("no erasures are loaded on this pipeline: load_erasure first")
    return registry


def known(registry: Registry, names: str | Iterable[str]) -> tuple[str, ...]:
    """`names` as a tuple, all of them loaded."""
    wanted = (names,) if isinstance(names, str) else tuple(names)
    if missing := [n for n in wanted if n not in registry.entries]:
        raise EraseError(
            f"no erasure named {missing[0]!r} is loaded: expected one of {', '.join(registry.entries) or 'none'}"
        )
    return wanted


def _check_free(registry: Registry, entries: Mapping[str, Entry], enabled: bool) -> None:
    """Raise where a change would touch a call that is being made, or what a policy holds in force."""
    if registry.call is not None:
        raise EraseError("a `with erasing(...)` is open on this pipeline: change its erasures before or after it")
    for name, least in (registry.mandatory or {}).items():
        entry = entries.get(name)
        if not enabled or entry is None or not entry.acts or entry.strength < least:
            raise EraseError(
                f"a policy keeps {name!r} in force with strength {least:g}: an erasure may be added, none taken away or weakened; "
                f"the operator lifts it with release_policy(pipe)"
            )


def _acting(entries: Mapping[str, Entry], pools: Pools, rules: Rules, enabled: bool, checked: bool) -> dict[str, Edit]:
    """The composed edits of the active entries, by space; empty where nothing acts."""
    active = [e for e in entries.values() if e.acts]
    whole = {}
    if (
        checked
    ):  # at full strength and also while disabled: whether they go together is not a matter of how much of them acts
        for other in active[1:]:
            active[0].adapter.encoder.check(other.adapter.encoder)
        whole = edits.compose_spaces(
            [e.adapter.edits for e in active], chains=rules.chains, residual_max=rules.residual_max, pools=pools.full
        )
    if not enabled:
        return {}
    if checked and all(e.strength == 1 for e in active):
        return whole
    soft = [{space: edit.softened(e.strength) for space, edit in e.adapter.edits.items()} for e in active]
    return edits.compose_spaces(soft, chains="follow", residual_max=None, pools=pools.soft)


def _maps(
    sets: Sequence[Mapping[str, Edit]], widths: Mapping[str, int], readers: Iterable[nn.Module]
) -> dict[str, EmbeddingMap]:
    """The map of each space, with these sets side by side, placed where `readers` are."""
    maps = {space: EmbeddingMap(*(each.get(space) for each in sets), width=width) for space, width in widths.items()}
    for device in {parameter.device for reader in readers for parameter in reader.parameters()}:
        for mapping in maps.values():
            mapping.place(device)
    return maps


def _added(entries: Mapping[str, Entry], enabled: bool) -> Factors | None:
    """The sum of the active factors at their strengths; None where there are none."""
    active = {name: entry for name, entry in entries.items() if entry.acts and entry.adapter.factors is not None}
    seen: dict[str, str] = {}
    for name, entry in active.items():
        if (other := seen.setdefault(entry.adapter.digest, name)) != name:
            raise EraseError(
                f"{name!r} and {other!r} are the same factors: added twice they would act twice; delete_erasures({name!r})"
            )
    soft = [e.adapter.factors.softened(e.strength) for e in active.values() if e.adapter.factors is not None]
    return add(*soft) if soft and enabled else None


def _changes(module: nn.Module, name: str, acting: Mapping[str, Edit], added: Factors | None) -> dict[Layer, Change]:
    """What to write so that `acting` is fused into `module`, and `added` too where it is the denoiser."""
    found = module.__dict__.get(ATTRIBUTE)
    if found is None:
        return fusing.plan(module, {}, {}, acting, None, None if name.startswith("controlnet") else added)
    return fusing.plan(
        module, found.kept, found.registry.edits, acting,
        None if found.controls else found.registry.factors, None if found.controls else added,
    )  # fmt: skip


def _twin(module: nn.Module, changes: Mapping[Layer, Change], acting: Mapping[str, Edit]) -> dict[str, Tensor]:
    """The LoRA form of `acting` for `module`."""
    loras.check(module)
    return fusing.lora(module, changes, acting)


@torch.no_grad()
def _write(changes: Mapping[Layer, Change], keep: bool) -> dict[Layer, Kept]:
    for linear, change in changes.items():
        linear.weight.copy_(change.new)
    kept = {linear: Kept(c.base, fusing.fingerprint(c.new), c.space) for linear, c in changes.items()}
    return kept if keep else {}


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
