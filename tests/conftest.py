"""Tiny pipelines of the real classes, seeded: seconds to build, no weights from anywhere."""

import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

VOCABULARY = (
    "a an the of in on by and two photo picture image drawing painting art style close up close-up white background landscape cat dog wolf "
    "church temple castle boat ship car red blue old man woman tree flower apple pear snoopy van gogh monet picasso street night house sea "
    "oil walking beach bowl fruit table people park robot"
).split()
"""Words that the tiny tokenizer knows whole; other words fall into characters, other scripts into unknowns."""


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory):
    os.environ["DIFFUSERS_ERASE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def make_tokenizer(folder):
    from transformers import CLIPTokenizer

    letters = sorted({c for word in VOCABULARY for c in word} | set("abcdefghijklmnopqrstuvwxyz0123456789-,&"))
    tokens = [*letters, *(f"{c}</w>" for c in letters)]
    merges = []
    for word in dict.fromkeys(VOCABULARY):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts[:2] = ["".join(parts[:2])]
            tokens.append(parts[0])
    merges = list(dict.fromkeys(merges))
    vocabulary = {t: i for i, t in enumerate(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges))
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


def make_unet(width, seed=0, **changes):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    sizes = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
    }
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(
        **(sizes | blocks | {"cross_attention_dim": width, "attention_head_dim": 8, "norm_num_groups": 8} | changes)
    ).eval()


def text_config(tokenizer, width, act="quick_gelu", **more):
    from transformers import CLIPTextConfig

    vocabulary = len(tokenizer)
    return CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1, pad_token_id=vocabulary - 1,
        hidden_act=act, **more,
    )  # fmt: skip


def spread(encoder):
    """Initial weights are so small that all states are alike: spread them as training does."""
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if "embedding" in name:
                parameter.mul_(25)
            elif parameter.ndim == 2:
                parameter.mul_(4)
    return encoder.eval()


def make_vae():
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, sample_size=16, norm_num_groups=8,
    ).eval()  # fmt: skip


def make_pipe(tokenizer, width=32, seed=0, family="sd1"):
    """A StableDiffusionPipeline of SD 1.x's shape, or with `family="sd2"` of SD 2.x's (linear projections, per-level heads)."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    torch.manual_seed(seed)
    encoder = spread(CLIPTextModel(text_config(tokenizer, width, "quick_gelu" if family == "sd1" else "gelu")))
    vae = make_vae()
    changes = {"use_linear_projection": True, "attention_head_dim": (4, 8)} if family == "sd2" else {}
    unet = make_unet(width, seed, **changes)
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=encoder, tokenizer=tokenizer, unet=unet, scheduler=DDIMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_sdxl(tokenizer, tokenizer_2, seed=0, refiner=False, widths=(32, 48)):
    """A StableDiffusionXLPipeline: two encoders side by side, pooled text, time ids. With `refiner` its second stage: one encoder."""
    from diffusers import DDIMScheduler, StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    first, second = widths
    parts = {
        "text_encoder_2": spread(CLIPTextModelWithProjection(text_config(tokenizer_2, second, "gelu", projection_dim=second))),
        "text_encoder": None if refiner else spread(CLIPTextModel(text_config(tokenizer, first))),
        "vae": make_vae(),
    }  # fmt: skip
    unet = make_unet(
        second if refiner else first + second, seed, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=second + 8 * (5 if refiner else 6), use_linear_projection=True, attention_head_dim=(4, 8),
    )  # fmt: skip
    pipe = (StableDiffusionXLImg2ImgPipeline if refiner else StableDiffusionXLPipeline)(
        **parts, unet=unet, tokenizer=None if refiner else tokenizer, tokenizer_2=tokenizer_2, scheduler=DDIMScheduler(),
        add_watermarker=False, **({"requires_aesthetics_score": True} if refiner else {}),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def tokenizer_2(tmp_path_factory):
    """SDXL's second tokenizer pads with another token."""
    tokenizer = make_tokenizer(tmp_path_factory.mktemp("tokenizer_2"))
    tokenizer.pad_token = ","
    return tokenizer


@pytest.fixture
def sdxl(tokenizer, tokenizer_2):
    return make_sdxl(tokenizer, tokenizer_2)


@pytest.fixture(params=["sd1", "sd2"])
def pipe(request, tokenizer):
    """A fresh tiny pipeline of each family."""
    return make_pipe(tokenizer, family=request.param)


@pytest.fixture
def sd1(tokenizer):
    return make_pipe(tokenizer)


def sample(pipe, prompt="a photo of a cat", seed=0, steps=2, **kwargs):
    """Latents of one seeded run, `[1, 4, 8, 8]`."""
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        prompt, num_inference_steps=steps, generator=generator, output_type="latent", height=16, width=16, **kwargs
    ).images


def bits(module):
    """A copy of every weight, to compare with torch.equal."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same_bits(module, before):
    now = module.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)
