"""Metrics are pure, pictures are paired and resumed, the page holds what was seen."""

import html.parser
import json
import math

import pytest
from conftest import bits, same_bits
from PIL import Image

from diffusers_erase import bench, erase, load_erasure
from diffusers_erase.bench import images
from diffusers_erase.bench.metrics import Estimate, share_kept
from diffusers_erase.bench.suites import Prompt, Settings, Suite
from diffusers_erase.errors import EraseError


def test_wilson_interval_is_the_root_of_its_definition():
    """Its ends are the p with |k/n − p| = z √(p(1 − p)/n)."""
    for hits, n in ((3, 4), (0, 20), (20, 20), (37, 90)):
        e = Estimate.of_share([True] * hits + [False] * (n - hits))
        for p in (e.low, e.high):
            assert math.isclose(abs(hits / n - p), 1.959963984540054 * math.sqrt(p * (1 - p) / n), abs_tol=1e-9)
        assert e.low <= e.value <= e.high and e.n == n


def test_no_pictures_is_no_value():
    e = Estimate.of_share([])
    assert math.isnan(e.value) and (e.low, e.high, e.n) == (0.0, 1.0, 0)


def test_only_what_was_right_before_counts():
    kept = share_kept(["cat", "cat", "dog", "dog"], ["cat", "dog", "dog", "dog"], ["cat", "cat", "cat", "dog"])
    assert (kept.value, kept.n) == (2 / 3, 3)


class ByColour:
    """A judge of the real interface: names a picture by its brightness, so it needs no training."""

    def objects(self, pictures):
        return [self.answer if self._mean(p) > self.threshold else "dog" for p in pictures]

    def styles(self, pictures):
        return ["photo"] * len(pictures)

    def __init__(self, threshold, answer="cat"):
        self.threshold, self.answer = threshold, answer

    def _mean(self, picture):
        return sum(picture.convert("L").histogram()[i] * i for i in range(256)) / (picture.width * picture.height)


@pytest.fixture
def suite():
    drawn = [Prompt("a photo of a cat", seed, "cat", "photo") for seed in (0, 1)]
    drawn += [Prompt("a photo of a wolf", 0, "wolf", "photo"), Prompt("a photo of a boat", 0, "boat", "photo")]
    return Suite(
        "tiny", "1", "this test", "Apache-2.0", tuple(drawn), {"cat": {"visual": ("wolf",)}}, Settings(2, 3.0)
    )


def test_pictures_are_drawn_once_and_a_killed_run_goes_on(sd1, suite, tmp_path):
    counted = []
    paths = images.generate(sd1, suite, tmp_path, counted.append)
    assert sum(counted) == len(suite.prompts) == len(set(paths))
    first = [p.read_bytes() for p in paths]
    times = [p.stat().st_mtime_ns for p in paths]
    paths[1].unlink()
    (tmp_path / ".left-over").write_bytes(b"of a killed run")
    assert images.generate(sd1, suite, tmp_path) == paths
    assert [p.stat().st_mtime_ns for i, p in enumerate(paths) if i != 1] == [t for i, t in enumerate(times) if i != 1]
    difference = max(abs(a - b) for a, b in zip(*(Image.open(p).tobytes() for p in (paths[1], paths[1])), strict=True))
    assert difference == 0 and len(first[1]) == len(paths[1].read_bytes())


def test_evaluate_leaves_the_pipe_as_it_was_and_reports(sd1, suite, tmp_path):
    before = bits(sd1.unet)
    report = bench.evaluate(sd1, erase(sd1, "cat", target="dog"), suite, ByColour(0), tmp_path / "pictures")
    assert same_bits(sd1.unet, before) and not sd1.unet._forward_pre_hooks
    assert set(report.estimates) == {"concept left", "other aspect kept in the concept's pictures", "styles kept"}
    assert report.estimates["concept left"].n == 2
    assert any(a.read_bytes() != b.read_bytes() for a, b in report.pictures)  # control: something was drawn otherwise


def test_evaluate_wants_an_unedited_pipe(sd1, suite, tmp_path):
    load_erasure(sd1, erase(sd1, "boat"))
    with pytest.raises(EraseError, match="carries erasures already"):
        bench.evaluate(sd1, erase(sd1, "cat"), suite, ByColour(0), tmp_path)


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.pictures, self.linked, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "img":
            self.pictures.append(attrs["src"])
        if tag in ("script", "link") and not attrs.get("href", "data:").startswith("data:"):
            self.linked.append(attrs)

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_self_contained(sd1, suite, tmp_path):
    report = bench.evaluate(sd1, erase(sd1, "cat", target="dog"), suite, ByColour(0), tmp_path / "pictures")
    page = Page()
    page.feed(report.save(tmp_path / "out").read_text())
    assert len(page.pictures) == 2 * len(suite.prompts) and all(
        p.startswith("data:image/png;base64,") for p in page.pictures
    )
    assert not page.linked and "$" not in "".join(page.text)
    data = json.loads((tmp_path / "out" / "report.json").read_text())
    assert data["estimates"]["concept left"]["n"] == 2 and len(data["cases"]) == len(suite.prompts)


def test_the_worst_pairs_come_first(suite, tmp_path):
    judged = (
        bench.Judged(("cat", "cat", "wolf", "boat"), ("photo",) * 4),
        bench.Judged(("dog", "cat", "wolf", "dog"), ("photo",) * 4),
    )
    picture = tmp_path / "p.png"
    Image.new("RGB", (4, 4)).save(picture)
    report = bench.Report(suite, ("cat",), *judged, ((picture, picture),) * 4, {})
    section = report._section(report._shown()[0])
    assert section.index('class="bad"') < section.index('class="good"')
    assert report.estimates["concept left"].value == 0.5 and report.estimates["unrelated kept"].value == 0
    assert report.estimates["neighbours kept"].value == 1
