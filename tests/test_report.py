"""What a report says follows from what the judges saw; its files are whole, valid and self-contained; a browser can read it."""

import copy
import html.parser
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
from PIL import Image

from diffusers_erase.bench.judges import Verdict
from diffusers_erase.bench.page import PAIRS, render
from diffusers_erase.bench.report import Report, Trial, percent
from diffusers_erase.bench.suites import SHOWS, STYLE, Prompt, Settings, Suite

SCHEMA = json.loads(
    (Path(__file__).parents[1] / "diffusers_erase" / "bench" / "data" / "report.schema.json").read_text("utf-8")
)
DIGEST = "0123456789abcdef" * 4


def suite(others=3):
    drawn = [Prompt(f"a cat {i}", i, "cat", "ink") for i in range(4)]
    drawn += [Prompt("a kitty", i, "cat", "ink", "paraphrase") for i in range(2)]
    drawn += [Prompt("a fox", i, "fox", "ink") for i in range(2)]
    drawn += [Prompt("a pet", 0, "pet", "noto")]
    drawn += [Prompt(f"a <boat> & {i}", i, "boat", "noto") for i in range(others)]
    relations = {"cat": {"visual": ("fox",), "superset": ("pet",)}}
    return Suite(
        "small", "2", "a test", "Apache-2.0", tuple(drawn), relations, Settings(3, 2.0), {"pet": ("cat", "fox")}
    )


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "one.png"
    Image.new("RGB", (64, 64), "teal").save(path)
    return path


def trial(picture, shows, name="ridge", drawn=None, adapter=True, styles=None):
    """A trial of an erasure of the cat in which the judge sees `shows` after it, and before what it should."""
    drawn = drawn or suite()
    before = {
        SHOWS: [Verdict("fox" if p.shows == "pet" else p.shows, 0.9) for p in drawn.prompts],
        STYLE: [Verdict(p.style, 0.9) for p in drawn.prompts],
    }
    after = {SHOWS: [Verdict(label, 0.8 if label else math.nan) for label in shows], STYLE: styles or before[STYLE]}
    told = (
        {"digest": DIGEST, "bytes": 1234, "pack": "p", "recipes": [{"concept": "cat", "targets": []}]}
        if adapter
        else None
    )
    return Trial(name, ("cat",), told, drawn, ((picture, picture),) * len(drawn.prompts), before, after)


def report(*trials):
    judges = {"shows": {"name": "judge <1>", "digest": DIGEST}, "style": {"name": "judge 2", "digest": DIGEST}}
    model = {"name": "tiny", "digest": DIGEST}
    made = {"date": "2026-11-22", "diffusers-erase": "0"}
    return Report(trials, trials[0].suite, judges, model, "diffusers-erase evaluate tiny", 2.5, made=made)


SEEN = ["dog", "cat", "dog", "other", "cat", "cat", "fox", None, "cat", "boat", "boat", "dog"]
"""Of four cats one is left, both kitties; of two foxes one is kept, one unknown; the pet is a cat now; a boat is lost."""


RIGHT = [{"pet": "fox"}.get(p.shows, p.shows) for p in suite().prompts]


@pytest.fixture
def small(picture):
    return report(trial(picture, SEEN), trial(picture, RIGHT, "no edit", adapter=False))


def test_shares_say_what_the_judge_saw(small):
    found = {
        (d.part.name, d.part.aspect): (d.share.value, d.share.n, d.share.coverage, d.verdict)
        for d in small.trials[0].dimensions
    }
    assert found["efficacy", SHOWS] == (0.25, 4, 1, "mostly gone")
    assert found["generality", SHOWS] == (1, 2, 1, "still there")
    assert found["sensitivity/visual", SHOWS] == (1, 1, 0.5, "kept")
    assert found["sensitivity/subset-superset", SHOWS] == (1, 1, 1, "kept")  # a cat is a pet too
    assert found["unrelated", SHOWS] == (2 / 3, 3, 1, "hurt")
    assert found["across/outside", STYLE][0] == 1


def test_the_control_keeps_everything(small):
    assert {d.share.value for d in small.trials[1].dimensions} == {1.0}
    assert small.trials[1].scores["UA"].value == 0 and small.trials[1].scores["IRA"].value == 1


def test_the_papers_scores_do_not_look_before(small):
    scores = small.trials[0].scores
    assert (scores["UA"].value, scores["IRA"].value, scores["CRA"].value) == (0.75, 4 / 5, 1)
    assert math.isclose(scores["H_o"].value, 2 / (1 / 0.75 + 5 / 4)) and scores["H"].value == 0  # no synonym is gone


def test_a_matrix_row_is_a_label_and_knows_its_relation(small):
    [first, _] = small.trials
    assert {label: first.relation(a, label) for a, label in first.labels if a == SHOWS} == {
        "cat": "erased", "fox": "visual", "pet": "superset", "boat": ""
    }  # fmt: skip
    assert first.labels[SHOWS, "cat"].estimate().n == 6


def test_two_erasures_of_one_concept_are_compared_on_the_same_pictures(picture):
    other = ["dog"] * 6 + SEEN[6:]
    compared = report(trial(picture, SEEN, "a"), trial(picture, other, "b")).comparisons
    difference = compared["a", "b", "efficacy (shows)"].difference
    assert difference.value == -0.25 and difference.n == 4
    assert compared["a", "b", "unrelated (shows)"].difference.value == 0


def test_what_was_not_tested_is_said(small):
    said = " ".join(small.untested)
    assert "what goes with it: the suite has none for cat" in said and "CLIP score" in said
    assert "1 pictures that a judge could not tell" in said and "textual inversion" in said
    assert "look-alikes" not in said  # control: that was


@pytest.mark.parametrize(
    ("value", "said"), [(0, "0%"), (0.004, "0.4%"), (0.5, "50%"), (0.995, "99.5%"), (1, "100%"), (math.nan, "–")]
)
def test_percent_keeps_the_decimals_that_tell(value, said):
    assert percent(value) == said


def test_the_json_is_what_its_schema_says(small):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    told = json.loads(json.dumps(small.to_json(), allow_nan=False))
    jsonschema.validate(told, SCHEMA)
    for path in (
        ["trials", 0, "dimensions", 0, "share", "value"],
        ["trials", 0, "concepts"],
        ["model", "digest"],
    ):  # control
        broken = copy.deepcopy(told)
        place = broken
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = "much"
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMA)


def test_results_fit_a_model_card(small):
    told = small.to_markdown()
    assert "| ridge | the concept by its name | left | 25% | " in told and "Not tested:" in told
    tables = [line for line in told.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in tables}) == 1


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.sources, self.outside, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.sources += [given["src"]] if tag == "img" else []
        link = given.get("href") or given.get("src") or "data:"
        self.outside += [link] if not link.startswith("data:") else []

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_self_contained(small):
    page = render(small)
    read = Page(page)
    assert read.sources and all(s.startswith("data:image/webp;base64,") for s in read.sources)
    assert not read.outside and "@import" not in page and "url(" not in page and "$" not in page
    assert "a <boat> & 0" in " ".join(read.text) and "judge <1>" in " ".join(read.text)  # escaped, then read back


def test_the_worst_pairs_come_first_and_the_page_is_bounded(picture):
    drawn = suite(others=60)
    seen = [p.shows for p in drawn.prompts[:-1]] + ["dog"]
    page = render(report(trial(picture, seen, drawn=drawn)))
    unrelated = page[page.index("<h3>everything else") :]
    unrelated = unrelated[: unrelated.index("</details>")]
    assert unrelated.index('<figure class="bad"') < unrelated.index('<figure class="good"')
    assert unrelated.count("<figure") == PAIRS and f"1 of 60 lost it; {60 - PAIRS} more, worst shown" in unrelated


# --- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

CHECK = """<script>
const errors = [];
addEventListener("error", event => errors.push(event.message));
addEventListener("load", () => {
  const found = {}, images = [...document.images], column = table => [...table.tBodies[0].rows].map(row => row.cells[%d].dataset.v);
  found.pictures = [images.length, images.filter(image => image.naturalWidth > 0).length];
  found.width = [document.documentElement.scrollWidth, innerWidth];
  const table = document.querySelector("table"), heads = table.tHead.rows[0].cells;
  found.before = column(table);
  heads[%d].click(); found.up = column(table);
  heads[%d].click(); found.down = column(table);
  found.sorted = heads[%d].getAttribute("aria-sort");
  found.errors = errors;
  const told = document.createElement("pre"); told.id = "found"; told.textContent = JSON.stringify(found); document.body.append(told);
});
</script>"""


def browse(page, folder, width):
    """The page as Chromium sees it at `width` pixels: what `CHECK` found, and the browser's console."""
    column = 1
    path = folder / "checked.html"
    path.write_text(page.replace("</head>", CHECK % ((column,) * 4) + "</head>"))
    found = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--enable-logging=stderr",
         f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900", "--virtual-time-budget=4000", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    told = re.search(r'<pre id="found">(.*?)</pre>', found.stdout, re.DOTALL)
    assert told, found.stderr[-2000:]
    return json.loads(html.unescape(told[1])), [line for line in found.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium) to open the page as a reader would"
)
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_reads_the_page(small, tmp_path, width):
    """500 pixels is the narrowest window that headless Chromium opens."""
    found, console = browse(render(small), tmp_path, width)
    assert not found["errors"] and not console
    shown, loaded = found["pictures"]
    assert shown == loaded > 0
    assert found["width"][0] <= found["width"][1], "the page scrolls sideways"
    numbers = [float(v) for v in found["up"]]
    assert numbers == sorted(numbers) and found["down"] == found["up"][::-1] != found["up"]
    assert sorted(found["before"]) == sorted(found["up"]) and found["sorted"] == "descending"
