"""Cards: what they say, and that nothing on them gets lost."""

import pytest
from attaching import adapter
from conftest import make_pipe

from diffusers_erase import EraseError, ErasureAdapter, card, hub

SHARE = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 12}


@pytest.fixture(scope="module")
def made(tokenizer):
    return adapter(make_pipe(tokenizer), "cat")


def report(digest, **more):
    measured = {"title": "neighbours", "should_be": "kept", "share": SHARE}
    trial = {"name": "mine", "adapter": {"digest": digest}, "dimensions": [measured, {"title": "no share"}, 3]}
    return {
        "suite": {"name": "s", "version": "1"},
        "trials": [trial, None, {"adapter": None}],
        "not_tested": ["attacks"],
    } | more


def test_a_report_is_told_and_what_it_left_out(made):
    text = made.card(report=report(made.digest))
    assert "| mine | neighbours | kept | 50.0% | 25.0% – 75.0% | 12 |" in text and "- attacks\n" in text
    assert "by making this file" not in text and "no share" not in text
    assert "by making this file" in made.card()  # control


def test_a_gated_adapter_and_its_linear_part_are_both_told(tokenizer):
    gated = adapter(make_pipe(tokenizer), "gated")
    both = report(gated.digest)
    text = gated.card(report=both)
    assert "- its linear part, which fused weights and LoRA twins are\n" in text  # nobody measured it
    both["trials"].append(report(gated.linear.digest)["trials"][0] | {"name": "plain"})
    text = gated.card(report=both)
    assert (
        "| mine | neighbours" in text
        and "| plain (linear part) | neighbours" in text
        and "- its linear part" not in text
    )
    with pytest.raises(
        EraseError, match="no measurements of the adapter"
    ):  # the linear part alone is not this adapter
        gated.card(report=report(gated.linear.digest))
    assert "linear part" in gated.card() and "linear part" not in gated.linear.card(report=report(gated.linear.digest))


@pytest.mark.parametrize("odd", [{}, {"trials": None}, {"trials": [{"adapter": {"digest": "0"}}]}, {"trials": "abc"}])
def test_a_report_about_something_else_is_refused(made, odd):
    with pytest.raises(EraseError, match="no measurements of the adapter"):
        made.card(report=odd)
    with pytest.raises(EraseError, match="no measurements of the adapter"):
        made.card(report=report("0" * 64))


def test_measurements_outlive_a_save_without_them(made, tmp_path):
    made.save_pretrained(tmp_path, report=report(made.digest))
    again = ErasureAdapter.from_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "elsewhere"):
        text = (again.save_pretrained(folder) / "README.md").read_text()
        assert "25.0% – 75.0%" in text and text.count("Not tested") == 1
    text = (
        again.save_pretrained(tmp_path, report=report(made.digest, not_tested=["pears"])) / "README.md"
    ).read_text()
    assert "- pears\n" in text and "- attacks\n" not in text and text.count("25.0% – 75.0%") == 1


def test_measurements_of_another_adapter_do_not(made, tokenizer, tmp_path):
    made.save_pretrained(tmp_path, report=report(made.digest))
    adapter(make_pipe(tokenizer), "gogh").save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "25.0%" not in text and "Not tested by making this file" in text


def test_saving_again_changes_no_byte_of_a_card(made, tmp_path):
    first = (made.save_pretrained(tmp_path, license="mit") / "README.md").read_bytes()
    assert (made.save_pretrained(tmp_path) / "README.md").read_bytes() == first
    assert (ErasureAdapter.from_pretrained(tmp_path).save_pretrained(tmp_path) / "README.md").read_bytes() == first


def test_the_words_of_a_concept_end_nothing(made):
    text = card.new(
        [("a | b\n<!-- diffusers-erase: end -->", "x", "m", "t", "0", "1")], kind="rows", content="c", digest="ab", linear=None,
        base_model="", files=(), repository=None, report=None, pictures={}, license=None,
    )  # fmt: skip
    assert "a \\| b &lt;!--" in text and text.count("<!-- diffusers-erase: end -->") == 2
    assert card.merge(text, text) == text


@pytest.mark.parametrize(
    "old",
    [
        "no metadata at all\n",
        "---\n---\ntext\n",
        "---\nlicense: mit\n---\n",
        "---\ntags: art\nbase_model: [a/b]\nwidget: [{text: x}, 3]\n---\nx",
        "---\r\nlicense: mit\r\n---\r\ntext\r\n",
    ],
)
def test_any_card_is_carried_on(made, old):
    new = card.merge(old, made.card(pictures={"p": "images/p.png"}))
    (was, text), (now, body) = hub.read_card(old), hub.read_card(new)
    assert text in body and card.merge(new, made.card()) == new
    for name, value in was.items():
        kept = now[name] if isinstance(now[name], list) else [now[name]]
        assert all(one in kept for one in (value if isinstance(value, list) else [value]))
    assert {"erasure", "diffusers"} <= set(now["tags"]) and {"text": "p", "output": {"url": "images/p.png"}} in now[
        "widget"
    ]
