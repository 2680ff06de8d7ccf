"""Target search against pictures, on emoji-sd: does the predicted damage rank the measured one, and is the found target good?

    python examples/benchmarks/target_pictures.py choices  # what is found for 64 objects; draws nothing
    python examples/benchmarks/target_pictures.py synonyms # what tells a paraphrase from a sibling; draws nothing
    python examples/benchmarks/target_pictures.py kinds    # 12 objects and 2 styles, each sent to 8 kinds of target
    python examples/benchmarks/target_pictures.py broad    # the same objects under a base pack that protects nothing: others are hurt
    python examples/benchmarks/target_pictures.py brute    # 8 objects, each sent to each of 20 candidates
    python examples/benchmarks/target_pictures.py study    # AGE's section 3: 25 objects in 5 groups, each against each
    python examples/benchmarks/target_pictures.py tables   # the tables of docs/targets.md

Each line of `pictures.jsonl` in --work is one concept and one target; what is there is not done again, so a killed run goes on.
Pictures of the unedited model are drawn once for all stages.
Only pictures that the unedited model got right count.
"""

import argparse
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import ablation
import numpy as np
import paired
import torch
from torch import Tensor

from diffusers_erase import ConceptGraph, ErasureAdapter, erase, packs, search_targets, world
from diffusers_erase.bench import images
from diffusers_erase.bench.metrics import Estimate, Share, paired_bootstrap
from diffusers_erase.guess import FirstGuess
from diffusers_erase.outlook import squared
from diffusers_erase.sites import TEXT
from diffusers_erase.targets import readout
from diffusers_erase.text import Encoder

GROUPS = (
    ("cat", "dog", "fox", "panda", "pig"),
    ("banana", "apple", "strawberry", "watermelon", "lemon"),
    ("sun", "moon", "rainbow", "umbrella", "star"),
    ("car", "bus", "tractor", "airplane", "helicopter"),
    ("rose", "sunflower", "tulip", "cactus", "mushroom"),
)
OBJECTS = (
    "dog",
    "penguin",
    "crab",
    "bee",
    "sunflower",
    "mushroom",
    "apple",
    "pizza",
    "beer",
    "bus",
    "trumpet",
    "hammer",
)
"""Of those on which nothing was tuned (ablation.OTHERS), spread over the groups."""
RESULTS = "pictures.jsonl"
KINDS = ("empty", "sibling", "searched", "direction-aware", "parent", "paraphrase", "unrelated", "random")
"""`searched` is what `erase` does by itself; `direction-aware` ranks by collateral + confusion, and preserves the target."""
BROAD = 50.0
"""The ridge λ of a base pack that protects next to nothing (the model's own: 0.5), so that there is damage to tell targets apart by."""
BRUTE = 20
"""Candidates that are all drawn."""


class Job(NamedTuple):
    """One concept and one target."""

    stage: str
    concept: str
    kind: str
    target: tuple[str, ...]
    preserve: tuple[str, ...]

    @property
    def made(self) -> tuple[str, str, tuple[str, ...], tuple[str, ...]]:
        """What the adapter follows from."""
        return self.stage, self.concept, self.target, self.preserve


def options_of(pipe: Any, stage: str, concept: str) -> dict[str, Any]:
    """What search and erasure are told alike."""
    recipe = packs.recipe_of(pipe)
    told: dict[str, Any] = {"pack": replace(recipe, ridge=BROAD) if stage == "broad" else recipe}
    return told | ({"templates": world.style_contexts()} if concept in world.STYLES else {})


def target_of(pipe: Any, stage: str, concept: str, kind: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Target and preserved names of a kind; None where there is none."""
    if kind in ("searched", "direction-aware"):
        told = options_of(pipe, stage, concept)
        if kind == "searched":
            return search_targets(pipe, concept, **told)[0].names, ()
        ranking = search_targets(pipe, concept, k=24, shield=True, **told)
        best = min(ranking, key=lambda target: target.collateral + target.confusion).names
        return best, best
    if kind == "empty":
        return (), ()
    if kind == "random":
        return (random.Random(concept).choice(Encoder(pipe).words()),), ()
    if concept in world.STYLES and kind != "sibling":
        return None
    if kind == "paraphrase":
        return (tuple(world.paraphrases(concept)[:1]), ()) if world.paraphrases(concept) else None
    return (ablation.target_of(concept, kind),), ()


def jobs(stage: str, pipe: Any, done: Callable[..., bool], kinds: Sequence[str]) -> Iterator[Job]:
    """What is to be drawn, the most telling first; searches are made only where they are needed."""
    if stage == "brute":
        for concept in OBJECTS[:8]:
            near = world.neighbours(concept, BRUTE // 2)
            far = [o for o in world.OBJECTS if o not in (concept, *near)]
            for name in (*near, *random.Random(concept).sample(far, BRUTE - len(near))):
                yield Job(stage, concept, "candidate", (name,), ())
        return
    names = tuple(name for group in GROUPS for name in group)
    for kind in kinds:
        for concept in {"study": names, "broad": OBJECTS}.get(stage, (*ablation.OTHER_STYLES, *OBJECTS)):
            if not done(concept, kind) and (found := target_of(pipe, stage, concept, kind)):
                yield Job(stage, concept, kind, *found)


def cases_of(job: Job) -> list[paired.Case]:
    """What is drawn. `kinds`: 10 neighbours and 20 others in 2 styles, 2 seeds; `broad`, `brute`: fewer; `study`: each name once."""
    if job.stage == "study":
        names = [name for group in GROUPS for name in group]
        return [
            *paired.cases("concept", [(job.concept, "noto", 0)]),
            *paired.cases("unrelated", [(o, "noto", 0) for o in names if o != job.concept]),
        ]
    if job.concept in world.STYLES:
        return ablation.cases_of(job.concept, "confirm")
    near, draw = world.neighbours(job.concept, 10), random.Random(job.concept)
    far = draw.sample([o for o in world.OBJECTS if o not in (job.concept, *near)], 20)
    words = world.paraphrases(job.concept)[:2]
    own = [
        *paired.cases("concept", [(job.concept, s, seed) for s in world.STYLES for seed in (0, 1)]),
        *paired.cases("paraphrase", [(job.concept, s, 0, w) for w in words for s in ablation.STYLES]),
    ]
    if job.stage == "broad":
        return [
            *own,
            *paired.cases("neighbour", [(o, s, 0) for o in near for s in ablation.STYLES]),
            *paired.cases("unrelated", [(o, ablation.STYLES[i % 2], 0) for i, o in enumerate(far)]),
        ]
    if job.stage == "brute":
        return [
            *own,
            *paired.cases("neighbour", [(o, s, 0) for o in near[:5] for s in ablation.STYLES]),
            *paired.cases("unrelated", [(o, ablation.STYLES[i % 2], 0) for i, o in enumerate(far[:10])]),
        ]
    seen = [(s, seed) for s in ablation.STYLES for seed in (0, 1)]
    return [
        *own,
        *paired.cases("neighbour", [(o, *how) for o in near for how in seen]),
        *paired.cases("unrelated", [(o, *how) for o in far for how in seen]),
    ]


def make(pipe: Any, stage: str, concept: str, target: Sequence[str], preserve: Sequence[str]) -> ErasureAdapter:
    told = options_of(pipe, stage, concept)
    return erase(pipe, concept, target=tuple(target) or "null", preserve=tuple(preserve), **told)


def measure(pipe: Any, judge: Any, job: Job, pictures: Path) -> dict[str, Any]:
    """Of every picture its part, what it should show, the judge's probability of that before and after, whether it is the likeliest,
    and how far the pixels moved (root mean square of 0 to 1). Of a style's pictures the style is looked for, else the object."""
    cases, is_style = cases_of(job), job.concept in world.STYLES
    adapter = make(pipe, *job.made)
    before, after = map(images.read, paired.draw(pipe, adapter, cases, pictures))
    seen, rows = [judge.probabilities(some) for some in (before, after)], []
    for i, (role, prompt) in enumerate(cases):
        labels = judge.style_names if is_style else judge.object_names
        place = labels.index(prompt.style if is_style else prompt.shows)
        b, a = (seen[n][int(is_style)][i] for n in (0, 1))
        moved = np.sqrt(np.mean((np.asarray(before[i], float) - np.asarray(after[i], float)) ** 2)) / 255
        hits = [bool(p.argmax() == place) for p in (b, a)]
        rows.append(
            [
                role,
                prompt.shows,
                prompt.text,
                *(round(float(p[place]), 5) for p in (b, a)),
                *hits,
                round(float(moved), 5),
            ]
        )
    return job._asdict() | {"rows": rows, "bytes": adapter.size}


def run(stage: str, work: Path, pictures: Path, kinds: Sequence[str] = KINDS) -> None:
    """Do what is not in the results yet."""
    work.mkdir(parents=True, exist_ok=True)
    pipe, judge = world.load(), world.judge()

    def done(
        concept: str, kind: str, target: tuple[str, ...] | None = None
    ) -> bool:  # asked anew: others may be at work too
        mine = [
            e for e in paired.read(work / RESULTS) if (e["stage"], e["concept"], e["kind"]) == (stage, concept, kind)
        ]
        return any(target in (None, tuple(e["target"])) for e in mine)

    for job in jobs(stage, pipe, done, kinds):
        if done(*job[1:4]):
            continue
        entry = measure(pipe, judge, job, pictures)
        paired.keep(work / RESULTS, entry)
        own = [Row(*row) for row in entry["rows"] if row[0] == "concept"]
        print(*job[:4], "left", sum(r.hit_after for r in own), "of", sum(r.hit_before for r in own), flush=True)


class Row(NamedTuple):
    """A picture, see `measure`."""

    role: str
    shows: str
    text: str
    before: float
    after: float
    hit_before: bool
    hit_after: bool
    moved: float


def predict(
    pipe: Any, entry: dict[str, Any], metric: Tensor, known: dict[str, tuple[Tensor, Tensor]]
) -> dict[str, list[float]]:
    """Of each other object the predicted damage: of its name in the pack's contexts, and of all tokens of the prompts drawn of it."""
    adapter = make(pipe, *(entry[key] for key in ("stage", "concept", "target", "preserve")))
    encoder = Encoder(pipe)
    X, roles = adapter.edits[TEXT].matrix, ("subject", "eot")
    null, nothing = encoder.null_rows(roles), encoder.encode([""]).rows.double()
    empty = torch.stack([null[role] for role in roles])

    found = {}
    for name in dict.fromkeys(row[1] for row in entry["rows"] if row[0] in OTHER):
        if name not in known:
            prompts = sorted({row[2] for row in entry["rows"] if row[1] == name})
            contexts = packs.recipe_of(pipe).templates
            known[name] = encoder.table([name], roles, contexts)[0], encoder.encode(prompts).rows.double()
        rows, states = known[name]
        by_name = (squared(rows @ X, metric) / squared(rows - empty, metric)).sqrt().mean()
        by_prompt = (squared(states @ X, metric).sum(1) / squared(states - nothing, metric).sum(1)).sqrt().mean()
        found[name] = [float(by_name), float(by_prompt)]
    return found


def results(work: Path) -> list[dict[str, Any]]:
    """All results, with what was predicted for objects, which is kept beside them."""
    path, entries = work / "predictions.jsonl", paired.read(work / RESULTS)
    known = dict(map(json.loads, path.read_text().splitlines())) if path.exists() else {}
    pipe, metric, rows = None, torch.empty(0), {}
    for entry in entries:
        entry["rows"] = [Row(*row) for row in entry["rows"]]
        key = json.dumps([entry["stage"], entry["concept"], entry["target"], entry["preserve"]])
        if entry["concept"] in world.STYLES:
            continue
        if key not in known:
            if pipe is None:
                pipe = world.load()
                metric = readout(pipe)
            known[key] = predict(pipe, entry, metric, rows)
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


def pairs_of(entries: list[dict[str, Any]], predictor: int, measure: Callable[[Row], float]) -> dict[str, np.ndarray]:
    """Of each concept its pairs (predicted, measured), one for each target and other name."""
    found: dict[str, list[tuple[float, float]]] = {}
    for e in entries:
        for name, told in e["predicted"].items():
            values = [measure(row) for row in e["rows"] if row.shows == name and row.role in OTHER and row.hit_before]
            if values:
                found.setdefault(e["concept"], []).append((told[predictor], float(np.mean(values))))
    return {concept: np.array(pairs) for concept, pairs in found.items()}


OTHER = ("neighbour", "unrelated")
MEASURES: dict[str, Callable[[Row], float]] = {
    "lost": lambda row: float(not row.hit_after),
    "probability lost": lambda row: row.before - row.after,
    "pixels moved": lambda row: row.moved,
}
PREDICTORS = ("name in contexts", "all tokens of the prompts")


def rank_table(entries: list[dict[str, Any]]) -> None:
    """Spearman of predicted and measured damage over (concept, target, other), of all pairs and within each kind of target."""
    graded = {name: measure for name, measure in MEASURES.items() if name != "lost"}
    heads = [f"{predictor} / {name}" for predictor in PREDICTORS for name in graded]
    print(f"\n| Spearman of | {' | '.join(heads)} |\n{'|---' * (len(heads) + 1)}|")
    kinds = dict.fromkeys(e["kind"] for e in entries)
    for title, mine in (("all", entries), *((kind, [e for e in entries if e["kind"] == kind]) for kind in kinds)):
        cells = [
            number(by_concept(pairs_of(mine, p, measure), spearman))
            for p in range(len(PREDICTORS))
            for measure in graded.values()
        ]
        print(f"| {title} | {' | '.join(cells)} |")


def number(e: Estimate) -> str:
    return f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}], n = {e.n:,}"


def shares(entries: list[dict[str, Any]]) -> list[str]:
    """Shares of each part's pictures, what the others lost, and what was predicted."""
    cells = [share(entries, role) for role in ROLES]
    others = [row for e in entries for row in e["rows"] if row.role in OTHER and row.hit_before]
    cells += [f"{np.mean([m(row) for row in others]):.4f}" for name, m in MEASURES.items() if name != "lost"]
    told = [value[0] for e in entries for value in e.get("predicted", {}).values()]
    return [*cells, f"{np.mean(told):.1%}" if told else ""]


def share(entries: Iterable[dict[str, Any]], role: str) -> str:
    """Of the pictures of this role that were right before, the share that is still."""
    seen = {e["concept"]: [row.hit_after for row in e["rows"] if row.role == role and row.hit_before] for e in entries}
    return paired.told({concept: Share.of(hits) for concept, hits in seen.items()})


ROLES = ("concept", "paraphrase", "neighbour", "unrelated")


def kinds_table(entries: list[dict[str, Any]]) -> None:
    heads = (
        "target",
        "concept left",
        "paraphrases left",
        "neighbours kept",
        "unrelated kept",
        *list(MEASURES)[1:],
        "predicted",
    )
    print(f"\n| {' | '.join(heads)} |")
    print("|---" * len(heads) + "|")
    for kind in dict.fromkeys(e["kind"] for e in entries):
        print(f"| {kind} | {' | '.join(shares([e for e in entries if e['kind'] == kind]))} |")


def paired_table(entries: list[dict[str, Any]], first: str = "empty") -> None:
    """Against the empty prompt, on the same pictures: what is left of the concept, and what others lose."""
    compared: dict[str, tuple[Callable[[Row], float], tuple[str, ...]]] = {
        "concept left": (lambda row: float(row.hit_after), ("concept",)),
        **{f"neighbours: {name}": (measure, ("neighbour",)) for name, measure in MEASURES.items()},
        **{f"all others: {name}": (measure, OTHER) for name, measure in MEASURES.items()},
    }
    print(f"\n| minus {first!r}, paired | " + " | ".join(compared) + " |\n" + "|---" * (len(compared) + 1) + "|")
    base = {e["concept"]: e for e in entries if e["kind"] == first}
    for kind in dict.fromkeys(e["kind"] for e in entries if e["kind"] != first):
        cells = []
        for of, roles in compared.values():
            pairs = [
                (of(a), of(b), e["concept"])
                for e in entries
                if e["kind"] == kind and e["concept"] in base
                for a, b in zip(base[e["concept"]]["rows"], e["rows"], strict=True)
                if a.hit_before and a.role in roles
            ]
            if not pairs:
                cells.append("")
                continue
            one, two, concepts = zip(*pairs, strict=True)
            d = paired_bootstrap(one, two, concepts).difference
            times = f", × {np.mean(two) / np.mean(one):.2f}" if np.mean(one) > 1e-9 else ""
            cells.append(f"{d.value:+.4f} [{d.low:+.4f}, {d.high:+.4f}]{times}")
        print(f"| {kind} | {' | '.join(cells)} |")


def brute_table(entries: list[dict[str, Any]], pipe: Any) -> None:
    """Of each concept the search's choice among the 20 candidates, and the best by pictures: erased, and others kept most."""
    heads = (
        "concept",
        "chosen: left, others kept, moved",
        "rank by pixels moved",
        "best by pictures",
        "refused: left",
        "Spearman",
    )
    print(f"\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    pairs: list[tuple[float, float, str]] = []
    for concept in dict.fromkeys(e["concept"] for e in entries):
        mine = {e["target"][0]: e for e in entries if e["concept"] == concept}
        seen = {name: _seen(e) for name, e in mine.items()}
        ranking = search_targets(pipe, concept, tuple(mine), k=BRUTE)
        good = sorted((n for n in mine if seen[n][0] <= 0.125), key=lambda n: (-seen[n][1], seen[n][2]))
        by_pixels = sorted(good, key=lambda n: seen[n][2])
        chosen, best = ranking[0].names[0], good[0]
        rows = [[r for r in mine[name]["rows"] if r.role in OTHER and r.hit_before] for name in (best, chosen)]
        pairs += [(float(b.hit_after), float(c.hit_after), concept) for b, c in zip(*rows, strict=True)]
        gone = ", ".join(f"{n} {seen[n][0]:.0%}" for n, _ in ranking.refused) or "none"
        both = np.array([[np.mean([v[0] for v in mine[n]["predicted"].values()]), seen[n][2]] for n in mine])
        told = [f"{n}: {seen[n][0]:.0%}, {seen[n][1]:.1%}, {seen[n][2]:.4f}" for n in (chosen, best)]
        place = f"{by_pixels.index(chosen) + 1} of {len(good)}" if chosen in good else "not erased"
        print(f"| {concept} | {told[0]} | {place} | {told[1]} | {gone} | {spearman(both):.2f} |")
    one, two, concepts = zip(*pairs, strict=True)
    d = paired_bootstrap(one, two, concepts).difference
    print(
        f"\nothers kept, chosen less best: {100 * d.value:+.1f} points [{100 * d.low:+.1f}, {100 * d.high:+.1f}], n = {d.n}"
    )


def _seen(entry: dict[str, Any]) -> tuple[float, float, float]:
    """Of a concept and target the share of the concept left, the share of others kept, and how far their pixels moved."""
    own, others = ([r for r in entry["rows"] if r.role in roles and r.hit_before] for roles in (("concept",), OTHER))
    left, kept = (float(np.mean([row.hit_after for row in rows])) for rows in (own, others))
    return left, kept, float(np.mean([row.moved for row in others]))


def study_table(entries: list[dict[str, Any]], folder: Path) -> None:
    """AGE's section 3 of the pixels moved, for each kind of target; a page of each graph."""
    heads = (
        "target",
        "concept left",
        "others kept",
        "moved within groups",
        "between",
        "asymmetry",
        "fragile",
        "Spearman",
    )
    print(f"\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for kind in dict.fromkeys(e["kind"] for e in entries):
        mine = {e["concept"]: e for e in entries if e["kind"] == kind}
        found = graph_of(mine)
        found.save(folder / f"graph-{kind}")
        told = found.findings()
        fragile = ", ".join(f"{name} {damage:.1%}" for name, damage in told.fragile) or "none"
        pairs = by_concept(pairs_of(list(mine.values()), 0, MEASURES["pixels moved"]), spearman)
        cells = (
            share(mine.values(), "concept"),
            share(mine.values(), "unrelated"),
            f"{told.within:.2%}",
            f"{told.between:.2%}",
            f"{told.asymmetry:.0%}",
            fragile,
            number(pairs),
        )
        print(f"| {kind} | {' | '.join(map(str, cells))} |")


def graph_of(entries: dict[str, dict[str, Any]]) -> ConceptGraph:
    """The concept graph of one kind of target, by the pixels that moved."""
    names = tuple(name for group in GROUPS for name in group if name in entries)
    moved = {a: {row.shows: row.moved for row in entries[a]["rows"]} for a in names}
    return ConceptGraph(
        names,
        tuple(group[0] for group in GROUPS for name in group if name in entries),
        tuple(tuple(entries[name]["target"]) for name in names),
        tuple(tuple(entries[a]["predicted"].get(b, [math.nan])[0] for b in names) for a in names),
        tuple(tuple(moved[a][b] for b in names) for a in names),
    )


def choices() -> None:
    """What the search finds for every object, how soon separately made adapters are in each other's way; no picture."""
    pipe, found = world.load(), {}
    kin = world.catalogue()["objects"]
    known_names, met, beside = 0, 0, []
    print("| concept | found | collateral | the empty prompt's | other names found |\n|---|---|---|---|---|")
    for concept in world.OBJECTS:
        ranking = search_targets(pipe, concept, k=1)
        found[concept] = ranking[0].names[0]
        others = erase(pipe, concept, target="null", coreferences="auto").recipes[0].coreferences
        wanted = [name for name in world.paraphrases(concept) if " " not in name]
        known_names, met = known_names + len(wanted), met + len(set(wanted) & set(others))
        beside += [f"{name} ({concept})" for name in others if name not in wanted]
        told = f"{ranking[0].collateral:.1%} | {ranking.null.collateral:.1%} | {', '.join(others) or 'none'}"
        print(f"| {concept} | {found[concept]} | {told} |", flush=True)
    known = {c: t for c, t in found.items() if t in kin}
    related = [kin[c]["subgroup"] == kin[t]["subgroup"] for c, t in known.items()]
    draw, sets = random.Random(0), 10_000
    clash = sum(
        any(known.get(c) in some for c in some) for some in (draw.sample(world.OBJECTS, 5) for _ in range(sets))
    )
    print(f"\nsent to another object: {len(known)} of {len(found)}, {sum(related)} of them of the same kind")
    print(f"random sets of 5 in which one is sent to another: {clash / sets:.0%}")
    print(
        f"coreferences='auto' found {met} of {known_names} known paraphrases of one word, and beside them {', '.join(beside) or 'none'}"
    )


def synonyms() -> None:
    """How far paraphrases, siblings and unrelated objects lie from each object, as a share of the way to the empty prompt."""
    pipe, roles, kin = world.load(), ("subject", "eot"), world.catalogue()["objects"]
    encoder, metric = Encoder(pipe), readout(pipe)
    guess = FirstGuess(encoder, packs.recipe_of(pipe).templates)
    nothing = torch.stack(list(encoder.null_rows(roles).values()))
    far: dict[str, list[list[float]]] = {"paraphrases": [], "siblings": [], "unrelated": []}
    for concept in world.OBJECTS:
        apart = [o for o in world.OBJECTS if kin[o]["group"] != kin[concept]["group"]]
        near = [o for o in world.neighbours(concept, 3) if kin[o]["subgroup"] == kin[concept]["subgroup"]]
        some = random.Random(concept).sample(apart, 3)
        for kind, names in zip(far, (world.paraphrases(concept), near, some), strict=True):
            if names:
                own, *others = encoder.table([concept, *names], roles, ["{}"])
                whole = squared(nothing - own, metric).sum().sqrt()
                text = [float(squared(rows - own, metric).sum().sqrt() / whole) for rows in others]
                far[kind] += map(
                    list, zip(text, guess.distances(concept, [(n,) for n in names]).tolist(), strict=True)
                )
    print(
        "| distance | text states: 5 %, median, 95 % | first guess: least, 5 %, median, 95 %, most | n |\n|---|---|---|---|"
    )
    for kind, rows in far.items():
        text, first = np.array(rows).T
        cells = (np.percentile(text, [5, 50, 95]), np.percentile(first, [0, 5, 50, 95, 100]))
        print(f"| {kind} | {' | '.join(', '.join(f'{v:.2f}' for v in cell) for cell in cells)} | {len(rows)} |")
    for i, name in enumerate(("text states", "first guess")):
        pairs = [(p[i], s[i]) for p in far["paraphrases"] for s in far["siblings"]]
        print(
            f"{name}: a paraphrase lies nearer than a sibling in {np.mean([p < s for p, s in pairs]):.1%} of all pairs"
        )


def tables(work: Path) -> None:
    """Markdown tables of every stage."""
    entries = results(work)
    for stage in ("kinds", "broad", "study", "brute"):
        for styles in (False, True):
            mine = [e for e in entries if e["stage"] == stage and (e["concept"] in world.STYLES) == styles]
            if not mine:
                continue
            print(f"\n**{stage}, {'styles' if styles else 'objects'}, {len({e['concept'] for e in mine})} concepts**")
            if stage != "brute":
                kinds_table(mine)
                paired_table(mine)
            if not styles and stage != "study":
                rank_table(mine)
            if stage == "study":
                study_table(mine, work)
            if stage == "brute":
                brute_table(mine, world.load())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("choices", "synonyms", "kinds", "broad", "brute", "study", "tables"))
    parser.add_argument("--work", type=Path, default=Path("targets-work"))
    parser.add_argument("--pictures", type=Path, help="by default in --work")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, metavar="KIND", help="only these")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.stage in ("choices", "synonyms", "tables"):
        return {"choices": choices, "synonyms": synonyms, "tables": lambda: tables(options.work)}[options.stage]()
    run(options.stage, options.work, options.pictures or options.work / "pictures", options.kinds)


if __name__ == "__main__":
    main()
