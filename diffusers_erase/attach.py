"""Attaching: what puts erasures in force on a pipeline, changes them and takes them off. Only this file changes a pipeline.

Three forms: the *map* on text states (the default), which nothing that is done to the model inside (LoRA, IP-Adapter, fused
projections, quantisation, compilation) can switch off; *fused*, plain weights whose original bits are kept; and *LoRA*, beside
the user's own. Every change is computed whole before anything is touched.
"""

import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import edits, fusing, loras
from .adapter import ErasureAdapter, compose
from .edits import Edit, Pool
from .errors import EraseError, MismatchError
from .factors import Factors, add
from .fusing import Change, Kept
from .hook import OPENED, Attachment, Entry, PerCall, Registry, Rules, check_text_side, check_twins, follows
from .lock import Requested, gather, write_lock
from .mapping import EmbeddingMap, effect
from .sites import ATTRIBUTE, Layer, check_fusable, layer, matrix, text_readers, unwrapped, widths
from .status import registry_of
from .text import Encoder, TextSide

EFFECT_TOLERANCE = 0.15
"""How far the effect measured at load may lie from the one recorded when the concept was erased."""


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


def load_erasure(
    pipe: Any,
    source: Any,
    adapter_name: str | Sequence[str] | None = None,
    *,
    strength: float = 1.0,
    mode: str = "auto",
    branch: str | None = None,
    strict: bool = True,
    allow_text_changes: bool = False,
    chains: str = "error",
    residual_max: float | None = 0.2,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    public_key: str | Path | None = None,
) -> None:
    """Attach erasures to `pipe`; everything that is checked is checked before anything changes.

    Args:
        source: a folder, a file, a repository on the Hub (`"user/repo"`, `"user/repo@revision"`), an `ErasureAdapter`, a lock file
            (`"erasures.lock"`, which has its own names and strengths), or a list of them.
        adapter_name: name, or one for each source; by default made from the concepts.
        strength: 1 is the adapter's own residual r; w gives the residual 1 − w(1 − r).
        mode: form of all erasures on the pipe. `"map"`; `"fused"` into plain floating weights; `"lora"`, beside the user's LoRAs
            (one that a LoRA call switches off makes the next picture raise); `"auto"`: fused where there are factors, which have
            no other form, else the form that is there already, else map.
        branch: `"both"` halves of a guided batch, so that a negative prompt loses the concept too; or `"cond"`, the conditional
            half alone, as a map on this pipeline only. None: as what is loaded already, else both.
        strict: False loads an adapter whose text encoder or effect does not match; the status says so for as long as it is there.
        allow_text_changes: accept that the text side changes later (a text-encoder LoRA, textual inversion, another encoder),
            which otherwise makes the next picture raise.
        chains, residual_max: see `compose`.
        revision, token, subfolder, cache_dir, local_files_only, public_key: for every source, see `ErasureAdapter.from_pretrained`.

    Raises:
        EraseError: and nothing is attached.

    Example:
        >>> load_erasure(pipe, "erase-van-gogh")
        >>> image = pipe("a painting by Van Gogh").images[0]
    """
    for name, given, known in (
        ("chains", chains, ("error", "follow")),
        ("mode", mode, ("auto", "map", "fused", "lora")),
        ("branch", branch, (None, "both", "cond")),
    ):
        if given not in known:
            raise EraseError(f"{name} is one of {', '.join(map(repr, known))}: got {given!r}")
    readers = text_readers(pipe)
    registry = registry_of(readers) or Registry()
    where: dict[str, Any] = {"revision": revision, "token": token, "subfolder": subfolder, "cache_dir": cache_dir}
    where |= {"local_files_only": local_files_only, "public_key": public_key}
    requested = gather(source, strength, **where)
    if not requested:
        raise EraseError(
            "no erasure given: expected a folder, a file, a repository, an ErasureAdapter, or a list of them"
        )
    adapters = [one.adapter for one in requested]
    _check_strengths(one.strength for one in requested)
    names = _names(requested, adapter_name, registry.entries)
    for adapter in adapters:
        _check_width(adapter, readers)
        _check_base(adapter, readers, same=False)
    if mode == "auto":
        mode = _form(registry, adapters)
    passed, side = _verify(pipe, adapters, strict)
    entries = {n: Entry(r.adapter, r.strength, True, ok) for n, r, ok in zip(names, requested, passed, strict=True)}
    if registry.entries and branch not in (None, registry.branch):
        raise EraseError(
            f"the erasures on this pipeline act on branch={registry.branch!r}, which is one for all: unload_erasure() first"
        )
    _commit(
        pipe, registry, registry.entries | entries, checked=True,
        mode=mode,
        branch=branch or registry.branch,
        rules=registry.rules.loosened(Rules(chains, residual_max, allow_text_changes)),
        side=side,
    )  # fmt: skip
    registry.home = weakref.ref(pipe)


def unload_erasure(pipe: Any) -> None:
    """Detach every erasure: weights, hooks and outputs are bit for bit what they were. Does nothing where there is none."""
    if registry := registry_of(text_readers(pipe)):
        _commit(pipe, registry, {})


def delete_erasures(pipe: Any, adapter_names: str | Iterable[str]) -> None:
    """Detach some erasures; the others are solved again without their rows."""
    registry = loaded(pipe)
    gone = known(registry, adapter_names)
    _commit(pipe, registry, {name: entry for name, entry in registry.entries.items() if name not in gone})


def set_erasures(
    pipe: Any, adapter_names: str | Iterable[str], strengths: float | Sequence[float] | None = None
) -> None:
    """Make exactly these erasures active, each with its strength (None: as it was loaded)."""
    registry = loaded(pipe)
    names = known(registry, adapter_names)
    given = [strengths] * len(names) if strengths is None or isinstance(strengths, (int, float)) else list(strengths)
    if len(given) != len(names):
        raise EraseError(f"{len(names)} erasures but {len(given)} strengths: give one strength, or one for each name")
    _check_strengths([s for s in given if s is not None])
    chosen = {n: registry.entries[n].strength if s is None else float(s) for n, s in zip(names, given, strict=True)}
    entries = {
        name: replace(entry, active=name in chosen, strength=chosen.get(name, entry.strength))
        for name, entry in registry.entries.items()
    }
    _commit(pipe, registry, entries, checked=True)


def enable_erasure(pipe: Any, *, allow_text_changes: bool = False) -> None:
    """Put the active erasures in force again, on every component of this pipeline that reads text.

    Args:
        allow_text_changes: accept the text side of the pipeline as it is now and will be (see `load_erasure`).
    """
    registry = loaded(pipe)
    rules = registry.rules.loosened(Rules(text_changes=True)) if allow_text_changes else registry.rules
    _commit(pipe, registry, registry.entries, enabled=True, rules=rules)


def disable_erasure(pipe: Any) -> AbstractContextManager[None]:
    """Put all erasures out of force. Used as a context manager, what was in force is again at its end.

    Example:
        >>> with disable_erasure(pipe):
        ...     before = pipe("a painting by Van Gogh").images[0]
    """
    registry = loaded(pipe)
    was = registry.enabled
    _commit(pipe, registry, registry.entries, enabled=False)
    return _Restored(pipe, was)


def fuse_erasure(pipe: Any) -> None:
    """Write the erasures in force into the weights; later changes of the set are written as well, each from the original bits."""
    registry = loaded(pipe)
    _commit(pipe, registry, registry.entries, mode="fused")


def unfuse_erasure(pipe: Any) -> None:
    """Give back the original bits of every weight; the erasures stay in force as a map."""
    registry = loaded(pipe)
    _commit(pipe, registry, registry.entries, mode="map")


def save_erasure(pipe: Any, directory: str | Path, adapter_name: str | None = None) -> Path:
    """Save a loaded erasure, or without a name the composition of all that are in force, at the strength they were made with."""
    registry = loaded(pipe)
    names = registry.in_force if adapter_name is None else known(registry, adapter_name)
    if not names:
        raise EraseError("no erasure is in force: name the one to save, or enable_erasure() first")
    adapters = (registry.entries[n].adapter for n in names)
    return compose(*adapters, chains=registry.rules.chains, residual_max=None).save_pretrained(directory)


def lock_erasures(pipe: Any, path: str | Path = "erasures.lock") -> Path:
    """Write down exactly which erasures are in force: place, commit, digest, strength. `load_erasure(pipe, path)` holds to it.

    Raises:
        EraseError: nothing is in force, or an erasure was made here and never loaded from a place.

    Example:
        >>> load_erasure(pipe, ["user/erase-van-gogh", "user/erase-monet"])
        >>> lock_erasures(pipe)
    """
    registry = loaded(pipe)
    entries = {name: registry.entries[name] for name in registry.in_force}
    if not entries:
        raise EraseError("no erasure is in force: load what is to be locked, or enable_erasure() first")
    return write_lock(path, [Requested(entry.adapter, entry.strength, name) for name, entry in entries.items()])


class _Restored:
    """Puts erasures back in force at the end of a `with`; outside of one it does nothing."""

    def __init__(self, pipe: Any, enabled: bool):
        self.pipe, self.enabled = pipe, enabled

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        registry = registry_of(text_readers(self.pipe))
        if self.enabled and registry and registry.entries:
            enable_erasure(self.pipe)


def _commit(
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
    pools = dict(registry.pools) if entries else {}
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


def _acting(
    entries: Mapping[str, Entry], pools: dict[str, Pool], rules: Rules, enabled: bool, checked: bool
) -> dict[str, Edit]:
    """The composed edits of the active entries, by space; empty where nothing acts."""
    active = [e for e in entries.values() if e.acts]
    whole = {}
    if (
        checked
    ):  # at full strength and also while disabled: whether they go together is not a matter of how much of them acts
        for other in active[1:]:
            active[0].adapter.encoder.check(other.adapter.encoder)
        whole = edits.compose_spaces(
            [e.adapter.edits for e in active], chains=rules.chains, residual_max=rules.residual_max, pools=pools
        )
    if not enabled:
        return {}
    if checked and all(e.strength == 1 for e in active):
        return whole
    soft = [{space: edit.softened(e.strength) for space, edit in e.adapter.edits.items()} for e in active]
    return edits.compose_spaces(soft, chains="follow", residual_max=None, pools=pools)


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


def _check_strengths(strengths: Iterable[float]) -> None:
    for s in strengths:
        if not 0 <= s <= 1:
            raise EraseError(
                f"a strength lies between 0 and 1: got {s}; to erase more, erase again with a smaller residual"
            )


def _names(requested: list[Requested], given: str | Sequence[str] | None, taken: dict[str, Entry]) -> list[str]:
    if given is not None and any(one.name for one in requested):
        raise EraseError("a lock file names its erasures: load it without adapter_name")
    names = [given] if isinstance(given, str) else list(given or [])
    if given is None:
        for one in requested:
            free = (f"{one.adapter.name}{n}" for n in ["", *(f"-{i}" for i in range(2, 10_000))])
            names.append(one.name or next(n for n in free if n not in taken and n not in names))
    if len(names) != len(requested) or len(set(names)) != len(names):
        raise EraseError(f"{len(requested)} erasures need as many different names: got {names}")
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


def _check_base(adapter: ErasureAdapter, readers: dict[str, nn.Module], *, same: bool) -> None:
    """Raise unless the denoiser's original weights are those that factors were made for; of `same` False, have their shapes."""
    if adapter.factors is None:
        return
    reader = next(iter(readers.values()))
    check_fusable(reader, (), adapter.factors.paths)
    found = unwrapped(reader).__dict__.get(ATTRIBUTE)
    kept = found.kept if found else {}
    layers = {path: layer(reader, path) for path in adapter.factors.paths}
    weights = {path: kept[part].base if part in kept else part.weight for path, part in layers.items()}
    adapter.factors.check({path: matrix(weight) for path, weight in weights.items()}, same=same)


def _form(registry: Registry, adapters: Sequence[ErasureAdapter]) -> str:
    """The form that `mode="auto"` means for a pipeline with these erasures and these new ones."""
    if registry.mode == "fused" or all(a.factors is None for a in adapters):
        return registry.mode
    loaded = [entry.adapter for entry in registry.entries.values()] + list(adapters)
    if gated := [a for a in loaded for edit in a.edits.values() for label in edit.labels if label.gate]:
        raise EraseError(
            f"factors exist in fused form only, in which the gate of {', '.join(gated[0].concepts)} is left out: accept that with "
            f"mode='fused', or do not load both"
        )
    return "fused"


def _verify(pipe: Any, adapters: Sequence[ErasureAdapter], strict: bool) -> tuple[list[bool], TextSide | None]:
    """Whether the pipe's encoder is each adapter's and its concepts' names still land on their targets, and its text side now.

    Raises:
        EraseError: one does not, and `strict`.
    """
    passed = []
    try:
        encoder = Encoder(pipe)
        side = encoder.side()
    except EraseError:
        if strict:
            raise
        return [False] * len(adapters), None
    for adapter in adapters:
        try:
            adapter.encoder.check(side.fingerprint)
            _check_base(adapter, text_readers(pipe), same=True)
            _check_effects(encoder, adapter)
        except EraseError:
            if strict:
                raise
            passed.append(False)
        else:
            passed.append(True)
    return passed, side


def _check_effects(encoder: Encoder, adapter: ErasureAdapter) -> None:
    for recipe in adapter.recipes:
        if recipe.effect is None:
            continue
        found = effect(encoder, adapter.edits, recipe.concept)
        if abs(found - recipe.effect) > EFFECT_TOLERANCE:
            raise MismatchError(
                f"under this adapter {recipe.concept!r} goes {found:.2f} of the way to its target here, {recipe.effect:.2f} where it "
                f"was made: the text side of this pipeline differs; erase the concept again on it"
            )
