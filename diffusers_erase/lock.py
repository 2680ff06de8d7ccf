"""Which erasures, exactly: what `load_erasure` is given, and lock files that pin a set of them.

A lock file names each erasure of a set by its place (a repository and a commit, or a path), its digest and its strength. Loading
it gives these erasures with these bits, or an error.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from . import hub
from .adapter import ErasureAdapter
from .errors import EraseError, MismatchError

FORMAT = 1
SUFFIX = ".lock"
FIELDS = {
    "name": str,
    "source": str,
    "subfolder": str,
    "commit": (str, type(None)),
    "digest": str,
    "strength": (int, float),
}


@dataclass(frozen=True)
class Requested:
    """One erasure that is to be loaded."""

    adapter: ErasureAdapter
    strength: float = 1.0
    name: str | None = None
    """None where none was asked for."""


class Locked(NamedTuple):
    """One erasure as a lock file names it."""

    name: str
    source: str
    """A repository, or a path as seen from the lock file."""
    subfolder: str
    commit: str | None
    """None for a path."""
    digest: str
    strength: float


def gather(source: Any, strength: float = 1.0, **where: Any) -> list[Requested]:
    """The erasures that `source` means: an adapter, a folder, a file, a repository, a lock file, or a list of these.

    Args:
        where: see `ErasureAdapter.from_pretrained`.

    Raises:
        EraseError: one of them is not there or not whole; or `strength` or a revision is given for a lock file, which has its own.
    """
    found = []
    for one in source if isinstance(source, (list, tuple)) else [source]:
        if isinstance(one, ErasureAdapter):
            if given := [name for name in ("revision", "subfolder", "public_key") if where.get(name)]:
                raise EraseError(
                    f"{given[0]}= is for adapters that are read, and one was given that is: give it where it is read"
                )
            found.append(Requested(one, strength))
        elif isinstance(one, (str, Path)) and str(one).endswith(SUFFIX) and not os.path.isdir(one):
            if strength != 1.0 or where.get("revision") or where.get("subfolder"):
                raise EraseError(
                    f"{one} pins places and strengths: load it without strength=, revision= and subfolder="
                )
            found += read_lock(one, **where)
        else:
            found.append(Requested(ErasureAdapter.from_pretrained(one, **where), strength))
    return found


def write_lock(path: str | Path, erasures: Iterable[Requested]) -> Path:
    """Pin erasures that were read from a repository or from a folder. The same set always gives the same bytes.

    Raises:
        EraseError: one was made here and not saved or pushed yet, so that there is no place to name; or two have one name.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise EraseError(f"a lock file's name ends in {SUFFIX}, such as erasures{SUFFIX}: got {path.name!r}")
    entries = {}
    for one in erasures:
        origin, name = one.adapter.origin, one.name or one.adapter.name
        if origin is None:
            raise EraseError(f"{name!r} was made here: save or push it, load it from there, and lock it then")
        if name in entries:
            raise EraseError(f"two erasures of this set are called {name!r}: give them names of their own")
        entries[name] = {
            "name": name,
            "source": origin.source if origin.commit else _place(origin.source, path),
            "subfolder": origin.subfolder,
            "commit": origin.commit,
            "digest": one.adapter.digest,
            "strength": one.strength,
        }
    text = hub.readable({"format": FORMAT, "erasures": [entries[name] for name in sorted(entries)]})
    return hub.write_text(path, text)


def read_lock(path: str | Path, **where: Any) -> list[Requested]:
    """The erasures of a lock file, each fetched at its commit and held to its digest.

    Raises:
        EraseError: one is not there.
        MismatchError: the file is not a lock file, or an erasure is not the one that was locked.
    """
    path = Path(path)
    return [_fetched(entry, path, where) for entry in locked(path)]


def locked(path: str | Path) -> list[Locked]:
    """What a lock file says, without fetching anything.

    Raises:
        EraseError: there is no such file.
        MismatchError: it is not a lock file.
    """
    path = Path(path)
    if not path.is_file():
        raise EraseError(f"no lock file at {path}: write one with lock_erasures, or diffusers-erase lock")
    data, found = hub.read_json(path), {}
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("erasures"), list):
        raise MismatchError(f"{path} is not a lock file of format {FORMAT}: write it again with lock_erasures")
    for entry in data["erasures"]:
        if (
            not isinstance(entry, dict)
            or set(entry) != set(FIELDS)
            or not all(isinstance(entry[name], kind) for name, kind in FIELDS.items())
        ):
            raise MismatchError(
                f"an entry of {path} does not have exactly the fields {', '.join(FIELDS)}: write it again"
            )
        if entry["name"] in found:
            raise MismatchError(f"{path} has two erasures called {entry['name']!r}: write it again")
        found[entry["name"]] = Locked(**entry)._replace(strength=float(entry["strength"]))
    return list(found.values())


def _fetched(entry: Locked, path: Path, where: dict[str, Any]) -> Requested:
    place, commit = entry.source, entry.commit
    if commit is not None and not (hub.REPOSITORY.fullmatch(place) and hub.COMMIT.fullmatch(commit)):
        raise MismatchError(
            f"{path} pins {place!r} to {commit!r}: expected a repository and a commit of 40 hex digits"
        )
    if commit is None:
        place = path.parent / place
    found = ErasureAdapter.from_pretrained(place, **where | {"revision": commit, "subfolder": entry.subfolder})
    if found.digest != entry.digest:
        raise MismatchError(
            f"{entry.name!r} at {found.origin} has digest {found.digest[:12]}, {path} locks {entry.digest[:12]}: it was "
            f"replaced; lock it again if that is meant"
        )
    return Requested(found, entry.strength, entry.name)


def _place(source: str, lock: Path) -> str:
    """A path as the lock file names it: relative to its folder if it lies below, so that both can move together."""
    full, folder = Path(source).resolve(), lock.parent.resolve()
    return full.relative_to(folder).as_posix() if full.is_relative_to(folder) else str(full)
