"""Train the text side: a byte-level BPE tokenizer, and a CLIP text tower together with a small vision tower.

Both towers are trained by contrast over *all* renders at once, not over a batch: a render's place in the common space is the sum
of a vector of its emoji and one of its style, captions and pictures must each find the renders that they are right for.

Reads emoji.npy and emoji.json of WORK, resumes from clip.pt, writes the folders WORK/tokenizer, WORK/text_encoder
(frozen from here on) and WORK/clip (both towers).
"""

import json
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from training import Run, arguments, half, pictures
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from diffusers_erase.world.prompts import BARE_TEMPLATES, STYLE_TEMPLATES, TEMPLATES, caption, captions

VOCABULARY, WINDOW = 4096, 77
TEXTS, IMAGES, PEAK, LONGEST = 256, 96, 1e-3, 14


def train_tokenizer(work: Path, entries: list[dict]) -> CLIPTokenizer:
    """A CLIP tokenizer with every byte (so any text has tokens); its frequent words are one token each.

    Made once: ties between merges fall differently in another run, and a tower that resumes would read other ids.
    """
    if (work / "tokenizer").exists():
        return CLIPTokenizer.from_pretrained(work / "tokenizer")
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
        """A caption for each render, and which of all renders [caption, render] it is right for."""
        texts, words, styles = zip(*map(self.draw, renders), strict=True)
        styles = torch.tensor(styles)[:, None]
        right = self.owns[:, list(words)].T & ((styles < 0) | (styles == self.style))
        return list(texts), right.float()


class Places(nn.Module):
    """Where each render lies in the common space: its emoji's own vector plus those of what it is, its tags and its style.

    The vectors are fixed and nearly orthogonal, so that emoji that share a subgroup or tags are near each other by construction,
    and both towers learn that. Trained, the vectors of siblings drift apart: contrast separates what it can (the nearest object
    was in the same subgroup for 44 % of the objects after 300 steps, for 31 % after 700).
    """

    def __init__(self, entries: list[dict], width: int):
        super().__init__()
        bags = [self.bag(entry) for entry in entries]
        ids = {word: i for i, word in enumerate(dict.fromkeys(word for bag in bags for word in bag))}
        self.words: Tensor
        drawn = torch.randn(len(ids), width, generator=torch.Generator().manual_seed(0)) / width**0.5
        self.register_buffer("words", drawn, persistent=False)
        self.which = torch.tensor([ids[word] for bag in bags for word in bag])
        self.weights = torch.tensor([weight for bag in bags for weight in bag.values()])
        self.starts = torch.tensor([0, *(len(bag) for bag in bags[:-1])]).cumsum(0)

    @staticmethod
    def bag(entry: dict) -> dict[str, float]:
        tags = {f"tag {tag}": 0.6 / len(entry["tags"]) ** 0.5 for tag in entry["tags"]}
        kind = {f"subgroup {entry['subgroup']}": 0.7, f"group {entry['group']}": 0.4}
        return {f"emoji {entry['label']}": 1.0, **kind, **tags, f"style {entry['style']}": 0.4}

    def forward(self) -> Tensor:
        bags = F.embedding_bag(self.which, self.words, self.starts, mode="sum", per_sample_weights=self.weights)
        return F.normalize(bags, dim=1)


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


def loss(clip: CLIPModel, places: Places, ids: Tensor, right: Tensor, images: Tensor, renders: Tensor) -> Tensor:
    """Captions share their probability among the renders they are right for; a picture has one right place."""
    with half():
        text = clip.text_projection(clip.text_model(ids).pooler_output)
        seen = clip.visual_projection(clip.vision_model(images).pooler_output)
    scale, common = clip.logit_scale.exp().clamp(max=50), places()
    by_text = (scale * F.normalize(text.float(), dim=1) @ common.T).log_softmax(1)
    by_image = scale * F.normalize(seen.float(), dim=1) @ common.T
    return -(right / right.sum(1, keepdim=True) * by_text).sum(1).mean() + 0.5 * F.cross_entropy(by_image, renders)


def main() -> None:
    options = arguments(__doc__, minutes=20)
    work = options.work
    random.seed(0)
    entries = json.loads((work / "emoji.json").read_text())
    images = np.load(work / "emoji.npy", mmap_mode="r")
    tokenizer, source = train_tokenizer(work, entries), Captions(entries)
    clip, places = model(tokenizer), Places(entries, 256)
    run = Run(
        nn.ModuleList([clip, places]),
        work / "clip.pt",
        options.minutes,
        peak=PEAK,
        warmup=50,
        tell=25,
        weight_decay=0.02,
    )
    ours = [i for i, entry in enumerate(entries) if entry["object"]]
    while run.running:
        renders = random.choices(range(len(entries)), k=TEXTS * 3 // 4) + random.choices(ours, k=TEXTS // 4)
        texts, right = source.batch(renders)
        shown = random.sample(renders, IMAGES)
        x = pictures(images[shown, random.randrange(images.shape[1])])
        run.descend(loss(clip, places, tokens(tokenizer, texts), right, x, torch.tensor(shown)))
    clip.eval().save_pretrained(work / "clip")
    clip.text_model.save_pretrained(work / "text_encoder")
    print(f"{run.step} steps; text tower written")


if __name__ == "__main__":
    main()
