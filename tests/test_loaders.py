"""Suites from the user's own files, and from the pipeline's own text space."""

import csv
import json

import pytest

from diffusers_erase.bench import loaders
from diffusers_erase.bench.suites import Suite
from diffusers_erase.errors import EraseError
from diffusers_erase.text import Encoder


@pytest.fixture
def i2p(tmp_path):
    path = tmp_path / "i2p.csv"
    rows = [("a, b", "sexual, shocking", 7, 80.0), ("c", "hate", 8, 0.0), ("d", "sexual", 9, 20.0)]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "categories", "sd_seed", "nudity_percentage", "hard"])
        writer.writerows((*row, 0) for row in rows)
    return path


def test_i2p_is_chosen_by_category_and_nudity(i2p):
    assert [(p.text, p.seed) for p in loaders.i2p(i2p).prompts] == [("a, b", 7), ("c", 8), ("d", 9)]
    assert [p.text for p in loaders.i2p(i2p, category="sexual").prompts] == ["a, b", "d"]
    suite = loaders.i2p(i2p, nudity=50)
    assert [p.text for p in suite.prompts] == ["a, b"] and suite.parts(["nudity"])[0].gone
    with pytest.raises(EraseError, match="no prompt that was asked for"):
        loaders.i2p(i2p, category="violence")


def test_another_csv_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("prompt,seed\na,1\n")
    with pytest.raises(EraseError, match="no column 'categories'"):
        loaders.i2p(tmp_path / "other.csv")


def test_coco_takes_one_caption_of_an_image_at_random_but_always_the_same(tmp_path):
    path = tmp_path / "captions.json"
    told = [{"image_id": i // 2, "id": i, "caption": f"caption {i}\n"} for i in range(40)]
    path.write_text(json.dumps({"annotations": told}))
    suite = loaders.coco(path, n=5)
    assert len({p.seed for p in suite.prompts}) == 5 and all(int(p.text.split()[1]) % 2 == 0 for p in suite.prompts)
    assert loaders.coco(path, n=5).digest == suite.digest != loaders.coco(path, n=5, seed=1).digest
    assert len(loaders.coco(path).prompts) == 20
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(EraseError, match="no file of COCO captions"):
        loaders.coco(tmp_path / "other.json")


def test_pinpoint_ranks_words_by_the_pipes_own_encoder(sd1):
    words = ["dog", "cat", "church", "boat", "a red apple"]
    suite = loaders.pinpoint(sd1, "cat", words, k=2, seeds=[1, 2])
    near = suite.relations["cat"]["visual"]
    encoder = Encoder(sd1)

    def distance(word):  # a naive reference, one word at a time
        a, b = (loaders._ends(encoder, [name])[0].double() for name in ("cat", word))
        return 1 - float(a @ b / (a.norm() * b.norm()))

    assert near == tuple(sorted((w for w in words if w != "cat"), key=distance)[:2])
    assert len(suite.prompts) == 6 and isinstance(suite, Suite)
    with pytest.raises(EraseError, match="no words beside 'cat'"):
        loaders.pinpoint(sd1, "cat", ["Cat"])
