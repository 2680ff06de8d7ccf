"""Where text enters a model: the only file that knows architectures.

A *text reader* is a component of a pipeline that receives prompt embeddings (a UNet, a ControlNet); a *site* is a linear
layer in it that reads them unchanged. The families known here, Stable Diffusion 1.x and 2.x, read the raw embedding in
every `attn2.to_k` and `attn2.to_v` and nowhere else, so one map at the entrance equals an edit of all these layers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import EraseError

TEXT_ARGUMENT = "encoder_hidden_states"
"""Keyword under which text readers receive embeddings `[batch, tokens, d]`."""

ATTRIBUTE = "_diffusers_erase"
"""Where a text reader keeps what is attached to it (see attach.py)."""

TEXT_POSITION = 2
"""Its position where it is not given by keyword: `forward(sample, timestep, encoder_hidden_states, ...)`."""


def text_readers(pipe: Any) -> dict[str, nn.Module]:
    """Every component of `pipe` that reads prompt embeddings, by name: the denoiser, then its ControlNets.

    Raises:
        EraseError: no supported denoiser, or one that receives text by a path which a map of the embeddings cannot see.
    """
    unet = getattr(pipe, "unet", None)
    if unet is None:
        raise EraseError(
            f"{type(pipe).__name__} has no UNet: this version erases in Stable Diffusion 1.x and 2.x pipelines (text read by "
            f"the cross-attention of a UNet); other families are not supported yet"
        )
    readers = {"unet": unet}
    controlnet = getattr(pipe, "controlnet", None)
    nets = getattr(unwrapped(controlnet), "nets", None)
    if nets is not None:
        readers |= {f"controlnet.{i}": net for i, net in enumerate(nets)}
    elif controlnet is not None:
        readers["controlnet"] = controlnet
    for name, reader in readers.items():
        _check_text_paths(name, reader)
    return readers


def unwrapped(module: Any) -> Any:
    """The module behind `torch.compile`'s wrapper; the module itself where there is none."""
    return getattr(module, "_orig_mod", module)


def text_width(reader: nn.Module) -> int:
    """d, the width of the embeddings that `reader` takes."""
    width = unwrapped(reader).config.cross_attention_dim
    return width if isinstance(width, int) else width[0]


def sites(reader: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers `[o, d]` of `reader` that read raw text states, by module path, without PEFT's wrappers.

    Includes the `to_kv` copy that `fuse_qkv_projections` reads instead of `to_k` and `to_v`.
    """
    found = {}
    for path, module in _text_attentions(reader):
        for part in ("to_k", "to_v", "to_kv"):
            linear = getattr(module, part, None)
            if linear is not None and not (part == "to_kv" and not module.fused_projections):
                found[f"{path}.{part}"] = _base_layer(linear)
    if not found:
        raise EraseError(
            f"{type(unwrapped(reader)).__name__} has no cross-attention that reads text: nothing to erase in"
        )
    return found


def fused_pairs(reader: nn.Module) -> list[tuple[nn.Linear, nn.Linear, nn.Linear]]:
    """(to_kv, to_k, to_v) of every cross-attention whose projections the host has fused into a copy, without PEFT's wrappers."""
    fused = [m for _, m in _text_attentions(reader) if m.fused_projections]
    return [(_base_layer(m.to_kv), _base_layer(m.to_k), _base_layer(m.to_v)) for m in fused]


def with_text(args: tuple, kwargs: Mapping[str, Any], mapping: Any) -> tuple[tuple, dict[str, Any]]:
    """The call's arguments with `mapping` applied to the embeddings; the caller's containers are not changed.

    Raises:
        EraseError: the call carries no embeddings where this family expects them, so the erasure could not act.
    """
    if isinstance(kwargs.get(TEXT_ARGUMENT), Tensor):
        return args, {**kwargs, TEXT_ARGUMENT: mapping(kwargs[TEXT_ARGUMENT])}
    if len(args) > TEXT_POSITION and isinstance(args[TEXT_POSITION], Tensor):
        return (*args[:TEXT_POSITION], mapping(args[TEXT_POSITION]), *args[TEXT_POSITION + 1 :]), dict(kwargs)
    raise EraseError(
        f"an erasure is attached, but this call has no tensor {TEXT_ARGUMENT!r} to act on: pass the prompt embeddings by that "
        f"keyword, or disable the erasure"
    )


def feeds_controlnet(kwargs: Mapping[str, Any]) -> bool:
    """Whether this denoiser call carries a ControlNet's residuals (its adapters' kind, T2I, reads no text)."""
    return kwargs.get("mid_block_additional_residual") is not None


def _text_attentions(reader: nn.Module) -> list[tuple[str, Any]]:
    """Path and module of every attention whose keys and values read text, not the picture itself."""
    modules = unwrapped(reader).named_modules()
    return [(path, m) for path, m in modules if hasattr(m, "to_k") and getattr(m, "is_cross_attention", False)]


def _base_layer(linear: Any) -> nn.Linear:
    return getattr(linear, "base_layer", linear)


def _check_text_paths(name: str, reader: nn.Module) -> None:
    config = getattr(unwrapped(reader), "config", None)
    if config is None or getattr(config, "cross_attention_dim", None) is None:
        raise EraseError(
            f"{name} is a {type(unwrapped(reader)).__name__}, which does not read prompt embeddings by cross-attention"
        )
    widths = config.cross_attention_dim
    if not isinstance(widths, int) and len(set(widths)) > 1:
        raise EraseError(
            f"{name} reads text of several widths {tuple(widths)}: expected one; this model is not supported"
        )
    if getattr(config, "addition_embed_type", None) is not None:
        raise EraseError(
            f"{name} also takes pooled text ({config.addition_embed_type}, as SDXL does), by which a concept would survive: "
            f"pooled paths are not supported yet"
        )
    if getattr(config, "class_embed_type", None) is not None:
        raise EraseError(
            f"{name} also takes class embeddings ({config.class_embed_type}, as unCLIP does), by which a concept would survive: "
            f"not supported yet"
        )
    if str(getattr(config, "attention_type", "default")).startswith("gated"):
        raise EraseError(
            f"{name} also reads phrases through gated attention (GLIGEN), by which a concept would survive: not supported yet"
        )
    if getattr(config, "encoder_hid_dim_type", None) not in (None, "ip_image_proj"):
        raise EraseError(f"{name} projects text ({config.encoder_hid_dim_type}) before it reads it: not supported yet")


def check_fusable(reader: nn.Module) -> None:
    """Raise unless every site of `reader` is a plain floating weight that can be written and given back.

    Quantised, packed, meta and fp8 weights lose or refuse small edits; a LoRA that PEFT has merged would be subtracted later
    from weights that it was not added to.
    """
    for path, linear in sites(reader).items():
        if getattr(unwrapped(reader).get_submodule(path), "merged", False):
            raise EraseError(
                f"a LoRA is fused into {path}: call unfuse_lora() before fuse_erasure(), or keep the erasure as a map"
            )
        weight = linear.weight
        plain = type(weight) is nn.Parameter and weight.ndim == 2 and not weight.is_meta
        if not plain or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise EraseError(
                f"{path} holds {type(weight).__name__} {weight.dtype} on {weight.device}: an erasure is fused only into plain floating "
                f"weights; keep it as a map, which works on any"
            )
