"""One to ten thousand concepts: what a set of erasures costs to solve, keep, apply, change and load.

Two rows a concept (last subject token and EOT), random text states on a base pack with a background, d = 768 (SD 1.x) and
2048 (SDXL). A concept is erased to residual 0.02 on its own before the sets are made. PEFT's LoRA of the same rank runs over
layers of the real shapes (32 and 140), and is left out where it needs more than a gigabyte. Each line is measured in a
process of its own. Times are CPU times on one thread: medians, fastest and slowest in brackets.

    python examples/benchmarks/scale.py                              # some ten minutes
    python examples/benchmarks/scale.py --widths 768 --concepts 1 10 100
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from diffusers_erase.adapter import ErasureAdapter, Recipe
from diffusers_erase.edits import Edit, Label, Pool
from diffusers_erase.mapping import EmbeddingMap
from diffusers_erase.text import Encoder, Fingerprint

LAYERS = {
    768: [320] * 4 + [640] * 4 + [1280] * 4 + [1280] * 2 + [1280] * 6 + [640] * 6 + [320] * 6,
    2048: [640] * 20 + [1280] * 120,
}
"""Output widths of the key and value layers of SD 1.x and SDXL."""
GIGABYTE = 2**30


def states(count, width, seed):
    """Random states of CLIP's kind: a common part, and norms about 28."""
    common = torch.randn(width, generator=torch.Generator().manual_seed(width))
    found = 0.6 * common + 0.8 * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return 28 * found / found.norm(dim=1, keepdim=True)


def edits(count, width):
    """`count` edits of two rows each, on one background; strengths are those of residual 0.02 on average states."""
    background = states(2 * width, width, 1).double()
    gram = background.mT @ background / len(background)
    gram += 0.005 * gram.trace() / width * torch.eye(width)
    keys = states(2 * count, width, 2)
    offsets = states(2 * count, width, 3) - keys
    pulled = torch.cholesky_solve(keys.double().mT, torch.linalg.cholesky(gram)).mT.float()
    made = []
    for i in range(count):
        rows, name = slice(2 * i, 2 * i + 2), f"concept {i:05}"
        labels = tuple(Label(name, name, role, ()) for role in ("eot", "subject"))
        edit = Edit(labels, keys[rows], offsets[rows], torch.ones(2), pulled[rows], "benchmark", "0" * 64)
        made.append(edit.calibrated(0.02) if i < 50 else edit)
    typical = statistics.median(float(edit.strengths[0]) for edit in made[:50])
    return [made[i] if i < 50 else strengthened(edit, typical) for i, edit in enumerate(made)]


def strengthened(edit, strength):
    """The edit with this strength: calibrating ten thousand concepts is not what is measured."""
    return Edit(
        edit.labels, edit.keys, edit.offsets, edit.strengths * strength, edit.pulled, edit.pack, edit.pack_digest
    )


def seconds(run, repeats):
    """[median, fastest, slowest] of the CPU seconds of `repeats` runs."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return [statistics.median(times), min(times), max(times)]


def memory():
    """Peak of this process, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.no_grad()
def lora(width, rank, repeats):
    """(bytes, CPU seconds a call) of a PEFT LoRA over the key and value layers, on [2, 77, d]; no time beyond a gigabyte."""
    size = 4 * rank * sum(width + out for out in LAYERS[width])
    if size > GIGABYTE:
        return size, None
    from peft import LoraConfig, inject_adapter_in_model

    layers = torch.nn.ModuleDict(
        {f"to_{i}": torch.nn.Linear(width, out, bias=False) for i, out in enumerate(LAYERS[width])}
    )
    text = torch.randn(2, 77, width)
    bare = seconds(lambda: [layer(text) for layer in layers.values()], repeats)
    names = list(layers)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), layers)
    full = seconds(lambda: [layers[name](text) for name in names], repeats)
    return size, [max(a - bare[0], 0.0) for a in full]


@torch.no_grad()
def one(count, width):
    """Every number of one line."""
    made = edits(count, width)
    before = memory()
    start = time.process_time()
    pool = Pool(made)
    pooled = time.process_time() - start
    union = pool.union
    few = 20 if count <= 100 else 3 if count <= 1000 else 1
    whole = [
        Edit(union.labels, *union.rows[:2], union.strengths, union.pulled, union.pack, union.pack_digest)
        for _ in range(few)
    ]
    found = iter(whole)
    solved = seconds(lambda: EmbeddingMap(next(found)), few)
    peak = memory() - before
    text = torch.randn(2, 77, width)
    mapping = EmbeddingMap(whole[0])
    mapping(text)
    step = seconds(lambda: mapping(text), 50)
    pool.compose(made, residual_max=None)  # solved once
    toggled = None
    if count > 1:
        off = iter(range(count))
        n = min(count, 20 if width == 768 else 5)
        toggled = seconds(
            lambda: EmbeddingMap(pool.compose([*made[: (i := next(off))], *made[i + 1 :]], residual_max=None)), n
        )
    size, twin = lora(width, 2 * count, 5)
    return {
        "rows": 2 * count, "bytes": sum(t.nbytes for t in union.rows), "compose": pooled, "solve": solved, "memory": peak,
        "step": step, "toggle": toggled, "lora bytes": size, "lora step": twin, "saturation": whole[0].saturation,
    }  # fmt: skip


def verbs(count=100, many=1000):
    """Times of the public verbs on a pipeline of d = 768: loading `count` adapter folders, and toggling one of `many`."""
    from diffusers import UNet2DConditionModel

    from diffusers_erase import load_erasure, set_erasures

    class Pipe:
        unet = UNet2DConditionModel(
            block_out_channels=(32,), layers_per_block=1, cross_attention_dim=768, norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        )  # fmt: skip

    adapters = []
    for edit in edits(many, 768):
        recipe = Recipe(edit.concepts[0], (), (), (), "ridge", {}, "last+eot", None, 0.02, None)
        adapters.append(ErasureAdapter({"text": edit}, Fingerprint(768, "", ()), (recipe,)))
    with tempfile.TemporaryDirectory() as folder:
        places = [a.save_pretrained(Path(folder) / str(i)) for i, a in enumerate(adapters[:count])]
        pipe = Pipe()
        loaded = seconds(lambda: load_erasure(pipe, places, strict=False, residual_max=None), 1)
    pipe = Pipe()
    pipe.unet = type(pipe).unet.from_config(pipe.unet.config)
    names = [f"concept-{i:05}" for i in range(many)]
    everything = seconds(lambda: load_erasure(pipe, adapters, names, strict=False, residual_max=None), 1)
    toggled = {}
    for strength in (1.0, 0.5):
        set_erasures(pipe, names, strength)
        set_erasures(pipe, names[1:], strength)  # solved once
        off = iter(range(1, many))
        toggled[strength] = seconds(
            lambda s=strength, off=off: set_erasures(pipe, [*names[: (i := next(off))], *names[i + 1 :]], s), 20
        )
    return {"load": loaded, "load many": everything, "toggle": toggled[1.0], "toggle half": toggled[0.5]}


def checked(count=100):
    """Loading `count` adapters of emoji-sd, every check on: its text encoder reads the probes and each concept's name."""
    from diffusers_erase import erase, load_erasure, unload_erasure, world

    pipe, names = world.load(), two_words(count)
    with tempfile.TemporaryDirectory() as folder:
        places = [erase(pipe, name, target="null").save_pretrained(Path(folder) / name) for name in names]

        def load():
            load_erasure(pipe, places, residual_max=None)
            unload_erasure(pipe)

        return seconds(load, 5)


def reading(count=100):
    """What the effect check of `count` adapters reads with a text encoder of CLIP ViT-L/14's shape (random weights)."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from diffusers_erase import world

    tokenizer = world.load().tokenizer
    size = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    last = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    pipe = StableDiffusionPipeline(
        vae=None, tokenizer=tokenizer, text_encoder=CLIPTextModel(CLIPTextConfig(**size, **last)).eval(),
        unet=UNet2DConditionModel(
            block_out_channels=(32,), layers_per_block=1, cross_attention_dim=768, norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        ),
        scheduler=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    names, roles = two_words(count), ("subject", "eot")
    encoder = Encoder(pipe)
    brief = seconds(lambda: encoder.brief(names).table(names, roles, ("{}",)), 3)
    return brief, seconds(lambda: encoder.table(names, roles, ("{}",)), 1)


def two_words(count):
    """Names in emoji-sd's vocabulary."""
    from diffusers_erase import world

    pairs = [f"{a} {b}" for a in world.OBJECTS for b in world.OBJECTS if a != b]
    return pairs[:: len(pairs) // count][:count]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[768, 2048])
    parser.add_argument("--concepts", type=int, nargs="+", default=[1, 10, 100, 1000, 10000])
    parser.add_argument("--one", type=int, nargs=2, metavar=("CONCEPTS", "WIDTH"), help="one line as JSON")
    parser.add_argument("--verbs", action="store_true", help="only the public verbs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.one:
        print(json.dumps(one(*arguments.one)))
        return
    if not arguments.verbs:
        print(
            "| d | concepts | bytes | compose | solve | peak memory | a step | toggle one | LoRA of that rank | its step |\n|"
            + "---|" * 10
        )
        for width in arguments.widths:
            for count in arguments.concepts:
                print(f"| {width} | {count} | {' | '.join(cells(count, width))} |", flush=True)
    found, (brief, whole) = verbs(), reading()
    print("\n| by the public verbs | CPU time |\n|---|---|")
    print(f"| 100 adapters of emoji-sd loaded from their folders, every check on (n = 5) | {say(checked())} |")
    print(
        f"| 100 adapters of d = 768 loaded from their folders, no text encoder to check with (n = 1) | {say(found['load'])} |"
    )
    print(f"| the check's reading of 100 names with an encoder of CLIP ViT-L/14's shape (n = 3) | {say(brief)} |")
    print(f"| the same names, padded to 77 tokens (n = 1) | {say(whole)} |")
    print(f"| 1,000 adapters of d = 768 loaded from memory (n = 1) | {say(found['load many'])} |")
    print(f"| one of these 1,000 toggled by `set_erasures` (n = 20) | {say(found['toggle'])} |")
    print(f"| the same with all at strength 0.5 (n = 20) | {say(found['toggle half'])} |")


def cells(count, width):
    """The numbers of one line, from a process of its own."""
    call = [sys.executable, __file__, "--one", str(count), str(width)]
    found = json.loads(subprocess.run(call, capture_output=True, text=True, check=True).stdout)
    sizes = [size(found[name]) for name in ("bytes", "memory", "lora bytes")]
    return [
        f"{sizes[0]}", say([found["compose"]]), say(found["solve"]), sizes[1], say(found["step"]), say(found["toggle"]),
        sizes[2], say(found["lora step"]),
    ]  # fmt: skip


def size(count):
    return (
        f"{count / 1e6:,.0f} MB"
        if count >= 1e7
        else f"{count / 1e6:.1f} MB"
        if count >= 1e6
        else f"{count / 1e3:.0f} kB"
    )


def say(times):
    if times is None:
        return "–"
    unit, factor = ("s", 1) if times[0] >= 1 else ("ms", 1e3) if times[0] >= 1e-3 else ("µs", 1e6)
    middle, *ends = (f"{t:,.0f}" if t >= 100 else f"{t:.2g}" for t in (t * factor for t in times))
    return f"{middle} {unit} ({ends[0]}–{ends[1]})" if ends and ends[0] != ends[1] else f"{middle} {unit}"


if __name__ == "__main__":
    main()
