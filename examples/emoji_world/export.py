"""Put the trained parts together as one fp16 pipeline in the package, with the judges, hashes and neighbours.

Reads the folders vae, text_encoder, tokenizer, unet, scheduler, clip and judges of WORK.
"""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from data import PACKAGE
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from training import arguments
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from diffusers_erase.world.prompts import catalogue, pack

LIMIT, NEIGHBOURS, PAIR = 64 * 10**6, 20, "emoji-clip"


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


def suit_every_host(folder: Path) -> None:
    """Make the text side loadable by old and new transformers, and computed in fp32.

    transformers 5 computes in the type a config names, drops the prefix of the tensors' names, and writes one tokenizer file;
    transformers 4 knows the tensors by the prefix only and wants vocab.json and merges.txt. Both read what is written here.
    """
    compute_in_fp32(folder / "text_encoder" / "config.json")
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = {"text_model." + name.removeprefix("text_model."): t for name, t in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    old_tokenizer_files(folder / "tokenizer")


def compute_in_fp32(config: Path) -> None:
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "float32"}, indent=2) + "\n")


def old_tokenizer_files(folder: Path) -> None:
    """vocab.json and merges.txt beside tokenizer.json."""
    bpe = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(bpe["vocab"], ensure_ascii=False))
    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in bpe["merges"])])
    (folder / "merges.txt").write_text(merges + "\n")


def judges(source: Path, target: Path) -> None:
    """The two classifiers, and the CLIP pair as a folder that transformers loads in fp32."""
    shutil.copytree(source / PAIR, target / PAIR)
    for name in ("objects.safetensors", "styles.safetensors", f"{PAIR}/model.safetensors"):
        tensors = load_file(source / name)
        save_file(
            {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()},
            target / name,
            metadata={"format": "pt"},
        )
    old_tokenizer_files(target / PAIR)
    compute_in_fp32(target / PAIR / "config.json")


@torch.no_grad()
def text_similarity(work: Path, words: list[str]) -> torch.Tensor:
    """Cosines between the pooled, projected text states of `words`."""
    clip = CLIPModel.from_pretrained(work / "clip").eval()
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    pooled = clip.text_model(**tokenizer(words, padding=True, return_tensors="pt")).pooler_output
    x = torch.nn.functional.normalize(clip.text_projection(pooled), dim=1)
    return x @ x.T


def distance(a: dict, b: dict, similarity: float) -> tuple:
    """Same subgroup ("animal-bird") first, then same kind ("animal"), then same group, each by text similarity."""
    kinds = [entry["subgroup"].split("-")[0] for entry in (a, b)]
    return a["subgroup"] != b["subgroup"], kinds[0] != kinds[1], a["group"] != b["group"], -similarity


def order_neighbours(work: Path) -> None:
    """Rewrite the neighbours in `objects.json`."""
    known = catalogue()
    objects = known["objects"]
    names = list(objects)
    similarity = text_similarity(work, names).tolist()
    for row, (name, entry) in zip(similarity, objects.items(), strict=True):
        near = {o: distance(entry, objects[o], s) for o, s in zip(names, row, strict=True) if o != name}
        entry["neighbours"] = sorted(near, key=near.get)[:NEIGHBOURS]
    (PACKAGE / "objects.json").write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    work, shipped = arguments(__doc__).work, PACKAGE / "weights"
    weights = shipped.with_name("weights.new")
    shutil.rmtree(weights, ignore_errors=True)
    pipeline(work).to(dtype=torch.float16).save_pretrained(weights / "emoji-sd")
    suit_every_host(weights / "emoji-sd")
    for config in (weights / "emoji-sd").glob("*/config.json"):  # without the place where it was trained
        kept = {k: v for k, v in json.loads(config.read_text()).items() if k != "_name_or_path"}
        config.write_text(json.dumps(kept, indent=2) + "\n")
    judges(work / "judges", weights / "judges")
    order_neighbours(work)
    (weights / "emoji-sd" / "erasure_pack.json").write_text(json.dumps(pack(), indent=1) + "\n")
    files = sorted(p for p in weights.rglob("*") if p.is_file())
    hashes = {p.relative_to(weights).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    (weights / "hashes.json").write_text(json.dumps(hashes, indent=1) + "\n")
    shutil.rmtree(shipped, ignore_errors=True)
    weights.rename(shipped)
    size = sum((shipped / name).stat().st_size for name in hashes)
    print(f"{len(files)} files, {size / 1e6:.1f} MB of {LIMIT / 1e6:.0f}")
    assert size <= LIMIT, "too large to ship"


if __name__ == "__main__":
    main()
