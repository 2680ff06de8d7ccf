"""The concept graph: what its edges are, AGE's findings as numbers, and the files it is saved as."""

import json
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_erase import EraseError, erase, get_active_erasures, load_erasure
from diffusers_erase.bench.judges import by_function
from diffusers_erase.bench.suites import Settings
from diffusers_erase.graph import ConceptGraph, capability, concept_graph, moved
from diffusers_erase.status import registry_of
from diffusers_erase.targets import readout, search_targets
from diffusers_erase.text import Encoder
from tests.cases import PACK
from tests.conftest import bits, make_pipe, same_bits

NAMES, GROUPS = ("cat", "dog", "boat", "ship"), ("animal", "animal", "vessel", "vessel")
TOLD = {"pack": PACK, "templates": ["{}"]}


@pytest.fixture(scope="module")
def still(tokenizer):
    """A pipe that no test changes."""
    return make_pipe(tokenizer)


@pytest.fixture(scope="module")
def graph(still):
    return concept_graph(still, NAMES, groups=GROUPS, **TOLD)


def made(damage, groups=("a", "a", "b")):
    """A graph with this damage."""
    names = tuple("xyz"[: len(damage)])
    return ConceptGraph(names, groups, ((),) * len(names), tuple(map(tuple, damage)))


def test_an_edge_is_the_damage_that_the_adapter_does(still, graph):
    encoder, M = Encoder(still), readout(still)
    null = encoder.null_rows(("subject", "eot"))
    edit = erase(still, "cat", target="null", **TOLD).edit
    for b, name in enumerate(NAMES):
        shares = []
        for role, row in encoder.rows(name, ("subject", "eot"), ["{}"]).items():
            change, away = (row @ edit.detectors().mT) @ edit.offsets.double(), row - null[role]
            shares.append(float((change @ M @ change) / (away @ M @ away)) ** 0.5)
        assert graph.predicted[0][b] == pytest.approx(sum(shares) / 2, rel=1e-4)  # read briefly
    assert graph.predicted[0][0] > 0.9 and graph.measured is None


def test_an_edge_is_what_the_search_tells_of_that_target(still):
    told = search_targets(still, "cat", ["dog"], among=["boat", "ship"], shield=False, **TOLD)[0]
    found = concept_graph(still, ["cat", "boat", "ship"], target="dog", **TOLD)
    assert dict(told.hurt) == pytest.approx(dict(zip(("boat", "ship"), found.predicted[0][1:], strict=True)), rel=1e-4)


def test_findings_are_ages():
    told = made([[9, 4, 1], [2, 9, 1], [1, 3, 9]]).findings()
    assert told.within == 3 and told.between == 1.5
    assert told.asymmetry == pytest.approx(((4 - 2) + (1 - 1) + (3 - 1)) / 3 / 2)
    assert told.fragile == ()


def test_a_fragile_name_is_hurt_by_whatever_is_erased():
    damage = np.full((9, 9), 0.1)
    damage[:, 4] = 2.0
    names = tuple("abcdefghi")
    graph = ConceptGraph(names, ("",) * 9, ((),) * 9, tuple(map(tuple, damage.tolist())))
    assert graph.findings().fragile == (("e", 2.0),)
    assert made(np.full((3, 3), 0.1).tolist()).findings().fragile == ()


def test_what_is_not_known_does_not_count():
    told = made([[9, math.nan, 1], [2, 9, 1], [1, 3, 9]]).findings()
    assert told.within == 2 and told.between == 1.5
    assert told.asymmetry == pytest.approx(((1 - 1) + (3 - 1)) / 2 / (8 / 5))


def test_the_digraph_has_names_and_damage(graph):
    pytest.importorskip("networkx")
    found = graph.digraph()
    assert set(found.nodes) == set(NAMES) and found.nodes["cat"] == {"group": "animal", "target": ""}
    assert found.number_of_edges() == 12 and not found.has_edge("cat", "cat")
    assert found["cat"]["dog"]["damage"] == graph.predicted[0][1] != found["dog"]["cat"]["damage"]


def test_saved_page_holds_everything_and_nothing_from_elsewhere(tmp_path):
    hostile = ConceptGraph(
        ("<b>x</b>", "</script>", "z"),
        ("a", "a", "b"),
        ((), ("z",), ()),
        ((1, 0.5, 0.1), (0.2, 1, 0), (0, math.nan, 1)),
    )
    page = hostile.save(tmp_path).read_text()
    assert page.count("</script>") == 2 and "<b>x" not in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "") and "$" not in page.split("<script>")[0]
    told = json.loads((tmp_path / "graph.json").read_text())
    assert told["predicted"][2][1] is None and told["findings"]["within"] == pytest.approx(0.35)
    drawn = ElementTree.parse(tmp_path / "matrix.svg").getroot()
    assert len(drawn.findall("{*}rect")) == 9


def test_pictures_measure_it(still, tmp_path):
    """A measure sees each name's own pictures, before and after; the pipe is given back unchanged."""
    seen = []

    def measure(name, before, after):
        seen.append((name, len(before), len(after)))
        return moved(name, before, after)

    weights = bits(still.unet)
    told = {"contexts": ["a {}", "{}"], "settings": Settings(1, 1.0, 16, 16), "folder": tmp_path}
    graph = concept_graph(still, NAMES[:2], measure=measure, **told, **TOLD)
    assert seen == [("cat", 2, 2), ("dog", 2, 2)] * 2
    assert registry_of({"unet": still.unet}) is None and same_bits(still.unet, weights)
    damage = np.array(graph.measured)
    assert (damage > 0).all() and np.array_equal(damage, graph.damage)
    drawn = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    again = concept_graph(still, NAMES[:2], measure=moved, **told, **TOLD)
    assert again.measured == graph.measured
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")} == drawn


def test_capability_is_what_the_judge_sees_no_more():
    light, dark = (Image.new("RGB", (8, 8), (value,) * 3) for value in (200, 20))

    def answer(pictures):
        return ["cat" if picture.getpixel((0, 0))[0] > 99 else "other" for picture in pictures]

    judge = by_function(answer, name="light", version="1")
    lost = capability(judge)
    assert lost("cat", [light, light], [light, dark]) == 0.5
    assert lost("cat", [light, light], [light, light]) == 0
    assert moved("cat", [light, dark], [light, light]) == pytest.approx(180 / 255 / 2)


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        (["cat"], {}, "at least two names, each once: got cat"),
        (["cat", "cat"], {}, "at least two names, each once"),
        (["cat", "dog"], {"groups": ["a"]}, "groups has one for each name: got 1 for 2 names"),
        (["cat", "dog"], {"method": "esd"}, "predicts what closed forms without a gate do: got 'esd', gate None"),
        (["cat", "dog"], {"gate": 0.7}, "predicts what closed forms without a gate do: got 'ridge', gate 0.7"),
    ],
)
def test_what_is_no_graph(still, names, more, message):
    with pytest.raises(EraseError, match=message):
        concept_graph(still, names, **more, **TOLD)
    assert torch.is_grad_enabled()


def test_what_the_user_has_loaded_is_not_taken_away(tokenizer, tmp_path):
    pipe = make_pipe(tokenizer)
    load_erasure(pipe, erase(pipe, "tree", target="boat", pack=PACK), "mine")
    with pytest.raises(EraseError, match=r"measured on the model alone: call unload_erasure\(\) first"):
        concept_graph(pipe, NAMES[:2], measure=moved, folder=tmp_path, **TOLD)
    assert get_active_erasures(pipe) == ["mine"]
    assert concept_graph(pipe, NAMES[:2], **TOLD).measured is None  # a prediction does not mind
