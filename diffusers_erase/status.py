"""What is requested of a pipeline and what is in force: the status for people, the receipt for records. Changes nothing."""

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from torch import nn

from . import edits as edits_
from . import hub
from .edits import Edit
from .errors import EraseError
from .hook import Registry, follows
from .sites import ATTRIBUTE, family_of, reads_images, reads_phrases, text_readers, unwrapped
from .version import __version__


@dataclass(frozen=True)
class ErasureStatus:
    """What was requested of a pipeline, and what is in force."""

    requested: dict[str, dict[str, Any]]
    """By adapter name: concepts, digest, origin (a repository with its commit), strength, active, verified."""
    in_force: tuple[str, ...]
    mode: str
    """`map`, `fused`, `lora`, or `none` where nothing is in force."""
    branch: str
    """`both` halves of a guided batch, or the conditional one (`cond`)."""
    components: tuple[str, ...]
    """The components of this pipeline that carry the erasure."""
    residuals: dict[str, float]
    """Of each concept in force, the share that is left in this set."""
    saturation: float | None
    """How far the set moves everything else, see `Edit.saturation`; of several spaces the most, None where it is not known."""
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
        if self.saturation is not None:
            lines.append(f"  saturation {self.saturation:.2f}{edits_.too_full(self.saturation)}")
        lines += [f"  preserved by one, erased by another (erased): {name}" for name in self.overruled]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


@dataclass(frozen=True)
class Receipt:
    """What was in force while a picture was drawn: a record that says it without the pipeline. See `erasing`."""

    requested: tuple[tuple[str, ...], ...] | None
    """Names asked for, of each row of the batch; one tuple for a whole batch; None where no set was named."""
    in_force: tuple[tuple[str, ...], ...]
    """Names in force, of each row of the batch; one tuple where all rows have the same."""
    adapters: dict[str, dict[str, Any]]
    """By name, of every adapter in force on a row: concepts, digest, origin, strength, verified."""
    mode: str
    branch: str
    components: tuple[str, ...]
    mandatory: tuple[str, ...]
    """Names that a policy keeps in force."""
    encoder: dict[str, Any] | None
    """Fingerprint of the text encoder; None where the pipeline has none that this version reads."""
    notes: tuple[str, ...]
    """What a text-side erasure cannot see here, and what was waived."""
    versions: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """This receipt as plain JSON data, with a digest over all of it."""
        data = asdict(self)
        return data | {"digest": hub.digest(data)}


def get_active_erasures(pipe: Any) -> list[str]:
    """Names of the erasures in force."""
    registry = registry_of(text_readers(pipe))
    return list(registry.in_force) if registry else []


def edits_in_force(pipe: Any) -> dict[str, Edit]:
    """The rows that act now, all adapters composed, by space of text states; empty where none do."""
    registry = registry_of(text_readers(pipe))
    return dict(registry.edits) if registry else {}


def get_list_erasures(pipe: Any) -> dict[str, list[str]]:
    """Names of the loaded erasures, by component."""
    found = {name: unwrapped(reader).__dict__.get(ATTRIBUTE) for name, reader in text_readers(pipe).items()}
    return {name: list(a.registry.entries) for name, a in found.items() if a and a.registry.entries}


def erasure_status(pipe: Any) -> ErasureStatus:
    """What was requested of `pipe` and what is in force, without changing anything."""
    readers = text_readers(pipe)
    registry = registry_of(readers) or Registry()
    active = [edit for n in registry.in_force for edit in registry.entries[n].adapter.edits.values()]
    return ErasureStatus(
        requested={
            name: described(registry, name) | {"active": entry.active} for name, entry in registry.entries.items()
        },
        in_force=registry.in_force,
        mode=registry.mode if registry.edits or registry.factors else "none",
        branch=registry.branch,
        components=_attached(readers, registry),
        residuals=_residuals(registry.edits),
        saturation=edits_.saturation(registry.edits),
        overruled=edits_.overruled(active),
        notes=_notes(readers, registry),
    )


def receipt(pipe: Any, requested: Sequence[Sequence[str]] | None, in_force: Sequence[Sequence[str]]) -> Receipt:
    """The receipt of what is in force on `pipe`, for these rows of its batch."""
    readers = text_readers(pipe)
    registry = registry_of(readers) or Registry()
    return Receipt(
        requested=None if requested is None else tuple(map(tuple, requested)),
        in_force=tuple(map(tuple, in_force)),
        adapters={name: described(registry, name) for name in dict.fromkeys(n for row in in_force for n in row)},
        mode=registry.mode,
        branch=registry.branch,
        components=_attached(readers, registry),
        mandatory=tuple(registry.mandatory or ()),
        encoder=registry.side and registry.side.fingerprint.to_json(),
        notes=_notes(readers, registry),
        versions=versions(),
    )


def registry_of(readers: Mapping[str, nn.Module]) -> Registry | None:
    """The registry that these modules share, found on any of them."""
    found = [a.registry for r in readers.values() if (a := unwrapped(r).__dict__.get(ATTRIBUTE)) is not None]
    if any(registry is not found[0] and registry.entries for registry in found):
        raise EraseError(
            f"the components of this pipeline ({', '.join(readers)}) carry erasures that were loaded on different pipelines: "
            f"unload_erasure on those pipelines first, then load here"
        )
    return found[0] if found else None


def described(registry: Registry, name: str) -> dict[str, Any]:
    """One loaded adapter in plain data."""
    entry = registry.entries[name]
    return {
        "concepts": entry.adapter.concepts,
        "digest": entry.adapter.digest,
        "origin": str(entry.adapter.origin or ""),
        "strength": entry.strength,
        "verified": entry.verified,
    }


def versions() -> dict[str, str]:
    """Versions of this package and of the hosts that decide a picture."""
    hosts = ("torch", "diffusers", "transformers")
    return {"diffusers-erase": __version__, "python": platform.python_version()} | {n: version(n) for n in hosts}


def _attached(readers: Mapping[str, nn.Module], registry: Registry) -> tuple[str, ...]:
    return tuple(name for name, reader in readers.items() if follows(reader, registry))


def _residuals(acting: Mapping[str, Edit]) -> dict[str, float]:
    """Of each concept the share that is left, of several spaces the largest."""
    found: dict[str, float] = {}
    for edit in acting.values():
        found |= {concept: max(left, found.get(concept, 0.0)) for concept, left in edit.residuals().items()}
    return found


def _notes(readers: Mapping[str, nn.Module], registry: Registry) -> tuple[str, ...]:
    return tuple(_told(readers, registry)) if registry.entries else ()


def _told(readers: Mapping[str, nn.Module], registry: Registry) -> Iterable[str]:
    denoiser = next(iter(readers.values()))
    for name, entry in registry.entries.items():
        if not entry.verified:
            yield f"{name} was loaded with strict=False and does not match this pipeline"
        if registry.mode != "map" and entry.adapter.gated:
            yield f"{name} has a gate, which exists only as a map: its {registry.mode} form is the linear part"
        if entry.adapter.factors is not None:
            others = len(registry.entries) > 1
            yield f"{name} is factors, changes of the {next(iter(readers))}'s weights" + (
                ": they only add up with what else is loaded, which is inexact" if others else ""
            )
            if any(reader.startswith("controlnet") for reader in readers):
                yield f"{name} does not act on the ControlNet, which reads the prompt too"
            continue
        for space in family_of(denoiser).spaces.keys() - entry.adapter.edits.keys():
            yield f"{name} does not act on {space} states, which this model reads too: its concepts come through by them"
    if bare := sorted(readers.keys() - set(_attached(readers, registry))):
        yield f"not attached to {', '.join(bare)}: call enable_erasure() on this pipeline"
    if (family := family_of(denoiser)).experimental:
        yield f"{family.name} is experimental: given embeddings are mapped where they enter, nothing was measured on pictures"
    if registry.rules.text_changes:
        yield "changes of the text side are allowed: a text-encoder LoRA or textual inversion may bring a concept back"
    if registry.branch == "cond":
        yield "only the conditional half of a guided batch is mapped"
    if registry.mode == "lora":
        yield "in LoRA form: a LoRA call that switches it off makes the next picture raise"
    if reads_images(denoiser):
        yield "an IP-Adapter is loaded: a concept in an image prompt is not seen by a text-side erasure"
    if reads_phrases(denoiser):
        yield "this UNet reads GLIGEN phrases beside the prompt: a concept named in one is not seen by this erasure"
