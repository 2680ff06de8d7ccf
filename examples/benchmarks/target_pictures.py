"""Target search against pictures, on emoji-sd: does the predicted damage rank the measured one, and is the found target good?

    python examples/benchmarks/target_pictures.py kinds    # 12 objects x 8 kinds of target x 30 others x 2 styles x 2 seeds
    python examples/benchmarks/target_pictures.py brute    # 8 objects, each sent to each of 20 candidates
    python examples/benchmarks/target_pictures.py study    # AGE's section 3: 25 objects in 5 groups, each against each
    python examples/benchmarks/target_pictures.py styles   # 4 styles: the others, their mixtures, the empty prompt
    python examples/benchmarks/target_pictures.py tables   # the tables of docs/targets.md

Each line of `pictures.jsonl` in --work is one concept and one target; what is there is not done again, so a killed run goes on.
Pictures of the unedited model are drawn once for all. Only pictures that it got right count.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from diffusers_erase import erase, load_erasure, packs, search_targets, unload_erasure, world
from diffusers_erase.bench import images
from diffusers_erase.bench.metrics import Estimate, paired_bootstrap
from diffusers_erase.bench.suites import Prompt, Settings, Suite
from diffusers_erase.sites import TEXT
from diffusers_erase.targets import readout
from diffusers_erase.text import Encoder

OBJECTS = (
    "cat", "owl", "butterfly", "rose", "banana", "hamburger", "wine", "airplane", "moon", "basketball", "guitar", "crown",
)  # fmt: skip
GROUPS = (
    ("cat", "dog", "fox", "panda", "pig"),
    ("banana", "apple", "strawberry", "watermelon", "lemon"),
    ("sun", "moon", "rainbow", "umbrella", "star"),
    ("car", "bus", "tractor", "airplane", "helicopter"),
    ("rose", "sunflower", "tulip", "cactus", "mushroom"),
)
KINDS = ("searched", "searched, preserved", "parent", "sibling", "paraphrase", "empty", "unrelated", "random")
STYLES, SEEDS, OTHERS, NEIGHBOURS, BRUTE = ("noto", "ink"), (0, 1), 30, 5, 20


class Job(NamedTuple):
    """One concept, one target, and whose pictures are looked at."""

    stage: str
    concept: str
    kind: str
    target: tuple[str, ...]
    preserve: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def key(self) -> tuple:
        return self.stage, self.concept, self.kind, self.target


def others_of(concept: str) -> tuple[str, ...]:
    """The concept's nearest neighbours, then objects drawn by its name."""
    near = world.neighbours(concept, NEIGHBOURS)
    far = [o for o in world.OBJECTS if o not in (concept, *near)]
    return (*near, *random.Random(concept).sample(far, OTHERS - NEIGHBOURS))


def target_of(pipe: Any, concept: str, kind: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Target and preserved names of a kind; None where there is none."""
    entry = world.catalogue()["objects"]
    if kind.startswith("searched"):
        told = search_targets(pipe, concept, world.OBJECTS, shield=kind.endswith("preserved")).options
        return told["target"], told["preserve"]
    names = {
        "parent": lambda: (entry[concept]["subgroup"].split("-")[-1],),
        "sibling": lambda: (world.neighbours(concept, 1)[0],),
        "paraphrase": lambda: tuple(world.paraphrases(concept)[:1]),
        "empty": tuple,
        "unrelated": lambda: (
            random.Random(concept).choice([o for o in entry if entry[o]["group"] != entry[concept]["group"]]),
        ),
        "random": lambda: (random.Random(concept).choice(Encoder(pipe).words()),),
    }[kind]()
    return None if kind == "paraphrase" and not names else (names, ())


def jobs(stage: str, pipe: Any, done: set[tuple]) -> Iterator[Job]:
    """What is to be drawn, the most telling first; searches are made only where they are needed."""
    if stage == "kinds":
        for concept in OBJECTS:
            for kind in KINDS:
                if not any(key[:3] == (stage, concept, kind) for key in done) and (
                    found := target_of(pipe, concept, kind)
                ):
                    yield Job(stage, concept, kind, *found, others_of(concept))
    elif stage == "study":
        names = tuple(name for group in GROUPS for name in group)
        for kind in ("empty", "sibling", "parent", "searched", "unrelated", "paraphrase", "random"):
            for concept in names:
                if not any(key[:3] == (stage, concept, kind) for key in done) and (
                    found := target_of(pipe, concept, kind)
                ):
                    yield Job(stage, concept, kind, *found, tuple(name for name in names if name != concept))
    elif stage == "brute":
        for concept in OBJECTS[:8]:
            near = world.neighbours(concept, BRUTE // 2)
            far = [o for o in world.OBJECTS if o not in (concept, *near)]
            for name in (*near, *random.Random(concept).sample(far, BRUTE - len(near))):
                yield Job(stage, concept, "candidate", (name,), (), others_of(concept))
    else:
        for concept in world.STYLES:
            rest = [s for s in world.STYLES if s != concept]
            for target in ((), *((s,) for s in rest), tuple(rest[:2]), tuple(rest)):
                yield Job(stage, concept, "mixture" if len(target) > 1 else "single", target, (), ())


def prompts_of(job: Job) -> list[Prompt]:
    """The concept's own pictures, then the others'."""
    if job.concept in world.STYLES:
        objects = random.Random(job.concept).sample(world.OBJECTS, 16)
        drawn = [(o, s, 0) for s in (job.concept, *(s for s in world.STYLES if s != job.concept)) for o in objects]
    else:
        own = [(job.concept, s, seed) for s in world.STYLES for seed in SEEDS]
        drawn = own + [(o, s, seed) for o in job.others for s in STYLES for seed in SEEDS]
    return [Prompt(world.prompt(o, s), seed, o, s) for o, s, seed in drawn]


def measure(pipe: Any, judge: Any, job: Job, work: Path) -> dict[str, Any]:
    """Of every picture what it should show, the judge's probability of that before and after, whether it is the likeliest, and how
    far the pixels moved (root mean square of 0 to 1)."""
    is_style = job.concept in world.STYLES
    told = {"templates": world.style_contexts()} if is_style else {}
    adapter = erase(pipe, job.concept, target=job.target or "null", preserve=job.preserve, **told)
    prompts = prompts_of(job)
    suite = Suite("targets", "1", "this file", "Apache-2.0", tuple(prompts), {}, Settings(world.STEPS, world.GUIDANCE))
    before = images.read(images.generate(pipe, suite, work / "pictures"))
    load_erasure(pipe, adapter, residual_max=None)
    try:
        after = images.read(images.generate(pipe, suite, work / "pictures"))
    finally:
        unload_erasure(pipe)
    seen = [judge.probabilities(pictures) for pictures in (before, after)]
    rows = []
    for i, prompt in enumerate(prompts):
        what, names = (1, judge.style_names) if is_style else (0, judge.object_names)
        label = names.index(prompt.style if is_style else prompt.shows)
        b, a = (seen[n][what][i] for n in (0, 1))
        moved = np.sqrt(np.mean((np.asarray(before[i], float) - np.asarray(after[i], float)) ** 2)) / 255
        rows.append(
            [prompt.shows, prompt.style, round(float(b[label]), 5), round(float(a[label]), 5)]
            + [bool(b.argmax() == label), bool(a.argmax() == label), round(float(moved), 5)]
        )
    return job._asdict() | {"rows": rows, "bytes": adapter.size}


def read(work: Path) -> list[dict[str, Any]]:
    path = work / "pictures.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(stage: str, work: Path) -> None:
    """Do what is not in the results yet."""
    work.mkdir(parents=True, exist_ok=True)
    done = {(e["stage"], e["concept"], e["kind"], tuple(e["target"])) for e in read(work)}
    pipe, judge = world.load(), world.judge()
    for job in jobs(stage, pipe, done):
        if job.key in done:
            continue
        entry = measure(pipe, judge, job, work)
        with (work / "pictures.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")
        own = [row for row in entry["rows"] if job.concept in row[:2] and row[4]]
        print(*job[:4], "left", sum(row[5] for row in own), "of", len(own), flush=True)


def predict(pipe: Any, entry: dict[str, Any], metric: torch.Tensor) -> dict[str, list[float]]:
    """Of each other name the predicted damage: of its name in the pack's contexts, and of all tokens of the prompts that were drawn."""
    adapter = erase(pipe, entry["concept"], target=entry["target"] or "null", preserve=entry["preserve"])
    encoder = Encoder(pipe)
    A, D, roles = adapter.edits[TEXT].detectors(), adapter.edits[TEXT].offsets.double(), ("subject", "eot")

    def share(states: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
        change, away = states @ A.mT @ D, states - empty
        return ((change @ metric) * change).sum(-1), ((away @ metric) * away).sum(-1)

    null = encoder.null_rows(roles)
    empty, nothing = torch.stack([null[role] for role in roles]), encoder.encode([""]).rows.double()
    found = {}
    for name in entry["others"]:
        if name not in ROWS:
            prompts = [world.prompt(name, style) for style in STYLES]
            contexts = search_contexts(pipe)
            ROWS[name] = encoder.table([name], roles, contexts)[0], encoder.encode(prompts).rows.double()
        rows, states = ROWS[name]
        moved, whole = share(rows, empty)
        by_name = float((moved / whole).sqrt().mean())
        moved, whole = share(states, nothing)
        found[name] = [by_name, float((moved.sum(1) / whole.sum(1)).sqrt().mean())]
    return found


ROWS: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}


def search_contexts(pipe: Any) -> tuple[str, ...]:
    """The contexts in which `erase` reads names on this model."""
    return packs.recipe_of(pipe).templates


def with_predictions(work: Path) -> list[dict[str, Any]]:
    """The results on objects with what was predicted for each, which is kept beside them."""
    path, entries = work / "predictions.jsonl", [e for e in read(work) if e["stage"] != "styles"]
    known = {
        tuple(map(str, e[0])): e[1] for e in map(json.loads, path.read_text().splitlines() if path.exists() else ())
    }
    pipe, metric = None, None
    for entry in entries:
        key = (entry["concept"], str(entry["target"]), str(entry["preserve"]), str(entry["others"]))
        if key not in known:
            pipe = pipe or world.load()
            metric = readout(pipe) if metric is None else metric
            known[key] = predict(pipe, entry, metric)
            with path.open("a") as file:
                file.write(json.dumps([key, known[key]]) + "\n")
        entry["predicted"] = known[key]
    return entries


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, ties sharing their mean."""
    ordered = np.sort(values)
    return (np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")) / 2


def spearman(pairs: np.ndarray) -> float:
    return float(np.corrcoef(ranks(pairs[:, 0]), ranks(pairs[:, 1]))[0, 1])


def by_concept(groups: dict[str, np.ndarray], of: Callable[[np.ndarray], float], draws: int = 1000) -> Estimate:
    """`of` all rows, with an interval from drawing concepts with replacement."""
    names, generator = sorted(groups), np.random.default_rng(0)
    values = []
    for _ in range(draws):
        drawn = generator.integers(len(names), size=len(names))
        values.append(of(np.concatenate([groups[names[i]] for i in drawn])))
    low, high = np.nanpercentile(values, [2.5, 97.5])
    whole = np.concatenate([groups[name] for name in names])
    return Estimate(of(whole), float(low), float(high), len(whole))


def pairs_of(entries: list[dict[str, Any]], predictor: int, measure: Callable[[list], float]) -> dict[str, np.ndarray]:
    """Of each concept its pairs (predicted, measured), one for each target and other name."""
    found: dict[str, list[tuple[float, float]]] = {}
    for e in entries:
        for name in e["others"]:
            rows = [row for row in e["rows"] if row[0] == name and row[4]]
            if rows:
                value = float(np.mean([measure(row) for row in rows]))
                found.setdefault(e["concept"], []).append((e["predicted"][name][predictor], value))
    return {concept: np.array(pairs) for concept, pairs in found.items()}


MEASURES = {"probability lost": lambda row: row[2] - row[3], "pixels moved": lambda row: row[6]}
PREDICTORS = ("name in contexts", "all tokens of the prompts")


def rank_table(entries: list[dict[str, Any]]) -> None:
    print(
        "\n| Spearman of | "
        + " | ".join(f"{p} / {m}" for p in PREDICTORS for m in MEASURES)
        + " |\n|---|---|---|---|---|"
    )
    kinds = dict.fromkeys(e["kind"] for e in entries)
    for title, mine in (
        ("all pairs", entries),
        *((kind, [e for e in entries if e["kind"] == kind]) for kind in kinds),
    ):
        cells = [
            number(by_concept(pairs_of(mine, p, measure), spearman))
            for p in range(len(PREDICTORS))
            for measure in MEASURES.values()
        ]
        print(f"| {title} | {' | '.join(cells)} |")


def number(e: Estimate) -> str:
    return f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}], n = {e.n:,}"


def shares(entries: list[dict[str, Any]]) -> list[str]:
    """Concept left, neighbours kept, others kept, probability lost and pixels moved of the others, predicted damage."""
    own, near, far = [], [], []
    for e in entries:
        neighbours = world.neighbours(e["concept"], NEIGHBOURS) if e["stage"] != "styles" else ()
        for row in e["rows"]:
            if row[4]:
                (own if e["concept"] in row[:2] else near if row[0] in neighbours else far).append(row)
    cells = [str(Estimate.of_share(row[5] for row in rows)) for rows in (own, near, far)]
    lost, moved = (1000 * np.mean([m(row) for row in near + far]) for m in MEASURES.values())
    cells += [f"{lost:.1f}", f"{moved:.1f}"]
    if "predicted" in entries[0]:
        cells.append(f"{np.mean([v[0] for e in entries for v in e['predicted'].values()]):.2%}")
    return cells


def kinds_table(entries: list[dict[str, Any]]) -> None:
    print(
        "\n| target | concept left | neighbours kept | others kept | probability lost, ‰ | pixels moved, ‰ | predicted |"
    )
    print("|---|---|---|---|---|---|---|")
    for kind in dict.fromkeys(e["kind"] for e in entries):
        print(f"| {kind} | {' | '.join(shares([e for e in entries if e['kind'] == kind]))} |")


def paired_table(entries: list[dict[str, Any]], first: str = "empty") -> None:
    """Against the empty prompt, on the same pictures: differences in what others lose and in what is left of the concept."""
    print(
        f"\n| against {first!r} | neighbours: probability lost | neighbours: pixels moved | concept left |\n|---|---|---|---|"
    )
    base = {e["concept"]: e for e in entries if e["kind"] == first}
    for kind in dict.fromkeys(e["kind"] for e in entries if e["kind"] != first):
        cells = []
        for measure, own in (*((m, False) for m in MEASURES.values()), (lambda row: float(row[5]), True)):
            values: tuple[list, list, list] = ([], [], [])
            for e in (e for e in entries if e["kind"] == kind and e["concept"] in base):
                near = world.neighbours(e["concept"], NEIGHBOURS)
                for a, b in zip(base[e["concept"]]["rows"], e["rows"], strict=True):
                    if a[4] and (a[0] == e["concept"] if own else a[0] in near):
                        values[0].append(measure(a)), values[1].append(measure(b)), values[2].append(e["concept"])
            d = paired_bootstrap(values[0], values[1], values[2]).difference
            ratio = np.mean(values[1]) / np.mean(values[0]) if np.mean(values[0]) else float("nan")
            cells.append(f"{d.value:+.4f} [{d.low:+.4f}, {d.high:+.4f}], × {ratio:.2f}")
        print(f"| {kind} | {' | '.join(cells)} |")


def brute_table(entries: list[dict[str, Any]], pipe: Any) -> None:
    """Of each concept the search's choice among the 20 candidates, and the best by pictures: erased, and others kept most."""
    print(
        "\n| concept | chosen: left, others' pixels moved, rank | best by pictures | refused, of these left | Spearman |"
    )
    print("|---|---|---|---|---|")
    for concept in dict.fromkeys(e["concept"] for e in entries):
        mine = {e["target"][0]: e for e in entries if e["concept"] == concept}
        ranking = search_targets(pipe, concept, tuple(mine), k=BRUTE)
        refused = dict(ranking.refused)
        left, moved, told = {}, {}, {}
        for name, e in mine.items():
            own = [row for row in e["rows"] if row[0] == concept and row[4]]
            left[name] = float(np.mean([row[5] for row in own]))
            moved[name] = float(np.mean([row[6] for row in e["rows"] if row[0] != concept and row[4]]))
            told[name] = float(np.mean([v[0] for v in e["predicted"].values()]))
        good = sorted((name for name in mine if left[name] <= 0.125), key=moved.__getitem__)
        chosen = ranking[0].names[0]
        rank = good.index(chosen) + 1 if chosen in good else "not erased"
        gone = ", ".join(f"{name} {left[name]:.0%}" for name in mine if name in refused) or "none"
        best = f"{good[0]}: {left[good[0]]:.0%}, {moved[good[0]]:.4f}" if good else "none"
        both = np.array([[told[name], moved[name]] for name in mine])
        found = f"{chosen}: {left[chosen]:.0%}, {moved[chosen]:.4f}, {rank} of {len(good)}"
        print(f"| {concept} | {found} | {best} | {gone} | {spearman(both):.2f} |")


def study_table(entries: list[dict[str, Any]]) -> None:
    """Locality, asymmetry and the most fragile names, of the pixels moved."""
    group = {name: i for i, names in enumerate(GROUPS) for name in names}
    print(
        "\n| target | within the group, ‰ | between groups, ‰ | mean asymmetry, ‰ | most fragile |\n|---|---|---|---|---|"
    )
    for kind in dict.fromkeys(e["kind"] for e in entries):
        edges = {}
        for e in (e for e in entries if e["kind"] == kind):
            for name in e["others"]:
                rows = [row[6] for row in e["rows"] if row[0] == name and row[4]]
                edges[e["concept"], name] = 1000 * float(np.mean(rows)) if rows else float("nan")
        inside, outside = (
            [v for (a, b), v in edges.items() if (group[a] == group[b]) == same] for same in (True, False)
        )
        apart = [abs(v - edges[b, a]) for (a, b), v in edges.items() if a < b and (b, a) in edges]
        column = {name: np.nanmean([v for (_, b), v in edges.items() if b == name] or [np.nan]) for name in group}
        fragile = sorted(column, key=lambda name: -np.nan_to_num(column[name]))[:3]
        said = ", ".join(f"{name} {column[name]:.1f}" for name in fragile)
        print(f"| {kind} | {np.nanmean(inside):.1f} | {np.nanmean(outside):.1f} | {np.nanmean(apart):.1f} | {said} |")


def tables(work: Path) -> None:
    """Markdown tables of every stage."""
    entries = with_predictions(work)
    for stage in ("kinds", "study"):
        if mine := [e for e in entries if e["stage"] == stage]:
            print(f"\n**{stage}**")
            kinds_table(mine)
            paired_table(mine)
            rank_table(mine)
            if stage == "study":
                study_table(mine)
    if mine := [e for e in entries if e["stage"] == "brute"]:
        print("\n**brute**")
        rank_table(mine)
        brute_table(mine, world.load())
    if mine := [e for e in read(work) if e["stage"] == "styles"]:
        print("\n**styles**")
        for e in mine:
            e["kind"] = " + ".join(e["target"]) or "empty"
        kinds_table(mine)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("kinds", "brute", "study", "styles", "tables"))
    parser.add_argument("--work", type=Path, default=Path("targets-work"))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.stage == "tables":
        return tables(options.work)
    run(options.stage, options.work)


if __name__ == "__main__":
    main()
