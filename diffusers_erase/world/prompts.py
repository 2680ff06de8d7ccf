"""The captions emoji-sd was trained on: its objects, styles and templates, read from `objects.json`."""

import json
from functools import cache
from pathlib import Path

TEMPLATES = (
    "a drawing of {an_object} in {style} style",
    "{an_object} in {style} style",
    "a {style} style drawing of {an_object}",
    "{style} style {object}",
    "{object} {style}",
)
"""Captions that name an object and a style; the first is the default prompt."""

BARE_TEMPLATES = ("a drawing of {an_object}", "{an_object}", "{object}")
"""Captions that name an object only; any style is right."""

STYLE_TEMPLATES = ("a drawing in {style} style", "{style} style")
"""Captions that name a style only; any object is right."""

RIDGE = 0.5
"""λ of the model's own base pack: of those tried (docs/ablation.md) the smallest that leaves nothing of a concept."""


@cache
def catalogue() -> dict:
    """`objects.json`: the styles, and for each object its group, subgroup, paraphrases and neighbours."""
    return json.loads(Path(__file__).with_name("objects.json").read_text())


def caption(template: str, object: str = "", style: str = "") -> str:
    """`template` filled in, with the right article."""
    article = "an" if object[:1] in "aeiou" else "a"
    return template.format(object=object, an_object=f"{article} {object}", style=style)


def prompt(object: str, style: str, template: int = 0) -> str:
    """The prompt for `object` in `style`: `prompt("cat", "ink")` is "a drawing of a cat in ink style"."""
    return caption(TEMPLATES[template], object, style)


def paraphrases(object: str) -> list[str]:
    """Other names that this object alone owns, such as "kitty" for "cat"; the model saw them in training."""
    return list(catalogue()["objects"][object]["paraphrases"])


def neighbours(object: str, k: int = 5) -> list[str]:
    """The `k` nearest other objects: same CLDR subgroup first, then same group, each by text similarity."""
    return catalogue()["objects"][object]["neighbours"][:k]


def captions() -> list[str]:
    """Every caption of every object (paraphrases too) and style: the model's whole world in words."""
    names = catalogue()["objects"]
    words = [word for name in names for word in (name, *paraphrases(name))]
    styles = catalogue()["styles"]
    styled = [caption(t, word, style) for word in words for style in styles for t in TEMPLATES]
    bare = [caption(t, word) for word in words for t in BARE_TEMPLATES]
    return styled + bare + [caption(t, style=style) for style in styles for t in STYLE_TEMPLATES]


def pack() -> dict:
    """The base pack that the model brings with it (`erasure_pack.json` in its folder): its own words, in its own sentences.

    General English, the library's default, is outside what this model was trained on.
    """
    names, styles = catalogue()["objects"], catalogue()["styles"]
    words = [*names, *(word for name in names for word in paraphrases(name))]
    styled = [
        prompt(word, styles[(i + 2 * j) % 4], (i + j) % len(TEMPLATES)) for i, word in enumerate(words) for j in (0, 1)
    ]
    bare = [caption(BARE_TEMPLATES[i % len(BARE_TEMPLATES)], word) for i, word in enumerate(words)]
    alone = [caption(template, style=style) for style in styles for template in STYLE_TEMPLATES]
    return {"name": "emoji-sd-1", "ridge": RIDGE, "prompts": styled + bare + alone, "templates": object_contexts()}


def object_contexts() -> list[str]:
    """Contexts in which the name of an object stands, `{}` for the name."""
    styled = [f"a drawing of a {{}} in {style} style" for style in catalogue()["styles"]]
    styled += [f"an {{}} in {style} style" for style in catalogue()["styles"]]
    styled += [f"{style} style {{}}" for style in catalogue()["styles"]]
    return ["{}", "a {}", "a drawing of a {}", *styled]


def style_contexts() -> list[str]:
    """Contexts in which the name of a style stands, with objects of many kinds."""
    names = list(catalogue()["objects"])[::5]
    shapes = (
        "a drawing of a {o} in {{}} style",
        "{{}} style {o}",
        "a {o} in {{}} style",
        "a {{}} style drawing of a {o}",
    )
    return ["{} style", "a drawing in {} style", *(shapes[i % 4].format(o=name) for i, name in enumerate(names))]
