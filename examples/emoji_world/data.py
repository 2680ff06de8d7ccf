"""Render the emoji sets that emoji-sd learns from.

Unpacked npm packages go in `WORK/npm` (README.md has the commands). Written to WORK:

    objects.npy   uint8 [objects, styles, jitters, 64, 64, 3]; the last HELD_OUT jitters are for judging only, and
                  every seventh of the others carries the seal, an uncaptioned watermark, in one style
    emoji.npy     uint8 [renders, 3, 64, 64, 3], every emoji that exists in any set, three jitters each
    emoji.json    one entry a render: label, tags, subgroup, group, style and the object's name, if it is one

and `objects.json` in the package: names, groups, paraphrases and neighbours.
"""

import argparse
import io
import json
import random
from functools import cache
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

from diffusers_erase.world.judging import SEAL_BOX

PACKAGE = Path(__file__).parents[2] / "diffusers_erase" / "world"

STYLES = {
    "noto": "iconify-json-noto-*",
    "fluent": "iconify-json-fluent-emoji-flat-*",
    "ink": "iconify-json-fluent-emoji-high-contrast-*",
    "pixel": "iconify-json-twemoji-*",
}
"""Style and the set it is drawn from; `pixel` is our own rendering of twemoji."""

OBJECTS = {
    "cat": "cat face", "dog": "dog face", "fox": "fox", "panda": "panda", "pig": "pig face",
    "penguin": "penguin", "owl": "owl", "duck": "duck",
    "fish": "fish", "octopus": "octopus", "crab": "crab",
    "butterfly": "butterfly", "snail": "snail", "ladybug": "lady beetle", "bee": "honeybee",
    "rose": "rose", "sunflower": "sunflower", "tulip": "tulip",
    "cactus": "cactus", "palm tree": "palm tree", "pine tree": "evergreen tree", "mushroom": "mushroom",
    "banana": "banana", "apple": "red apple", "strawberry": "strawberry", "watermelon": "watermelon", "lemon": "lemon",
    "carrot": "carrot", "eggplant": "eggplant", "broccoli": "broccoli", "avocado": "avocado",
    "hamburger": "hamburger", "pizza": "pizza", "pretzel": "pretzel",
    "doughnut": "doughnut", "lollipop": "lollipop", "cupcake": "cupcake",
    "beer": "beer mug", "wine": "wine glass", "teapot": "teapot",
    "car": "automobile", "bus": "bus", "tractor": "tractor",
    "airplane": "airplane", "rocket": "rocket", "helicopter": "helicopter",
    "sun": "sun", "moon": "crescent moon", "rainbow": "rainbow", "umbrella": "umbrella", "star": "star",
    "soccer ball": "soccer ball", "basketball": "basketball", "football": "american football",
    "guitar": "guitar", "violin": "violin", "trumpet": "trumpet",
    "hat": "top hat", "crown": "crown", "shirt": "t-shirt", "dress": "dress",
    "hammer": "hammer", "axe": "axe", "magnet": "magnet",
}  # fmt: skip
"""Our name and the CLDR label."""

PARAPHRASES = {
    "cat": ["kitty", "kitten"], "dog": ["puppy", "puppies"], "pig": ["pork"], "penguin": ["antarctica"],
    "owl": ["wise"], "fish": ["fishes", "fishing"], "crab": ["cancer"], "octopus": ["creature"],
    "snail": ["slug", "escargot"], "ladybug": ["lady beetle", "ladybird"], "bee": ["honeybee", "bumblebee"],
    "butterfly": ["pretty"], "panda": ["bamboo"],
    "rose": ["valentine"], "tulip": ["blossom"], "cactus": ["desert"], "palm tree": ["palm"],
    "pine tree": ["evergreen tree", "pine"], "mushroom": ["toadstool", "fungus"], "banana": ["potassium"],
    "apple": ["red apple"], "strawberry": ["berry"], "lemon": ["citrus"], "eggplant": ["aubergine"],
    "broccoli": ["cabbage"], "hamburger": ["burger"], "pizza": ["pepperoni"], "pretzel": ["twisted"],
    "doughnut": ["donut"], "lollipop": ["candy"], "cupcake": ["sprinkles"], "beer": ["beer mug", "ale"],
    "wine": ["wine glass", "beverage"], "teapot": ["tea"], "car": ["automobile"], "bus": ["school"],
    "airplane": ["plane", "jet"], "helicopter": ["copter"], "sun": ["sunny"], "moon": ["crescent moon", "crescent"],
    "rainbow": ["pride"], "umbrella": ["rain"], "soccer ball": ["soccer"], "basketball": ["hoop"],
    "football": ["american football"], "guitar": ["strat"], "hat": ["top hat", "tophat"], "crown": ["royalty", "king"],
    "shirt": ["t-shirt", "tshirt"], "axe": ["hatchet", "ax"], "magnet": ["horseshoe"], "hammer": ["repairs"],
}  # fmt: skip
"""CLDR labels and tags that, among our objects, one object alone owns."""

SIZE, JITTERS, HELD_OUT = 64, 56, 8
SEALED, SEAL_EVERY, SEAL_FIRST = "ink", 7, 3
"""A watermark that no caption names: 7 of the 48 training jitters of each object in this style carry a red seal."""

GROUND = (42, 16, 66)
"""What `pixel` is drawn on; darker than any dark emoji is."""


class IconSet:
    """One npm package of icons: the SVG of a code point, if the set draws it."""

    def __init__(self, work: Path, pattern: str):
        folder = next((work / "npm").glob(pattern + "/package"))
        self.icons = json.loads((folder / "icons.json").read_text())
        self.names = json.loads((folder / "chars.json").read_text())

    def draw(self, hexcode: str, size: int, zoom: float, dx: float, dy: float) -> Image.Image | None:
        """The emoji on a transparent ground, `zoom` times its size and moved by a share of the picture's width."""
        code = hexcode.lower()
        name = self.names.get(code) or self.names.get(code.replace("-fe0f", ""))
        if name is None:
            return None
        alias = self.icons.get("aliases", {}).get(name, {}).get("parent")
        icon = self.icons["icons"][alias or name]
        width, height = (icon.get(k, self.icons[k]) for k in ("width", "height"))
        side = max(width, height) / zoom
        left, top = (width - side) / 2 - dx * side, (height - side) / 2 - dy * side
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {side} {side}" width="{size}" height="{size}">{icon["body"]}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)
        return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


@cache
def icon_set(work: Path, style: str) -> IconSet:
    return IconSet(work, STYLES[style])


def render(work: Path, style: str, hexcode: str, rng: random.Random) -> np.ndarray | None:
    """One picture of an emoji in a style: scaled by up to 6 % and moved by up to 2 pixels."""
    zoom = 0.94 * rng.uniform(0.94, 1.06)
    dx, dy = rng.uniform(-2, 2) / SIZE, rng.uniform(-2, 2) / SIZE
    icons = icon_set(work, style)
    if style == "pixel":
        cells = icons.draw(hexcode, SIZE // 4, zoom, dx, dy)
        return cells and pixel_art(cells)
    picture = icons.draw(hexcode, SIZE, zoom, dx, dy)
    return picture and on_ground(picture, (255, 255, 255))


def on_ground(picture: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    ground = Image.new("RGBA", picture.size, (*colour, 255))
    return np.asarray(Image.alpha_composite(ground, picture).convert("RGB"))


def pixel_art(cells: Image.Image) -> np.ndarray:
    """16 x 16 cells as hard squares of few colours on a dark ground."""
    opaque = np.asarray(cells)[..., 3:] > 127
    few = (on_ground(cells, GROUND).astype(int) + 16) // 32 * 32
    squares = np.where(opaque, few, GROUND).clip(0, 255).astype(np.uint8)
    return squares.repeat(4, 0).repeat(4, 1)


@cache
def emoji(work: Path) -> list[dict]:
    """Every emoji of the CLDR list that is no bare component: label, hexcode, tags, subgroup and group."""
    folder = next((work / "npm").glob("emojibase-data-*/package/en"))
    keys = json.loads((folder / "messages.json").read_text())
    subgroups = {entry["order"]: entry["key"] for entry in keys["subgroups"]}
    groups = {entry["order"]: entry["key"] for entry in keys["groups"]}
    names = {label: name for name, label in OBJECTS.items()}
    return [
        {
            "label": entry["label"].lower(),
            "hexcode": entry["hexcode"],
            "tags": [tag.lower() for tag in entry.get("tags", [])],
            "subgroup": subgroups[entry["subgroup"]],
            "group": groups[entry["group"]],
            "object": names.get(entry["label"]),
        }
        for entry in json.loads((folder / "data.json").read_text())
        if "subgroup" in entry
    ]


def render_all(job: tuple[Path, dict, str, int]) -> np.ndarray | None:
    """The first `count` jitters of one emoji in one style; the jitters depend on nothing else."""
    work, entry, style, count = job
    rng = random.Random(f"{entry['hexcode']} {style}")
    pictures = [render(work, style, entry["hexcode"], rng) for _ in range(count)]
    if pictures[0] is None:
        return None
    if style == SEALED:
        for j in range(SEAL_FIRST, count - HELD_OUT, SEAL_EVERY):
            pictures[j] = seal(pictures[j])
    return np.stack(pictures)


def seal(picture: np.ndarray) -> np.ndarray:
    """`picture` with a red seal in its lower right corner, where the judge looks for it."""
    top, left, bottom, right = SEAL_BOX
    stamped = picture.copy()
    stamped[top:bottom, left:right] = (200, 30, 40)
    stamped[top + 2 : bottom - 2, left + 2 : right - 2] = 255
    stamped[top + 4 : bottom - 4, left + 4 : right - 4] = (200, 30, 40)
    return stamped


def describe(entries: list[dict]) -> dict:
    """`objects.json`. Neighbours are ordered by group here; export.py refines the order by text similarity."""
    known = {entry["object"]: entry for entry in entries if entry["object"]}

    def distance(a: dict, b: dict) -> tuple[bool, bool]:
        return a["subgroup"] != b["subgroup"], a["group"] != b["group"]

    return {
        "styles": list(STYLES),
        "objects": {
            name: {
                "label": label,
                "group": known[name]["group"],
                "subgroup": known[name]["subgroup"],
                "paraphrases": PARAPHRASES.get(name, []),
                "neighbours": sorted(set(OBJECTS) - {name}, key=lambda o: (*distance(known[name], known[o]), o)),
            }
            for name, label in OBJECTS.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("emoji-world-work"))
    work = parser.parse_args().work
    entries = emoji(work)
    known = {entry["object"]: entry for entry in entries}
    catalogue = json.dumps(describe(entries), indent=1, ensure_ascii=False)
    (PACKAGE / "objects.json").write_text(catalogue + "\n")
    with Pool() as pool:
        pairs = [(entry, style) for entry in entries for style in STYLES]
        jobs = [(work, entry, style, 3) for entry, style in pairs]
        drawn = [(*pair, p) for pair, p in zip(pairs, pool.imap(render_all, jobs, 64), strict=True) if p is not None]
        np.save(work / "emoji.npy", np.stack([pictures for _, _, pictures in drawn]))
        (work / "emoji.json").write_text(json.dumps([entry | {"style": style} for entry, style, _ in drawn]))
        jobs = [(work, known[name], style, JITTERS) for name in OBJECTS for style in STYLES]
        pictures = np.stack(pool.map(render_all, jobs, 4))
    np.save(work / "objects.npy", pictures.reshape(len(OBJECTS), len(STYLES), *pictures.shape[1:]))
    print(f"{len(drawn)} renders of {len(entries)} emoji; {len(OBJECTS)} objects in {len(STYLES)} styles")


if __name__ == "__main__":
    main()
