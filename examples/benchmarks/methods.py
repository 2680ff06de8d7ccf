"""Closed forms and methods that train on emoji-sd: what is left, what is hurt, what it costs; paired by seed.

    python examples/benchmarks/methods.py run --concepts butterfly ink    # 10 objects and 2 styles where none are named
    python examples/benchmarks/methods.py probes --concepts butterfly     # attacks on every method's erasure
    python examples/benchmarks/methods.py table                           # the tables of docs/training.md

Each line of `results.jsonl` in --work is one method on one concept; what is there is not done again, so a killed run goes on, and
two runs may share the folder. Concepts are gone through in turn, each with all methods; the adapters are kept for the probes.
Trained methods get a budget (BUDGET), the same for all. Pictures of the unedited model are drawn once. Shares count pictures that
the unedited model got right. No paraphrase is named to any method.
"""

import argparse
import json
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import paired
import probes
import torch

from diffusers_erase import ErasureAdapter, erase, load_erasure, unload_erasure, world
from diffusers_erase.bench import images
from diffusers_erase.bench.measures import clip_score
from diffusers_erase.bench.metrics import Mean, Share

OBJECTS = ("butterfly", "guitar", "hamburger", "owl", "airplane", "rose", "cat", "banana", "crown", "moon")
RESULTS = "results.jsonl"
STYLES = {"ink": "noto", "pixel": "fluent"}
"""Styles to erase, and where a generic target sends them."""

BUDGET = {"updates": 200, "batch": 8, "rate": 3e-4, "steps": world.STEPS, "guidance": 1.0, "precision": "bf16"}
"""Of every method that trains: what AGE, the dearest, does in less than five minutes on two cores. The papers take 200 to 2,000 steps."""

METHODS: dict[str, dict[str, Any]] = {
    "UCE, empty": {"method": "uce"},
    "UCE, generic": {"method": "uce", "target": "generic"},
    "ridge, null": {"target": "null"},
    "ridge, generic": {"target": "generic"},
    "ridge, auto": {"target": "auto"},
    "ridge, auto, coreferences too": {"target": "auto", "coreferences": "auto"},
    "ridge, AGE's target": {"target": "learned"},
    "ESD": {"method": "esd"} | BUDGET,
    "AP": {"method": "ap", "candidates": "near"} | BUDGET,
    "AGE": {"method": "age", "candidates": "near"} | BUDGET,
    "AGE, as released": {"method": "age", "candidates": "near", "released": True} | BUDGET,
}
ATTACKS: dict[str, dict[str, Any]] = {
    "completion": {"shares": (0.3, 0.5)},
    "concept-vector": {"scales": (1.0, 3.0), "population": 16, "generations": 15},
    "inversion": {"tokens": (2,), "pictures": 4, "updates": 40},
}
"""Probes and their options: the first steps unedited, prompts searched without the name, and a learned word."""
PROBE_BUDGET = 1200
LAST = ("ridge, AGE's target",)
"""Done after the others of a concept: it needs what AGE has learned."""


def cases_of(concept: str) -> list[paired.Case]:
    """What is drawn for one concept; the choice depends on its name only."""
    draw = random.Random(concept)

    if concept in STYLES:
        objects, others = draw.sample(world.OBJECTS, 16), [s for s in world.STYLES if s != concept]
        kept = [(o, others[i % 3], 0) for i, o in enumerate(objects)]
        return paired.cases("concept", [(o, concept, 0) for o in objects]) + paired.cases("unrelated", kept)
    far = draw.sample([o for o in world.OBJECTS if o not in (concept, *world.neighbours(concept, 8))], 8)
    return [
        *paired.cases("concept", [(concept, s, seed) for s in world.STYLES for seed in (0, 1)]),
        *paired.cases(
            "paraphrase", [(concept, s, 0, w) for w in world.paraphrases(concept)[:2] for s in ("noto", "ink")]
        ),
        *paired.cases("neighbour", [(o, s, 0) for o in world.neighbours(concept, 4) for s in ("noto", "ink")]),
        *paired.cases("unrelated", [(o, world.STYLES[i % 4], 0) for i, o in enumerate(far)]),
    ]


def make(pipe: Any, name: str, concept: str, work: Path) -> tuple[ErasureAdapter, float]:
    """The adapter of one method for one concept, kept in `work`, and the CPU seconds that it took."""
    options = dict(METHODS[name])
    if options.get("target") == "generic":
        subgroup = world.catalogue()["objects"].get(concept, {}).get("subgroup", "")
        options["target"] = STYLES.get(concept, subgroup.split("-")[-1])
    if options.get("target") == "learned":
        (learned,) = (
            e["targets"] for e in paired.read(work / RESULTS) if (e["method"], e["concept"]) == ("AGE", concept)
        )
        options["target"] = learned[0]
    if options.get("candidates") == "near":
        styles = [s for s in world.STYLES if s != concept]
        options["candidates"] = styles if concept in STYLES else world.neighbours(concept, 20)
    if concept in STYLES and options.get("method") != "uce":
        options["templates"] = world.style_contexts()
    spent = time.process_time()
    adapter = erase(pipe, concept, **options)
    spent = time.process_time() - spent
    adapter.save_pretrained(work / "adapters" / concept / name)
    return adapter, spent


def measure(pipe: Any, judge: Any, score: Any, name: str, concept: str, work: Path) -> dict[str, Any]:
    """Hits and n of every share, CLIP scores of what is to be kept, and what the adapter cost."""
    adapter, spent = make(pipe, name, concept, work)
    found: dict[str, Any] = {
        "cpu": spent,
        "bytes": adapter.size,
        "targets": adapter.recipes[0].targets,
        "loss": adapter.recipes[0].options.get("loss"),
    }
    cases = cases_of(concept)
    files = paired.draw(pipe, adapter, cases, work / "pictures")
    before, after = (
        [list(zip(judge.objects(p), judge.styles(p), strict=True)) for p in [images.read(f)]][0] for f in files
    )
    for share, right in paired.count(cases, before, after, concept, paired.SHARES).items():
        found[share] = [sum(hit for hit, _ in right), len(right)]
    kept = [i for i, case in enumerate(cases) if case.role in ("neighbour", "unrelated")]
    texts = [cases[i].prompt.text for i in kept]
    plain, edited = (score([f[i] for i in kept], texts) for f in files)
    found["CLIP score"] = (edited - plain).tolist()
    return found


def run(work: Path, concepts: Iterable[str], methods: Iterable[str]) -> None:
    """Do what is not in the results yet."""
    work.mkdir(parents=True, exist_ok=True)
    pipe, judge, score = world.load(), world.judge(), clip_score(world.clip_path())
    order = sorted(methods, key=lambda name: name in LAST)
    for concept in concepts:
        for name in order:
            if any((e["method"], e["concept"]) == (name, concept) for e in paired.read(work / RESULTS)):
                continue
            entry = {"method": name, "concept": concept} | measure(pipe, judge, score, name, concept, work)
            paired.keep(work / RESULTS, entry)
            print(concept, name, {key: entry[key] for key in (*paired.SHARES, "cpu", "targets")}, flush=True)


def probe(work: Path, concepts: Iterable[str], methods: Iterable[str]) -> None:
    """Try to bring each concept back from each method's erasure; what is not in the results yet."""
    pipe, judge = world.load(), world.judge()
    for concept in concepts:
        for name in methods:
            folder = work / "probes" / concept / name
            if all((folder / f"{kind}.json").is_file() for kind in ATTACKS):
                continue
            made = work / "adapters" / concept / name
            load_erasure(pipe, made if made.is_dir() else make(pipe, name, concept, work)[0], residual_max=None)
            probes.measured(pipe, judge, concept, list(ATTACKS), PROBE_BUDGET, folder, ATTACKS)
            unload_erasure(pipe)
            print(concept, name, flush=True)


def probe_table(work: Path) -> None:
    """A Markdown table: what each attack brought back from each method's erasure, from the unedited model, and by chance."""
    found = [name for name in METHODS if any(work.glob(f"probes/*/{name}/*.json"))]
    if found:
        print(f"\n| method | {' | '.join(ATTACKS)} |\n{'|---' * (len(ATTACKS) + 1)}|")
    for name in found:
        cells = []
        for kind in ATTACKS:
            told = [
                (f.parent.parent.name, json.loads(f.read_text())) for f in work.glob(f"probes/*/{name}/{kind}.json")
            ]
            back, *others = (
                {concept: probes.share_of(result[key]) for concept, result in sorted(told)}
                for key in ("came_back", "control", "chance")
            )
            plain, chance = (Share.merged(list(other.values())).estimate().value for other in others)
            cells.append(f"{paired.told(back)} ({plain:.0%}, {chance:.0%})")
        print(f"| {name} | {' | '.join(cells)} |")


def table(work: Path) -> None:
    """A Markdown table for objects, and one for styles; intervals are bootstrapped by concept."""
    for styles in (False, True):
        mine = [e for e in paired.read(work / RESULTS) if (e["concept"] in STYLES) == styles]
        shares = [s for s in paired.SHARES if any(e[s][1] for e in mine)]
        if not mine:
            continue
        print(f"\n{', '.join(dict.fromkeys(e['concept'] for e in mine))}:\n")
        print(
            f"| method | {' | '.join(shares)} | CLIP score, change | CPU seconds | bytes |\n{'|---' * (len(shares) + 4)}|"
        )
        for name in METHODS:
            rows = [e for e in mine if e["method"] == name]
            if not rows:
                continue
            cells = [paired.told({e["concept"]: Share(*e[share]) for e in rows}) for share in shares]
            cells.append(paired.told({e["concept"]: Mean.of(e["CLIP score"]) for e in rows}, "{:+.2f}"))
            cpu, size = (sum(e[key] for e in rows) / len(rows) for key in ("cpu", "bytes"))
            cells += [f"{cpu:.1f}", f"{size:,.0f}"]
            print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("run", "probes", "table"))
    parser.add_argument("--work", type=Path, default=Path("methods-work"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--concepts", nargs="+", choices=(*OBJECTS, *STYLES), default=[*OBJECTS, *STYLES])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="only these")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.stage == "probes":
        probe(options.work, [c for c in options.concepts if c not in STYLES], options.methods)
        return probe_table(options.work)
    if options.stage == "run":
        run(options.work, options.concepts, options.methods)
    table(options.work)
    probe_table(options.work)


if __name__ == "__main__":
    main()
