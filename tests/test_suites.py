"""Suites: every prompt plays one part, groups stand for their members, files say what they hold, unknown concepts are refused."""

import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_erase import world
from diffusers_erase.bench.suites import (
    ALWAYS,
    NEAR,
    OWN,
    PARTS,
    SHOWS,
    STYLE,
    Prompt,
    Settings,
    Suite,
    load_suite,
    shipped,
)
from diffusers_erase.errors import EraseError

ROOT = Path(__file__).parents[1]

RELATIONS = {
    "cat": {"visual": ("fox",), "pair": ("dog", "fox"), "superset": ("animal",)},
    "animal": {"subset": ("cat", "dog", "fox")},
    "ink": {"style": ("noto",)},
}


def suite(prompts=None, relations=RELATIONS):
    drawn = [
        Prompt("a cat", 1, "cat", "ink"),
        Prompt("a cat", 2, "cat", "ink", scope=OWN),
        Prompt("a kitty", 1, "cat", "noto", "paraphrase"),
        Prompt("a fox", 1, "fox", "ink"),
        Prompt("a dog", 1, "dog", "noto"),
        Prompt("a dog", 2, "dog", "noto", scope=NEAR),
        Prompt("an animal", 1, "animal", "pixel"),
        Prompt("a boat", 1, "boat", "noto"),
        Prompt("a caption", 1, kind="caption"),
    ]
    given = tuple(drawn if prompts is None else prompts)
    return Suite(
        "s", "1", "a test", "Apache-2.0", given, relations, Settings(2, 3.0), {"animal": ("cat", "dog", "fox")}
    )


def parts(concepts, **changes):
    return {
        (part.name, part.aspect): [suite().prompts[i].text for i in part.indices]
        for part in suite(**changes).parts(concepts)
    }


def test_what_is_efficacy_for_one_is_unrelated_for_another():
    assert parts(["cat"]) == {
        ("efficacy", SHOWS): ["a cat", "a cat"],
        ("generality", SHOWS): ["a kitty"],
        ("sensitivity/visual", SHOWS): ["a fox"],  # also a pair: the first relation counts
        ("sensitivity/pair", SHOWS): ["a dog", "a dog"],
        ("sensitivity/subset-superset", SHOWS): ["an animal"],
        ("unrelated", SHOWS): ["a boat"],
        ("across/inside", STYLE): ["a cat", "a cat", "a kitty"],
        ("across/outside", STYLE): ["a fox", "a dog", "a dog", "an animal", "a boat"],
    }
    assert parts(["boat"])["unrelated", SHOWS] == ["a cat", "a cat", "a kitty", "a fox", "a dog", "a dog", "an animal"]


def test_a_style_is_a_concept_too():
    found = parts(["ink"])
    assert found["efficacy", STYLE] == ["a cat", "a cat", "a fox"] == found["across/inside", SHOWS]
    assert found["sensitivity/style", STYLE] == ["a kitty", "a dog", "a dog", "a boat"]
    assert found["unrelated", STYLE] == ["an animal"]
    assert found["across/outside", SHOWS] == ["a kitty", "a dog", "a dog", "an animal", "a boat"]


def test_erasing_a_group_has_its_members_as_kinds_of_it():
    assert parts(["animal"])["sensitivity/subset-superset", SHOWS] == [
        "a cat",
        "a cat",
        "a kitty",
        "a fox",
        "a dog",
        "a dog",
    ]
    assert suite().accepts("animal") == {"cat", "dog", "fox"} and suite().accepts("boat") == {"boat"}
    assert suite().labels(SHOWS) == ("cat", "fox", "dog", "boat")


def test_what_is_erased_is_not_also_kept():
    both = parts(["cat", "fox"])
    assert both["efficacy", SHOWS] == ["a cat", "a cat", "a fox"] and ("sensitivity/visual", SHOWS) not in both


def test_only_what_an_erasure_needs_is_drawn():
    def drawn(*concepts):
        return [p.text for p in suite().selected(concepts).prompts if p.seed == 2]

    assert drawn("cat") == ["a cat", "a dog"]  # the dog is related to the cat, the other way round is not written
    assert drawn("dog") == ["a dog"] and drawn("boat") == []


@settings(deadline=None)
@given(st.lists(st.sampled_from(["cat", "fox", "dog", "animal", "ink", "noto"]), min_size=1, unique=True))
def test_every_labelled_prompt_plays_one_part_for_each_aspect(concepts):
    whole = suite()
    for aspect in (SHOWS, STYLE):
        indices = [i for part in whole.parts(concepts) if part.aspect == aspect for i in part.indices]
        assert sorted(indices) == [i for i, p in enumerate(whole.prompts) if getattr(p, aspect)]
    assert [part.name for part in whole.parts(concepts)] == sorted(
        (part.name for part in whole.parts(concepts)), key=list(PARTS).index
    )


def test_an_unknown_concept_is_refused_with_what_is_known():
    with pytest.raises(
        EraseError, match="does not know 'unicorn': it knows cat, fox, dog, animal, boat, ink, noto, pixel"
    ):
        suite().parts(["cat", "unicorn"])
    assert suite().known([" CAT"]) == ("cat",)  # control: spelled otherwise is not unknown


def test_a_suite_survives_its_file():
    back = Suite.from_json(json.loads(json.dumps(suite().to_json())))
    assert back.digest == suite().digest and set(back.prompts) == set(suite().prompts)
    assert suite(suite().prompts[:-1]).digest != suite().digest


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 9}, "format 9"),
        ({"prompts": [{"shows": "cat", "seeds": [1]}]}, "garbles a part"),
        ({"prompts": [{"text": "a", "seeds": [1], "kind": "poem"}]}, "'poem' of 'a' is none of"),
        ({"prompts": [{"text": "a", "seeds": [1], "scope": "far"}]}, "'far' of 'a' is none of"),
        ({"relations": {"cat": {"cousin": ["dog"]}}}, "relation 'cousin' is none of"),
    ],
)
def test_a_file_that_is_no_suite_is_refused(change, said, tmp_path):
    path = tmp_path / "suite.json"
    path.write_text(json.dumps(suite().to_json()))
    assert load_suite(path).digest == suite().digest  # control
    path.write_text(json.dumps(suite().to_json() | change))
    with pytest.raises(EraseError, match=said):
        load_suite(path)


def test_a_name_that_is_no_suite_lists_those_that_are(tmp_path):
    with pytest.raises(EraseError, match=", ".join(shipped())):
        load_suite("sd-everything")
    (tmp_path / "words.json").write_text("not json")
    with pytest.raises(EraseError, match="is no suite"):
        load_suite(tmp_path / "words.json")


@pytest.fixture(scope="module")
def build():
    """examples/suites/build.py, which writes the shipped files."""
    spec = importlib.util.spec_from_file_location("build", ROOT / "examples" / "suites" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", shipped())
def test_shipped_suites_are_what_is_built(name, build):
    built = next(make() for make in build.SUITES if make.__name__.replace("_", "-") == name)
    shipped_text = (ROOT / "diffusers_erase" / "bench" / "data" / "suites" / f"{name}.json").read_text("utf-8")
    assert build.written(built) == shipped_text, "run: python examples/suites/build.py"


def test_every_object_of_the_embedded_model_can_be_judged_in_every_dimension():
    whole, mini = load_suite("emoji"), load_suite("emoji-mini")
    for o in world.OBJECTS:
        parts = {part.name: part.indices for part in whole.parts([o]) if part.aspect == SHOWS}
        assert (
            len(parts["efficacy"]) >= 32 and len(parts["sensitivity/visual"]) >= 50 and len(parts["unrelated"]) >= 300
        )
        assert len(mini.selected([o]).prompts) <= 350
    assert len(whole.prompts) >= 1000
    for relation in ("visual", "superset", "pair"):
        assert sum(relation in whole.relations[o] for o in world.OBJECTS) > len(world.OBJECTS) / 2, relation
    assert whole.relations["noto"] == {"style": ("fluent",)}


@pytest.mark.parametrize("name", shipped())
def test_shipped_suites_hold_together(name):
    found = load_suite(name)
    assert found.name == name and found.source and found.licence and found.version
    assert {p.scope for p in found.prompts} & {ALWAYS, NEAR, OWN}
    told = {
        n for c, related in found.relations.items() for n in (c, *(m for names in related.values() for m in names))
    }
    assert told <= set(found.concepts), f"related, but never drawn: {sorted(told - set(found.concepts))[:5]}"
    assert len({(p.text, p.seed, p.shows) for p in found.prompts}) == len(found.prompts), "a picture twice"
