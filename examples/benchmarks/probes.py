"""Erase objects of emoji-sd, then try to bring each back by every probe: what does each kind of attack get?

    python examples/benchmarks/probes.py                       # three objects, each erased by its name only
    python examples/benchmarks/probes.py --coreferences        # their paraphrases named too
    python examples/benchmarks/probes.py --concepts bee --probes completion inpainting --budget 4000

Prints a table, pooled over the objects, with 95 % intervals. For every probe and object the strongest way is chosen on some
seeds and measured on others. Results are kept in --work: a killed run goes on, and a probe is run once.
"""

import argparse
import json
from pathlib import Path

import torch

from diffusers_erase import erase, load_erasure, unload_erasure, world
from diffusers_erase.bench.metrics import Share
from diffusers_erase.bench.probes import PROBES, Setting

OBJECTS = ("butterfly", "guitar", "snail")
OPTIONS = {
    "concept-vector": {"scales": (1.0, 3.0), "population": 16, "generations": 15},
    "guidance": {"pictures": 8},
    "inversion": {"tokens": (2,), "pictures": 4, "updates": 40},
    "prefixes": {"words": (4,)},
    "relearning": {"updates": (5, 10, 20, 40), "pictures": 4},
}
"""What leaves those that learn half of the default budget for pictures."""
SHARES = ("came_back", "control", "chance")


def measured(
    pipe, judge, concept: str, probes: list[str], budget: int, folder: Path, options: dict[str, dict] = OPTIONS
) -> dict[str, dict]:
    """The results of these probes, as JSON; those in `folder` are not run again."""
    folder.mkdir(parents=True, exist_ok=True)
    setting = Setting(
        templates=tuple(world.prompt("{}", style) for style in world.STYLES),
        names=tuple(world.paraphrases(concept)),
        steps=world.STEPS,
        guidance=world.GUIDANCE,
        batch=16,
    )
    told = {}
    for name in probes:
        file = folder / f"{name}.json"
        if not file.is_file():
            result = PROBES[name](
                pipe, concept, lambda pictures: [o == concept for o in judge.objects(pictures)], budget,
                setting=setting, folder=folder / name, **options.get(name, {}),
            )  # fmt: skip
            print(f"  {concept}: {result}", flush=True)
            file.write_text(json.dumps(result.to_json(), indent=1, allow_nan=False))
        told[name] = json.loads(file.read_text())
    return told


def share_of(told: dict) -> Share:
    """The counts behind a share in a result's JSON."""
    return Share(round((told["value"] or 0) * told["n"]), told["n"])


def pooled(results: list[dict], share: str) -> str:
    """One share over all objects."""
    return str(Share.merged([share_of(result[share]) for result in results]).estimate())


def curve(results: list[dict]) -> str:
    """What came back of each way, pooled over the objects: the pictures on which the strongest was chosen."""
    ways: dict[str, list] = {}
    for result in results:
        for way in result["tried"]:
            ways.setdefault(way["label"], []).extend(way["seen"])
    return "; ".join(f"{label}: {seen.count(True)} of {len(seen)}" for label, seen in ways.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", nargs="+", default=list(OBJECTS))
    parser.add_argument(
        "--probes", nargs="+", choices=list(PROBES), metavar="PROBE",
        default=[name for name, known in PROBES.items() if not known.trains],
        help="by default those that train nothing; the others need a larger budget",
    )  # fmt: skip
    parser.add_argument("--coreferences", action="store_true", help="name each object's paraphrases when erasing it")
    parser.add_argument(
        "--budget", type=int, default=800, help="forwards of a probe on one object; a picture takes 20"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("probes-work"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    pipe, judge, found = world.load(), world.judge(), []
    adapter = "paraphrases named too" if given.coreferences else "by name only"
    for concept in given.concepts:
        named = world.paraphrases(concept) if given.coreferences else ()
        load_erasure(pipe, erase(pipe, concept, target="null", coreferences=named))
        folder = given.work / concept / adapter.replace(" ", "-")
        found.append(measured(pipe, judge, concept, given.probes, given.budget, folder))
        unload_erasure(pipe)
    print(f"\n{', '.join(given.concepts)}; {adapter}; {given.budget} forwards each\n")
    print("| probe | came back | unedited | by chance | strongest ways |\n|---|---|---|---|---|")
    for name in given.probes:
        results = [told[name] for told in found]
        ways = "; ".join(result["strongest"] for result in results)
        print(f"| {name} | {' | '.join(pooled(results, share) for share in SHARES)} | {ways} |")
    for name in (name for name in ("completion", "inpainting") if name in given.probes):
        print(f"\n{name}: {curve([told[name] for told in found])}")


if __name__ == "__main__":
    main()
