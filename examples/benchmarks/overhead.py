"""What does an erasure cost per denoising step? Map, LoRA and fused weights, against the bare UNet, at Stable Diffusion 1.4's shapes.

The UNet has SD 1.4's configuration and random weights: its time does not depend on their values. One step is one forward of
[2, 4, 32, 32] latents (classifier-free guidance, 256 x 256 pixels; at 512 x 512 a step is longer and the share of the map
smaller). The forms take turns, so that a change of the machine's speed meets all of them. The map is also timed by itself.

    python examples/benchmarks/overhead.py              # one thread, about three minutes, 5 GB
    python examples/benchmarks/overhead.py --rounds 20  # narrower intervals
"""

import argparse
import random
import statistics
import time

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging

from diffusers_erase import ErasureAdapter, load_erasure, unload_erasure
from diffusers_erase.adapter import Recipe
from diffusers_erase.edits import Edit, Gate, Label
from diffusers_erase.mapping import EmbeddingMap
from diffusers_erase.text import Fingerprint

WIDTH = 768
FORMS = ("bare", "map", "LoRA", "fused")


def clock():
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def random_adapter(concepts, gate=None):
    """An erasure of the size that the default policy gives: two rows a concept."""
    generator = torch.Generator().manual_seed(0)
    keys, offsets = torch.randn(2, 2 * concepts, WIDTH, generator=generator)
    names = [f"concept {i:04}" for i in range(concepts)]
    labels = tuple(Label(name, name, role, (), gate) for name in names for role in ("subject", "eot"))
    edit = Edit(labels, keys, offsets, torch.ones(len(keys)), keys / 100, "benchmark", "benchmark")
    recipes = tuple(Recipe(name, (), (), (), "ridge", {}, "last+eot", None, 0.02, 0.9) for name in names)
    return ErasureAdapter({"text": edit}, Fingerprint(WIDTH, "", ()), recipes)


def pipeline():
    """SD 1.4's UNet with random weights in a pipeline without the parts that a denoising step does not use."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=WIDTH).eval()
    return StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@torch.no_grad()
def step_seconds(pipe, form, adapter, inputs):
    """Time of one step with the erasure in this form; attaching and detaching are not counted."""
    if form == "LoRA":
        pipe.load_lora_weights(adapter.to_lora(pipe))
    elif form != "bare":  # strict=False: this pipeline has no text encoder to check
        load_erasure(pipe, adapter, mode="map" if form == "map" else "fused", strict=False)
    pipe.unet(*inputs)  # the first one after a change meets cold caches and freed memory
    start = clock()
    pipe.unet(*inputs)
    elapsed = clock() - start
    if form == "LoRA":
        pipe.unload_lora_weights()
    elif form != "bare":
        unload_erasure(pipe)
    return elapsed


@torch.no_grad()
def map_seconds(adapter, repeats=300):
    """Median time of the map alone on the embeddings of one guided step."""
    mapping, states, times = EmbeddingMap(adapter.edit), torch.randn(2, 77, WIDTH), []
    for _ in range(repeats):
        start = clock()
        mapping(states)
        times.append(clock() - start)
    return statistics.median(times)


def interval(ratios):
    """Median, and its 95 % interval by bootstrap."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[50], medians[1949]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--latents", type=int, default=32, help="side of the latents; 64 is 512 x 512 pixels")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    pipe, adapter = pipeline(), random_adapter(1)
    side = arguments.latents
    inputs = (torch.randn(2, 4, side, side), torch.tensor(500), torch.randn(2, 77, WIDTH))
    times = {form: [] for form in FORMS}
    for turn in range(arguments.rounds):
        for form in FORMS[turn % 4 :] + FORMS[: turn % 4]:
            times[form].append(step_seconds(pipe, form, adapter, inputs))
    bare = statistics.median(times["bare"])
    print(
        f"torch {torch.__version__}, {arguments.threads} thread(s), latents {side} x {side}, batch 2, {arguments.rounds} rounds\n"
    )
    print(
        "| form, one concept (2 rows) | seconds a step (median) | over bare (median of ratios, 95 % interval) |\n|---|---|---|"
    )
    for form in FORMS:
        middle, low, high = interval([100 * (t / b - 1) for t, b in zip(times[form], times["bare"], strict=True)])
        ratio = "" if form == "bare" else f"{middle:+.1f} % ({low:+.1f} to {high:+.1f})"
        print(f"| {form} | {statistics.median(times[form]):.2f} | {ratio} |")
    print("\n| the map alone, on [2, 77, 768] | µs | share of a bare step |\n|---|---|---|")
    for name, some in (("1 concept", random_adapter(1)), ("1 concept, gated", random_adapter(1, Gate(0.7))),
                       ("10 concepts", random_adapter(10)), ("100 concepts", random_adapter(100)),
                       ("1000 concepts", random_adapter(1000))):  # fmt: skip
        alone = map_seconds(some)
        print(f"| {name} | {alone * 1e6:.0f} | {alone / bare:.3%} |")


if __name__ == "__main__":
    main()
