"""Put the trained parts together as one fp16 pipeline in the package, with the judges, hashes and neighbours.

Reads the folders vae, text_encoder, tokenizer, unet, scheduler, clip and judges of WORK.
"""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from training import arguments
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from data import PACKAGE
from diffusers_erase.world.prompts import catalogue

LIMIT = 64 * 2**20


def pipeline(work: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(work / "unet"),
        scheduler=DDIMScheduler.from_pretrained(work / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def judges(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for name in ("objects.safetensors", "styles.safetensors"):
        tensors = load_file(source / name)
        save_file({k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}, target / name)


@torch.no_grad()
def text_similarity(work: Path, words: list[str]) -> torch.Tensor:
    """Cosines between the pooled, projected text states of `words`."""
    clip = CLIPModel.from_pretrained(work / "clip").eval()
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    pooled = clip.text_model(**tokenizer(words, padding=True, return_tensors="pt")).pooler_output
    x = torch.nn.functional.normalize(clip.text_projection(pooled), dim=1)
    return x @ x.T


def order_neighbours(work: Path) -> None:
    """Rewrite `objects.json`: neighbours by subgroup, then group, then text similarity."""
    known = catalogue()
    objects = known["objects"]
    names = list(objects)
    similarity = dict(zip(names, text_similarity(work, names).tolist(), strict=True))
    for name, entry in objects.items():
        entry["neighbours"] = sorted(
            (other for other in names if other != name),
            key=lambda o: (
                objects[o]["subgroup"] != entry["subgroup"],  # noqa: B023
                objects[o]["group"] != entry["group"],  # noqa: B023
                -similarity[name][names.index(o)],  # noqa: B023
            ),
        )
    (PACKAGE / "objects.json").write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    work, weights = arguments(__doc__).work, PACKAGE / "weights"
    shutil.rmtree(weights, ignore_errors=True)
    pipeline(work).to(dtype=torch.float16).save_pretrained(weights / "emoji-sd")
    judges(work / "judges", weights / "judges")
    order_neighbours(work)
    files = sorted(p for p in weights.rglob("*") if p.is_file())
    hashes = {p.relative_to(weights).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    (weights / "hashes.json").write_text(json.dumps(hashes, indent=1) + "\n")
    size = sum(p.stat().st_size for p in files)
    print(f"{len(files)} files, {size / 2**20:.1f} MiB of {LIMIT / 2**20:.0f}")
    assert size <= LIMIT, "too large to ship"


if __name__ == "__main__":
    main()
