"""Serving: sets of erasures for one call, a receipt of what was in force, and a policy that requests can only add to.

A policy for serving, not a sandbox: code in the same process can reach the model and take anything off.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .attach import hold, known, loaded, sets_in_force
from .errors import EraseError, MismatchError
from .hook import Registry
from .lock import Locked, locked
from .status import Receipt, receipt


@dataclass(frozen=True)
class ErasurePolicy:
    """What must stay in force on a pipeline, and what a request may add; by the names of loaded erasures.

    Example:
        >>> load_erasure(pipe, [van_gogh, snoopy], ["van-gogh", "snoopy"])
        >>> enforce_policy(pipe, ErasurePolicy(mandatory=["van-gogh"], optional=["snoopy"]))
        >>> with erasing(pipe, rows=[["snoopy"], []]) as receipt:  # the second picture: van-gogh alone
        ...     images = pipe(["a dog", "a starry night"]).images
    """

    mandatory: Sequence[str]
    optional: Sequence[str] = ()
    pinned: Mapping[str, Locked] = field(default_factory=dict)
    """Of mandatory erasures what a lock file says of them (see `from_lock`)."""

    def __post_init__(self):
        for name in ("mandatory", "optional"):
            given = getattr(self, name)
            if isinstance(given, str) or not all(isinstance(n, str) for n in given):
                raise EraseError(f"{name} is a list of names of loaded erasures: got {given!r}")
            object.__setattr__(self, name, tuple(dict.fromkeys(given)))
        if both := set(self.mandatory) & set(self.optional):
            raise EraseError(f"{min(both)!r} is mandatory and optional: name it once")

    @classmethod
    def from_lock(cls, path: str | Path, optional: Sequence[str] = ()) -> "ErasurePolicy":
        """The set of a lock file as what is mandatory: these digests, each with the strength that it has there at least.

        Raises:
            EraseError: there is no such file, or it is no lock file.

        Example:
            >>> load_erasure(pipe, "erasures.lock")
            >>> enforce_policy(pipe, ErasurePolicy.from_lock("erasures.lock"))
        """
        pinned = {entry.name: entry for entry in locked(path)}
        return cls(tuple(pinned), optional, pinned)


def enforce_policy(pipe: Any, policy: ErasurePolicy) -> None:
    """Hold every later verb and request on `pipe` to `policy`: an erasure may be added, a mandatory one never taken away.

    The mandatory erasures must be loaded and in force; the strength that they have now is the least they may have later, or
    that of the lock file that pins them.

    Raises:
        EraseError: one is not in force; the policy is not enforced then.
        MismatchError: one is not what a lock file pins under its name.
    """
    registry = loaded(pipe)
    known(registry, (*policy.mandatory, *policy.optional))
    least = {name: registry.entries[name].strength for name in policy.mandatory}
    for name, pin in policy.pinned.items():
        if (found := registry.entries[name].adapter.digest) != pin.digest:
            raise MismatchError(
                f"{name!r} has digest {found[:12]}, the lock file of this policy pins {pin.digest[:12]}: delete_erasures({name!r}), then "
                f"load the lock file"
            )
        least[name] = pin.strength
    hold(pipe, least, frozenset(policy.optional))


def release_policy(pipe: Any) -> None:
    """Lift the policy of `pipe`; what is in force stays in force."""
    hold(pipe, None, frozenset())


@contextmanager
def erasing(
    pipe: Any, names: Sequence[str] | None = None, *, rows: Sequence[Sequence[str]] | None = None
) -> Iterator[Receipt]:
    """Inside, calls of `pipe` are drawn with the named erasures, and the receipt says which. Other threads wait their turn.

    Nothing about erasures is an argument of the call itself: diffusers' pipelines swallow unknown keywords.

    Args:
        names: loaded erasures for the whole batch. Neither names nor rows: those that are in force.
        rows: for each picture of the batch its own; `num_images_per_prompt` counts. The number of rows is checked at the
            first call of the denoiser. Under a policy each request adds to the mandatory set, and `[]` means that set.

    Raises:
        EraseError: a name is not loaded, or the policy does not offer it; the erasures are fused.

    Example:
        >>> with erasing(pipe, rows=[["van-gogh"], ["van-gogh", "snoopy"], []]) as receipt:
        ...     images = pipe(["a dog", "a dog", "a dog"]).images
        >>> receipt.in_force
        (('van-gogh',), ('van-gogh', 'snoopy'), ())
    """
    registry = loaded(pipe)
    if names is not None and rows is not None:
        raise EraseError("erasing takes names for the whole batch, or rows for its pictures: got both")
    if isinstance(names, str) or isinstance(rows, str) or any(isinstance(row, str) for row in rows or ()):
        raise EraseError("erasing takes names as a list, and rows as a list of lists: got a text")
    if rows is not None and not rows:
        raise EraseError("erasing got no rows: give one list of names for each picture of the batch")
    asked = rows if rows is not None else None if names is None else [names]
    granted = [registry.in_force] if asked is None else [_granted(registry, row) for row in asked]
    sets = list(dict.fromkeys(granted))
    which = None if rows is None else tuple(map(sets.index, granted))
    if asked is None and registry.mode != "map":
        yield receipt(pipe, asked, granted)  # nothing to change, so any form will do
        return
    with sets_in_force(pipe, sets, which):
        yield receipt(pipe, asked, granted)


def _granted(registry: Registry, request: Sequence[str]) -> tuple[str, ...]:
    """The names in force for a request, in the order of loading: the mandatory ones and those that it adds."""
    wanted = known(registry, request)
    mandatory = registry.mandatory or {}
    if registry.mandatory is not None and (
        extra := [n for n in wanted if n not in registry.optional and n not in mandatory]
    ):
        raise EraseError(
            f"the policy of this pipeline does not offer {extra[0]!r}: expected one of {', '.join(sorted(registry.optional)) or 'none'}"
        )
    return tuple(name for name in registry.entries if name in mandatory or name in wanted)
