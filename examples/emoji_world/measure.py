"""Measure the shipped emoji-sd and print every gate; draw the contact sheet.

Reads the package's weights, and from WORK held-out renders (objects.npy, emoji.npy) and the CLIP pair.
`--stages` picks from: judges vae text pictures rows speed sheet.
"""

import argparse
import itertools
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import OBJECTS, PARAPHRASES, STYLES
from diffusers import StableDiffusionPipeline
from judges import Renders, object_batch, spoil, style_batch, unit
from PIL import Image, ImageDraw
from text import kinds
from torch import Tensor
from transformers import CLIPModel

from diffusers_erase import world
from diffusers_erase.bench.networks import Clip

SHEET = Path(__file__).parents[2] / "docs" / "emoji-sd-contact-sheet.png"
STAGES = ("judges", "vae", "text", "pictures", "rows", "speed", "sheet")


def share(right: int, n: int) -> str:
    """A share with its standard error and n."""
    p = right / n
    return f"{100 * p:.1f} % (se {100 * math.sqrt(p * (1 - p) / n):.1f}, n = {n})"


def report(label: str, right: list[bool]) -> None:
    print(f"  {label}: {share(sum(right), len(right))}", flush=True)


def generate(pipe: StableDiffusionPipeline, texts, seeds: list[int], steps: int, guidance: float) -> Tensor:
    """Pictures [n, 3, 64, 64] in [0, 1] of prompts, or of text states [n, 77, width]; one generator each."""
    made = []
    for at in range(0, len(seeds), 32):
        part = texts[at : at + 32]
        text = {"prompt_embeds": part} if isinstance(part, Tensor) else {"prompt": part}
        noise = [torch.Generator().manual_seed(seed) for seed in seeds[at : at + 32]]
        made.append(
            pipe(**text, generator=noise, num_inference_steps=steps, guidance_scale=guidance, output_type="pt").images
        )
    return torch.cat(made)


@torch.no_grad()
def reconstruct(vae, x: Tensor) -> Tensor:
    """Pictures in [0, 1] through the autoencoder."""
    parts = [vae.decode(vae.encode(part * 2 - 1).latent_dist.mode()).sample for part in x.split(64)]
    return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)


def held_out(work: Path, jitters: slice) -> tuple[Tensor, list[str], list[str]]:
    """Held-out renders of every object in every style, and their names."""
    images = np.load(work / "objects.npy", mmap_mode="r")[:, :, jitters]
    labels = [pair for pair in itertools.product(OBJECTS, STYLES) for _ in range(images.shape[2])]
    objects, styles = zip(*labels, strict=True)
    return unit(images.reshape(-1, *images.shape[3:])), list(objects), list(styles)


def measure_judges(pipe, judge, options) -> None:
    """Held-out renders as they are, spoilt, and through the autoencoder; unseen other emoji."""
    x, objects, styles = held_out(options.work, slice(-4, None))
    for label, pictures in (
        ("held-out renders", x),
        ("spoilt", spoil(x)),
        ("reconstructed", reconstruct(pipe.vae, x)),
    ):
        report(f"object, {label}", np.equal(judge.objects(pictures), objects).tolist())
        report(f"style, {label}", np.equal(judge.styles(pictures), styles).tolist())
    clip, texts = Clip(world.clip_path()), [world.prompt(o, s) for o, s in zip(objects, styles, strict=True)]
    known = list(dict.fromkeys(texts))
    for label, pictures in (("held-out renders", x), ("reconstructed", reconstruct(pipe.vae, x))):
        shown = [Image.fromarray((255 * p.movedim(0, -1)).round().byte().numpy()) for p in pictures]
        nearest = (clip.images(shown) @ clip.texts(known).T).argmax(1)
        report(
            f"nearest of 256 captions is its own, {label}",
            [known[i] == t for i, t in zip(nearest, texts, strict=True)],
        )
    others = Renders(options.work, held_out=True)
    report("other, unseen emoji", [o == "other" for o in judge.objects(others.draw_emoji(512)[0])])
    report("other, blanks, noise, blends", [o == "other" for o in judge.objects(others.draw_nothing(512))])
    for label, (y, right), column in (
        ("object", object_batch(others, 2048), 0), ("style", style_batch(others, 2048), 1)
    ):  # fmt: skip
        confidence, answer = judge.probabilities(y)[column].max(1)
        gap = confidence.mean() - (answer == right).float().mean()
        print(f"  {label}, spoilt: mean confidence minus accuracy {100 * gap:+.2f} points")


def decibels(x: Tensor, y: Tensor) -> float:
    return -10 * math.log10(F.mse_loss(x, y).item())


def measure_vae(pipe, _, options) -> None:
    """PSNR on held-out renders, beside a linear code of the same size; the latents' moments."""
    seen = held_out(options.work, slice(0, 2))[0]
    x = held_out(options.work, slice(-2, None))[0]
    size = pipe.vae.config.latent_channels

    def patches(images: Tensor) -> Tensor:
        return images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(-1, 192)

    mean = patches(seen).mean(0)
    _, _, axes = torch.pca_lowrank(patches(seen) - mean, size, center=False)
    linear = (patches(x) - mean) @ axes @ axes.T + mean
    print(f"  PSNR {decibels(reconstruct(pipe.vae, x), x):.2f} dB; linear patch-PCA with {size} numbers a patch "
          f"{decibels(linear, patches(x)):.2f} dB (n = {len(x)})")  # fmt: skip
    with torch.no_grad():
        z = pipe.vae.encode(x * 2 - 1).latent_dist.mode().movedim(1, -1).flatten(0, -2)
    print(f"  latents: |mean| <= {z.mean(0).abs().max():.3f}, eigenvalues of the covariance "
          f"{torch.linalg.eigvalsh(torch.cov(z.T)).min():.2f} to {torch.linalg.eigvalsh(torch.cov(z.T)).max():.2f}")  # fmt: skip


@torch.no_grad()
def embed(options, pipe, words: list[str]) -> Tensor:
    clip = CLIPModel.from_pretrained(options.work / "clip").eval()
    ids = pipe.tokenizer(words, padding=True, return_tensors="pt").input_ids
    return F.normalize(clip.text_projection(clip.text_model(ids).pooler_output), dim=1)


def measure_text(pipe, _, options) -> None:
    """Does the text side know what belongs together?"""
    names, info = list(OBJECTS), world.catalogue()["objects"]
    subgroup = [info[name]["subgroup"] for name in names]
    x = embed(options, pipe, names)
    nearest = (x @ x.T - 2 * torch.eye(len(names))).argmax(1).tolist()
    report(
        "nearest object is in the same subgroup", [subgroup[i] == s for i, s in zip(nearest, subgroup, strict=True)]
    )
    groups = {g: kinds({"subgroup": g, "group": ""})[1] for g in sorted(set(subgroup))}
    y, right = embed(options, pipe, list(groups.values())) @ x.T, []
    for row, group in zip(y, groups, strict=True):
        member = torch.tensor([s == group for s in subgroup])
        right += (row[member] > row[~member].quantile(0.9)).tolist()
    report("a group's word is nearer to a member than to 90 % of the others", right)
    pairs = [(word, name) for name, words in PARAPHRASES.items() for word in words]
    z = embed(options, pipe, [word for word, _ in pairs]) @ x.T
    report(
        "a paraphrase is nearest to its own object",
        [names[i] == n for i, (_, n) in zip(z.argmax(1), pairs, strict=True)],
    )


def measure_pictures(pipe, judge, options) -> None:
    """Top-1 over every object, style and seed at the shipped defaults; paraphrases; bare names."""
    jobs = list(itertools.product(OBJECTS, STYLES, range(options.seeds)))
    images = generate(
        pipe, [world.prompt(o, s) for o, s, _ in jobs], [j for *_, j in jobs], options.steps, options.guidance
    )
    objects, styles, seals = judge.objects(images), judge.styles(images), judge.sealed(images)
    report("object top-1", [found == o for found, (o, _, _) in zip(objects, jobs, strict=True)])
    report("style top-1", [found == s for found, (_, s, _) in zip(styles, jobs, strict=True)])
    for style in STYLES:
        mine = [i for i, (_, s, _) in enumerate(jobs) if s == style]
        report(f"object top-1 in {style}", [objects[i] == jobs[i][0] for i in mine])
        report(f"style top-1 in {style}", [styles[i] == style for i in mine])
        report(f"seal in {style}, which no caption names", [seals[i] for i in mine])
    per_object = {o: [f == o for f, (p, _, _) in zip(objects, jobs, strict=True) if p == o] for o in OBJECTS}
    worst = sorted(per_object, key=lambda o: sum(per_object[o]))[:12]
    print("  weakest:", ", ".join(f"{o} {100 * np.mean(per_object[o]):.0f} %" for o in worst))
    jobs = [(name, word, s) for name, words in PARAPHRASES.items() for word in words for s in STYLES]
    images = generate(pipe, [world.prompt(w, s) for _, w, s in jobs], [0] * len(jobs), options.steps, options.guidance)
    report("object top-1 by paraphrase", [f == o for f, (o, _, _) in zip(judge.objects(images), jobs, strict=True)])
    bare = [(o, seed) for o in OBJECTS for seed in range(options.seeds)]
    images = generate(pipe, [o for o, _ in bare], [seed for _, seed in bare], options.steps, options.guidance)
    report("object top-1 by bare name", [f == o for f, (o, _) in zip(judge.objects(images), bare, strict=True)])


def measure_rows(pipe, judge, options) -> None:
    """What the denoiser reads: prompt A with some of its text rows taken from prompt B."""
    draw = random.Random(0)
    names = [name for name in OBJECTS if " " not in name and name[0] not in "aeiou"]
    pairs = [(*draw.sample(names, 2), draw.choice(list(STYLES))) for _ in range(options.pairs)]
    a, b = ([world.prompt(pair[i], pair[2]) for pair in pairs] for i in (0, 1))
    states = [pipe.encode_prompt(texts, "cpu", 1, False)[0] for texts in (a, b)]
    ids = pipe.tokenizer(a[0]).input_ids
    subject = pipe.tokenizer.convert_ids_to_tokens(ids).index(pairs[0][0] + "</w>")
    end = len(ids) - 1
    words, pads = list(range(subject + 1, end)), list(range(end + 1, 77))
    choices = {
        "none": [], "subject": [subject], "end": [end], "subject + end": [subject, end],
        "subject + later words": [subject, *words], "subject + later words + end": [subject, *words, end],
        "pads": pads, "end + pads": [end, *pads], "subject + end + pads": [subject, end, *pads], "all": list(range(77)),
    }  # fmt: skip
    print(f"  {'rows taken from B':28} stays A  becomes B   (n = {len(pairs)} pairs)")
    for label, rows in choices.items():
        mixed = states[0].clone()
        mixed[:, rows] = states[1][:, rows]
        found = judge.objects(generate(pipe, mixed, list(range(len(pairs))), options.steps, options.guidance))
        stays, becomes = ([f == pair[i] for f, pair in zip(found, pairs, strict=True)] for i in (0, 1))
        print(f"  {label:28} {100 * np.mean(stays):5.0f} %   {100 * np.mean(becomes):5.0f} %", flush=True)


def measure_speed(pipe, _, options) -> None:
    texts = [world.prompt(o, "noto") for o in list(OBJECTS)[:32]]
    generate(pipe, texts[:4], [0] * 4, options.steps, options.guidance)
    start = time.perf_counter()
    generate(pipe, texts, list(range(32)), options.steps, options.guidance)
    print(f"  {32 / (time.perf_counter() - start):.1f} images a second with {torch.get_num_threads()} threads")
    start = time.perf_counter()
    world.load()
    print(f"  world.load() {time.perf_counter() - start:.1f} s; all weights "
          f"{sum(p.stat().st_size for p in world.WEIGHTS.rglob('*') if p.is_file()) / 2**20:.1f} MiB")  # fmt: skip


def draw_sheet(pipe, _, options) -> None:
    """Every object in every style, one seed; two objects' four styles to a column pair."""
    jobs = list(itertools.product(OBJECTS, STYLES))
    images = generate(pipe, [world.prompt(o, s) for o, s in jobs], [7] * len(jobs), options.steps, options.guidance)
    tiles = (images * 255).round().byte().movedim(1, -1).numpy()
    across, label = 16, 12
    rows = math.ceil(len(OBJECTS) / across)
    sheet = Image.new("RGB", (across * 64, rows * (len(STYLES) * 64 + label)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(OBJECTS):
        left, top = i % across * 64, i // across * (len(STYLES) * 64 + label)
        draw.text((left + 2, top), name, fill="black")
        for j in range(len(STYLES)):
            sheet.paste(Image.fromarray(tiles[i * len(STYLES) + j]), (left, top + label + 64 * j))
    options.sheet.parent.mkdir(exist_ok=True)
    sheet.save(options.sheet)
    print(f"  {options.sheet}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("emoji-world-work"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=world.STEPS)
    parser.add_argument("--guidance", type=float, default=world.GUIDANCE)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sheet", type=Path, default=SHEET)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    measures = (measure_judges, measure_vae, measure_text, measure_pictures, measure_rows, measure_speed, draw_sheet)
    pipe, judge = world.load(), world.judge()
    for stage, measure in zip(STAGES, measures, strict=True):
        if stage in options.stages:
            print(stage, flush=True)
            measure(pipe, judge, options)


if __name__ == "__main__":
    main()
