"""What the tests of the attaching half share: adapters made once, one seeded forward pass, and the edit applied by hand."""

import torch
from conftest import bits

from diffusers_erase import erase

ASKED = {
    "cat": {"concept": "cat", "target": "tree"},
    "gogh": {"concept": "van gogh", "target": "null", "tokens": "name+eot"},
    "ship": {"concept": "ship", "target": "boat", "preserve": ["car"], "coreferences": ["sea ship"]},
    "pair": {"concept": ["snoopy", "robot"], "target": "null"},
    "mild": {"concept": "castle", "target": "house", "residual": 0.3},
    "gated": {"concept": "monet", "target": "old man", "gate": 0.7},
    "robot": {"concept": "robot", "target": "boat"},
    "car": {"concept": "car", "target": "street"},
    "uce": {"concept": "cat", "target": "tree", "method": "uce"},
}
MADE = {}

AGREE = 1e-5
"""Share of the output's standard deviation by which two forms may differ: float32 rounding in a forward pass, the issue's bar."""


def adapter(pipe, name):
    """The adapter of ASKED for the encoder of `pipe`, made once: encoders are seeded."""
    config = pipe.text_encoder.config
    key = (config.hidden_act, config.hidden_size, name)
    if key not in MADE:
        MADE[key] = erase(pipe, **ASKED[name])
    return MADE[key]


PROMPTS = ("a photo of a cat on a boat", "a painting by van gogh", "a ship in the sea and a snoopy", "")


def states(pipe, prompts=PROMPTS):
    """Text states `[n, 77, d]` of some prompts, as the pipeline's own encoder gives them: never mapped."""
    with torch.no_grad():
        return pipe.encode_prompt(list(prompts), "cpu", 1, False)[0]


def noise(n=4):
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(7))


def forward(pipe, text=None, unet=None, **kwargs):
    """One pass of the denoiser on fixed inputs, `[n, 4, 8, 8]`."""
    text = states(pipe) if text is None else text
    with torch.no_grad():
        return (unet or pipe.unet)(noise(len(text)), 500, encoder_hidden_states=text, **kwargs).sample


def solved(*edits):
    """(A, D) of all rows together in float64, written from design §2: A = (diag(1/s) + C Uᵀ)⁻¹ U."""
    C, D, U, s = (
        torch.cat([getattr(e, name) for e in edits]).double() for name in ("keys", "offsets", "pulled", "strengths")
    )
    return torch.linalg.inv(torch.diag(1 / s) + C @ U.T) @ U, D


def by_hand(text, *edits):
    """e + (e Aᵀ) D in float64, cast back once."""
    A, D = solved(*edits)
    return (text.double() + text.double() @ A.T @ D).to(text.dtype)


def patched_by_hand(unet, *edits):
    """{name: W(I + DᵀA)} for every weight that reads text, whatever wraps it."""
    A, D = solved(*edits)
    found = {}
    for name, weight in unet.named_parameters():
        if (".attn2.to_k" in name or ".attn2.to_v" in name) and "lora_" not in name:
            found[name] = (weight.double() + weight.double() @ D.T @ A).to(weight.dtype)
    return found


def error(found, expected):
    """Largest error over the standard deviation of what was expected."""
    return float((found - expected).abs().max() / expected.std())


def style_lora(unet, seed=3, scale=0.3, only=""):
    """A stock LoRA as diffusers saves it, over self- and cross-attention: it touches the very layers that read text."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for path, module in unet.named_modules():
        if path.rsplit(".", 1)[-1] in ("to_q", "to_k", "to_v") and only in path:
            out, into = module.weight.shape
            state[f"unet.{path}.lora_A.weight"] = torch.randn(2, into, generator=generator) * scale
            state[f"unet.{path}.lora_B.weight"] = torch.randn(out, 2, generator=generator) * scale
    return state


def look(module):
    """Everything by which a module could tell that something is or was attached to it."""
    return (
        sorted(vars(module)),
        len(module._forward_pre_hooks),
        len(module._forward_pre_hooks_with_kwargs),
        len(module._forward_hooks),
        sorted(n for n, _ in module.named_modules()),
    )


def all_bits(pipe):
    """Every weight of every component."""
    return {name: bits(part) for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
