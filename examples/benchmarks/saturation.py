"""When does a set of erasures begin to hurt? The meter (`Edit.saturation`, docs/maths.md) against pictures of emoji-sd.

Erases 1, 5, 20 and 50 objects together, draws other objects with the same prompts and seeds as without erasures, and counts
those that the judge still recognises, of those that it recognised before. Targets are the empty prompt, everything else
is as `erase` has it.

    python examples/benchmarks/saturation.py                      # about 330 pictures
    python examples/benchmarks/saturation.py --concepts 1 50 --each 2
"""

import argparse
import random

import torch

from diffusers_erase import compose, erase, load_erasure, unload_erasure, world
from diffusers_erase.bench.metrics import Estimate

KEPT = 14
"""Objects that are never erased, drawn by chance once; a neighbour of one may be."""


def split(seed=0):
    """(objects to keep, objects to erase in this order)."""
    names = list(world.OBJECTS)
    random.Random(seed).shuffle(names)
    return names[:KEPT], names[KEPT:]


def right(pipe, judge, names, each):
    """For each picture whether the judge sees the object that was asked for."""
    found = []
    for i, name in enumerate(names):
        prompts = [world.prompt(name, world.STYLES[(i + j) % len(world.STYLES)]) for j in range(each)]
        seeds = [torch.Generator().manual_seed(100 * i + j) for j in range(each)]
        images = pipe(
            prompts, generator=seeds, num_inference_steps=world.STEPS, guidance_scale=world.GUIDANCE
        ).images  # fmt: skip
        found += [seen == name for seen in judge.objects(images)]
    return torch.tensor(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--concepts", type=int, nargs="+", default=[1, 5, 20, 50])
    parser.add_argument("--each", type=int, default=4, help="pictures of each kept object")
    parser.add_argument("--gate", type=float)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipe, judge = world.load(), world.judge()
    kept, erased = split()
    before = right(pipe, judge, kept, arguments.each)
    print(f"{int(before.sum())} of {len(before)} pictures of {', '.join(kept)} are right without erasures\n")
    print(
        "| concepts | rows | saturation | largest residual | others kept (95 % interval) | n | erased ones gone |\n|"
        + "---|" * 7
    )
    made = [erase(pipe, name, target="null", gate=arguments.gate) for name in erased[: max(arguments.concepts)]]
    for count in arguments.concepts:
        union = compose(*made[:count], residual_max=None)
        load_erasure(pipe, union, residual_max=None)
        after = right(pipe, judge, kept, arguments.each)
        shown = right(pipe, judge, erased[:count][-KEPT:], 1)
        unload_erasure(pipe)
        share = Estimate.of_share(after[before].tolist())
        worst = max(union.edit.residuals().values())
        cells = [count, len(union.edit.labels), f"{union.edit.saturation:.3f}", f"{worst:.3f}"]
        cells += [
            f"{share.value:.0%} ({share.low:.0%}–{share.high:.0%})",
            share.n,
            f"{int((~shown).sum())} of {len(shown)}",
        ]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


if __name__ == "__main__":
    main()
