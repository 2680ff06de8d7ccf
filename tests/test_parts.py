"""Pictures and answers come in parts; a run that is killed anywhere and goes on ends with the same bits."""

import contextlib
import os
import random
import signal
import time

import pytest
from conftest import make_pipe
from hypothesis import given
from hypothesis import strategies as st

from diffusers_erase import MismatchError
from diffusers_erase.bench.images import draw, pace, paths, plan_for, read
from diffusers_erase.bench.metrics import Share
from diffusers_erase.bench.parts import answers, ask, unanswered
from diffusers_erase.bench.plan import WHOLE, Plan, Shard
from diffusers_erase.bench.suites import Prompt, Settings
from diffusers_erase.errors import EraseError

SETTINGS = Settings(steps=1, guidance=3.0)
WORDS = ("cat", "dog", "wolf", "car", "ship", "tree", "house")
PROMPTS = [Prompt(f"a photo of a {word}", seed) for word in WORDS for seed in (0, 1)]


def brightness(plan, folder):
    """A question whose answers depend on every picture's bits."""
    files = paths(plan, folder)  # no prompt comes twice: items and prompts are the same
    return lambda batch: [sum(picture.convert("L").tobytes()) for picture in read([files[i] for i in batch])]


def run(pipe, plan, folder, shard=WHOLE, on_picture=lambda n: None):
    draw(pipe, plan, folder, shard, on_picture)
    ask(plan, folder, "brightness", brightness(plan, folder), shard, on_picture)


def result(plan, folder):
    return answers(plan, folder, "brightness"), [path.read_bytes() for path in paths(plan, folder)]


@pytest.fixture(scope="module")
def drawing(tokenizer, tmp_path_factory):
    """Pipeline, plan, and what an undisturbed run gives."""
    pipe, folder = make_pipe(tokenizer), tmp_path_factory.mktemp("undisturbed")
    plan = plan_for(pipe, PROMPTS, SETTINGS, batch=4)
    run(pipe, plan, folder)
    return pipe, plan, result(plan, folder)


@pytest.fixture(scope="module")
def seconds(drawing, tmp_path_factory):
    """How long an undisturbed run takes here: within this time others are killed."""
    start = time.monotonic()
    run(*drawing[:2], tmp_path_factory.mktemp("timed"))
    return time.monotonic() - start


@contextlib.contextmanager
def worker(task):
    """A process of its own that does `task`; yields its id."""
    if (process := os.fork()) == 0:
        code = 1
        try:
            task()
            code = 0
        finally:
            os._exit(code)
    try:
        yield process
    finally:
        assert os.waitpid(process, 0)[0] == process


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))])
def test_a_run_killed_at_any_point_goes_on_to_the_same_result(drawing, seconds, tmp_path, seed):
    """Killed three times: twice at a moment that a clock gives, once right where it said that something was done."""
    pipe, plan, expected = drawing
    chance = random.Random(seed)
    for _ in range(2):
        with worker(lambda: run(pipe, plan, tmp_path)) as process:
            time.sleep(chance.random() * seconds)
            os.kill(process, signal.SIGKILL)
    last = chance.randint(1, 2 * len(plan.batches))
    steps = iter(range(1, 100))
    with worker(
        lambda: run(pipe, plan, tmp_path, on_picture=lambda n: next(steps) < last or os.kill(os.getpid(), 9))
    ) as process:
        pass
    run(pipe, plan, tmp_path)
    assert result(plan, tmp_path) == expected


def test_workers_side_by_side_give_what_one_gives(drawing, tmp_path):
    pipe, plan, expected = drawing
    with contextlib.ExitStack() as stack:
        for i in range(3):
            stack.enter_context(worker(lambda i=i: run(pipe, plan, tmp_path, Shard(i, 3))))
    assert result(plan, tmp_path) == expected


def test_a_merge_refuses_missing_shards_unless_told(drawing, tmp_path):
    pipe, plan, expected = drawing
    run(pipe, plan, tmp_path, Shard(0, 2))
    assert unanswered(plan, tmp_path, "brightness") == 6 and not unanswered(plan, tmp_path, "brightness", Shard(0, 2))
    with pytest.raises(EraseError, match="2 of 4 batches .* batch 2 the first"):
        answers(plan, tmp_path, "brightness")
    found = answers(plan, tmp_path, "brightness", partial=True)
    drawn = {i for batch in plan.batches[::2] for i in batch}
    assert [a for i, a in enumerate(found) if i in drawn] == [a for i, a in enumerate(expected[0]) if i in drawn]
    assert all(found[i] is None for i in range(len(PROMPTS)) if i not in drawn)
    assert Share.of(None if a is None else a > 0 for a in found).estimate().coverage == len(drawn) / len(PROMPTS)
    run(pipe, plan, tmp_path, Shard(1, 2))
    assert result(plan, tmp_path) == expected


def test_answers_are_given_once_and_one_each(drawing, tmp_path):
    _, plan, _ = drawing
    asked = []
    ask(plan, tmp_path, "seen", lambda batch: asked.append(batch) or [None] * len(batch))
    ask(plan, tmp_path, "seen", lambda batch: 1 / 0)
    assert asked == list(plan.batches)
    with pytest.raises(EraseError, match="3 answers for 4 pictures"):
        ask(plan, tmp_path, "few", lambda batch: [1, 2, 3])


def test_a_part_of_other_pictures_is_refused(drawing, tmp_path):
    _, plan, _ = drawing
    ask(plan, tmp_path, "index", list)
    first, second, *_ = sorted((tmp_path / "parts" / "index").iterdir())
    first.write_bytes(second.read_bytes())
    with pytest.raises(MismatchError, match="other pictures than expected"):
        answers(plan, tmp_path, "index")
    first.write_text("[")
    with pytest.raises(MismatchError, match="delete it and run again"):
        answers(plan, tmp_path, "index")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 2)), min_size=1, max_size=20), st.integers(1, 6))
def test_answers_come_in_the_order_of_the_prompts(tmp_path_factory, prompts, batch):
    folder = tmp_path_factory.mktemp("parts")
    plan = Plan("m", (), SETTINGS, tuple(prompts), batch)
    ask(plan, folder, "itself", lambda batch: [plan.items[i] for i in batch])
    assert answers(plan, folder, "itself") == [list(prompt) for prompt in prompts]


def test_the_pace_is_told_before_the_first_picture(drawing, tmp_path):
    pipe, plan, _ = drawing
    assert 0 < pace(pipe, plan) < float("inf") and not list(tmp_path.iterdir())
