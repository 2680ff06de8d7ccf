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
from .suites import EFFICACY, GENERALITY, PARTS, SHOWS, UNRELATED, Part, Suite


@dataclass(frozen=True)
class Judged:
    """What a judge saw in one set of pictures: one object and one style each."""

    objects: tuple[str, ...]
    styles: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """An erasure before and after, picture by picture, and the estimates that follow."""

    suite: Suite
    concepts: tuple[str, ...]
    before: Judged
    after: Judged
    pictures: tuple[tuple[Path, Path], ...]
    """(before, after) of every prompt."""
    facts: dict[str, str]
    """What else a reader should know: adapter, size, settings, seconds."""

    @property
    def estimates(self) -> dict[str, Estimate]:
        """Shares by part. Of the concept's own pictures what is *left* counts, of all others what is *kept*."""
        found = {_title(part): self._share(part) for part in self.suite.parts(self.concepts)}
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
            self.suite.prompts,
            self.before.objects,
            self.after.objects,
            self.before.styles,
            self.after.styles,
            strict=True,
        )
        return {
            "concepts": self.concepts,
            "suite": self.suite.name,
            "settings": asdict(self.suite.settings),
            "facts": self.facts,
            "estimates": {name: asdict(e) for name, e in self.estimates.items()},
            "cases": [asdict(prompt) | {"object": [b, a], "seen": [bs, as_]} for prompt, b, a, bs, as_ in rows],
        }

    def to_html(self) -> str:
        """The page: verdict, table, and all pairs of pictures, the worst first."""
        template = Template((resources.files("diffusers_erase.bench") / "page.html").read_text(encoding="utf-8"))
        return template.substitute(
            concept=html.escape(", ".join(self.concepts)),
            verdict=html.escape(self._verdict()),
            rows="\n".join(_table_row(name, estimate) for name, estimate in self.estimates.items()),
            facts="\n".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in self.facts.items()),
            sections="\n".join(self._section(part) for part in self._shown()),
        )

    def _verdict(self) -> str:
        found = self.estimates
        parts = (
            [f"{found['concept left'].value:.0%} of “{', '.join(self.concepts)}” is left"]
            if "concept left" in found
            else []
        )
        parts += [
            f"{found[n].value:.0%} of {n.removesuffix(' kept')} kept"
            for n in ("neighbours kept", "unrelated kept")
            if n in found
        ]
        return "; ".join(parts) + "."

    def _seen(self, aspect: str) -> tuple[Sequence[str], Sequence[str]]:
        return (
            (self.before.objects, self.after.objects) if aspect == SHOWS else (self.before.styles, self.after.styles)
        )

    def _share(self, part: Part) -> Estimate:
        before, after = self._seen(part.aspect)
        wanted = [getattr(self.suite.prompts[i], part.aspect) for i in part.indices]
        return share_kept(wanted, _at(before, part.indices), _at(after, part.indices))

    def _shown(self) -> list[Part]:
        return [part for part in self.suite.parts(self.concepts) if not part.name.startswith("across")]

    def _trouble(self, part: Part, index: int) -> int:
        """How bad a pair is for the erasure: 2 a failure of it, 1 nothing to see (wrong before already), 0 as it should be."""
        wanted = getattr(self.suite.prompts[index], part.aspect)
        before, after = self._seen(part.aspect)
        if before[index] != wanted:
            return 1
        return 2 if (after[index] == wanted) == part.gone else 0

    def _section(self, part: Part) -> str:
        order = sorted(part.indices, key=lambda i: -self._trouble(part, i))
        figures = "\n".join(self._figure(part, i) for i in order)
        return f'<section><h2>{html.escape(PARTS[part.name])}</h2>\n<div class="grid">\n{figures}\n</div></section>'

    def _figure(self, part: Part, index: int) -> str:
        prompt, trouble = self.suite.prompts[index], ("good", "void", "bad")[self._trouble(part, index)]
        saw = f"{self.before.objects[index]} → {self.after.objects[index]}"
        if self.before.styles[index] != self.after.styles[index]:
            saw += f" ({self.before.styles[index]} → {self.after.styles[index]})"
        images = "".join(
            f'<img alt="{when}" src="{_data_uri(path)}">'
            for when, path in zip(("before", "after"), self.pictures[index], strict=True)
        )
        caption = f"<b>{html.escape(prompt.text)}</b><span>seed {prompt.seed} · seen: {html.escape(saw)}</span>"
        return f'<figure class="{trouble}">{images}<figcaption>{caption}</figcaption></figure>'


def _title(part: Part) -> str:
    short = {EFFICACY: "concept left", GENERALITY: "paraphrases left", "sensitivity/visual": "neighbours kept"}
    short |= {UNRELATED: "unrelated kept", "across/inside": "other aspect kept in the concept's pictures"}
    return short.get(part.name, "styles kept" if part.aspect != SHOWS else "objects kept")


def _at(values: Sequence[str], indices: Sequence[int]) -> list[str]:
    return [values[i] for i in indices]


def _table_row(name: str, e: Estimate) -> str:
    kind = "left" if name.endswith("left") else "kept"
    bar = f'<div class="bar {kind}"><i style="left:{e.low:.1%};width:{e.high - e.low:.1%}"></i><b style="left:{e.value:.1%}"></b></div>'
    return f"<tr><th>{html.escape(name)}</th><td>{e.value:.0%}</td><td>{e.low:.0%} – {e.high:.0%}</td><td>{e.n}</td><td>{bar}</td></tr>"


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
