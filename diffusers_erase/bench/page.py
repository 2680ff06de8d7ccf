"""A report as one folder: a page for people, JSON for machines, a table for a model card.

The page is self-contained, readable without a network, at any width, in light and dark. The number of pictures is bounded
(`PAIRS` of each part, thumbnails of at most `SIDE` pixels), and so is the page.
"""

import base64
import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from .. import hub
from .beside import score
from .metrics import Estimate
from .report import OUTCOMES, Dimension, Pair, Report, Trial, percent
from .suites import PARTS, RELATIONS, UNRELATED

PAIRS, SIDE = 24, 160
"""Pairs of pictures shown of each part of a trial, and the longest side of a picture, in pixels."""

TONE = {
    "gone": "good",
    "kept": "good",
    "mostly gone": "mid",
    "mostly kept": "mid",
    "not seen before": "none",
    "not known": "mid",
}
"""Verdicts that are not bad."""


def save(report: Report, folder: str | Path) -> Path:
    """Write `index.html`, `report.json` and `results.md`, each whole or not at all; returns the page's path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    hub.write_text(folder / "report.json", json.dumps(report.to_json(), indent=1, ensure_ascii=False) + "\n")
    hub.write_text(folder / "results.md", report.to_markdown())
    hub.write_text(folder / "index.html", render(report))
    return folder / "index.html"


def render(report: Report) -> str:
    """The page."""
    template = Template((resources.files("diffusers_erase.bench") / "page.html").read_text(encoding="utf-8"))
    concepts = list(dict.fromkeys(c for trial in report.trials for c in trial.concepts))
    return template.substitute(
        title=_text(f"Erasing {_listed(concepts)}"),
        about=_text(f"{report.model['name']} · suite {report.suite.name} {report.suite.version} · {report.made.get('date', '')}"),
        verdicts="\n".join(_verdict(trial) for trial in report.trials),
        many="many" if len(report.trials) > 2 else "",
        dimensions=_dimensions(report.trials),
        untested=_items(report.untested),
        pictures="\n".join(_pictures(trial, first=i == 0) for i, trial in enumerate(report.trials)),
        matrix=_matrix(report.trials),
        probes=_probes(report.trials),
        scores=_scores(report),
        facts=_facts(report),
        command=_text(report.command),
        side=min(SIDE, _width(report)),
    )  # fmt: skip


def _verdict(trial: Trial) -> str:
    """One line: what is left of the concept, and what else was hurt most."""
    seen = [d for d in trial.dimensions if d.share.n and not d.part.name.startswith("across")]
    said = [_said(d) for d in seen if d.part.gone]
    if others := [d for d in seen if not d.part.gone]:
        said += [_said(d) for d in others if d.part.name == UNRELATED]
        least = min(others, key=lambda d: d.share.value)
        said += [_said(least)] if least.part.name != UNRELATED and least.verdict != "kept" else []
    hurt = sorted(
        (share.estimate().value, label, share.n)
        for (aspect, label), share in trial.labels.items()
        if trial.relation(aspect, label) != "erased" and share.n > 2
    )
    if hurt and hurt[0][0] < 0.95:
        value, label, n = hurt[0]
        said.append(f"hurt most: {_text(label)} <small>{percent(value)} of {n} kept</small>")
    note = "" if trial.adapter is not None else ", the control where nothing is erased"
    return f"<li><strong>{_text(trial.name)}</strong>{note}: {'; '.join(said) or 'nothing was judged'}.</li>"


def _said(d: Dimension) -> str:
    return f'{_text(d.title)} <b class="{_tone(d)}">{d.verdict}</b> <small>{percent(d.share.value)}</small>'


def _dimensions(trials: Sequence[Trial]) -> str:
    """Parts x trials: a verdict, the share, and a bar with its interval."""
    found = [{(d.part.name, d.part.aspect): d for d in trial.dimensions} for trial in trials]
    keys = sorted({key for each in found for key in each}, key=lambda key: list(PARTS).index(key[0]))
    rows = []
    for place, key in enumerate(keys):
        first = next(each[key] for each in found if key in each)
        what = f'<td data-v="{place}">{_text(first.title)} <small>{"left" if first.part.gone else "kept"}</small></td>'
        rows.append(f"<tr>{what}{''.join(_share(each.get(key)) for each in found)}</tr>")
    return _table(["pictures of", *(trial.name for trial in trials)], rows)


def _share(d: Dimension | None) -> str:
    if d is None:
        return '<td data-v="-1"></td>'
    e, tone = d.share, _tone(d)
    interval = f'<small class="wide">{100 * e.low:.0f} – {100 * e.high:.0f}, n {e.n}</small>' if e.n else ""
    told = f'<div class="told"><b class="{tone}">{d.verdict}</b> {percent(e.value)} {interval}</div>'
    return f'<td data-v="{e.value}">{told}{_bar(e, tone)}</td>'


def _matrix(trials: Sequence[Trial]) -> str:
    """Labels x trials: what is left or kept of each."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.labels))
    rows = []
    for aspect, label in keys:
        relations = dict.fromkeys(r for t in trials if (r := t.relation(aspect, label)))
        told = ", ".join("erased" if r == "erased" else RELATIONS[r] for r in relations)
        cells = [_cell(label), _cell(told), *(_heat(trial, aspect, label) for trial in trials)]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return _table(["label", "is to the erased", *(trial.name for trial in trials)], rows)


def _heat(trial: Trial, aspect: str, label: str) -> str:
    share = trial.labels[aspect, label].estimate() if (aspect, label) in trial.labels else None
    if share is None or not share.n:
        return '<td class="num" data-v="-1">–</td>'
    trouble = share.value if trial.relation(aspect, label) == "erased" else 1 - share.value
    heat = f' style="--heat:{trouble:.0%}"' if trouble > 0.004 else ""
    return f'<td class="num heat" data-v="{share.value}"{heat}>{percent(share.value)} <small>{_counted(share)}</small></td>'


def _pictures(trial: Trial, first: bool) -> str:
    """The trial's parts, each with its worst pairs."""
    sections = []
    for d in trial.dimensions:
        pairs = sorted(trial.pairs(d.part), key=lambda pair: OUTCOMES.index(pair.outcome))
        if d.part.name.startswith("across"):
            pairs = [pair for pair in pairs if pair.outcome == "bad"]
        drawn = [pair for pair in pairs if all(path.is_file() for path in trial.pictures[pair.index])]
        if drawn:
            bad = sum(pair.outcome == "bad" for pair in pairs)
            more = f"; {len(pairs) - PAIRS} more, worst shown" if len(pairs) > PAIRS else ""
            failed = {True: "still show it", False: "lost it"}[d.part.gone]
            figures = "\n".join(_figure(trial, pair) for pair in drawn[:PAIRS])
            sections.append(
                f"<h3>{_text(d.title)} <small>{bad} of {d.share.n} {failed}{more}</small></h3>\n"
                f'<div class="grid">\n{figures}\n</div>'
            )
    opened = " open" if first else ""
    return f"<details{opened}><summary>{_text(trial.name)}</summary>\n{''.join(sections)}</details>"


def _figure(trial: Trial, pair: Pair) -> str:
    prompt, aspect = trial.suite.prompts[pair.index], pair.part.aspect
    images = "".join(
        f'<img alt="{when}" src="{_thumbnail(path)}">'
        for when, path in zip(("before", "after"), trial.pictures[pair.index], strict=True)
    )
    before, after = (seen[aspect][pair.index].label or "?" for seen in (trial.before, trial.after))
    saw = before if before == after else f"{before} → {after}"
    caption = f"<b>{_text(saw)}</b>{_text(prompt.text)} <i>seed {prompt.seed}</i>"
    return f'<figure class="{pair.outcome}">{images}<figcaption>{caption}</figcaption></figure>'


def _probes(trials: Sequence[Trial]) -> str:
    results = [(trial, result) for trial in trials for result in trial.probes]
    if not results:
        return ""
    rows = []
    for trial, r in results:
        tone = "bad" if r["verdict"] == "came back" else "good" if r["verdict"].startswith("not more") else "none"
        back, control, chance = (score(r[name]) for name in ("came_back", "control", "chance"))
        cells = [
            _cell(r["name"]), _cell(trial.name), f'<td><b class="{tone}">{_text(r["verdict"])}</b></td>',
            _number(back.value), f"<td>{_bar(back, tone)}</td>", _number(control.value, wide=True),
            _number(chance.value, wide=True), f'<td class="wide">{_text(r["strongest"])}</td>',
            f'<td class="wide num" data-v="{back.n}">{_counted(back)}</td>',
        ]  # fmt: skip
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = ["probe", "erasure", "", "came back", "interval", "unedited", "by chance", "strongest way", "n"]
    table = _table(heads, rows, wide={"unedited", "by chance", "strongest way", "n"})
    return (
        '<section class="probes"><h2>Attacks without training</h2>\n'
        '<p class="note">Of the strongest way\'s pictures, the share that shows the concept again; beside it the same pictures by the '
        f"unedited model, and the same procedure without aim.</p>\n{table}</section>"
    )


def _scores(report: Report) -> str:
    names = dict.fromkeys(name for trial in report.trials for name in (*trial.scores, *trial.measures))
    rows = []
    for name in names:
        cells = []
        for trial in report.trials:
            found = trial.scores.get(name) or trial.measures.get(name)
            cells.append(f'<td class="num" data-v="{found.value}">{_text(found)}</td>' if found else "<td></td>")
        rows.append(f"<tr>{_cell(name)}{''.join(cells)}</tr>")
    tables = [_table(["score", *(trial.name for trial in report.trials)], rows)] if rows else []
    if report.comparisons:
        rows = [
            f'<tr>{_cell(part)}{_cell(f"{b} minus {a}")}<td class="num" data-v="{c.difference.value}">{_points(c.difference)}</td>'
            f'<td class="num" data-v="{c.p}">{c.p:.2g}</td><td class="wide num" data-v="{c.difference.n}">{c.difference.n}</td></tr>'
            for (a, b, part), c in report.comparisons.items()
        ]
        tables.append("<h3>Erasures against each other <small>McNemar's exact test on the same pictures</small></h3>")
        tables.append(_table(["pictures of", "difference of", "points", "p", "n"], rows, wide={"n"}))
    return "\n".join(tables)


def _points(e: Estimate) -> str:
    return f"{100 * e.value:+.1f} [{100 * e.low:+.1f}, {100 * e.high:+.1f}]"


def _facts(report: Report) -> str:
    suite = report.suite
    told: dict[str, Any] = {
        "model": f"{report.model['name']}, digest {report.model['digest'][:24]}",
        "suite": f"{suite.name} {suite.version}, digest {suite.digest[:24]}",
        "source": f"{suite.source}. Licence: {suite.licence}. {suite.about}",
        "drawn with": _pairs_of(asdict(suite.settings)),
    }
    for aspect, judge in report.judges.items():
        told[f"judge of {aspect!r}"] = _pairs_of({k: v for k, v in judge.items() if k != "labels"})
    for measure in report.measures:
        told[measure["name"]] = _pairs_of({k: v for k, v in measure.items() if k != "name"})
    for trial in report.trials:
        told[trial.name] = _adapter(trial)
    told |= {"made with": _pairs_of(report.made), "took": f"{report.seconds:.0f} s; what was cached took none"}
    return "\n".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in told.items())


def _adapter(trial: Trial) -> str:
    drawn = f"{len(trial.suite.prompts)} pairs of pictures"
    if trial.adapter is None:
        return f"no adapter; {drawn}"
    return f"{_pairs_of({k: v for k, v in trial.adapter.items() if k != 'recipes'})}; " + "; ".join(
        [*(_pairs_of(recipe) for recipe in trial.adapter.get("recipes", ())), drawn]
    )


def _pairs_of(told: Mapping[str, Any]) -> str:
    shown = {k: v for k, v in told.items() if v is not None and v != () and v != [] and v != {}}
    return ", ".join(f"{k} {_listed(v) if isinstance(v, list | tuple) else v}" for k, v in shown.items())


def _listed(names: Iterable[Any]) -> str:
    listed = [f"“{name}”" for name in names]
    return " and ".join([", ".join(listed[:-1]), listed[-1]]) if len(listed) > 1 else "".join(listed)


def _table(heads: Sequence[str], rows: Sequence[str], wide: Iterable[str] = ()) -> str:
    cells = "".join(f"<th{' class=wide' if head in wide else ''}>{_text(head)}</th>" for head in heads)
    body = "\n".join(rows)
    return f'<div class="scroll"><table>\n<thead><tr>{cells}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _cell(text: str, order: Any = None) -> str:
    value = "" if order is None else f' data-v="{order}"'
    return f"<td{value}>{_text(text)}</td>"


def _number(value: float, wide: bool = False) -> str:
    return f'<td class="num{" wide" if wide else ""}" data-v="{value}">{percent(value)}</td>'


def _counted(share: Estimate) -> str:
    return f"{share.n}" if share.coverage == 1 else f"{share.n} ({percent(share.coverage)} known)"


def _bar(e: Estimate, tone: str) -> str:
    if not e.n:
        return ""
    interval = f'<i style="left:{e.low:.1%};width:{e.high - e.low:.1%}"></i>'
    told = f"{percent(e.low)} – {percent(e.high)}, n = {e.n}"
    return f'<div class="bar {tone}" title="{told}">{interval}<b style="left:{e.value:.1%}"></b></div>'


def _tone(dimension: Dimension) -> str:
    return TONE.get(dimension.verdict, "bad")


def _items(lines: Iterable[str]) -> str:
    return "".join(f"<li>{_text(line)}</li>" for line in lines)


def _text(value: Any) -> str:
    return html.escape(str(value))


def _width(report: Report) -> int:
    """Width in pixels of the report's pictures."""
    for path in (path for trial in report.trials for pair in trial.pictures for path in pair if path.is_file()):
        with Image.open(path) as image:
            return image.width
    return SIDE


@cache
def _encoded(path: Path, changed: int) -> str:
    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((SIDE, SIDE))
    data = io.BytesIO()
    small.save(data, format="WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()


def _thumbnail(path: Path) -> str:
    return _encoded(path, path.stat().st_mtime_ns)
