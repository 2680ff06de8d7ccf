"""Target search: time to compare 3,000 encoded candidates at SD 1.4's width, against one solve a candidate.

    python examples/benchmarks/search.py [--candidates 3000] [--threads 1]

Prints a table: seconds, CPU seconds, which other jobs do not stretch, and the ratio to the loop, which is measured on some of
the candidates and scaled.
Rows are random; both compute the same numbers, and the script stops if they differ by more than 1e-9.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from diffusers_erase import solve
from diffusers_erase.edits import Edit, Label, Pack
from diffusers_erase.outlook import Surroundings

WIDTH, ROLES, AMONG = 768, 2, 64


def scene(candidates: int) -> tuple[Surroundings, Pack, Tensor]:
    """A concept, 64 names and candidates `[N, 1, r, d]` before a background of 5,000 random states."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64)

    background, readers = random(5000), random(2000)
    pack = Pack("random", "random", 0.005, WIDTH, background.mT @ background / 5000, random(3))
    rows = random(1 + AMONG, ROLES)
    view = Surroundings(
        concept=rows[0], others=rows[:0], names=rows[1:], empty=random(ROLES), inverse=pack.pull(torch.eye(WIDTH, dtype=torch.float64)),
        metric=readers.mT @ readers / 2000, residual=0.02, preserved=rows[:0],
    )  # fmt: skip
    return view, pack, random(candidates, 1, ROLES)


def together(view: Surroundings, T: Tensor) -> Tensor:
    """Damage of every name under every candidate `[N, m]`, as the search computes it."""
    return view.damage(view.outlook(T))


def one_by_one(view: Surroundings, pack: Pack, T: Tensor) -> Tensor:
    """The same by making each candidate's edit."""
    labels = [Label("c", "c", f"name:{i}", ("t",)) for i in range(ROLES)]
    labels += [Label("t", "t", f"name:{i}", None) for i in range(ROLES)]
    away = view.names - view.empty
    whole = ((away @ view.metric) * away).sum(-1).sqrt()
    rows = []
    for (target,) in T:
        keys = torch.cat([view.concept, target])
        pulled = pack.pull(keys)
        hold = solve.holding(target, pulled[ROLES:], view.hold)
        edit = Edit(
            tuple(labels), keys, torch.cat([target - view.concept, torch.zeros_like(target)]),
            torch.cat([torch.ones_like(hold), hold]), pulled, pack.name, pack.digest,
        ).calibrated(view.residual)  # fmt: skip
        change = (view.names @ edit.detectors().mT) @ edit.offsets
        rows.append((((change @ view.metric) * change).sum(-1).sqrt() / whole).mean(1))
    return torch.stack(rows)


def seconds(work: Callable[[], Tensor], rounds: int, scale: float = 1) -> list[list[float]]:
    """Seconds and CPU seconds of each round."""
    taken: list[list[float]] = [[], []]
    for _ in range(rounds):
        start = time.perf_counter(), time.process_time()
        work()
        for some, now, before in zip(taken, (time.perf_counter(), time.process_time()), start, strict=True):
            some.append((now - before) * scale)
    return taken


def cell(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--some", type=int, default=30, help="candidates that the loop is measured on")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    view, pack, T = scene(options.candidates)
    some = T[: options.some]
    error = float((together(view, some) / one_by_one(view, pack, some) - 1).abs().max())
    if error > 1e-9:
        raise SystemExit(f"the two differ by {error:.1e} of the damage")
    ours = seconds(lambda: together(view, T), 5)
    loop = seconds(lambda: one_by_one(view, pack, some), 3, len(T) / len(some))
    told = f"{options.candidates:,} candidates, {AMONG} names, {ROLES} token roles, d = {WIDTH}, {options.threads} threads"
    print(f"{told}; largest difference {error:.0e}\n\n| | seconds (fastest–slowest) | CPU seconds |\n|---|---|---|")
    print(f"| together | {' | '.join(map(cell, ours))} |")
    print(f"| one by one, from {len(some)} | {' | '.join(map(cell, loop))} |")
    print(
        f"| ratio | {' | '.join(f'{statistics.median(b) / statistics.median(a):.0f}' for a, b in zip(ours, loop, strict=True))} |"
    )


if __name__ == "__main__":
    main()
