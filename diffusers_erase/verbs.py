"""The verbs: load erasures, choose among them, switch them, fuse them, write down what is there. Each computes, then attaches."""

import weakref
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from .adapter import ErasureAdapter, compose
from .attach import commit, known, loaded
from .errors import EraseError
from .fitting import check_base, check_width, verify
from .hook import Entry, Registry, Rules
from .lock import Requested, gather, write_lock
from .sites import text_readers
from .status import registry_of


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
    for name, given, allowed in (
        ("chains", chains, ("error", "follow")),
        ("mode", mode, ("auto", "map", "fused", "lora")),
        ("branch", branch, (None, "both", "cond")),
    ):
        if given not in allowed:
            raise EraseError(f"{name} is one of {', '.join(map(repr, allowed))}: got {given!r}")
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
        check_width(adapter, readers)
        check_base(adapter, readers, same=False)
    if mode == "auto":
        mode = _form(registry, adapters)
    passed, side = verify(pipe, adapters, strict)
    entries = {n: Entry(r.adapter, r.strength, True, ok) for n, r, ok in zip(names, requested, passed, strict=True)}
    if registry.entries and branch not in (None, registry.branch):
        raise EraseError(
            f"the erasures on this pipeline act on branch={registry.branch!r}, which is one for all: unload_erasure() first"
        )
    commit(
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
        commit(pipe, registry, {})


def delete_erasures(pipe: Any, adapter_names: str | Iterable[str]) -> None:
    """Detach some erasures; the others are solved again without their rows."""
    registry = loaded(pipe)
    gone = known(registry, adapter_names)
    commit(pipe, registry, {name: entry for name, entry in registry.entries.items() if name not in gone})


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
    commit(pipe, registry, entries, checked=True)


def enable_erasure(pipe: Any, *, allow_text_changes: bool = False) -> None:
    """Put the active erasures in force again, on every component of this pipeline that reads text.

    Args:
        allow_text_changes: accept the text side of the pipeline as it is now and will be (see `load_erasure`).
    """
    registry = loaded(pipe)
    rules = registry.rules.loosened(Rules(text_changes=True)) if allow_text_changes else registry.rules
    commit(pipe, registry, registry.entries, enabled=True, rules=rules)


def disable_erasure(pipe: Any) -> AbstractContextManager[None]:
    """Put all erasures out of force. Used as a context manager, what was in force is again at its end.

    Example:
        >>> with disable_erasure(pipe):
        ...     before = pipe("a painting by Van Gogh").images[0]
    """
    registry = loaded(pipe)
    was = registry.enabled
    commit(pipe, registry, registry.entries, enabled=False)
    return _Restored(pipe, was)


def fuse_erasure(pipe: Any) -> None:
    """Write the erasures in force into the weights; later changes of the set are written as well, each from the original bits."""
    registry = loaded(pipe)
    commit(pipe, registry, registry.entries, mode="fused")


def unfuse_erasure(pipe: Any) -> None:
    """Give back the original bits of every weight; the erasures stay in force as a map."""
    registry = loaded(pipe)
    commit(pipe, registry, registry.entries, mode="map")


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


def _form(registry: Registry, adapters: Sequence[ErasureAdapter]) -> str:
    """The form that `mode="auto"` means for a pipeline with these erasures and these new ones."""
    if registry.mode == "fused" or all(a.factors is None for a in adapters):
        return registry.mode
    together = [entry.adapter for entry in registry.entries.values()] + list(adapters)
    if gated := [a for a in together if a.gated]:
        raise EraseError(
            f"factors exist in fused form only, in which the gate of {', '.join(gated[0].concepts)} is left out: accept that with "
            f"mode='fused', or do not load both"
        )
    return "fused"
