"""Suites as data: which pictures are drawn, what each should show, and what part each plays for an erasure.

One list of prompts serves every concept: what is *efficacy* for one concept is *unrelated* for another. So the pictures of
the unedited model are drawn once for all adapters. The dimensions are EraseBench's (arXiv 2501.09833).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from ..edits import same_name
from ..errors import EraseError
from ..hub import digest

SHOWS, STYLE = ASPECTS = ("shows", "style")
"""What can be looked for in a picture: the field of a `Prompt` that holds the label, and the name of the judge that finds it."""

KINDS = ("name", "paraphrase", "coreference", "homograph", "style", "caption")
"""How a prompt says what it shows. Paraphrases and coreferences are the generality of an erasure."""

ALWAYS, NEAR, OWN = SCOPES = ("always", "near", "own")
"""When a prompt is drawn: for every erasure; where what it shows is erased or related to what is; only where it is erased."""

RELATIONS = {
    "visual": "look-alike",
    "subset": "narrower term",
    "superset": "broader term",
    "pair": "goes with it",
    "style": "similar style",
    "homograph": "other sense",
}
"""What a label is to a concept, in words."""

EFFICACY, GENERALITY, UNRELATED = "efficacy", "generality", "unrelated"
PARTS = {
    EFFICACY: "the concept by its name",
    GENERALITY: "the concept by other names",
    "sensitivity/visual": "look-alikes",
    "sensitivity/subset-superset": "broader and narrower terms",
    "sensitivity/pair": "what goes with it",
    "sensitivity/style": "similar styles",
    "sensitivity/homograph": "other senses of its name",
    UNRELATED: "everything else",
    "across/inside": "other aspect of its pictures",
    "across/outside": "other aspect of all others",
}
"""The dimensions, in the order of a report."""


@dataclass(frozen=True)
class Settings:
    """What all pictures of a suite are drawn with; None leaves it to the pipeline."""

    steps: int
    guidance: float
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None


@dataclass(frozen=True)
class Prompt:
    """One picture to draw, and what a judge should find in it."""

    text: str
    seed: int
    shows: str = ""
    """The label that the picture should show; "" if there is nothing to check. A name of `Suite.groups` stands for any member."""
    style: str = ""
    """The label of the style that it should have, or ""."""
    kind: str = "name"
    clean: str = ""
    """The same content without the concept (Six-CD's dual version): what a text score of the picture is taken against."""
    scope: str = ALWAYS


class Part(NamedTuple):
    """The prompts that play one part for an erasure, which of their labels is checked, and whether it should be gone."""

    name: str
    aspect: str
    gone: bool
    indices: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Suite:
    """Prompts with seeds, how their labels are related, and the settings that they are drawn with; compared by `digest`."""

    name: str
    version: str
    source: str
    licence: str
    prompts: tuple[Prompt, ...]
    relations: Mapping[str, Mapping[str, tuple[str, ...]]]
    """concept -> relation (of `RELATIONS`) -> labels or names of groups."""
    settings: Settings
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Names that stand for several labels: a picture of a "tree" may show a palm tree or a pine tree."""
    about: str = ""
    """What else a reader should know: how the lists were made, what was left out."""

    def __post_init__(self):
        for prompt in self.prompts:
            for field_name, value, allowed in (("kind", prompt.kind, KINDS), ("scope", prompt.scope, SCOPES)):
                if value not in allowed:
                    raise EraseError(
                        f"suite {self.name}: {field_name} {value!r} of {prompt.text!r} is none of {', '.join(allowed)}"
                    )
        if odd := {r for related in self.relations.values() for r in related} - set(RELATIONS):
            raise EraseError(f"suite {self.name}: relation {min(odd)!r} is none of {', '.join(RELATIONS)}")

    @cached_property
    def digest(self) -> str:
        """sha256 of everything in the suite: two suites with one digest ask for the same."""
        return digest(self.to_json())

    def labels(self, aspect: str) -> tuple[str, ...]:
        """All labels of one aspect that the suite looks for, each once; groups are told by their members."""
        named = dict.fromkeys(getattr(prompt, aspect) for prompt in self.prompts)
        single = dict.fromkeys(m for name in named if name for m in self.groups.get(name, (name,)))
        return tuple(single)

    @property
    def concepts(self) -> tuple[str, ...]:
        """What can be erased and judged with this suite: everything that one of its prompts shows or is drawn in."""
        return tuple(dict.fromkeys(label for aspect in ASPECTS for label in self.concepts_of(aspect)))

    def concepts_of(self, aspect: str) -> tuple[str, ...]:
        """The concepts that one aspect's judge can see, groups by their own name."""
        return tuple(dict.fromkeys(label for prompt in self.prompts if (label := getattr(prompt, aspect))))

    def accepts(self, label: str) -> frozenset[str]:
        """The judge's labels that count as `label`: itself, or the members of a group."""
        return frozenset(self.groups.get(label, (label,)))

    def known(self, concepts: Iterable[str]) -> tuple[str, ...]:
        """`concepts` as the suite writes them.

        Raises:
            EraseError: the suite does not know one; the message lists what it knows.
        """
        spelled = {same_name(name): name for name in self.concepts}
        names = tuple(dict.fromkeys(concepts))
        for name in names:
            if same_name(name) not in spelled:
                known = ", ".join(self.concepts) or "no concept, it only has captions"
                raise EraseError(f"suite {self.name} does not know {name!r}: it knows {known}")
        return tuple(spelled[same_name(name)] for name in names)

    def related(self, concept: str) -> dict[str, str]:
        """Label -> its relation to `concept`, by the order of `RELATIONS` where there are several."""
        relations = self.relations.get(concept, {})
        return {label: r for r in reversed(RELATIONS) for label in relations.get(r, ())}

    def selected(self, concepts: Sequence[str]) -> "Suite":
        """The suite with only those prompts that are drawn where `concepts` are erased (see `SCOPES`)."""
        erased = set(self.known(concepts))
        near = erased.union(*(self.related(c) for c in erased))
        drawn = {ALWAYS: None, NEAR: near, OWN: erased}

        def wanted(prompt: Prompt) -> bool:
            names = drawn[prompt.scope]
            return names is None or prompt.shows in names

        return replace(self, prompts=tuple(prompt for prompt in self.prompts if wanted(prompt)))

    def parts(self, concepts: Sequence[str]) -> tuple[Part, ...]:
        """What each prompt is to an erasure of `concepts`, in the order of `PARTS`; parts without prompts are left out.

        An aspect of which nothing is erased (the styles, where an object is) gives the two parts `across/…`: what should be
        kept inside the concept's own pictures and outside of them.
        """
        erased = self.known(concepts)
        own = {i for i, p in enumerate(self.prompts) if p.shows in erased or p.style in erased}
        found: dict[tuple[str, str], list[int]] = {}
        for aspect in ASPECTS:
            labels = {getattr(prompt, aspect) for prompt in self.prompts}
            mine = [c for c in erased if c in labels]
            related = {label: r for c in reversed(mine) for label, r in self.related(c).items()}
            for i, prompt in enumerate(self.prompts):
                if label := getattr(prompt, aspect):
                    part = _part(prompt, label, aspect, mine, related) if mine else _across(i in own)
                    found.setdefault((part, aspect), []).append(i)
        order = list(PARTS)
        return tuple(
            Part(name, aspect, name in (EFFICACY, GENERALITY), tuple(indices))
            for (name, aspect), indices in sorted(found.items(), key=lambda item: order.index(item[0][0]))
        )

    def to_json(self) -> dict[str, Any]:
        """The suite as the data of its file: prompts that differ in their seeds alone are one entry, defaults are left out."""
        rows: dict[Prompt, list[int]] = {}
        for prompt in self.prompts:
            rows.setdefault(replace(prompt, seed=0), []).append(prompt.seed)
        plain = asdict(Prompt("", 0))
        return {
            "format": FORMAT, "name": self.name, "version": self.version, "source": self.source, "licence": self.licence,
            "about": self.about, "settings": {k: v for k, v in asdict(self.settings).items() if v is not None},
            "groups": {name: list(members) for name, members in self.groups.items()},
            "relations": {c: {r: list(names) for r, names in related.items()} for c, related in self.relations.items()},
            "prompts": [
                {k: v for k, v in asdict(row).items() if v != plain[k]} | {"seeds": seeds} for row, seeds in rows.items()
            ],
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Suite":
        """The suite of a file's data.

        Raises:
            EraseError: it is of another format, or lacks a part.
        """
        if data.get("format") != FORMAT:
            raise EraseError(f"a suite of format {data.get('format')!r}: this version reads format {FORMAT}")
        try:
            return cls(
                name=data["name"], version=data["version"], source=data["source"], licence=data["licence"],
                prompts=tuple(
                    Prompt(seed=seed, **{k: v for k, v in row.items() if k != "seeds"})
                    for row in data["prompts"] for seed in row["seeds"]
                ),
                relations={c: {r: tuple(n) for r, n in rel.items()} for c, rel in data["relations"].items()},
                settings=Settings(**data["settings"]),
                groups={name: tuple(members) for name, members in data["groups"].items()},
                about=data["about"],
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError) as error:
            raise EraseError(
                f"suite {data.get('name', '?')!r} lacks or garbles a part ({error}): see docs/bench.md"
            ) from error


FORMAT = 1


def shipped() -> tuple[str, ...]:
    """Names of the suites that come with the package."""
    folder = resources.files("diffusers_erase.bench") / "data" / "suites"
    return tuple(sorted(entry.name.removesuffix(".json") for entry in folder.iterdir()))


def load_suite(source: str | Path) -> Suite:
    """The suite `source`: a name of `shipped()`, or the path of a suite's JSON file.

    Raises:
        EraseError: there is no such suite, or the file is none.
    """
    if str(source) in shipped():
        text = (resources.files("diffusers_erase.bench") / "data" / "suites" / f"{source}.json").read_text("utf-8")
    elif Path(source).is_file():
        text = Path(source).read_text("utf-8")
    else:
        raise EraseError(f"no suite {str(source)!r}: expected a JSON file, or one of {', '.join(shipped())}")
    try:
        data = json.loads(text)
    except ValueError as error:
        raise EraseError(f"{source} is no suite: {error}") from error
    return Suite.from_json(data if isinstance(data, dict) else {})


def _part(prompt: Prompt, label: str, aspect: str, erased: Sequence[str], related: Mapping[str, str]) -> str:
    if label in erased:
        other_name = aspect == SHOWS and prompt.kind in ("paraphrase", "coreference")
        return GENERALITY if other_name else EFFICACY
    if label not in related:
        return UNRELATED
    relation = related[label]
    return "sensitivity/subset-superset" if relation in ("subset", "superset") else f"sensitivity/{relation}"


def _across(inside: bool) -> str:
    return "across/inside" if inside else "across/outside"
