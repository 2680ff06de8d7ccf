"""What a negative prompt does beside an erasure: emoji-sd, with the erasure on both halves of the guided batch or on one.

    python examples/benchmarks/negatives.py

Draws concepts and unrelated objects with an empty negative prompt, one that names the erased concept, and one that names
another object. Prints the share of pictures that show what the prompt asks for, with Wilson's 95 % interval, and how far
the negative prompt moves the picture (root mean square over pixels, of 255, from the one with the empty negative prompt).
"""

import argparse
import math

import numpy as np
import torch

from diffusers_erase import erase, load_erasure, unload_erasure, world

CONCEPTS = {"bee": "guitar", "sun": "fish", "cactus": "umbrella"}
"""Erased objects, each with an unrelated one."""

OTHER = "snail"
"""What a negative prompt names that is not erased."""

ERASURES = {"none": None, "both halves": "both", "conditional half": "cond"}


def drawn(pipe, thing: str, negative: str, seeds: int) -> list:
    """Pictures of `thing` in every style."""
    prompts = [world.prompt(thing, style) for style in world.STYLES]
    return [
        image
        for seed in range(seeds)
        for image in pipe(
            prompts,
            negative_prompt=[negative] * len(prompts),
            generator=[torch.Generator().manual_seed(seed) for _ in prompts],
            num_inference_steps=world.STEPS,
            guidance_scale=world.GUIDANCE,
        ).images
    ]


def moved(images: list, others: list) -> float:
    """Root mean square difference of two lists of pictures."""
    pairs = zip(images, others, strict=True)
    return math.sqrt(np.mean([np.square(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in pairs]))


def wilson(hits: int, n: int) -> str:
    """A share with its 95 % interval, in per cent."""
    z, p = 1.96, hits / n
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
    return f"{100 * p:3.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2, help="Pictures of each prompt.")
    seeds = parser.parse_args().seeds
    pipe, judge = world.load(), world.judge()
    pipe.set_progress_bar_config(disable=True)
    adapters = {concept: erase(pipe, concept, target="null") for concept in CONCEPTS}
    for name, branch in ERASURES.items():
        for asked in ("concept", "unrelated"):
            pictures: dict[str, list] = {"": [], "erased": [], "other": []}
            hits = dict.fromkeys(pictures, 0)
            for concept, unrelated in CONCEPTS.items():
                if branch:
                    load_erasure(pipe, adapters[concept], branch=branch)
                thing = concept if asked == "concept" else unrelated
                for negative, text in {"": "", "erased": concept, "other": OTHER}.items():
                    images = drawn(pipe, thing, text, seeds)
                    hits[negative] += sum(found == thing for found in judge.objects(images))
                    pictures[negative] += images
                unload_erasure(pipe)
            for negative, images in pictures.items():
                change = f"{moved(images, pictures['']):5.1f}" if negative else "    -"
                print(f"{name:>17} | {asked:>9} | negative: {negative or 'empty':>6} | "
                      f"shown {wilson(hits[negative], len(images))}, n = {len(images)} | moved {change}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
