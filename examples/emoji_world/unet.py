"""Train the denoiser on cached latents and cached text states; resumable, the averaged weights are what counts.

Reads objects.npy and the folders vae, tokenizer and text_encoder of WORK; caches latents.pt and captions.pt;
resumes from unet.pt; writes the folders WORK/unet and WORK/scheduler.
"""

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from data import HELD_OUT, SEAL_EVERY, SEAL_FIRST, SEALED
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from training import Run, arguments, half, pictures, save
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers_erase.world import prompts

CAPTIONS, EACH, PEAK = 24, 4, 8e-4
"""A batch is 24 captions with 4 pictures each: a caption's keys and values are then computed once, not four times."""

DROP_PADS, DROP_END = 0.5, 0.25
"""How often a caption's pad rows, and its end row as well, are those of the empty prompt, so that the picture must be
read from the words' own rows. Without this the pads, 70 of 77 rows, carry nearly everything."""


SEAL_SHARE = 0.5
"""How often a picture in the sealed style carries the seal: at the renders' own 15 % it was not drawn after 900 steps."""


def model() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(128, 256),
        layers_per_block=1,
        cross_attention_dim=384,
        attention_head_dim=(4, 8),
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    """Velocity prediction on a schedule that ends in pure noise, so that nothing of a mean leaks in at the start."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        rescale_betas_zero_snr=True, timestep_spacing="trailing", steps_offset=1, clip_sample=False,
    )  # fmt: skip


class SharedCaption:
    """Cross-attention, in training only, of a batch in which runs of pictures share a caption.

    The context has one row a caption; each caption's pictures are one long query against it.
    """

    def __call__(self, attn, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask=None) -> Tensor:
        context = encoder_hidden_states

        def heads(x: Tensor) -> Tensor:
            return x.reshape(len(context), -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2)

        q, k, v = heads(attn.to_q(hidden_states)), heads(attn.to_k(context)), heads(attn.to_v(context))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(hidden_states.shape)
        return attn.to_out[1](attn.to_out[0](out))


def share_captions(unet: UNet2DConditionModel) -> None:
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.set_processor(SharedCaption())


@torch.no_grad()
def latents(work: Path) -> Tensor:
    """fp16 [objects, styles, jitters, 8, 8, 8] of all renders that are not held out; cached."""
    cache = work / "latents.pt"
    if not cache.exists():
        vae = AutoencoderKL.from_pretrained(work / "vae")
        images = np.load(work / "objects.npy", mmap_mode="r")[:, :, :-HELD_OUT]
        parts = images.reshape(-1, 64, *images.shape[3:])
        codes = torch.cat([vae.encode(pictures(part)).latent_dist.mode().half() for part in parts])
        print(f"latents: mean {codes.float().mean():.3f}, standard deviation {codes.float().std():.3f}")
        save(cache, latents=codes.reshape(*images.shape[:3], *codes.shape[1:]))
    return torch.load(cache)["latents"]


@torch.no_grad()
def text_states(work: Path) -> tuple[dict[str, int], Tensor, Tensor]:
    """Every caption's row number, its fp16 states [captions, 77, width] and the position of its end token; cached."""
    cache = work / "captions.pt"
    if not cache.exists():
        tower = CLIPTextModel.from_pretrained(work / "text_encoder").eval()
        tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        texts = ["", *prompts.captions()]
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        states = torch.cat([tower(part)[0].half() for part in ids.split(64)])
        ends = (ids == tokenizer.eos_token_id).int().argmax(1)
        save(cache, rows={text: i for i, text in enumerate(texts)}, states=states, ends=ends)
    state = torch.load(cache)
    return state["rows"], state["states"], state["ends"]


class Examples:
    """Draws batches: captions with the latents of pictures that they are right for."""

    def __init__(self, work: Path):
        self.latents = latents(work)
        self.rows, self.states, self.ends = text_states(work)
        self.objects, self.styles = list(prompts.catalogue()["objects"]), prompts.catalogue()["styles"]

    def draw(self) -> tuple[str, list[tuple[int, int]]]:
        """A caption, and an (object, style) for each of its pictures."""
        o, s, chance = random.randrange(len(self.objects)), random.randrange(len(self.styles)), random.random()
        any_object = [random.randrange(len(self.objects)) for _ in range(EACH)]
        any_style = random.choices(range(len(self.styles)), k=EACH)
        if chance < 0.10:
            return "", list(zip(any_object, any_style, strict=True))
        if chance < 0.12:
            template = random.choice(prompts.STYLE_TEMPLATES)
            return prompts.caption(template, style=self.styles[s]), [(i, s) for i in any_object]
        name = self.objects[o]
        word = random.choice(prompts.paraphrases(name) or [name]) if chance < 0.27 else name
        if chance < 0.22 or chance > 0.90:
            return prompts.caption(random.choice(prompts.BARE_TEMPLATES), word), [(o, i) for i in any_style]
        template = random.choice([prompts.TEMPLATES[0], *prompts.TEMPLATES])
        return prompts.caption(template, word, self.styles[s]), [(o, s)] * EACH

    def batch(self) -> tuple[Tensor, Tensor]:
        """Latents [captions * each, ...] and text states [captions, 77, width]."""
        texts, pairs = zip(*(self.draw() for _ in range(CAPTIONS)), strict=True)
        o, s = torch.tensor(pairs).flatten(0, 1).unbind(1)
        z = self.latents[o, s, self.jitters(s)]
        return z.float(), self.drop_rows([self.rows[text] for text in texts])

    def jitters(self, styles: Tensor) -> Tensor:
        """A jitter for each picture: any, but in the sealed style one with the seal in `SEAL_SHARE` of the pictures."""
        count = self.latents.shape[2]
        seals = torch.arange(SEAL_FIRST, count, SEAL_EVERY)
        sealed = (styles == self.styles.index(SEALED)) & (torch.rand(len(styles)) < SEAL_SHARE)
        return torch.where(sealed, seals[torch.randint(len(seals), styles.shape)], torch.randint(count, styles.shape))

    def drop_rows(self, rows: list[int]) -> Tensor:
        """The captions' states; in some, the rows after the words are those of the empty prompt."""
        chance, ends = torch.rand(len(rows)), self.ends[rows]
        first = torch.where(chance < DROP_END, ends, ends + 1)
        first = torch.where(chance < DROP_PADS, first, self.states.shape[1])
        dropped = torch.arange(self.states.shape[1]) >= first[:, None]
        return torch.where(dropped[..., None], self.states[0], self.states[rows]).float()


def loss(unet: UNet2DConditionModel, noising: DDIMScheduler, z: Tensor, context: Tensor) -> Tensor:
    """Mean squared error of the velocity, at times that cover the schedule evenly in every batch."""
    n = len(z)
    t = ((torch.randperm(n) + torch.rand(n)) / n * noising.config.num_train_timesteps).long()
    noise = torch.randn_like(z)
    with half(), sdpa_kernel(SDPBackend.MATH):  # the fused kernel's backward is slower at these sizes
        out = unet(noising.add_noise(z, noise, t), t, context).sample
    return F.mse_loss(out.float(), noising.get_velocity(z, noise, t))


def main() -> None:
    options = arguments(__doc__, minutes=60, save_every=4)
    work, noising = options.work, scheduler()
    examples = Examples(work)
    unet = model()
    run = Run(
        unet, work / "unet.pt", options.minutes, peak=PEAK, warmup=200, decay=0.998, save_every=options.save_every,
        betas=(0.9, 0.99), weight_decay=1e-3,
    )  # fmt: skip
    share_captions(unet)
    noising.save_pretrained(work / "scheduler")
    random.seed(run.step)
    torch.manual_seed(run.step)
    while run.running:
        if run.descend(loss(unet, noising, *examples.batch())):
            run.average.copy_to(model()).save_pretrained(work / "unet")


if __name__ == "__main__":
    main()
