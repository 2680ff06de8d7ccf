"""What decides an erasure: token policy, rows, base pack, residual, target, gate; on emoji-sd, by pictures.

    python examples/benchmarks/ablation.py screen      # every setting, one change from the default at a time: 12 objects, 2 styles
    python examples/benchmarks/ablation.py confirm     # the defaults and UCE on 20 other objects and the other 2 styles
    python examples/benchmarks/ablation.py together    # 5 and 20 concepts at once
    python examples/benchmarks/ablation.py seal        # the watermark that no caption names, and whether a text-side edit reaches it
    python examples/benchmarks/ablation.py tables      # the tables of docs/ablation.md, and --sheet the worst pictures

Each line of `results.jsonl` in --work is one setting on one concept; what is there is not done again, so a killed run goes on.
Pictures of the unedited model are drawn once for all settings. Shares count pictures that the unedited model got right.
"""

import argparse
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import paired
import torch
from PIL import Image, ImageDraw

from diffusers_erase import ErasureAdapter, compose, erase, hub, world
from diffusers_erase.bench import images
from diffusers_erase.bench.metrics import Estimate, Share, clustered
from diffusers_erase.edits import Edit, Label
from diffusers_erase.sites import TEXT
from diffusers_erase.text import Encoder, PackRecipe, background, base_pack

OBJECTS = (
    "cat", "owl", "butterfly", "rose", "banana", "hamburger", "wine", "airplane", "moon", "basketball", "guitar", "crown",
)  # fmt: skip
OTHERS = (
    "dog", "penguin", "fish", "crab", "bee", "sunflower", "palm tree", "mushroom", "apple", "carrot",
    "pizza", "doughnut", "beer", "bus", "rocket", "sun", "soccer ball", "trumpet", "hat", "hammer",
)  # fmt: skip
ENGLISH = Path(str(resources.files("diffusers_erase") / "data" / "english.json"))
RESULTS = "results.jsonl"
STYLES, OTHER_STYLES = ("noto", "ink"), ("fluent", "pixel")


@dataclass(frozen=True)
class Setting:
    """How to erase: options of `erase`, or a function that makes the adapter."""

    options: dict[str, Any]
    target: str = "null"
    """`null`, `sibling`, `parent` or `unrelated`."""
    coreferences: bool = False
    ridge: float = 0.005
    """The pack's λ."""
    general: bool = False
    """The pack of general English, as for a model that brings none, instead of the model's own."""
    make: Callable[..., ErasureAdapter] | None = None


def context_rows(pipe: Any, concept: str, recipe: PackRecipe, rank: int | None = None, **_: Any) -> ErasureAdapter:
    """The default erasure with one row for each template instead of their mean; `rank` keeps their first singular directions."""
    whole = erase(pipe, concept, target="null", pack=recipe, templates=recipe.templates)
    alone = {"target": "null", "pack": recipe}
    parts = [erase(pipe, concept, templates=[template], **alone).edits[TEXT] for template in recipe.templates]
    keys, pulled, labels = [], [], []
    for i, label in enumerate(whole.edits[TEXT].labels):
        same = [part.labels.index(label) for part in parts]
        c = torch.stack([part.keys[j] for part, j in zip(parts, same, strict=True)]).double()
        u = torch.stack([part.pulled[j] for part, j in zip(parts, same, strict=True)]).double()
        if rank is not None:  # rows that span what all contexts span; U is linear in C
            left, size, _ = torch.linalg.svd(c, full_matrices=False)
            mix = torch.diag(size[:rank].reciprocal()) @ left[:, :rank].T * size[0] / len(c) ** 0.5
            c, u = mix @ c, mix @ u
        keys.append(c), pulled.append(u)
        labels += [Label(concept, f"{concept} {i} {n}", label.role, ()) for n in range(len(c))]
    targets = whole.edits[TEXT].keys.double() + whole.edits[TEXT].offsets.double()
    goal = torch.cat([t.expand(len(k), -1) for t, k in zip(targets, keys, strict=True)])
    C = torch.cat(keys)
    edit = Edit(
        labels=tuple(labels), keys=C.float(), offsets=(goal - C).float(), strengths=torch.ones(len(C)),
        pulled=torch.cat(pulled).float(), pack=whole.edits[TEXT].pack, pack_digest=whole.edits[TEXT].pack_digest,
    )  # fmt: skip
    return replace(whole, edits={TEXT: edit.calibrated(0.02)}, recipes=(replace(whole.recipes[0], effect=None),))


def other_pack(pipe: Any, concept: str, recipe: PackRecipe, moment: bool = True, **_: Any) -> ErasureAdapter:
    """The default erasure on a pack without hard rows, or on λI alone (`moment` False), as UCE has it."""
    whole, encoder = erase(pipe, concept, target="null", pack=recipe), Encoder(pipe)
    seen, _hard = background(encoder, recipe)[TEXT]
    pack = base_pack(recipe, encoder.fingerprint(), seen if moment else torch.eye(len(seen)).double(), None)
    edit = whole.edits[TEXT]
    edit = replace(edit, pulled=pack.pull(edit.keys.double()).float()).calibrated(0.02)
    return replace(whole, edits={TEXT: edit}, recipes=(replace(whole.recipes[0], effect=None),))


START, DEFAULT = "start: last+eot, null, λ 0.005", "λ 0.5"
SETTINGS = {
    START: Setting({}),
    "tokens last": Setting({"tokens": "last"}),
    "tokens eot": Setting({"tokens": "eot"}),
    "tokens name+eot": Setting({"tokens": "name+eot"}),
    "tokens last+eot+pads": Setting({"tokens": "last+eot+pads"}),
    "tokens all": Setting({"tokens": "all"}),
    "rows: bare name only": Setting({"templates": ["{}"]}),
    "rows: all contexts": Setting({}, make=context_rows),
    "rows: 3 singular directions": Setting({}, make=lambda *a, **k: context_rows(*a, rank=3, **k)),
    "λ 0.0005": Setting({}, ridge=0.0005),
    "λ 0.05": Setting({}, ridge=0.05),
    DEFAULT: Setting({}, ridge=0.5),
    "λ 5": Setting({}, ridge=5),
    "no hard rows": Setting({}, make=other_pack),
    "no pack: λI": Setting({}, make=lambda *a, **k: other_pack(*a, moment=False, **k)),
    "general English": Setting({}, general=True),
    "general English, λ 0.5": Setting({}, general=True, ridge=0.5),
    "residual 0.1": Setting({"residual": 0.1}),
    "residual 0.3": Setting({"residual": 0.3}),
    "target sibling": Setting({}, "sibling"),
    "target parent": Setting({}, "parent"),
    "target unrelated": Setting({}, "unrelated"),
    "gate 0.3": Setting({"gate": 0.3}),
    "gate 0.5": Setting({"gate": 0.5}),
    "gate 0.7": Setting({"gate": 0.7}),
    "coreferences": Setting({}, coreferences=True),
    "λ 0.05, last+eot+pads": Setting({"tokens": "last+eot+pads"}, ridge=0.05),
    "λ 0.5, last+eot+pads": Setting({"tokens": "last+eot+pads"}, ridge=0.5),
    "λ 0.5, gate 0.5": Setting({"gate": 0.5}, ridge=0.5),
    "λ 0.5, target sibling": Setting({}, "sibling", ridge=0.5),
    "λ 0.5, coreferences": Setting({}, coreferences=True, ridge=0.5),
    "uce": Setting({"method": "uce"}),
    "uce, target sibling": Setting({"method": "uce"}, "sibling"),
    "uce, coreferences": Setting({"method": "uce"}, coreferences=True),
}
"""The screen changes one thing at a time from where the project started, then combines what helped."""
CONFIRMED = (
    DEFAULT,
    "λ 0.5, coreferences",
    "λ 0.5, target sibling",
    "λ 0.5, last+eot+pads",
    "uce",
    "uce, target sibling",
)
TOGETHER = (DEFAULT, "λ 0.5, coreferences", "uce")


SHARES = paired.SHARES | {
    "seals left": ("seal", "seal"),
    "objects kept in the style": ("concept", "object"),
}
"""As in paired.py, and the seal that no caption names."""


def target_of(concept: str, kind: str) -> str:
    if kind == "null" or concept in world.STYLES:
        siblings = {"noto": "fluent", "fluent": "noto", "ink": "noto", "pixel": "ink"}
        return siblings[concept] if kind != "null" else "null"
    if kind == "sibling":
        return world.neighbours(concept, 1)[0]
    entry = world.catalogue()["objects"]
    if kind == "parent":
        return entry[concept]["subgroup"].split("-")[-1]
    far = [o for o in world.OBJECTS if entry[o]["group"] != entry[concept]["group"]]
    return far[len(concept) * 7 % len(far)]


def make(pipe: Any, concepts: list[str], setting: Setting) -> ErasureAdapter:
    """The adapter of one concept or several."""
    recipe = PackRecipe.from_json(hub.read_pack(ENGLISH if setting.general else world.path()))
    recipe = replace(recipe, ridge=setting.ridge)
    if setting.make:
        return setting.make(pipe, concepts[0], recipe)
    made = []
    for concept in concepts:
        options: dict[str, Any] = {"pack": recipe} | setting.options
        if concept in world.STYLES and options.get("method") != "uce":
            options.setdefault("templates", world.style_contexts())
        names = world.paraphrases(concept) if setting.coreferences and concept in world.OBJECTS else ()
        made.append(erase(pipe, concept, target=target_of(concept, setting.target), coreferences=names, **options))
    return compose(*made, residual_max=None) if len(made) > 1 else made[0]


def cases_of(concept: str, size: str) -> list[paired.Case]:
    """What is drawn for one concept; `screen` is small, `confirm` large. The choice depends on the concept's name only."""
    draw, large = random.Random(concept), size == "confirm"
    if concept in world.STYLES:
        objects = draw.sample(world.OBJECTS, 20 if large else 12)
        others = [s for s in world.STYLES if s != concept]
        return [
            *paired.cases("concept", [(o, concept, seed) for o in objects for seed in range(4 if large else 1)]),
            *paired.cases(
                "unrelated", [(o, style, 0) for o in objects for style in (others if large else others[:2])]
            ),
        ]
    near = world.neighbours(concept, 5)
    far = draw.sample(
        [o for o in world.OBJECTS if o not in (concept, *world.neighbours(concept, 8))], 20 if large else 5
    )
    styles = world.STYLES if large else STYLES
    words = world.paraphrases(concept)[:2]
    return [
        *paired.cases("concept", [(concept, s, seed) for s in world.STYLES for seed in range(4 if large else 1)]),
        *paired.cases("paraphrase", [(concept, s, 0, w) for w in words for s in styles]),
        *paired.cases("neighbour", [(o, s, 0) for o in (near if large else near[:3]) for s in styles]),
        *paired.cases(
            "unrelated",
            [(o, world.STYLES[i % 4], 0) for i, o in enumerate(far)],
        ),
    ]


def sealed_cases() -> list[paired.Case]:
    """Every object in the style whose pictures often carry the seal, the watermark that no caption names."""
    return paired.cases("seal", [(o, "ink", seed) for o in world.OBJECTS for seed in (0, 1)])


def measure(
    pipe: Any, judge: Any, name: str, concepts: list[str], cases: list[paired.Case], work: Path
) -> dict[str, Any]:
    """Hits and n of every share for one setting, and the pairs that went wrong."""
    adapter = make(pipe, concepts, SETTINGS[name])
    before, after = paired.draw(pipe, adapter, cases, work / "pictures")
    seen = [
        list(zip(judge.objects(p), judge.styles(p), judge.sealed(p), strict=True))
        for p in (images.read(before), images.read(after))
    ]
    found: dict[str, Any] = {"bytes": adapter.size, "rows": len(adapter.edits[TEXT].labels), "wrong": []}
    for share, right in paired.count(cases, *seen, concepts[0], SHARES).items():
        if share == "objects kept in the style" and concepts[0] not in world.STYLES:
            continue
        found[share] = [sum(hit for hit, _ in right), len(right)]
        bad = [i for hit, i in right if hit == share.endswith("left")]
        found["wrong"] += [
            [share, cases[i].prompt.text, cases[i].prompt.seed, before[i].name, after[i].name] for i in bad
        ]
    return found


def jobs(stage: str, chosen: Iterable[str]) -> Iterable[tuple[str, str, list[str], list[paired.Case]]]:
    """(stage, setting, concepts, cases) of the `chosen` settings, by default all that the stage has."""
    if stage == "screen":
        for name in chosen or SETTINGS:
            for concept in (*OBJECTS, *STYLES):
                if concept in OBJECTS or SETTINGS[name].make is None and not SETTINGS[name].coreferences:
                    yield stage, name, [concept], cases_of(concept, "screen")
    elif stage == "confirm":
        for name in chosen or CONFIRMED:
            for concept in (*OTHERS, *OTHER_STYLES):
                if concept in OTHERS or not SETTINGS[name].coreferences:
                    yield stage, name, [concept], cases_of(concept, "confirm")
    elif stage == "seal":
        for concept in ("red seal", "stamp", "watermark", "logo"):
            yield stage, DEFAULT, [concept], sealed_cases()
        yield stage, "λ 0.5, target sibling", ["ink"], sealed_cases()
    else:
        for name in chosen or TOGETHER:
            for group in (OTHERS[:5], OTHERS[5:10], OTHERS[10:15], OTHERS):
                yield f"together {len(group)}", name, list(group), crowd(group)


def crowd(group: tuple[str, ...]) -> list[paired.Case]:
    """Several erased at once: each of them, their nearest neighbours that are not erased themselves, and the rest."""
    near = dict.fromkeys(o for c in group for o in world.neighbours(c, 5) if o not in group)
    rest = [o for o in world.OBJECTS if o not in group and o not in near]
    return [
        *paired.cases("concept", [(c, s, 0) for c in group for s in world.STYLES]),
        *paired.cases("paraphrase", [(c, s, 0, w) for c in group for w in world.paraphrases(c)[:1] for s in STYLES]),
        *paired.cases("neighbour", [(o, s, 0) for o in list(near)[:25] for s in STYLES]),
        *paired.cases("unrelated", [(o, world.STYLES[i % 4], 0) for i, o in enumerate(rest)]),
    ]


def run(stage: str, work: Path, chosen: Iterable[str], part: tuple[int, int]) -> None:
    """Do what is not in the results yet; part (i, n) does every n-th job, from the i-th."""
    work.mkdir(parents=True, exist_ok=True)
    done = {key(entry) for entry in paired.read(work / RESULTS)}
    pipe, judge = world.load(), world.judge()
    for size, name, concepts, cases in list(jobs(stage, chosen))[part[0] :: part[1]]:
        entry: dict[str, Any] = {"stage": size, "setting": name, "concepts": concepts}
        if key(entry) in done:
            continue
        entry |= measure(pipe, judge, name, concepts, cases, work)
        paired.keep(work / RESULTS, entry)
        print(size, name, ", ".join(concepts), {s: entry[s] for s in SHARES if entry.get(s, (0, 0))[1]}, flush=True)


def key(entry: dict[str, Any]) -> tuple:
    return entry["stage"], entry["setting"], *entry["concepts"]


def tables(work: Path) -> None:
    """Markdown tables: objects, styles, and several at once."""
    entries = paired.read(work / RESULTS)
    for stage in dict.fromkeys(entry["stage"] for entry in entries):
        for styles in (False, True):
            mine = [e for e in entries if e["stage"] == stage and (e["concepts"][0] in world.STYLES) == styles]
            shares = [s for s in SHARES if any(e.get(s, [0, 0])[1] for e in mine)]
            if not mine:
                continue
            print(f"\n**{stage}, {'styles' if styles else 'objects'}**\n\n| setting | {' | '.join(shares)} | bytes |")
            print("|---" * (len(shares) + 2) + "|")
            for name, rows in ((name, [e for e in mine if e["setting"] == name]) for name in SETTINGS):
                if not rows:
                    continue
                cells = [str(pooled(rows, share)) for share in shares]
                print(f"| {name} | {' | '.join(cells)} | {sum(e['bytes'] for e in rows) // len(rows):,} |")


def pooled(entries: list[dict[str, Any]], share: str) -> Estimate | str:
    """The share over all pictures; the interval knows that one concept's pictures stand and fall together."""
    sums = {str(e["concepts"]): (Share(*e[share]),) for e in entries if e.get(share, [0, 0])[1]}
    return clustered(sums, Share.estimate) if sums else "–"


def sheet(work: Path, path: Path, chosen: Iterable[str], stage: str = "confirm", most: int = 8) -> None:
    """Pairs before | after that went wrong under the chosen settings: a row for each share, spread over concepts."""
    rows: dict[str, list[tuple[str, str, str]]] = {}
    for entry in paired.read(work / RESULTS):
        if entry["stage"] == stage and entry["setting"] in chosen:
            kind = "a style:\n" if entry["concepts"][0] in world.STYLES else ""
            for share, text, _seed, before, after in entry["wrong"]:
                share = share.replace("kept", "not kept")
                rows.setdefault(kind + share, []).append((text, before, after))
    grid = Image.new("RGB", (150 + most * 134, 70 * len(rows) or 1), "white")
    draw = ImageDraw.Draw(grid)
    for y, (share, wrong) in enumerate(sorted(rows.items())):
        shown = wrong[:: max(1, len(wrong) // most)][:most]
        draw.text((4, 70 * y + 24), f"{share}\n{len(shown)} of {len(wrong)}", fill="black")
        for x, (_text, before, after) in enumerate(shown):
            for j, name in enumerate((before, after)):
                with Image.open(work / "pictures" / name) as picture:
                    grid.paste(picture.convert("RGB"), (150 + 134 * x + 65 * j, 70 * y))
        print(f"{share.replace(chr(10), ' ')}: {'; '.join(text for text, *_ in shown)}")
    grid.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("screen", "confirm", "together", "seal", "tables"))
    parser.add_argument("--work", type=Path, default=Path("ablation-work"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, help="only these")
    parser.add_argument(
        "--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"), help="for N processes side by side"
    )
    parser.add_argument("--sheet", type=Path, help="with tables: write the worst pairs of the settings here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.stage != "tables":
        return run(options.stage, options.work, options.settings or (), options.part)
    tables(options.work)
    if options.sheet:
        sheet(options.work, options.sheet, options.settings or CONFIRMED)


if __name__ == "__main__":
    main()
