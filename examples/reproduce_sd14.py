"""Closed-form erasure on Stable Diffusion 1.4, for whoever has the weights: erase, save, draw before and after, unload.

    python examples/reproduce_sd14.py --model PATH/stable-diffusion-v1-4 --concept "Van Gogh" --kind style --target Monet
    python examples/reproduce_sd14.py --model ... --concept church --target temple --preserve-file keep.txt
    python examples/reproduce_sd14.py --dry-run    # the same code on the embedded model; also without --model

Pairs (before | after, same prompt, same seed) land in --out, with the adapter. Nothing here was measured on SD weights by this
project: docs/recipes.md has the settings of the papers.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from diffusers_erase import erase, erasure_status, load_erasure, unload_erasure, world

PROMPTS = {
    "object": ("a photo of a {}", "a picture of a {}"),
    "person": ("a portrait of {}", "{} in an official photo"),
    "style": ("a painting in the style of {}", "an artwork by {}"),
}
OTHERS = ("a photo of a dog in a park", "a painting of a harbour in the evening")


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a diffusers folder; without it, a dry run")
    parser.add_argument("--dry-run", action="store_true", help="run on the embedded model emoji-sd")
    parser.add_argument("--concept", default="Van Gogh")
    parser.add_argument("--kind", choices=PROMPTS, default="style")
    parser.add_argument(
        "--target", help="a name, 'null' for the empty prompt, 'auto' for a search; by default what the method does"
    )
    parser.add_argument("--preserve", nargs="*", default=[])
    parser.add_argument("--preserve-file", type=Path, help="more names to preserve, one a line")
    parser.add_argument("--method", choices=["ridge", "uce"], default="ridge")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=7.5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("reproduce-sd14"))
    return parser.parse_args()


def load(arguments):
    """(pipeline, prompts that name the concept, prompts that do not); a dry run replaces what SD 1.4 needs to be told."""
    if arguments.model and not arguments.dry_run:
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(arguments.model, safety_checker=None)
        return pipe.to(arguments.device), [p.format(arguments.concept) for p in PROMPTS[arguments.kind]], OTHERS
    arguments.concept, arguments.kind, arguments.target = "cat", "object", "dog"
    arguments.preserve, arguments.preserve_file = ["fox"], None
    arguments.steps, arguments.guidance, arguments.seeds = world.STEPS, world.GUIDANCE, 2
    kept = [world.prompt(name, world.STYLES[0]) for name in ("fox", "umbrella")]
    return world.load(), [world.prompt("cat", style) for style in world.STYLES[:2]], kept


def draw(pipe, prompts, arguments):
    pictures = []
    for prompt in prompts:
        for seed in range(arguments.seeds):
            seeded = torch.Generator().manual_seed(seed)
            settings = {"num_inference_steps": arguments.steps, "guidance_scale": arguments.guidance}
            pictures.append(pipe(prompt, generator=seeded, **settings).images[0])
    return pictures


def beside(before, after):
    pair = Image.new("RGB", (2 * before.width, before.height))
    pair.paste(before, (0, 0))
    pair.paste(after, (before.width, 0))
    return pair


arguments = parse()
pipe, named, others = load(arguments)
preserve = arguments.preserve + (
    arguments.preserve_file.read_text("utf-8").split("\n") if arguments.preserve_file else []
)
adapter = erase(
    pipe,
    arguments.concept,
    target=arguments.target,
    preserve=[n for n in preserve if n.strip()],
    method=arguments.method,
    templates=PROMPTS["style"] if arguments.kind == "style" and arguments.method == "ridge" else None,
)
adapter.save_pretrained(arguments.out / "adapter")

prompts = [*named, *others]
before = draw(pipe, prompts, arguments)
load_erasure(pipe, arguments.out / "adapter")
print(erasure_status(pipe))
after = draw(pipe, prompts, arguments)
unload_erasure(pipe)

for i, pair in enumerate(zip(before, after, strict=True)):
    beside(*pair).save(arguments.out / f"{'concept' if i < len(named) * arguments.seeds else 'other'}-{i:03}.png")
print(f"{len(before)} pairs, before | after, in {arguments.out}")
