"""Erase objects of emoji-sd, then try to bring each back by every probe: what does each kind of attack get?

    python examples/benchmarks/probes.py                       # three objects, by name only and with their paraphrases named
    python examples/benchmarks/probes.py --concepts bee --budget 4000

Prints a table for each adapter, pooled over the objects, with 95 % intervals. For every probe and object the strongest way is
chosen on some seeds and measured on others. Results are kept in --work: a killed run goes on, and a probe is run once.
"""

import argparse
import json
from pathlib import Path

import torch

from diffusers_erase import erase, load_erasure, unload_erasure, world
from diffusers_erase.bench.metrics import Share
from diffusers_erase.bench.probes import PROBES, Setting

OBJECTS = ("butterfly", "guitar", "snail")
OPTIONS = {"concept-vector": {"scales": (1.0, 3.0), "population": 16, "generations": 15}}
SHARES = ("came_back", "control", "chance")


def measured(pipe, judge, concept: str, budget: int, folder: Path) -> dict[str, dict]:
    """The results of every probe, as JSON; those in `folder` are not run again."""
    setting = Setting(
        templates=tuple(world.prompt("{}", style) for style in world.STYLES),
        names=tuple(world.paraphrases(concept)),
        steps=world.STEPS,
        guidance=world.GUIDANCE,
        batch=16,
    )
    told = {}
    for name, probe in PROBES.items():
        file = folder / f"{name}.json"
        if not file.is_file():
            result = probe(
                pipe, concept, lambda pictures: [o == concept for o in judge.objects(pictures)], budget,
                setting=setting, folder=folder / name, **OPTIONS.get(name, {}),
            )  # fmt: skip
            print(f"  {concept}: {result}", flush=True)
            file.write_text(json.dumps(result.to_json(), indent=1, allow_nan=False))
        told[name] = json.loads(file.read_text())
    return told


def pooled(results: list[dict], share: str) -> str:
    """One share over all objects."""
    parts = [result[share] for result in results]
    hits, n = sum(round((e["value"] or 0) * e["n"]) for e in parts), sum(e["n"] for e in parts)
    return str(Share.of([True] * hits + [False] * (n - hits)).estimate())


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
        "--budget", type=int, default=800, help="denoiser forwards of a probe on one object; a picture takes 20"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("probes-work"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    pipe, judge, found = world.load(), world.judge(), {}
    for concept in given.concepts:
        for adapter, names in (("by name only", ()), ("paraphrases named too", world.paraphrases(concept))):
            load_erasure(pipe, erase(pipe, concept, coreferences=names))
            folder = given.work / concept / adapter.replace(" ", "-")
            found.setdefault(adapter, []).append(measured(pipe, judge, concept, given.budget, folder))
            unload_erasure(pipe)
    for adapter, objects in found.items():
        print(
            f"\n{adapter} ({', '.join(given.concepts)})\n\n| probe | came back | unedited | by chance | strongest ways |"
        )
        print("|---|---|---|---|---|")
        for name in PROBES:
            results = [told[name] for told in objects]
            ways = "; ".join(result["strongest"] for result in results)
            print(f"| {name} | {' | '.join(pooled(results, share) for share in SHARES)} | {ways} |")
        print(f"\ncompletion: {curve([told['completion'] for told in objects])}")
        print(f"inpainting: {curve([told['inpainting'] for told in objects])}")


if __name__ == "__main__":
    main()
