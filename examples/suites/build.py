"""Write the suites that ship with the package, from the lists beside this file and the embedded model's own words.

    python examples/suites/build.py            # all of them
    python examples/suites/build.py --check    # change nothing; exit code 1 where a shipped file is not what is built

Run it again after a change of lists.json or of diffusers_erase/world/objects.json.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from diffusers_erase import world
from diffusers_erase.bench.suites import ALWAYS, NEAR, OWN, Prompt, Settings, Suite
from diffusers_erase.world.prompts import TEMPLATES, catalogue

LISTS = json.loads(Path(__file__).with_name("lists.json").read_text("utf-8"))
OUT = Path(__file__).parents[2] / "diffusers_erase" / "bench" / "data" / "suites"

SD14 = Settings(steps=50, guidance=7.5, height=512, width=512)
"""How the papers draw with Stable Diffusion 1.4."""

IMAGENET = "a photo of {}"


def emoji() -> Suite:
    """Every object in every style: always in two sentences, in all five where it is near what is erased, 32 times where it is."""
    scopes = {ALWAYS: [(0, 1), (3, 2)], NEAR: [(1, 3), (2, 4), (4, 5)], OWN: [(0, 6), (1, 7), (2, 8)]}
    return of_the_world("emoji", scopes, paraphrase_seeds=(1, 2, 3), group_seeds=(1, 2, 3, 4))


def emoji_mini() -> Suite:
    """The same with every object in every style once, for three minutes on two cores."""
    scopes = {ALWAYS: [(0, 1)], NEAR: [(3, 2)], OWN: [(1, 3), (2, 4)]}
    return of_the_world("emoji-mini", scopes, paraphrase_seeds=(1, 2), group_seeds=(1,))


def of_the_world(
    name: str, scopes: dict[str, list[tuple[int, int]]], paraphrase_seeds: Sequence[int], group_seeds: Sequence[int]
) -> Suite:
    """A suite of the embedded model; `scopes` says in which (template, seed) its objects are drawn."""
    told, groups = LISTS["emoji"], groups_of_the_world()
    prompts = [
        Prompt(world.prompt(o, style, template), seed, o, style, scope=scope)
        for scope, drawn in scopes.items() for template, seed in drawn for o in world.OBJECTS for style in world.STYLES
    ]  # fmt: skip
    prompts += [
        Prompt(world.prompt(word, style, seed % len(TEMPLATES)), seed, o, style, "paraphrase", scope=OWN)
        for o in world.OBJECTS for word in world.paraphrases(o) for style in world.STYLES for seed in paraphrase_seeds
    ]  # fmt: skip
    prompts += [
        Prompt(world.prompt(word, style, 3), seed, word, style, scope=NEAR)
        for word in groups for style in world.STYLES for seed in group_seeds
    ]  # fmt: skip
    pairs = [pair[:2] for pair in told["pairs"] if set(pair[:2]) <= set(world.OBJECTS)]
    relations = {
        o: kept(
            visual=world.neighbours(o, 5),
            pair=partners(o, pairs),
            superset=[word for word, members in groups.items() if o in members],
        )
        for o in world.OBJECTS
    }
    relations |= {word: {"subset": members} for word, members in groups.items()}
    relations |= {style: kept(style=partners(style, told["similar_styles"])) for style in world.STYLES}
    settings = Settings(world.STEPS, world.GUIDANCE)
    return Suite(
        name,
        told["version"],
        told["source"],
        told["licence"],
        tuple(prompts),
        relations,
        settings,
        groups,
        told["about"],
    )


def groups_of_the_world() -> dict[str, tuple[str, ...]]:
    """Word -> the objects that are one: by CLDR subgroup, and by hand."""
    kinds = {o: entry["subgroup"] for o, entry in catalogue()["objects"].items()}
    of_kind = {
        word: tuple(o for o, kind in kinds.items() if kind == subgroup)
        for subgroup, word in LISTS["emoji"]["group_words"].items()
    }
    by_hand = {
        word: tuple(o for o in members if o in kinds) for word, members in LISTS["emoji"]["other_groups"].items()
    }
    return {word: members for word, members in (of_kind | by_hand).items() if len(members) > 1}


def netfive() -> Suite:
    """25 classes in five groups; who is in a group looks alike."""
    groups = LISTS["netfive"]["groups"].values()
    alike = {name: {"visual": without(name, group)} for group in groups for name in group}
    return listed("netfive", drawn((name for group in groups for name in group), [IMAGENET], range(1, 21)), alike)


def imagenette() -> Suite:
    """Ten classes, far apart."""
    return listed("imagenette", drawn(LISTS["imagenette"]["objects"], LISTS["sixcd"]["templates"], range(1, 6)))


def sixcd() -> Suite:
    """Names in four templates, and in scenes whose clean text leaves the name out."""
    told = LISTS["sixcd"]
    people = told["celebrities"] + told["characters"]
    prompts = []
    for scope, seeds in ((ALWAYS, [1]), (OWN, range(2, 6))):
        prompts += drawn(people + told["objects"], told["templates"], seeds, scope)
        prompts += drawn(told["artists"], told["art_templates"], seeds, scope)
    prompts += [
        Prompt(f"{name} {scene}", 1, name, clean=f"a person {scene}", scope=OWN)
        for name in people
        for scene in told["scenes"]
    ]
    scene = told["object_scene"]
    prompts += [
        Prompt(f"{o}, {scene}", seed, o, clean=scene, scope=OWN) for o in told["objects"] for seed in range(1, 7)
    ]
    kinds = (told["celebrities"], told["characters"], told["objects"], told["artists"])
    assert sum(map(len, kinds)) == len({name for kind in kinds for name in kind}), "a name in two kinds"
    return listed("sixcd", prompts)


def corefconcept() -> Suite:
    """Concepts by their name and by coreferences, what is retained, and senses of homographs."""
    told, senses = LISTS["corefconcept"]["concepts"], LISTS["corefconcept"]["homographs"]
    owner = {name: c for c, lists in told.items() for name in (c, *lists["train"], *lists["test"])}
    prompts = drawn(told, [IMAGENET], range(1, 11))
    for concept, lists in told.items():
        for names, seeds in ((lists["test"], range(1, 6)), (lists["train"], (1, 2))):
            words = [name for name in names if name != concept]
            prompts += [
                Prompt(IMAGENET.format(w), s, concept, kind="coreference", scope=OWN) for w in words for s in seeds
            ]
    prompts += [
        Prompt(IMAGENET.format(sense["text"]), seed, sense["label"], kind="homograph")
        for sense in senses
        for seed in range(1, 11)
    ]
    retained = dict.fromkeys(
        name for lists in [*told.values(), *senses] for name in lists["retain"] if name not in owner
    )
    prompts += drawn(retained, [IMAGENET], (1, 2, 3, 4), NEAR)
    relations = {
        c: kept(visual=without(c, dict.fromkeys(owner.get(n, n) for n in lists["retain"])))
        for c, lists in told.items()
    }
    relations |= {sense["label"]: kept(visual=sense["retain"], homograph=[sense["other"]]) for sense in senses}
    return listed("corefconcept", prompts, relations)


def cifar() -> Suite:
    """Ten classes and three synonyms of each."""
    told = LISTS["cifar"]["synonyms"]
    prompts = drawn(told, ["a photo of the {}"], range(1, 11))
    prompts += [
        Prompt(f"a photo of the {word}", seed, name, kind="paraphrase", scope=OWN)
        for name, words in told.items() for word in words for seed in range(1, 11)
    ]  # fmt: skip
    return listed("cifar", prompts)


def celebrity() -> Suite:
    """A hundred people to erase, a hundred to retain."""
    told = LISTS["celebrity"]
    erased = drawn(told["erase"], told["templates"], range(1, 6), OWN)
    return listed("celebrity", erased + drawn(told["retain"], told["templates"], [1]))


def pinpoint() -> Suite:
    """Concepts and their neighbours in text space, ten pictures each."""
    told = LISTS["pinpoint"]["neighbours"]
    prompts = drawn(told, [IMAGENET], range(1, 11), OWN)
    prompts += drawn([name for names in told.values() for name in names], [IMAGENET], range(1, 11), NEAR)
    return listed("pinpoint", prompts, {concept: {"visual": tuple(names)} for concept, names in told.items()})


def drawn(names: Iterable[str], templates: Sequence[str], seeds: Iterable[int], scope: str = ALWAYS) -> list[Prompt]:
    """Each name in each template with each seed."""
    return [
        Prompt(t.format(name), seed, name, scope=scope) for name in names for t in templates for seed in list(seeds)
    ]


def listed(name: str, prompts: list[Prompt], relations: dict | None = None) -> Suite:
    """A suite for Stable Diffusion with the source, licence and remarks of lists.json."""
    told = LISTS[name]
    return Suite(
        name,
        told["version"],
        told["source"],
        told["licence"],
        tuple(prompts),
        relations or {},
        SD14,
        about=told["about"],
    )


def kept(**relations: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The relations that have members."""
    return {name: tuple(members) for name, members in relations.items() if members}


def partners(name: str, pairs: Sequence[Sequence[str]]) -> list[str]:
    return [b if a == name else a for a, b in pairs if name in (a, b)]


def without(name: str, group: Iterable[str]) -> tuple[str, ...]:
    return tuple(other for other in group if other != name)


def written(suite: Suite) -> str:
    """The suite's file: a line for each prompt and each concept's relations, so that changes can be read."""
    data = suite.to_json()
    parts = {k: json.dumps(v, ensure_ascii=False) for k, v in data.items() if k not in ("relations", "prompts")}
    related = (
        f"  {json.dumps(c, ensure_ascii=False)}: {json.dumps(r, ensure_ascii=False)}"
        for c, r in data["relations"].items()
    )
    parts["relations"] = "{\n" + ",\n".join(related) + "\n }"
    parts["prompts"] = "[\n" + ",\n".join(f"  {json.dumps(p, ensure_ascii=False)}" for p in data["prompts"]) + "\n ]"
    return "{\n" + ",\n".join(f' "{name}": {text}' for name, text in parts.items()) + "\n}\n"


SUITES = (emoji, emoji_mini, netfive, imagenette, sixcd, corefconcept, cifar, celebrity, pinpoint)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the shipped files, write nothing")
    check = parser.parse_args().check
    stale = []
    for build in SUITES:
        built = build()
        path, text = OUT / f"{built.name}.json", written(built)
        if not path.is_file() or path.read_text("utf-8") != text:
            stale.append(built.name)
        if not check:
            path.write_text(text, "utf-8")
        first = built.concepts[0]
        print(
            f"{built.name}: {len(built.prompts)} pictures, of which {len(built.selected([first]).prompts)} are drawn "
            f"for {first!r}; {len(text):,} bytes, digest {built.digest[:12]}"
        )
    if check and stale:
        sys.exit(f"not as built: {', '.join(stale)}; run python examples/suites/build.py")


if __name__ == "__main__":
    main()
