"""Train a small CLIP pair for CLIP scores. It sees renders only, and nothing of it is used to make emoji-sd.

Reads emoji.npy and emoji.json of WORK and WORK/tokenizer, resumes from clip_pair.pt, writes the folder WORK/judges/emoji-clip.
"""

import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from judges import spoil, unit
from text import WINDOW, Captions, tokens
from torch import Tensor
from training import Run, arguments, half
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from diffusers_erase.world import prompts

BATCH, PEAK, OURS = 160, 1.5e-3, 0.5


def model(tokenizer: CLIPTokenizer) -> CLIPModel:
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": WINDOW, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "image_size": 64, "patch_size": 16, "hidden_size": 112, "intermediate_size": 448, "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))


def spaces(clip: CLIPModel, ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows of texts and of pictures in [0, 1]."""
    text = clip.text_projection(clip.text_model(ids).pooler_output)
    seen = clip.visual_projection(clip.vision_model(2 * x - 1).pooler_output)
    return F.normalize(text.float(), dim=1), F.normalize(seen.float(), dim=1)


def loss(clip: CLIPModel, ids: Tensor, x: Tensor, right: Tensor) -> Tensor:
    """Contrast within the batch, both ways; what a caption is right for shares its probability."""
    with half():
        text, seen = spaces(clip, ids, x)
    logits = clip.logit_scale.exp().clamp(max=100) * text @ seen.T
    ways = ((logits, right), (logits.T, right.T))
    return -sum((r / r.sum(1, keepdim=True) * way.log_softmax(1)).sum(1).mean() for way, r in ways) / 2


@torch.no_grad()
def zero_shot(clip: CLIPModel, tokenizer: CLIPTokenizer, work: Path) -> float:
    """Of held-out renders of every object and style, the share whose nearest of all 256 captions is its own."""
    pictures = unit(np.load(work / "objects.npy", mmap_mode="r")[:, :, -1].reshape(-1, 64, 64, 3))
    known = prompts.catalogue()
    texts = [prompts.prompt(o, s) for o in known["objects"] for s in known["styles"]]
    text, seen = spaces(clip, tokens(tokenizer, texts), pictures)
    return ((seen @ text.T).argmax(1) == torch.arange(len(texts))).float().mean().item()


def main() -> None:
    options = arguments(__doc__, minutes=10)
    work = options.work
    entries = json.loads((work / "emoji.json").read_text())
    images, source = np.load(work / "emoji.npy", mmap_mode="r"), Captions(entries)
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    clip = model(tokenizer)
    run = Run(clip, work / "clip_pair.pt", options.minutes, peak=PEAK, warmup=100, decay=0.99, weight_decay=0.05)
    ours = [i for i, entry in enumerate(entries) if entry["object"]]
    random.seed(run.step)
    while run.running:
        renders = random.sample(range(len(entries)), int(BATCH * (1 - OURS))) + random.sample(ours, int(BATCH * OURS))
        texts, right = source.batch(renders)
        x = spoil(unit(images[renders, random.randrange(images.shape[1])]))
        run.descend(loss(clip, tokens(tokenizer, texts), x, right[:, renders]))
    run.average.copy_to(clip).eval()
    print(
        f"{run.step} steps; held-out renders whose own caption of 256 is the nearest: {zero_shot(clip, tokenizer, work):.1%}"
    )
    folder = work / "judges" / "emoji-clip"
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size=64, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
    ).save_pretrained(folder)


if __name__ == "__main__":
    main()
