"""Target search: time to compare 3,000 encoded candidates at SD 1.4's width, against one solve a candidate.

    python examples/benchmarks/search.py [--candidates 3000] [--threads 1]

Prints a table: CPU seconds, which other jobs do not stretch, and the ratio to the loop, which is measured on some of the
candidates and scaled.
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
        concept=rows[0], names=rows[1:], empty=random(ROLES), inverse=pack.pull(torch.eye(WIDTH, dtype=torch.float64)),
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


def seconds(work: Callable[[], Tensor], rounds: int) -> list[float]:
    taken = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return taken


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
    loop = [s / len(some) * len(T) for s in seconds(lambda: one_by_one(view, pack, some), 3)]
    fast, slow = statistics.median(ours), statistics.median(loop)
    print(
        f"{options.candidates:,} candidates, {AMONG} names, {ROLES} token roles, d = {WIDTH}, {options.threads} threads; "
    )
    print(f"largest difference {error:.0e}\n\n| | CPU seconds (fastest–slowest) |\n|---|---|")
    print(f"| together | {fast:.2f} ({min(ours):.2f}–{max(ours):.2f}) |")
    print(f"| one by one, from {len(some)} | {slow:.1f} ({min(loop):.1f}–{max(loop):.1f}) |")
    print(f"| ratio | {slow / fast:.0f} |")


if __name__ == "__main__":
    main()
