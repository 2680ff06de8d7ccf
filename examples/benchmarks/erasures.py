"""Erase ten simple objects of emoji-sd, one after the other, and count: what is left of each, what else changed.

    python examples/benchmarks/erasures.py                             # the library's defaults
    python examples/benchmarks/erasures.py --coreferences auto         # what the model draws alike is erased too
    python examples/benchmarks/erasures.py --gate 0.6 --coreferences named
    python examples/benchmarks/erasures.py --method uce

Prints one line a setting, pooled over the objects, with 95 % intervals that take the objects as drawn at random. Pictures
are cached in --work: a killed run goes on, and the unedited model draws once for all settings. With --sheet a picture of
pairs before | after is written as well.
"""

import argparse
from pathlib import Path

from PIL import Image

from diffusers_erase import bench, erase, world
from diffusers_erase.bench.demo import demo_suite
from diffusers_erase.bench.judges import emoji_objects, emoji_styles
from diffusers_erase.bench.metrics import Estimate, Share, clustered

OBJECTS = ("apple", "bee", "butterfly", "cactus", "crown", "fish", "guitar", "snail", "sun", "umbrella")
SHARES = {
    "concept left": ("efficacy", "shows"),
    "paraphrases left": ("generality", "shows"),
    "neighbours kept": ("sensitivity/visual", "shows"),
    "unrelated kept": ("unrelated", "shows"),
    "styles kept": ("across/outside", "style"),
}
"""Heads of the table, and the part and aspect that each tells."""


def trials(
    concepts: list[str], target: str | None, work: Path, coreferences: str | None, **options
) -> list[bench.Trial]:
    """One trial a concept; `target` "sibling" is each concept's nearest neighbour."""
    pipe, judges = world.load(), {"shows": emoji_objects(), "style": emoji_styles()}
    found = []
    for concept in concepts:
        goal = world.neighbours(concept, 1)[0] if target == "sibling" else target
        names = {"named": world.paraphrases(concept), "auto": "auto", None: ()}[coreferences]
        adapter = erase(pipe, concept, target=goal, coreferences=names, **options)
        found += bench.evaluate(pipe, {concept: adapter}, demo_suite(concept), judges, work / "pictures").trials
    return found


def pooled(found: list[bench.Trial], share: str) -> Estimate:
    """The share over all pictures of all trials; the interval knows that one concept's pictures stand and fall together."""
    sums = {trial.name: trial.shares[SHARES[share]] for trial in found if SHARES[share] in trial.shares}
    return clustered({name: (s,) for name, s in sums.items()}, Share.estimate)


def sheet(found: list[bench.Trial]) -> Image.Image:
    """A row for each trial: before | after in every style, then an unrelated object in every style."""
    size, rows = 64, []
    for trial in found:
        parts = {part.name: part.indices for part in trial.parts if part.aspect == "shows"}
        first = [i for name in ("efficacy", "unrelated") for i in parts[name] if trial.suite.prompts[i].seed == 1][:8]
        rows.append([path for i in first for path in trial.pictures[i]])
    grid = Image.new("RGB", (16 * size + 7 * 6, len(rows) * (size + 2)), "white")
    for y, row in enumerate(rows):
        for x, path in enumerate(row):
            with Image.open(path) as picture:
                grid.paste(picture.convert("RGB"), (x * size + x // 2 * 6, y * (size + 2)))
    return grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", nargs="+", default=list(OBJECTS))
    parser.add_argument(
        "--target", help="a name, 'null', or 'sibling': each one's nearest neighbour; by default searched"
    )
    parser.add_argument("--method", default="ridge")
    parser.add_argument("--tokens")
    parser.add_argument("--residual", type=float)
    parser.add_argument("--gate", type=float)
    parser.add_argument(
        "--coreferences", choices=("named", "auto"), help="name each object's paraphrases, or have them found"
    )
    parser.add_argument("--work", type=Path, default=Path("erasures-work"))
    parser.add_argument("--sheet", type=Path)
    given = vars(parser.parse_args())
    to_sheet = given.pop("sheet")
    found = trials(**given)
    settings = {k: v for k, v in given.items() if k not in ("concepts", "work") and v}
    print(", ".join(f"{k} {v}" for k, v in settings.items()))
    for trial in found:
        told = {name: trial.shares[key].estimate().value for name, key in SHARES.items() if key in trial.shares}
        print(f"  {trial.name}: {', '.join(f'{name} {value:.0%}' for name, value in told.items())}")
    print("| " + " | ".join(SHARES) + " |")
    print("| " + " | ".join(str(pooled(found, share)) for share in SHARES) + " |")
    if to_sheet:
        sheet(found).save(to_sheet)


if __name__ == "__main__":
    main()
