"""Train the text side: a byte-level BPE tokenizer, and a CLIP text tower by contrast with a small vision tower.

Reads emoji.npy and emoji.json of WORK, resumes from clip.pt, writes the folders WORK/tokenizer, WORK/text_encoder
(frozen from here on) and WORK/clip (both towers).
"""

import json
import random
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from training import Clock, arguments, descend, half, pictures, save
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from diffusers_erase.world.prompts import BARE_TEMPLATES, STYLE_TEMPLATES, TEMPLATES, caption, captions

VOCABULARY, WINDOW = 4096, 77
BATCH, PEAK, LONGEST = 128, 8e-4, 14


def train_tokenizer(work: Path, entries: list[dict]) -> CLIPTokenizer:
    """A CLIP tokenizer with every byte (so any text has tokens); its frequent words are one token each."""
    texts = captions() * 2 + [name for entry in entries for name in names(entry)]
    texts += Path(__file__).with_name("english.txt").read_text().splitlines() * 3
    plain = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = plain.normalizer, plain.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    learned = json.loads(bpe.to_str())["model"]
    tokens = dict.fromkeys([*alphabet, *(letter + "</w>" for letter in alphabet), *learned["vocab"]])
    tokens = [*tokens, "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        {token: i for i, token in enumerate(tokens)}, [tuple(m) for m in learned["merges"]], model_max_length=WINDOW
    )
    tokenizer.save_pretrained(work / "tokenizer")
    return tokenizer


def names(entry: dict) -> list[str]:
    """What an emoji may be called: our name, label, tags."""
    return list(dict.fromkeys([*([entry["object"]] if entry["object"] else []), entry["label"], *entry["tags"]]))


def kinds(entry: dict) -> list[str]:
    """What an emoji is: its subgroup's words and its group's, such as "animal mammal", "mammal", "food drink"."""
    subgroup = entry["subgroup"].split("-")
    return [" ".join(subgroup), subgroup[-1], entry["group"].replace("-", " ")]


class Captions:
    """Draws captions for renders, and knows every render that a caption is right for."""

    def __init__(self, entries: list[dict]):
        self.entries = entries
        self.ids: dict[str, int] = {}
        owned = [{self.ids.setdefault(w, len(self.ids)) for w in names(e) + kinds(e)} for e in entries]
        self.owns = torch.zeros(len(entries), len(self.ids) + 1, dtype=torch.bool)
        for row, words in zip(self.owns, owned, strict=True):
            row[list(words)] = True
        self.owns[:, -1] = True  # the last column is "no name": a style alone
        self.styles = sorted({e["style"] for e in entries})
        self.style = torch.tensor([self.styles.index(e["style"]) for e in entries])

    def draw(self, render: int) -> tuple[str, int, int]:
        """A caption, the id of its name and of its style (-1: none)."""
        entry, chance = self.entries[render], random.random()
        style = self.styles.index(entry["style"])
        if chance < 0.03:
            return caption(random.choice(STYLE_TEMPLATES), style=entry["style"]), self.owns.shape[1] - 1, style
        options = names(entry)
        word = random.choice(kinds(entry)) if chance < 0.25 else random.choice([options[0], *options])
        if random.random() < 0.5:
            return caption(random.choice(BARE_TEMPLATES), word), self.ids[word], -1
        return caption(random.choice(TEMPLATES), word, entry["style"]), self.ids[word], style

    def batch(self, renders: list[int]) -> tuple[list[str], Tensor]:
        """A caption for each render, and which renders [caption, render] each is right for."""
        texts, words, styles = zip(*map(self.draw, renders), strict=True)
        styles = torch.tensor(styles)[:, None]
        right = self.owns[renders][:, list(words)].T & ((styles < 0) | (styles == self.style[renders]))
        return list(texts), right.float()


def model(tokenizer: CLIPTokenizer) -> CLIPModel:
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 4,
        "num_attention_heads": 6, "max_position_embeddings": WINDOW, "projection_dim": 256,
        # without these the pooled row is row 0 for every prompt, and contrast learns nothing
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {
        "image_size": 64, "patch_size": 16, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3,
        "num_attention_heads": 4, "projection_dim": 256,
    }  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=256))


def tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Ids cut after the longest caption and two pads: the tower is causal, so rows before are those of 77 positions."""
    ids = tokenizer(texts, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt").input_ids
    return torch.cat([ids, ids.new_full((len(ids), 2), tokenizer.pad_token_id)], 1)


def loss(clip: CLIPModel, ids: Tensor, images: Tensor, right: Tensor) -> Tensor:
    """Symmetric contrastive loss; where several renders are right for a caption they share its target."""
    with half():
        out = clip(input_ids=ids, pixel_values=images)
    logits = clip.logit_scale.exp().clamp(max=100) * out.text_embeds.float() @ out.image_embeds.float().T

    def cross(scores: Tensor, target: Tensor) -> Tensor:
        return -(target / target.sum(1, keepdim=True) * scores.log_softmax(1)).sum(1).mean()

    return cross(logits, right) + cross(logits.T, right.T)


def main() -> None:
    options = arguments(__doc__, minutes=18)
    work, checkpoint = options.work, options.work / "clip.pt"
    random.seed(0)
    entries = json.loads((work / "emoji.json").read_text())
    images = np.load(work / "emoji.npy", mmap_mode="r")
    tokenizer, source = train_tokenizer(work, entries), Captions(entries)
    clip, step, spent, recent = model(tokenizer), 0, 0.0, []
    optimizer = torch.optim.AdamW(clip.parameters(), lr=PEAK, weight_decay=0.05)
    if checkpoint.exists():
        state = torch.load(checkpoint)
        clip.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    clock, ours = Clock(options.minutes, spent, warmup=50), [i for i, e in enumerate(entries) if e["object"]]
    while clock.running:
        renders = random.sample(range(len(entries)), BATCH * 3 // 4)
        renders += random.sample(sorted(set(ours) - set(renders)), BATCH - len(renders))
        texts, right = source.batch(renders)
        x = pictures(images[renders, random.randrange(images.shape[1])])
        total = loss(clip, tokens(tokenizer, texts), x, right)
        descend(optimizer, total, clock.rate(step), PEAK)
        recent.append(total.item())
        step += 1
        if step % 25 == 0:
            print(f"step {step}  {clock.spent:.1f} min  loss {np.mean(recent):.3f}", flush=True)
            recent.clear()
        if step % 200 == 0 or not clock.running:
            save(checkpoint, model=clip.state_dict(), optimizer=optimizer.state_dict(), step=step, spent=clock.spent)
    clip.eval().save_pretrained(work / "clip")
    clip.text_model.save_pretrained(work / "text_encoder")
    print(f"{step} steps; text tower written")


if __name__ == "__main__":
    main()
