"""The concept graph: who is hurt by erasing whom, predicted from text states, and measured on pictures where wanted.

AGE's section 3 (arXiv 2501.18950): an edge from an erased concept to another is what the other lost. Its three findings are
numbers here: damage is *local* (larger within a group than between groups), *asymmetric*, and some names are *fragile*: hurt
whatever is erased.
"""

import html
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import hub, packs, vocabulary
from .adapter import ErasureAdapter
from .bench import images
from .bench.judges import Judge, sees
from .bench.suites import Prompt, Settings, Suite
from .erasing import erase
from .errors import EraseError
from .outlook import squared
from .sites import TEXT, text_readers
from .status import registry_of
from .targets import readout
from .task import method_named
from .text import Encoder, roles_of
from .verbs import load_erasure, unload_erasure

Measure = Callable[[str, list[Image.Image], list[Image.Image]], float]
"""What a name lost, from its pictures before and after; NaN where that cannot be told."""

CELL = 16
"""Side of a cell of the matrix, in pixels."""


@dataclass(frozen=True)
class Findings:
    """AGE's three findings as numbers, of all pairs whose damage is known."""

    within: float
    """Mean damage of the other names of the erased concept's group."""
    between: float
    """Mean damage of names of other groups."""
    asymmetry: float
    """Mean of |damage of b by erasing a − damage of a by erasing b|, as a share of the mean damage."""
    fragile: tuple[tuple[str, float], ...]
    """The names that are hurt most, whatever is erased, with their mean damage: those two standard deviations above the mean."""


@dataclass(frozen=True)
class ConceptGraph:
    """Who is hurt by erasing whom.

    Example:
        >>> graph = concept_graph(pipe, ["cat", "dog", "car", "bus"], groups=["animal", "animal", "vehicle", "vehicle"])
        >>> graph.findings().within > graph.findings().between
        True
        >>> graph.save("graph")
    """

    names: tuple[str, ...]
    groups: tuple[str, ...]
    """The group of each name; all "" where there are none."""
    targets: tuple[tuple[str, ...], ...]
    """Where each name was sent; `()` is the empty prompt."""
    predicted: tuple[tuple[float, ...], ...]
    """`predicted[a][b]`: the share of the way to the empty prompt by which b's keys and values move when a is erased."""
    measured: tuple[tuple[float, ...], ...] | None = None
    """`measured[a][b]`: what b lost on pictures when a was erased; NaN where it is not known."""

    @property
    def damage(self) -> np.ndarray:
        """`[n, n]`: measured where there are pictures, else predicted; the diagonal is what the erased name itself lost."""
        return np.array(self.predicted if self.measured is None else self.measured)

    def edges(self) -> Iterator[tuple[int, int, float]]:
        """(erased, hurt, damage) of all pairs whose damage is known."""
        damage = self.damage
        for a, b in np.argwhere(np.isfinite(damage)).tolist():
            if a != b:
                yield a, b, float(damage[a, b])

    def digraph(self) -> Any:
        """A `networkx.DiGraph`: names with their group and target, edges from the erased to the hurt with `damage` and `predicted`."""
        try:
            import networkx
        except ImportError:
            raise EraseError(
                "a digraph needs the library networkx: install diffusers-erase with the extra [graph]"
            ) from None
        graph = networkx.DiGraph()
        for name, group, target in zip(self.names, self.groups, self.targets, strict=True):
            graph.add_node(name, group=group, target=" + ".join(target))
        for a, b, damage in self.edges():
            graph.add_edge(self.names[a], self.names[b], damage=damage, predicted=self.predicted[a][b])
        return graph

    def findings(self) -> Findings:
        """Locality, asymmetry and fragile names."""
        edges = list(self.edges())
        same = [d for a, b, d in edges if self.groups[a] == self.groups[b]]
        other = [d for a, b, d in edges if self.groups[a] != self.groups[b]]
        known = {(a, b): d for a, b, d in edges}
        apart = [abs(d - known[b, a]) for (a, b), d in known.items() if a < b and (b, a) in known]
        hurt = {n: _mean([d for _, b, d in edges if b == i]) for i, n in enumerate(self.names)}
        limit = np.nanmean(list(hurt.values())) + 2 * np.nanstd(list(hurt.values()))
        fragile = sorted(((n, d) for n, d in hurt.items() if d > limit), key=lambda pair: -pair[1])
        whole = _mean([d for *_, d in edges])
        return Findings(_mean(same), _mean(other), _mean(apart) / whole if whole else math.nan, tuple(fragile))

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data; what is not known is null."""
        data = asdict(self) | {"findings": asdict(self.findings())}
        return json.loads(json.dumps(data, allow_nan=True), parse_constant=lambda _: None)

    def matrix(self) -> str:
        """The damage as an SVG picture: a row for each erased name, a column for each that may be hurt."""
        damage, n = self.damage, len(self.names)
        most = max((d for *_, d in self.edges()), default=0) or 1
        side = CELL * max(map(len, self.names)) // 2 + CELL
        text = '<text x="{}" y="{}" text-anchor="{}"{}>{}</text>'
        marks = []
        for i, name in enumerate(map(html.escape, self.names)):
            place = side + CELL * i
            marks.append(text.format(side - 4, place + 12, "end", "", name))
            turn = f' transform="rotate(-90 {place + 12} {side - 4})"'
            marks.append(text.format(place + 12, side - 4, "start", turn, name))
        for a in range(n):
            for b in range(n):
                value = damage[a, b]
                tone = "none" if not np.isfinite(value) else "#888" if a == b else _tone(value / most)
                told = f"erasing {self.names[a]}: {self.names[b]} {value:.2%}"
                marks.append(
                    f'<rect x="{side + CELL * b}" y="{side + CELL * a}" width="{CELL - 1}" height="{CELL - 1}" fill="{tone}">'
                    f"<title>{html.escape(told)}</title></rect>"
                )
        whole = side + CELL * n
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole} {whole}" width="{whole}" '
            f'font-family="sans-serif" font-size="11" fill="#777">{"".join(marks)}</svg>'
        )

    def save(self, folder: str | Path) -> Path:
        """Write `index.html` (self-contained), `matrix.svg` and `graph.json`; returns the page's path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        data, told = self.to_json(), self.findings()
        fragile = ", ".join(f"{name} {damage:.2%}" for name, damage in told.fragile) or "none"
        page = Template((resources.files("diffusers_erase") / "data" / "graph.html").read_text(encoding="utf-8"))
        hub.write_text(folder / "graph.json", json.dumps(data, indent=1, ensure_ascii=False) + "\n")
        hub.write_text(folder / "matrix.svg", self.matrix() + "\n")
        hub.write_text(
            folder / "index.html",
            page.substitute(
                kind="predicted, no picture drawn" if self.measured is None else "measured on pictures",
                within=f"{told.within:.2%}", between=f"{told.between:.2%}", asymmetry=f"{told.asymmetry:.0%}",
                fragile=html.escape(fragile), matrix=self.matrix(),
                data=json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"),
            ),
        )  # fmt: skip
        return folder / "index.html"


def concept_graph(
    pipe: Any,
    names: Sequence[str],
    *,
    groups: Sequence[str] | None = None,
    target: str | Sequence[str] = "null",
    measure: Measure | None = None,
    contexts: Sequence[str] = ("a photo of a {}",),
    seeds: Sequence[int] = (0,),
    settings: Settings | None = None,
    folder: str | Path = "graph-pictures",
    on_name: Callable[[int], Any] = lambda n: None,
    **options: Any,
) -> ConceptGraph:
    """Each of `names` erased alone, and what that does to the others. Without `measure` no picture is drawn.

    Args:
        groups: of each name, for locality.
        target: where each is sent; as in `erase`, so "auto" searches for each.
        measure: what a name lost, by its pictures before and after: `capability(judge)`, `moved`, or your own function.
        contexts, seeds, settings: what is drawn of each name, and how.
        folder: where pictures are kept; those that are there are not drawn again.
        on_name: called with 1 after each name, for progress.
        options: of `erase`, without a gate; the method is a closed form.

    Raises:
        EraseError: names, groups or options that make no sense; or pictures are asked for while an erasure is loaded.
    """
    names = tuple(names)
    if len(names) < 2 or len(set(names)) < len(names):
        raise EraseError(f"a concept graph has at least two names, each once: got {', '.join(names) or 'none'}")
    if groups is not None and len(groups) != len(names):
        raise EraseError(f"groups has one for each name: got {len(groups)} for {len(names)} names")
    method, _ = method_named(options.get("method", "ridge"), {})
    if method.training is not None or options.get("gate") is not None:
        raise EraseError(
            f"a concept graph predicts what closed forms without a gate do: got {method.name!r}, gate {options.get('gate')}"
        )
    if measure and registry_of(text_readers(pipe)) is not None:
        raise EraseError(
            "a concept graph is measured on the model alone: call unload_erasure() first, and load them again after it"
        )
    predict = _predictor(pipe, names, options)
    prompts = [Prompt(c.replace("{}", n), seed, n) for n in names for c in contexts for seed in seeds]
    suite = Suite("graph", "1", "names", "", tuple(prompts), {}, settings or Settings(50, 7.5))
    before = _drawn(pipe, suite, folder) if measure else {}
    targets, predicted, measured = [], [], []
    for name in names:
        adapter = erase(pipe, name, target=target, **options)
        targets.append(adapter.recipes[0].targets)
        predicted.append(predict(adapter))
        if measure:
            load_erasure(pipe, adapter)
            try:
                after = _drawn(pipe, suite, folder)
            finally:
                unload_erasure(pipe)
            measured.append(tuple(measure(other, before[other], after[other]) for other in names))
        on_name(1)
    return ConceptGraph(
        names,
        tuple(groups or [""] * len(names)),
        tuple(targets),
        tuple(predicted),
        tuple(measured) if measure else None,
    )


def capability(judge: Judge) -> Measure:
    """What `judge` sees no more: the share of a name's pictures that show it, before minus after (AGE's measure)."""

    def lost(name: str, before: list[Image.Image], after: list[Image.Image]) -> float:
        shares = [_mean([float(hit) for hit in sees(judge, name)(p) if hit is not None]) for p in (before, after)]
        return shares[0] - shares[1]

    return lost


def moved(name: str, before: list[Image.Image], after: list[Image.Image]) -> float:
    """How far the pictures moved: mean over them of the root mean square change of pixels, 0 to 1. Needs no judge."""
    pairs = [[np.asarray(p.convert("RGB"), float) / 255 for p in pair] for pair in zip(before, after, strict=True)]
    return _mean([float(np.sqrt(np.mean((a - b) ** 2))) for a, b in pairs])


def _predictor(
    pipe: Any, names: Sequence[str], options: dict[str, Any]
) -> Callable[[ErasureAdapter], tuple[float, ...]]:
    """Of each adapter the damage of all names, as the target search defines it (`outlook.Surroundings.damage`)."""
    encoder, metric = Encoder(pipe), readout(pipe)
    templates = options.get("templates") or packs.recipe_of(pipe, options.get("pack")).templates
    roles = roles_of(options.get("tokens") or "last+eot", 1)
    null = encoder.null_rows(roles)
    rows = vocabulary.table(encoder, names, roles, templates)
    whole = squared(rows - torch.stack([null[role] for role in roles]), metric)

    def predict(adapter: ErasureAdapter) -> tuple[float, ...]:
        return tuple((squared(rows @ adapter.edits[TEXT].matrix, metric) / whole).sqrt().mean(1).tolist())

    return predict


def _drawn(pipe: Any, suite: Suite, folder: str | Path) -> dict[str, list[Image.Image]]:
    """The suite's pictures, by what they should show."""
    found: dict[str, list[Image.Image]] = {}
    for prompt, picture in zip(suite.prompts, images.read(images.generate(pipe, suite, folder)), strict=True):
        found.setdefault(prompt.shows, []).append(picture)
    return found


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _tone(share: float) -> str:
    """White to red as the share goes from 0 to 1."""
    level = round(255 * (1 - min(max(share, 0.0), 1.0)))
    return f"rgb(255,{level},{level})"
