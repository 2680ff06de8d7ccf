"""From judged pairs of pictures to numbers and a page that one can hand over."""

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from .metrics import Estimate, share_kept
from .suites import CONCEPT, NEIGHBOUR, PARAPHRASE, ROLES, UNRELATED, Suite


@dataclass(frozen=True)
class Judged:
    """What a judge saw in one set of pictures: one object and one style each."""

    objects: tuple[str, ...]
    styles: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """An erasure before and after, case by case, and the estimates that follow."""

    suite: Suite
    before: Judged
    after: Judged
    pictures: tuple[tuple[Path, Path], ...]
    """(before, after) of every case."""
    facts: dict[str, str]
    """What else a reader should know: adapter, size, settings, seconds."""

    @property
    def erases_style(self) -> bool:
        """Whether the concept is a style rather than an object."""
        return all(self.suite.cases[i].style == self.suite.concept for i in self.suite.role(CONCEPT))

    @property
    def estimates(self) -> dict[str, Estimate]:
        """Shares by name. Of the concept's own pictures what is *left* counts, of all others what is *kept*."""
        concept = self._styles if self.erases_style else self._objects
        others = self.suite.role(NEIGHBOUR) + self.suite.role(UNRELATED)
        found = {
            "concept left": concept(self.suite.role(CONCEPT)),
            "paraphrases left": concept(self.suite.role(PARAPHRASE)),
            "neighbours kept": self._objects(self.suite.role(NEIGHBOUR)),
            "unrelated kept": self._objects(self.suite.role(UNRELATED)),
            "styles kept": self._styles(others),
        }
        if self.erases_style:
            found["objects kept in the style"] = self._objects(self.suite.role(CONCEPT))
        return {name: estimate for name, estimate in found.items() if estimate.n}

    def save(self, folder: str | Path) -> Path:
        """Write `index.html` (self-contained) and `report.json`; returns the page's path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(
            json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        page = folder / "index.html"
        page.write_text(self.to_html(), encoding="utf-8")
        return page

    def to_json(self) -> dict[str, Any]:
        """Everything but the pictures' bytes."""
        rows = zip(
            self.suite.cases,
            self.before.objects,
            self.after.objects,
            self.before.styles,
            self.after.styles,
            strict=True,
        )
        return {
            "concept": self.suite.concept,
            "suite": self.suite.name,
            "settings": {"steps": self.suite.steps, "guidance": self.suite.guidance},
            "facts": self.facts,
            "estimates": {name: asdict(e) for name, e in self.estimates.items()},
            "cases": [asdict(case) | {"object": [b, a], "style": [bs, as_]} for case, b, a, bs, as_ in rows],
        }

    def to_html(self) -> str:
        """The page: verdict, table, and all pairs of pictures, the worst first."""
        template = Template((resources.files("diffusers_erase.bench") / "page.html").read_text(encoding="utf-8"))
        return template.substitute(
            concept=html.escape(self.suite.concept),
            verdict=html.escape(self._verdict()),
            rows="\n".join(_table_row(name, estimate) for name, estimate in self.estimates.items()),
            facts="\n".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in self.facts.items()),
            sections="\n".join(self._section(role) for role in ROLES if self.suite.role(role)),
        )

    def _verdict(self) -> str:
        found = self.estimates
        parts = (
            [f"{found['concept left'].value:.0%} of “{self.suite.concept}” is left"] if "concept left" in found else []
        )
        parts += [
            f"{found[n].value:.0%} of {n.removesuffix(' kept')} kept"
            for n in ("neighbours kept", "unrelated kept")
            if n in found
        ]
        return "; ".join(parts) + "."

    def _objects(self, indices: Sequence[int]) -> Estimate:
        return share_kept(
            [self.suite.cases[i].shows for i in indices],
            _at(self.before.objects, indices),
            _at(self.after.objects, indices),
        )

    def _styles(self, indices: Sequence[int]) -> Estimate:
        return share_kept(
            [self.suite.cases[i].style for i in indices],
            _at(self.before.styles, indices),
            _at(self.after.styles, indices),
        )

    def _trouble(self, index: int) -> int:
        """How bad a pair is for the erasure: 2 a failure of it, 1 nothing to see (wrong before already), 0 as it should be."""
        case = self.suite.cases[index]
        seen = (
            (self.before.styles, self.after.styles)
            if self.erases_style and case.role == CONCEPT
            else (self.before.objects, self.after.objects)
        )
        wanted = case.style if self.erases_style and case.role == CONCEPT else case.shows
        if seen[0][index] != wanted:
            return 1
        return 2 if (seen[1][index] == wanted) == (case.role in (CONCEPT, PARAPHRASE)) else 0

    def _section(self, role: str) -> str:
        order = sorted(self.suite.role(role), key=lambda i: -self._trouble(i))
        figures = "\n".join(self._figure(i) for i in order)
        return f'<section><h2>{html.escape(ROLES[role])}</h2>\n<div class="grid">\n{figures}\n</div></section>'

    def _figure(self, index: int) -> str:
        case, trouble = self.suite.cases[index], ("good", "void", "bad")[self._trouble(index)]
        saw = f"{self.before.objects[index]} → {self.after.objects[index]}"
        if self.before.styles[index] != self.after.styles[index]:
            saw += f" ({self.before.styles[index]} → {self.after.styles[index]})"
        images = "".join(
            f'<img alt="{when}" src="{_data_uri(path)}">'
            for when, path in zip(("before", "after"), self.pictures[index], strict=True)
        )
        caption = f"<b>{html.escape(case.prompt)}</b><span>seed {case.seed} · seen: {html.escape(saw)}</span>"
        return f'<figure class="{trouble}">{images}<figcaption>{caption}</figcaption></figure>'


def _at(values: Sequence[str], indices: Sequence[int]) -> list[str]:
    return [values[i] for i in indices]


def _table_row(name: str, e: Estimate) -> str:
    kind = "left" if name.endswith("left") else "kept"
    bar = f'<div class="bar {kind}"><i style="left:{e.low:.1%};width:{e.high - e.low:.1%}"></i><b style="left:{e.value:.1%}"></b></div>'
    return f"<tr><th>{html.escape(name)}</th><td>{e.value:.0%}</td><td>{e.low:.0%} – {e.high:.0%}</td><td>{e.n}</td><td>{bar}</td></tr>"


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
