"""Who is a target and who is refused, what the ranking tells, and that it holds for the adapter that `erase` makes."""

import pytest
import torch

from diffusers_erase import EraseError, erase, fuse_erasure, load_erasure, search_targets, unload_erasure, vocabulary
from diffusers_erase.edits import contains
from diffusers_erase.targets import choose, readout
from diffusers_erase.text import Encoder
from tests.cases import PACK
from tests.conftest import VOCABULARY, bits, make_pipe, same_bits

WORDS = [word for word in VOCABULARY if len(word) > 3 and word.isalpha()]
CONTEXTS = ("{}", "a {}")


@pytest.fixture(scope="module")
def still(tokenizer):
    """A pipe that no test changes."""
    return make_pipe(tokenizer)


def search(pipe, concept="cat", candidates=WORDS, **more):
    return search_targets(pipe, concept, candidates, **({"pack": PACK, "templates": CONTEXTS} | more))


def names(ranking):
    return [target.names for target in ranking]


def twins(tokenizer, first, second, apart=0.02):
    """A pipe in which two words have almost one embedding."""
    pipe = make_pipe(tokenizer)
    a, b = (tokenizer(word)["input_ids"][1] for word in (first, second))
    table = pipe.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        noise = torch.randn(table.shape[1], generator=torch.Generator().manual_seed(0))
        table[b] = table[a] + apart * table[a].norm() * noise / noise.norm()
    return pipe


def test_a_search_changes_nothing_and_repeats(still):
    before = [bits(module) for module in (still.unet, still.text_encoder)]
    first, again = search(still), search(still)
    assert first == again
    assert all(same_bits(m, b) for m, b in zip((still.unet, still.text_encoder), before, strict=True))


def test_the_ranking_is_ordered_and_explains_itself(still):
    ranking = search(still, k=5)
    assert len(ranking) == 5
    few = search(still, candidates=WORDS[:8])
    assert len(few) > 1 and list(few) == sorted(few, key=lambda target: target.collateral)
    assert all(target.synonym <= 0.4 and target.relatedness < 1 for target in ranking)
    for target in (*ranking, ranking.null):
        assert [d for _, d in target.hurt] == sorted((d for _, d in target.hurt), reverse=True)
        assert len(target.hurt) == 10 and target.hurt[0][0] in str(target)
    assert ranking.null.names == () and "the empty prompt" in str(ranking.null)
    assert ranking[0].names[0] in str(ranking[0])
    assert ranking.options == {"target": ranking[0].names, "preserve": (), "coreferences": ()}
    shielded = search(still, shield=True)
    assert shielded.options["preserve"] == shielded[0].names


@pytest.mark.parametrize("mixture", [1, 2])
def test_a_longer_ranking_begins_as_a_shorter_one(still, mixture):
    """And as what `erase` chooses, also where the best by bare names are refused."""
    for concept in ("cat", "tree"):
        longest = search(still, concept, k=100, mixture=mixture, synonym_max=0.2)
        assert longest.refused and len(longest) > 8
        for k in (1, 3, 12):
            assert list(search(still, concept, k=k, mixture=mixture, synonym_max=0.2)) == list(longest[:k])


def test_of_a_few_candidates_the_damage_of_others_counts(still):
    """Not only the candidates themselves are looked at."""
    few = search(still, candidates=["dog", "wolf"])
    assert len(few[0].hurt) == 10 and not {name for name, _ in few[0].hurt} <= {"dog", "wolf"}
    told = search(still, candidates=["dog", "wolf"], among=["boat", "car"])
    assert {name for name, _ in told[0].hurt} == {"boat", "car"}
    alone = search(still, candidates=["dog", "wolf"], among=["boat"])
    assert alone[0].confusion == 0 < told[0].confusion  # nothing to be taken for


def test_a_family_with_two_encoders(sdxl):
    ranking = search(sdxl, candidates=["dog", "tree", "boat"], synonym_max=0.9)
    adapter = erase(sdxl, "cat", pack=PACK, templates=CONTEXTS, **ranking.options)
    assert set(adapter.edits) == {"text", "pooled"} and adapter.recipes[0].targets == ranking[0].names


@pytest.mark.parametrize(("shield", "own"), [(True, ()), (False, ()), (False, ["wolf", "snoopy"])])
def test_what_is_told_is_true_of_the_adapter_that_erase_makes(still, shield, own):
    """From the ranking to the adapter: the same damage, up to the adapter's float32."""
    ranking = search(still, among=["dog", "boat"], shield=shield, coreferences=own)
    adapter = erase(still, "cat", pack=PACK, templates=CONTEXTS, **ranking.options)
    assert bool(adapter.edit.preserved) == shield
    A, D, M = adapter.edit.detectors(), adapter.edit.offsets.double(), readout(still)
    encoder = Encoder(still)
    null = encoder.null_rows(("subject", "eot"))
    for name, damage in ranking[0].hurt:
        shares = []
        for role, row in encoder.rows(name, ("subject", "eot"), CONTEXTS).items():
            change, away = (row @ A.mT) @ D, row - null[role]
            shares.append(float((change @ M @ change) / (away @ M @ away)) ** 0.5)
        assert damage == pytest.approx(sum(shares) / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("concept", "candidate", "more", "reason"),
    [
        ("cat", "cat", {}, "contains the concept"),
        ("cat", "Cats", {}, "contains the concept"),
        ("cat", "a black cat", {}, "contains the concept"),
        ("cats", "cat", {}, "contains the concept"),
        ("van gogh", "old Van  Gogh", {}, "contains the concept"),
        ("cat", "wolf", {"coreferences": ["wolf"]}, "contains the concept"),
        ("cat", "wolf", {"erased": ["wolf"]}, "erased too"),
        ("cat", "old wolf", {"erased": ["wolf"]}, "erased too"),
    ],
)
def test_who_is_no_target_by_its_wording(still, concept, candidate, more, reason):
    ranking = search(still, concept, [candidate, "dog", "tree", "boat"], **more)
    assert (candidate,) not in names(ranking)
    assert ranking.refused[0][0] == candidate and reason in ranking.refused[0][1]
    if more:  # the control: without it, it is one
        assert (candidate,) in names(search(still, concept, [candidate, "dog"]))


@pytest.mark.parametrize(
    ("name", "part"),
    [(n, n + "s") for n in ("house", "movie", "pie", "axe", "zombie", "horse", "cat")]
    + [("tomato", "tomatoes"), ("lens", "lenses"), ("fox", "foxes"), ("berry", "berries"), ("dress", "dresses")]
    + [("old red fox", "foxes"), ("🐱", "🐱")],
)
def test_regular_plurals_are_the_same_word(name, part):
    assert contains(name, part) and contains(part, name.split()[-1])


@pytest.mark.parametrize(
    ("name", "part"), [("dog", "🐱"), ("princess", "prince"), ("catfish", "cat"), ("fox", "red fox")]
)
def test_other_words_are_not(name, part):
    assert not contains(name, part)


@pytest.mark.parametrize("candidate", ["catfish", "gogh", "hot dog"])
def test_letters_and_parts_of_a_name_are_not_the_name(still, candidate):
    """ "catfish" is no cat; "gogh" alone is not "van gogh": whether it is a synonym, the text states decide."""
    concept = {"gogh": "van gogh"}.get(candidate, "cat")
    assert (candidate,) in names(search(still, concept, [candidate, "tree"]))


@pytest.mark.parametrize("few", [True, False], ids=["few candidates", "many"])
def test_a_synonym_is_refused_without_a_lexicon(tokenizer, few):
    candidates = ["wolf", "dog"] if few else WORDS
    control = search(make_pipe(tokenizer), candidates=candidates, k=100)
    assert "wolf" not in dict(control.refused)
    ranking = search(twins(tokenizer, "cat", "wolf"), candidates=candidates, k=100)
    assert ("wolf",) not in names(ranking) and ("dog",) in names(search(make_pipe(tokenizer), candidates=["dog"]))
    assert dict(ranking.refused)["wolf"].startswith("a synonym")


def test_what_is_drawn_alike_is_erased_too(tokenizer):
    """And is no target, of its own concept or of another that is erased together with it; what is spoken for stays what it is."""
    told = {"pack": PACK, "templates": CONTEXTS, "residual": 0.3, "coreferences": "auto"}
    pipe = twins(tokenizer, "cat", "dog")
    assert "dog" in erase(pipe, "cat", target="null", **told).recipes[0].coreferences
    assert (
        "dog" not in erase(make_pipe(tokenizer), "cat", target="null", **told).recipes[0].coreferences
    )  # the control
    reading = {"tokens": "last+eot", "templates": CONTEXTS, "residual": 0.3}
    plans = choose(Encoder(pipe), PACK, ("cat", "boat"), [None, None], (), WORDS, "auto", **reading)
    named = {name for plan in plans for name in plan.coreferences}
    assert "dog" in named and not named & {name for plan in plans for name in plan.target}
    ranking = search(pipe, coreferences="auto", residual=0.3)
    assert "dog" in ranking.coreferences and ranking.options["coreferences"] == ranking.coreferences
    for spoken_for in ({"preserve": ["dog"]}, {"target": "dog"}):
        assert "dog" not in erase(pipe, "cat", **told | {"target": "null"} | spoken_for).recipes[0].coreferences
    both = erase(pipe, ["cat", "dog"], **told | {"target": "null"}).recipes
    assert not [recipe for recipe in both if {"cat", "dog"} & set(recipe.coreferences)]


def test_what_is_drawn_like_two_concepts_is_erased_with_one(tokenizer):
    pipe = twins(tokenizer, "cat", "dog")
    table, (cat, boat) = (
        pipe.text_encoder.get_input_embeddings().weight,
        (tokenizer(n)["input_ids"][1] for n in ("cat", "boat")),
    )
    with torch.no_grad():
        table[boat] = 1.02 * table[cat]
    told = {"pack": PACK, "templates": CONTEXTS, "residual": 0.3, "coreferences": "auto", "target": "null"}
    assert all(
        "dog" in erase(pipe, name, preserve=other, **told).recipes[0].coreferences
        for name, other in [("cat", "boat"), ("boat", "cat")]
    )
    assert sum("dog" in recipe.coreferences for recipe in erase(pipe, ["cat", "boat"], **told).recipes) == 1


def test_a_name_that_another_erasure_moves_is_a_chain(tokenizer):
    """Almost the same state as "dog", which is erased too: whoever is sent to "wolf" would go on."""
    pipe = twins(tokenizer, "dog", "wolf")
    others = ["wolf", "boat", "castle", "street", "house"]
    assert ("wolf",) in names(search(pipe, candidates=others))  # the control
    ranking = search(pipe, candidates=others, erased=["dog"])
    assert ("wolf",) not in names(ranking)
    assert "the erasure of 'dog' moves it too" in dict(ranking.refused)["wolf"]


def test_nothing_left_to_choose_from(still):
    with pytest.raises(
        EraseError, match=r"no candidate is left for 'cat' \('cats': it contains the concept\): give other"
    ):
        search(still, candidates=["cats"])
    with pytest.raises(EraseError, match=r"no candidate is left for 'cat' \(none was given\)"):
        search(still, candidates=[])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"concept": " "}, "an empty name was given"),
        ({"candidates": ["dog", ""]}, "an empty name was given"),
        (
            {"candidates": "dog"},
            "candidates are a list of names, 'everyday', 'words', 'neighbours', or the Path of WordNet's database: got 'dog'",
        ),
        ({"preserve": ["Cat"]}, "'Cat' is to be erased and preserved"),
        ({"preserve": ["auto"]}, "'auto' is no name and stands alone"),
        ({"preserve": 7}, "a name is a text such as 'Van Gogh', names are a list of texts: got 7"),
        ({"coreferences": ["wolf", "auto"]}, "'auto' is no name and stands alone"),
        ({"erased": "Cat"}, "'Cat' is the concept itself: take it out of what is erased too"),
        ({"among": []}, "among is empty"),
        ({"among": ["dog", ""]}, "an empty name was given"),
        ({"among": ["dog", "CAT"]}, "'CAT' is to be erased, so what it loses is no damage"),
        ({"residual": 1.5}, "residual is the share of the concept that is left.*got 1.5"),
        ({"k": 0}, "k is the length of the ranking, a whole number of at least 1: got 0"),
        ({"candidates": [7]}, "an empty name was given"),
        ({"mixture": 6}, "mixture is the most names in one target, 1 to 5: got 6"),
        ({"templates": ["a cat"]}, "a template holds the name once"),
    ],
)
def test_what_cannot_be_searched(still, more, message):
    with pytest.raises(EraseError, match=message):
        search(still, **more)


@pytest.mark.parametrize("argument", ["coreferences", "erased", "among", "preserve"])
def test_a_text_is_one_name(still, argument):
    assert search(still, **{argument: "wolf"}) == search(still, **{argument: ["wolf"]}) != search(still)


def test_when_nobody_else_is_left_nobody_is_preserved(still):
    ranking = search(still, candidates=["dog"], among=["dog"], preserve="auto")
    assert ranking.preserve == () and names(ranking) == [("dog",)]


def test_what_is_fused_does_not_change_the_search(tokenizer):
    pipe = make_pipe(tokenizer)
    alone = search(pipe)
    load_erasure(pipe, erase(pipe, "boat", target="dog", pack=PACK))
    assert search(pipe) == alone
    fuse_erasure(pipe)
    assert search(pipe) == alone
    unload_erasure(pipe)
    with torch.no_grad():  # the control: other weights hurt otherwise
        pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight[:2].mul_(5)
    assert search(pipe) != alone


def test_what_is_preserved_is_hurt_less(still):
    free = search(still, candidates=["wolf", "boat"], among=["dog", "car", "tree"])
    kept = search(still, candidates=["wolf", "boat"], among=["dog", "car", "tree"], preserve=["dog"])
    damage = [dict(next(t for t in ranking if t.names == ("wolf",)).hurt)["dog"] for ranking in (free, kept)]
    assert damage[1] < 0.3 * damage[0]
    assert kept.options["preserve"] == ("dog",)


def test_preserve_auto_keeps_who_would_be_hurt_most_until_the_target_repeats(still):
    ranking = search(still, preserve="auto", k=100)
    assert 0 < len(ranking.preserve) <= 4 and not {"cat", *ranking[0].names} & set(ranking.preserve)
    same = search(still, preserve=ranking.preserve, k=100)
    costs = [{target.names: target.collateral for target in each} for each in (ranking, same)]
    assert costs[0] and not {(name,) for name in ranking.preserve} & costs[0].keys()
    for target, cost in costs[0].items():
        assert cost == pytest.approx(costs[1][target], rel=1e-4)  # rows were read in other batches
    assert all(dict(ranking.refused)[name] == "it is preserved" for name in ranking.preserve if name in WORDS)


def test_mixtures_of_a_few_names(still):
    ranking = search(still, "monet", mixture=3, k=40, synonym_max=0.9)  # a mean lies nearer to everything
    blended = [target for target in ranking if len(target.names) > 1]
    assert {len(target.names) for target in blended} <= {2, 3} and blended
    assert not [target for target in search(still, "monet", k=40, synonym_max=0.9) if len(target.names) > 1]
    adapter = erase(still, "monet", target=blended[0].names, preserve=blended[0].names, pack=PACK)
    assert adapter.concepts == ("monet",)


@pytest.mark.parametrize("source", ["words", "neighbours"])
def test_candidates_from_the_tokenizer(still, source):
    ranking = search(still, candidates=source)
    assert set(names(ranking)) <= {(word,) for word in Encoder(still).words()} and 0 < len(ranking) <= 8


def test_candidates_from_the_base_pack(still):
    """What its prompts speak of, without particles and what the templates say anyway."""
    everyday = vocabulary.candidates(Encoder(still), "cat", "everyday", PACK.prompts, ("a painting of {}",))
    assert {"dog", "beach", "monet"} < set(everyday) and not {"the", "with", "painting", "of"} & set(everyday)
    ranking = search_targets(still, "cat", pack=PACK, templates=CONTEXTS)
    assert {name for target in ranking for name in target.names} <= set(everyday) | {"painting"}


def wordnet(folder, synsets):
    """WordNet's noun files of {words: hypernyms' words}, written from wndb(5WN): pointers are byte offsets."""
    licence = "  1 This stands for the licence.\n"
    keys, offsets = list(synsets), {}
    for _ in range(2):  # offsets have eight digits whatever they are: the second round knows them
        lines, place = [licence], len(licence)
        for key in keys:
            above = [("@", up) for up in synsets[key]] + [("~", down) for down in keys if key in synsets[down]]
            words = " ".join(f"{word.replace(' ', '_')} 0" for word in key)
            told = "".join(f" {symbol} {offsets.get(to, 0):08d} n 0000" for symbol, to in above)
            line = f"{place:08d} 05 n {len(key):02x} {words} {len(above):03d}{told} | a gloss | of it\n"
            offsets[key], place = place, place + len(line)
            lines.append(line)
    (folder / "data.noun").write_text("".join(lines))
    senses = {word: [offsets[key] for key in keys if word in key] for key in keys for word in key}
    index = [
        f"{w.replace(' ', '_')} n {len(o)} 1 @ {len(o)} 0 {' '.join(f'{x:08d}' for x in o)}  \n"
        for w, o in senses.items()
    ]
    (folder / "index.noun").write_text(licence + "".join(index))


def test_candidates_from_wordnet_are_what_it_is_a_kind_of_and_the_other_kinds(still, tmp_path):
    """A homograph has the relatives of all its senses; synonyms and what is a kind of it are no candidates."""
    animal, vessel = ("animal", "old flower"), ("boat",)
    kinds = {animal: [], ("cat", "wolf"): [animal], ("dog",): [animal], vessel: [], ("ship",): [vessel]}
    wordnet(tmp_path, kinds | {("cat", "red ship"): [vessel], ("snoopy",): [("dog",)]})
    found = vocabulary.candidates(Encoder(still), "Cat", tmp_path)
    assert found == ["animal", "old flower", "dog", "boat", "ship"]
    assert set(names(search(still, candidates=tmp_path))) <= {(name,) for name in found}
    with pytest.raises(EraseError, match="WordNet has no noun 'robot'"):
        search(still, "robot", candidates=tmp_path)
    with pytest.raises(EraseError, match="has no index.noun and data.noun"):
        search(still, candidates=tmp_path / "elsewhere")


def test_a_word_that_is_learned_anew_is_read_anew(tokenizer, tmp_path, monkeypatch):
    """Textual inversion changes one embedding, of which no probe prompt tells."""
    monkeypatch.setenv("DIFFUSERS_ERASE_CACHE", str(tmp_path))
    pipe, many = make_pipe(tokenizer), [*WORDS, *(f"{a} {b}" for a in WORDS for b in WORDS)][:600]
    told = {"roles": ("subject",), "templates": ("{}",)}
    before = vocabulary.table(Encoder(pipe), many, **told)
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[tokenizer("wolf")["input_ids"][1]].mul_(-1)
    after = vocabulary.table(Encoder(pipe), many, **told)
    wolf, tree = many.index("wolf"), many.index("tree")
    assert not torch.equal(after[wolf], before[wolf]) and torch.equal(after[tree], before[tree])


def test_a_long_list_is_cached_and_a_killed_run_goes_on(still, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSERS_ERASE_CACHE", str(tmp_path))
    many = [f"{a} {b} {c}" for a in WORDS[:8] for b in WORDS[10:20] for c in WORDS[20:28]]
    told = []
    first = search(still, candidates=many, k=3, on_words=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1] >= len(many) and len(told) == len(list(tmp_path.glob("names-*"))) == 2
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("names-*")}
    gone = next(iter(written))
    gone.unlink()  # a killed run
    assert search(still, candidates=many, k=3) == first
    assert gone.exists()
    assert all(path.stat().st_mtime_ns == then for path, then in written.items() if path != gone)
