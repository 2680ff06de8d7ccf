"""The model card: what was erased and how, on what it was tested, and on what it was not.

A card is metadata for the Hub and text for people. Two parts of the text are ours and stand between marks; whatever else is
there, in the text or in the metadata, belongs to whoever wrote it and is carried over from card to card.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from . import hub
from .errors import EraseError

COLUMNS = ("concept", "sent to", "method", "tokens", "residual", "effect on the name")
"""What a table of recipes says, in the card and on the command line."""

TAGS = ("text-to-image", "diffusers", "concept-erasure", "erasure")
TWIN_TAGS = ("lora", "template:diffusion-lora")
"""Make the Hub offer `load_lora_weights`: there exactly if a twin is."""

UNTESTED = (
    "pictures", "paraphrases", "neighbouring concepts", "attacks", "other languages", "image prompts, inpainting, textual inversion"
)  # fmt: skip
"""What making an adapter does not test; a report says itself what it left out."""

GALLERY = "<Gallery />\n\n"
"""Where the Hub shows the pictures of the field `widget`."""

_PART = re.compile(
    r"<!-- diffusers-erase: (?P<kind>erasure|tested|untested) (?P<digest>[0-9a-f]*) -->\n.*?"
    r"<!-- diffusers-erase: end -->\n",
    re.DOTALL,
)


def new(
    rows: Sequence[Sequence[str]],
    *,
    kind: str,
    content: str,
    digest: str,
    linear: str | None,
    base_model: str,
    files: Sequence[str],
    repository: str | None,
    report: Mapping[str, Any] | None,
    pictures: Mapping[str, str],
    license: str | None,
) -> str:
    """The card of an adapter, as if there were none yet.

    Args:
        rows: what `COLUMNS` says, one for each concept.
        kind: `rows` or `factors`.
        content: what it holds and where it is from.
        linear: digest of a gated adapter's linear part, whose measurements are told beside its own.
        files: names of the other files in its folder; twins among them are explained.
        repository: where it will be found, if that is known.
        report: `report.json` of an evaluation of this very adapter.
        pictures: prompt to path in the folder.
    """
    twin = hub.LORA in files
    names = ", ".join(dict.fromkeys(row[0] for row in rows))
    metadata: dict[str, Any] = {"license": license} if license else {}
    metadata |= {"library_name": "diffusers", "pipeline_tag": "text-to-image"}
    if hub.REPOSITORY.fullmatch(base_model):  # a repository, not somebody's folder
        metadata |= {"base_model": base_model, "base_model_relation": "adapter"}
    metadata["tags"] = [*TAGS, *(TWIN_TAGS if twin else ())]
    if pictures:
        metadata["widget"] = [{"text": text, "output": {"url": path}} for text, path in pictures.items()]
    about = _ABOUT.format(
        names=names,
        attaching=ATTACHING[kind],
        source=repository or "this folder or repository",
        table=_table(COLUMNS, rows),
        content=content,
        digest=digest,
        twins=f"{_twins(files)} " if twin else "",
        composing=COMPOSING[kind],
    )
    parts = _part("erasure", digest, about) + "\n" + _tested(digest, linear, report)
    return hub.card_text(metadata, (GALLERY if pictures else "") + parts)


def merge(old: str, new: str, license: str | None = None) -> str:
    """The card `new` on top of `old`, which loses nothing that is not ours.

    A field of the metadata keeps its value, unless a `license` is given; lists are joined, a picture of the same path is
    replaced. Our two parts are written anew where they stand, except that measurements of the same adapter outlive a card
    without any.
    """
    if not old.strip():
        return new
    (was, body), (now, fresh) = hub.read_card(old), hub.read_card(new)
    there = {_slot(part["kind"]): part for part in _PART.finditer(body)}
    added = ""
    if "widget" in now and GALLERY not in body:
        body = GALLERY + body
    for part in _PART.finditer(fresh):
        place = there.get(_slot(part["kind"]))
        if place is None:
            added += "\n" + part[0]
        elif not (part["kind"] == "untested" and place["kind"] == "tested" and place["digest"] == part["digest"]):
            body = body.replace(place[0], part[0])
    return hub.card_text(_joined(was, now) | ({"license": license} if license else {}), body + added)


def carried(text: str) -> str:
    """What of an adapter's card goes along when it is saved elsewhere: all but the pictures, which stay where they are."""
    fields, body = hub.read_card(text)
    return hub.card_text({n: v for n, v in fields.items() if n != "widget"}, body.replace(GALLERY, ""))


def _joined(was: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    fields = dict(was)
    for name, value in now.items():
        if name not in fields or fields[name] is None:
            fields[name] = value
        elif name == "tags":
            mine = [tag for tag in _list(fields[name]) if tag not in TWIN_TAGS]
            fields[name] = mine + [tag for tag in value if tag not in mine]
        elif name == "widget":
            urls = {entry["output"]["url"] for entry in value}
            fields[name] = [entry for entry in _list(fields[name]) if _url(entry) not in urls] + value
        elif name == "base_model" and value not in _list(fields[name]):
            fields[name] = [*_list(fields[name]), value]
    return fields


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _url(entry: Any) -> Any:
    output = entry.get("output") if isinstance(entry, dict) else None
    return output.get("url") if isinstance(output, dict) else None


def _slot(kind: str) -> str:
    return "erasure" if kind == "erasure" else "tested"


def _part(kind: str, digest: str, text: str) -> str:
    text = text.replace("<!--", "&lt;!--")  # concepts are anybody's words: none may end a part
    return f"<!-- diffusers-erase: {kind} {digest} -->\n{text}\n<!-- diffusers-erase: end -->\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in cells)


def _cell(text: str) -> str:
    """Text that ends neither its cell nor its line."""
    return " ".join(text.replace("|", "\\|").split())


def _twins(files: Sequence[str]) -> str:
    kohya = next((f" and `{name}` (kohya's names)" for name in files if name.endswith(hub.KOHYA)), "")
    return (
        f"For programs without this package: `{hub.LORA}`{kohya}, the same erasure as a LoRA. It can be switched off like any LoRA; "
        f"what `load_erasure` attaches cannot by accident."
    )


def _tested(digest: str, linear: str | None, report: Mapping[str, Any] | None) -> str:
    if report is None:
        return _part("untested", digest, f"**Not tested by making this file:** {', '.join(UNTESTED)}. {_LIMITS}")
    rows, plain = _measured(report, digest), _measured(report, linear, LINEAR) if linear else []
    if not rows:
        raise EraseError(
            f"the report has no measurements of the adapter {digest[:12]}: evaluate this very adapter, or leave the report out"
        )
    suite, model, left = _dict(report.get("suite")), _dict(report.get("model")), report.get("not_tested")
    listed = [f"- {line}" for line in left if isinstance(line, str)] if isinstance(left, list) else []
    listed += ["- its linear part, which fused weights and LoRA twins are"] if linear and not plain else []
    about = (
        f"Suite: {_cell(str(suite.get('name')))} {suite.get('version', '')} on {_cell(str(model.get('name')))}. Of the pictures that "
        f"the unedited model got right, the share that still shows what it should: left of the concept, kept of the rest."
    )
    table = _table(("erasure", "pictures of", "should be", "share", "95 % interval", "n"), rows + plain)
    return _part(
        "tested", digest, "\n\n".join([about, table, "**Not tested:**", "\n".join(listed or ["- unknown"]), _LIMITS])
    )


def _measured(report: Mapping[str, Any], digest: str, suffix: str = "") -> list[list[str]]:
    """A line for each share that `report` has of the adapter `digest`."""
    return [
        [
            str(trial.get("name")).removesuffix(suffix) + suffix,
            str(measured.get("title")),
            str(measured.get("should_be")),
            *_numbers(share),
        ]
        for trial in _dicts(report.get("trials"))
        if _dict(trial.get("adapter")).get("digest") == digest
        for measured in _dicts(trial.get("dimensions"))
        if _countable(share := _dict(measured.get("share")))
    ]


def _numbers(share: Mapping[str, Any]) -> tuple[str, str, str]:
    return f"{share['value']:.1%}", f"{share['low']:.1%} – {share['high']:.1%}", str(share["n"])


def _countable(share: Mapping[str, Any]) -> bool:
    return all(isinstance(share.get(name), (int, float)) for name in ("value", "low", "high", "n"))


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _dicts(values: Any) -> list[Mapping[str, Any]]:
    return [_dict(value) for value in values] if isinstance(values, (list, tuple)) else []


ATTACHING = {
    "rows": "Attach it to any Stable Diffusion pipeline with the same text encoder:",
    "factors": "It changes the weights of one base model. Attach it to pipelines of that model; it is fused into them:",
}
COMPOSING = {
    "rows": "Attached by this package, several erasures are solved together, exactly. Their LoRA twins only add up, which is not the same.",
    "factors": "Factors of several erasures, and their LoRA twins, only add up: each was made as if the others were not there.",
}
LINEAR = " (linear part)"
GATED = "It has a gate; fused weights and LoRA twins are its linear part and reach further."

_ABOUT = """# Erasure: {names}

A suppression of: {names}. {attaching}

```python
from diffusers_erase import load_erasure

load_erasure(pipe, "{source}")
```

{table}

{content} Digest: `{digest}`.

{twins}{composing}"""

_LIMITS = (
    "This is guidance away from a concept by its name, not a removal of knowledge from the weights: image prompts, inpainting, "
    "textual inversion and tuning can bring it back."
)
