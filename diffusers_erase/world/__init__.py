"""emoji-sd: a small, real Stable Diffusion (64 x 64) that ships with the package, its vocabulary, and its judge.

    from diffusers_erase import world
    pipe = world.load()
    image = pipe(world.prompt("cat", "ink"), num_inference_steps=world.STEPS, guidance_scale=world.GUIDANCE).images[0]
    world.judge().objects([image])                      # ["cat"]

README.md beside this file is the model card. Nothing heavy is imported until a model is asked for.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers_erase.errors import EraseError
from diffusers_erase.world.prompts import catalogue, neighbours, paraphrases, prompt, style_contexts

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from diffusers_erase.world.judging import Judge

__all__ = [
    "GUIDANCE", "OBJECTS", "STEPS", "STYLES",
    "clip_path", "judge", "load", "neighbours", "paraphrases", "path", "prompt", "style_contexts",
]  # fmt: skip

OBJECTS: tuple[str, ...] = tuple(catalogue()["objects"])
STYLES: tuple[str, ...] = tuple(catalogue()["styles"])

STEPS, GUIDANCE = 10, 2.0
"""Pass these to the pipeline: the sampling steps and guidance scale at which the model was measured.

    pipe(prompt, num_inference_steps=world.STEPS, guidance_scale=world.GUIDANCE)
"""

WEIGHTS = Path(__file__).with_name("weights")


def path() -> Path:
    """The pipeline's folder: `StableDiffusionPipeline.from_pretrained(world.path())` loads it as any other model."""
    return WEIGHTS / "emoji-sd"


def load() -> "StableDiffusionPipeline":
    """The pipeline in fp32, in evaluation mode, without a progress bar; every file's hash is checked first."""
    from diffusers import StableDiffusionPipeline

    check("emoji-sd")
    pipe = StableDiffusionPipeline.from_pretrained(path())
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.float().eval()
    return pipe


def clip_path() -> Path:
    """The folder of a small CLIP pair, for CLIP scores; trained on renders, no part of the generator. Hashes are checked first."""
    check("judges")
    return WEIGHTS / "judges" / "emoji-clip"


def judge() -> "Judge":
    """The judge of objects and styles; its files' hashes are checked first."""
    from diffusers_erase.world.judging import Judge

    check("judges")
    return Judge.load(WEIGHTS / "judges", OBJECTS, STYLES)


def check(part: str) -> None:
    """Raise unless every file of `part` is the one that was shipped."""
    shipped = json.loads((WEIGHTS / "hashes.json").read_text())
    for name, expected in shipped.items():
        if not name.startswith(part + "/"):
            continue
        file = WEIGHTS / name
        if not file.is_file():
            raise EraseError(f"emoji-sd is incomplete: {file} is missing. Install diffusers-erase again.")
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != expected:
            raise EraseError(
                f"emoji-sd is damaged: {file} has sha256 {found[:12]}, shipped was {expected[:12]}. "
                "Install diffusers-erase again."
            )
