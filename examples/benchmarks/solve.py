"""How long does it take to solve for an erasure? Ours against UCE's loop, at Stable Diffusion 1.4's layer shapes.

Weights and text states are random: timing and agreement depend on shapes and conditioning, not on meaning. All three solve
the same problem, UCE's (H = λI), so that their answers can be compared:

    published   for each of the 32 layers and each concept, add outer products to two matrices, then invert one; float32
    vectorised  the same sums as matrix products, one linear solve a layer; float32
    ours        one solve for all layers (float64 inside); then, apart, the same edit written into all 32 layers

Times on one thread are CPU times, which other work on the machine disturbs little; on several they are wall times.

    python examples/benchmarks/solve.py                  # one thread, about a minute and a half
    python examples/benchmarks/solve.py --concepts 1 10  # less
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from diffusers_erase.adapter import ErasureAdapter, Recipe
from diffusers_erase.edits import Edit, Label, Pack, compose
from diffusers_erase.solve import edited_weight
from diffusers_erase.text import Fingerprint, PackRecipe, base_pack

WIDTH = 768
BLOCKS = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] + [1280] * 3 + [640] * 3 + [320] * 3
"""Output widths of SD 1.x's 16 cross-attentions: down, mid, up. Each has a key and a value layer."""
LAYERS = [out for out in BLOCKS for _ in ("to_k", "to_v")]
LAMB = 0.5
FULL = 100
"""Up to this many concepts the published loop runs over all 32 layers; beyond, over one of each width, scaled up."""


def published(weights, keys, targets):
    """UCE's formula as its release computes it: a Python loop over layers and concepts, outer products, an inverse."""
    edited = []
    for W in weights:
        left = LAMB * W
        right = LAMB * torch.eye(W.shape[1])
        for c, t in zip(keys, targets, strict=True):
            value = W @ t[:, None]
            left = left + value @ c[None, :]
            right = right + c[:, None] @ c[None, :]
        edited.append(left @ torch.linalg.inv(right))
    return edited


def vectorised(weights, keys, targets):
    """The same with matrix products over all concepts and one solve for each layer."""
    edited = []
    for W in weights:
        left = LAMB * W + (W @ targets.mT) @ keys
        right = LAMB * torch.eye(W.shape[1]) + keys.mT @ keys
        edited.append(torch.linalg.solve(right, left.mT).mT)
    return edited


def fused(weights, edit, detectors):
    """Our edit written into every layer; rounded once, to float32."""
    return [edited_weight(W, edit.offsets, detectors).float() for W in weights]


def uce_edit(keys, targets):
    """The edit of UCE's problem: one row a concept on the pack H = λI."""
    pack = Pack(name="identity", digest="identity", ridge=LAMB, width=keys.shape[1])
    labels = tuple(Label(f"concept {i:04}", f"concept {i:04}", "subject", ()) for i in range(len(keys)))
    ones = torch.ones(len(keys))
    return Edit(labels, keys, targets - keys, ones, pack.pull(keys).float(), pack.name, pack.digest)


def text_states(count, generator):
    """Random states of CLIP's kind: a common part, and norms about 28."""
    common = torch.randn(WIDTH, generator=generator)
    states = 0.6 * common + 0.8 * torch.randn(count, WIDTH, generator=generator)
    return 28 * states / states.norm(dim=1, keepdim=True)


def clock():
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(run, repeats):
    """Median, fastest and slowest of some runs; one more before them warms up where that is cheap."""
    if repeats > 1:
        run()
    times = []
    for _ in range(repeats):
        start = clock()
        run()
        times.append(clock() - start)
    return statistics.median(times), min(times), max(times)


def published_seconds(weights, keys, targets):
    """Time of the published loop over 32 layers, measured whole or, for very many concepts, scaled up by layer width."""
    if len(keys) <= FULL:
        return seconds(lambda: published(weights, keys, targets), 2 if len(keys) <= 10 else 1)
    total = 0.0
    for out in sorted(set(LAYERS)):
        W = weights[LAYERS.index(out)]
        total += LAYERS.count(out) * seconds(lambda W=W: published([W], keys, targets), 1)[0]
    return total, total, total


def relative(found, expected):
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def error_rows(weights, keys, targets, edit):
    """Largest relative error of ΔW over one layer of each width, against the naive form in float64."""
    some = [weights[LAYERS.index(out)] for out in sorted(set(LAYERS))]
    exact = vectorised64(some, keys.double(), targets.double())
    deltas = [b - W.double() for W, b in zip(some, exact, strict=True)]
    A = edit.detectors()
    ours = [edited_weight(W.double(), edit.offsets, A) - W.double() for W in some]
    loop = [b.double() - W.double() for W, b in zip(some, published(some, keys, targets), strict=True)]
    batch = [b.double() - W.double() for W, b in zip(some, vectorised(some, keys, targets), strict=True)]
    return [relative(x, deltas) for x in (loop, batch, ours)]


def vectorised64(weights, keys, targets):
    right = LAMB * torch.eye(WIDTH, dtype=torch.float64) + keys.mT @ keys
    lefts = [LAMB * W.double() + (W.double() @ targets.mT) @ keys for W in weights]
    return [torch.linalg.solve(right, left.mT).mT for left in lefts]


def cold_pack(generator):
    """(seconds to sum 300 prompts' states, seconds of the first pull): what a base pack costs once on an encoder."""
    prompts = [text_states(12, generator).double() for _ in range(300)]
    moment = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    start = clock()
    for rows in prompts:
        moment = moment + rows.mT @ rows
    summed = clock() - start
    recipe = PackRecipe("benchmark", ("a prompt",))
    pack = base_pack(recipe, Fingerprint(WIDTH, "", ()), moment / 3600, text_states(3, generator))
    keys = text_states(2, generator)
    return summed, seconds(lambda: pack.pull(keys), 5)


def bytes_per_concept(generator):
    """(rows, tensor bytes, file bytes) of a stored concept with the default policy: last subject token and EOT."""
    keys, targets = text_states(2, generator), text_states(2, generator)
    labels = tuple(Label("Van Gogh", "Van Gogh", role, ("a painter",)) for role in ("subject", "eot"))
    edit = Edit(labels, keys, targets - keys, torch.ones(2), keys / LAMB, "english-1", "0" * 64)
    recipe = Recipe(
        "Van Gogh", (), ("a painter",), (), "ridge", {"preserve_residual": 0.1}, "last+eot", None, 0.02, 0.9
    )
    adapter = ErasureAdapter(
        {"text": edit}, Fingerprint(WIDTH, "0" * 16, tuple(1.0 + i / 1000 for i in range(28))), (recipe,)
    )
    with tempfile.TemporaryDirectory() as folder:
        adapter.save_pretrained(folder)
        return len(labels), adapter.size, (Path(folder) / "erasure.safetensors").stat().st_size


def measure(count, weights, generator):
    """Cells of one row of the table, and the relative errors."""
    keys, targets = text_states(count, generator), text_states(count, generator)
    edit = uce_edit(keys, targets)
    parts = [edit.take([i]) for i in range(count)]
    loop = published_seconds(weights, keys, targets)
    batch = seconds(lambda: vectorised(weights, keys, targets), 2)
    solve = seconds(edit.detectors, 50 if count <= 100 else 5)
    both = seconds(lambda: fused(weights, edit, edit.detectors()), 3)
    union = seconds(lambda: compose(*parts, residual_max=1.0), 3)
    cells = [say(loop) + ("" if count <= FULL else " ¹"), say(batch), say(solve), say(both), say(union)]
    cells += [f"{loop[0] / solve[0]:,.0f}×", f"{loop[0] / both[0]:,.1f}×", f"{batch[0] / solve[0]:,.0f}×"]
    return cells, error_rows(weights, keys, targets, edit)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--concepts", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    weights = [0.02 * torch.randn(out, WIDTH, generator=generator) for out in LAYERS]
    print(
        f"torch {torch.__version__}, {arguments.threads} thread(s), 32 layers, d = {WIDTH}; medians (fastest–slowest)\n"
    )
    columns = "published|vectorised|ours: solve|solve + fuse|compose|published / solve|published / (solve + fuse)|vectorised / solve"
    print(f"| concepts | {columns.replace('|', ' | ')} |\n|{'---|' * 9}")
    errors = []
    for count in arguments.concepts:
        cells, found = measure(count, weights, generator)
        print(f"| {count} | {' | '.join(cells)} |", flush=True)
        errors.append((count, found))
    if max(arguments.concepts) > FULL:
        print(f"\n¹ measured on one layer of each width, scaled to {len(LAYERS)} layers.")
    print("\nRelative error of ΔW against float64 (largest of one layer of each width):\n")
    print("| concepts | published | vectorised | ours |\n|---|---|---|---|")
    for count, found in errors:
        print(f"| {count} | {' | '.join(f'{e:.1e}' for e in found)} |")
    summed, pull = cold_pack(generator)
    print(
        f"\nCold pack, once on an encoder: second moment of 300 prompts' states {summed * 1e3:.0f} ms (without encoding them);"
    )
    print(f"each pull of two new keys through it, Cholesky of H included: {say(pull)}.")
    rows, stored, file = bytes_per_concept(generator)
    print(f"\nA stored concept: {rows} rows, {stored:,} bytes of tensors, {file:,} bytes as a file with its head.")


def say(times):
    unit, factor = ("s", 1) if times[0] >= 1 else ("ms", 1e3) if times[0] >= 1e-3 else ("µs", 1e6)
    middle, low, high = (f"{t * factor:.3g}" for t in times)
    return f"{middle} {unit} ({low}–{high})" if low != high else f"{middle} {unit}"


if __name__ == "__main__":
    main()
