"""Where text enters a model: the only file that knows architectures.

A *text reader* is a component of a pipeline that receives prompt embeddings (a UNet, a ControlNet, a transformer). It takes
them in one or two *spaces*: `text`, one state a token, and where a family has it `pooled`, one state a prompt. A *site* is a
linear layer that reads the states of a space unchanged, so one map at the entrance equals an edit of all its sites. A family
is one entry of `FAMILIES`; nothing else here or elsewhere asks which family a model belongs to.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import EraseError

ATTRIBUTE = "_diffusers_erase"
"""Where a text reader keeps what is attached to it (see attach.py)."""

TEXT, POOLED = "text", "pooled"

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Kinds of weights that can be written and given back; fp8 is for keeping only."""

Layer = nn.Linear | nn.Conv2d
"""What weight forms change: a linear layer, or a 1×1 convolution, which is one at every place of a picture."""


class Space(NamedTuple):
    """How the readers of a family take one kind of text state."""

    argument: tuple[str, ...]
    """Keyword of the call; two, where the states lie in a dictionary."""
    position: int | None
    """Its position where it is not given by keyword."""
    width: Callable[[nn.Module], int]
    """d, of a reader."""
    sites: Callable[[nn.Module], Mapping[str, Any]]
    """The linear layers that read it, by module path. Where a layer reads more than the states, they come first."""


@dataclass(frozen=True)
class Family:
    """One architecture: who takes text, under which arguments, into which layers, and who encodes it."""

    name: str
    denoiser: str
    """The pipeline's attribute that holds the denoiser."""
    readers: Callable[[nn.Module], bool]
    """Whether a module belongs to this family."""
    spaces: dict[str, Space]
    encoders: tuple[tuple[str, str], ...]
    """(tokenizer, text encoder) of the pipeline whose states, side by side, are the text space. Those that a pipeline
    leaves empty (an SDXL refiner its first) are passed over."""
    pooled_by: int | None = None
    """Position in `encode_prompt`'s answer of the pooled state; the text states are always the first."""
    encode: tuple[tuple[str, Any], ...] = (("do_classifier_free_guidance", False),)
    """What `encode_prompt` is told beside the prompts."""
    experimental: bool = False
    """Attaching is proven on tiny models and given embeddings only; `erase` does not read this family's text."""


def text_readers(pipe: Any) -> dict[str, nn.Module]:
    """Every component of `pipe` that reads prompt embeddings, by name: the denoiser, then its ControlNets.

    Raises:
        EraseError: no supported denoiser, or one that receives text by a path which a map of the embeddings cannot see.
    """
    names = dict.fromkeys(family.denoiser for family in FAMILIES)
    readers = {name: module for name in names if (module := getattr(pipe, name, None)) is not None}
    if not readers:
        raise EraseError(
            f"{type(pipe).__name__} has no UNet and no transformer: this version erases in pipelines of "
            f"{', '.join(family.name for family in FAMILIES)}; other families are not supported yet"
        )
    controlnet = getattr(pipe, "controlnet", None)
    nets = getattr(unwrapped(controlnet), "nets", None)
    if nets is not None:
        readers |= {f"controlnet.{i}": net for i, net in enumerate(nets)}
    elif controlnet is not None:
        readers["controlnet"] = controlnet
    families = {name: family_of(reader, name) for name, reader in readers.items()}
    first = next(iter(families))
    if other := [name for name in families if families[name] is not families[first]]:
        raise EraseError(
            f"{other[0]} takes text as {families[other[0]].name} does, {first} as {families[first].name}: "
            f"the pipeline's parts do not fit"
        )
    return readers


def family_of(reader: nn.Module, name: str = "the denoiser") -> Family:
    """The family that a text reader belongs to.

    Raises:
        EraseError: none that is known, or the reader takes text by a path which a map of the embeddings cannot see.
    """
    for family in FAMILIES:
        if family.readers(unwrapped(reader)):
            _check_text_paths(name, reader)
            return family
    _check_text_paths(name, reader)
    raise EraseError(
        f"{name} is a {type(unwrapped(reader)).__name__}, which this version does not know: it erases in "
        f"{', '.join(family.name for family in FAMILIES)}"
    )


def holds(pipe: Any, module: nn.Module) -> bool:
    """Whether `module` is a component of `pipe`, or one of its several ControlNets."""
    parts = [unwrapped(part) for part in vars(pipe).values()]
    return any(part is module or any(net is module for net in getattr(part, "nets", ())) for part in parts)


def unwrapped(module: Any) -> Any:
    """The module behind `torch.compile`'s wrapper; the module itself where there is none."""
    return getattr(module, "_orig_mod", module)


def widths(reader: nn.Module) -> dict[str, int]:
    """d of every space of text states that `reader` takes."""
    return {name: space.width(unwrapped(reader)) for name, space in family_of(reader).spaces.items()}


def sites(reader: nn.Module, space: str = TEXT) -> dict[str, nn.Linear]:
    """The linear layers of `reader` that read the raw states of `space`, by module path, without PEFT's wrappers.

    Each is `[o, d]`, or `[o, d + more]` where the layer reads more than the states, which then come first. Includes the
    `to_kv` copy that `fuse_qkv_projections` reads instead of `to_k` and `to_v`.
    """
    found = family_of(reader).spaces[space].sites(unwrapped(reader))
    if not found:
        raise EraseError(
            f"{type(unwrapped(reader)).__name__} has no layer that reads {space} states: nothing to erase in"
        )
    return {path: _base_layer(linear) for path, linear in found.items()}


def fused_pairs(reader: nn.Module) -> list[tuple[nn.Linear, nn.Linear, nn.Linear]]:
    """(to_kv, to_k, to_v) of every cross-attention whose projections the host has fused into a copy, without PEFT's wrappers."""
    fused = [m for _, m in _text_attentions(unwrapped(reader)) if m.fused_projections]
    return [(_base_layer(m.to_kv), _base_layer(m.to_k), _base_layer(m.to_v)) for m in fused]


def with_text(
    spaces: Mapping[str, Space], args: tuple, kwargs: Mapping[str, Any], maps: Mapping[str, Callable[[Tensor], Tensor]]
) -> tuple[tuple, dict[str, Any]]:
    """A call's arguments with the map of each space applied to its states; the caller's containers are not changed.

    Raises:
        EraseError: the call carries no states where this family expects them, so the erasure could not act.
    """
    kwargs = dict(kwargs)
    for name, mapping in maps.items():
        space = spaces[name]
        outer, inner = space.argument[0], space.argument[-1]
        holder = kwargs if len(space.argument) == 1 else kwargs.get(outer)
        if isinstance(holder, Mapping) and isinstance(holder.get(inner), Tensor):
            mapped = mapping(holder[inner])
            kwargs[outer] = mapped if holder is kwargs else {**holder, inner: mapped}
        elif space.position is not None and len(args) > space.position and isinstance(args[space.position], Tensor):
            args = (*args[: space.position], mapping(args[space.position]), *args[space.position + 1 :])
        else:
            raise EraseError(
                f"an erasure is attached, but this call has no tensor {'.'.join(space.argument)!r} to act on: pass the prompt "
                f"embeddings by that keyword, or disable the erasure"
            )
    return args, kwargs


def kohya_name(path: str) -> str:
    """A site's name in kohya's LoRA files; SDXL's added embedding goes by the name that it has in the original checkpoint.

    Raises:
        EraseError: the site is in a transformer, whose layers these files merge and split.
    """
    if "context_embedder" in path or "time_text_embed" in path:
        raise EraseError(
            "kohya's files have other layers for this model: use the LoRA twin of diffusers, to_lora(pipe)"
        )
    return "lora_unet_" + {"add_embedding.linear_1": "label_emb_0_0"}.get(path, path.replace(".", "_"))


def feeds_controlnet(kwargs: Mapping[str, Any]) -> bool:
    """Whether this denoiser call carries a ControlNet's residuals (its adapters' kind, T2I, reads no text)."""
    return any(kwargs.get(name) is not None for name in CONTROL_ARGUMENTS)


def states_of(spaces: Mapping[str, Space], args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """The text states of a call, as it is given them.

    Raises:
        EraseError: see `with_text`.
    """
    found = []
    with_text(spaces, args, kwargs, {TEXT: lambda states: found.append(states) or states})
    return found[0]


def guided_parts(pipe: Any) -> tuple[bool, ...]:
    """How a pipeline lays out its batch in the call that it is in: for each equal part, whether it is conditional.

    Raises:
        EraseError: it cannot be told; it is never inferred from the size of a batch.
    """
    place = next(cls.__module__ for cls in type(pipe).__mro__ if "__call__" in vars(cls))  # who draws
    if (
        not place.startswith(GUIDED)
        or "instruct_pix2pix" in place
        or not hasattr(type(pipe), "do_classifier_free_guidance")
    ):
        raise EraseError(
            f"{type(pipe).__name__} is not known to lay out a guided batch as unconditional, then conditional: rows and halves of "
            f"its batch cannot be told apart; use one set of erasures with branch='both'"
        )
    conditional = (True,) * (2 if getattr(pipe, "do_perturbed_attention_guidance", False) else 1)
    return (False, *conditional) if pipe.do_classifier_free_guidance else conditional


def reads_images(reader: nn.Module) -> bool:
    """Whether an IP-Adapter is loaded, by whose image prompt a concept comes in unseen."""
    return getattr(unwrapped(reader), "encoder_hid_proj", None) is not None


def reads_phrases(reader: nn.Module) -> bool:
    """Whether it has GLIGEN's gated attention, by which a concept that a phrase names comes in unseen."""
    return str(unwrapped(reader).config.get("attention_type", "default")).startswith("gated")


def check_fusable(reader: nn.Module, spaces: Iterable[str] = (TEXT,), paths: Iterable[str] = ()) -> None:
    """Raise unless every site of `reader` in `spaces` and every layer of `paths` is a plain floating weight that can be written
    and given back.

    Quantised, packed, meta and fp8 weights lose or refuse small edits; a LoRA that PEFT has merged would be subtracted later
    from weights that it was not added to; projections that the host has fused into a copy are read no more.
    """
    _check_in_memory(reader)
    named = {path: layer(reader, path) for path in paths}
    for path in named:
        # The flag of an attention stays set when the projections are unfused again; which processor it has tells.
        attention = unwrapped(reader).get_submodule(path.rpartition(".")[0])
        if type(getattr(attention, "processor", None)).__name__.startswith("Fused"):
            raise EraseError(
                f"{path} is not read now, fuse_qkv_projections has made a copy of it: call unfuse_qkv_projections() before this change"
            )
    for path, linear in ({p: lin for space in spaces for p, lin in sites(reader, space).items()} | named).items():
        if getattr(unwrapped(reader).get_submodule(path), "merged", False):
            raise EraseError(
                f"a LoRA is fused into {path}: call unfuse_lora() before fuse_erasure(), or keep the erasure as a map"
            )
        weight = linear.weight
        plain = type(weight) is nn.Parameter and weight.ndim in (2, 4) and not weight.is_meta
        if not plain or weight.dtype not in FLOATING:
            raise EraseError(
                f"{path} holds {type(weight).__name__} {weight.dtype} on {weight.device}: an erasure is fused only into plain floating "
                f"weights; rows may be kept as a map, which works on any"
            )


def _check_in_memory(reader: nn.Module) -> None:
    """Raise where diffusers keeps weights in files between calls: what lies in memory is not read again, and not even right."""
    for path, module in unwrapped(reader).named_modules():
        hooks = getattr(module, "_diffusers_hook", None)
        group = hooks and hooks.get_hook("group_offloading")
        if getattr(getattr(group, "group", None), "offload_to_disk_path", None) is not None:
            raise EraseError(
                f"the weights of {path or 'the model'} are offloaded to disk, and can neither be read nor changed: keep an erasure as a "
                f"map, and name the target of a new one"
            )


def probe_arguments(reader: nn.Module, states: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments for one call of a UNet on fixed noise with these states, `[n, ...]` of each space."""
    unet: Any = unwrapped(reader)
    if family_of(reader).denoiser != "unet":
        raise EraseError(f"{type(unet).__name__} is no UNet: this version does not export its family")
    like, n = next(unet.parameters()), len(states[TEXT])
    noise = torch.randn(n, unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"sample": noise.to(like), "timestep": 500} | text_arguments(reader, states)


def text_arguments(reader: nn.Module, states: Mapping[str, Tensor]) -> dict[str, Any]:
    """How a call of `reader` carries these states, `[n, ...]` of each space, with SDXL's ids of its own picture size."""
    unet: Any = unwrapped(reader)
    like, found = next(unet.parameters()), {}
    for name, space in family_of(reader).spaces.items():
        outer, inner = space.argument[0], space.argument[-1]
        found[outer] = states[name].to(like) if outer == inner else {inner: states[name].to(like)}
    if "added_cond_kwargs" in found:
        _, height, width = (8 * n for n in latent_shape(unet))
        added = unet.config.projection_class_embeddings_input_dim - widths(reader)[POOLED]
        # Size, crop and target size; a refiner reads a score of beauty instead of the last.
        six = added == 6 * unet.config.addition_time_embed_dim
        ids = (height, width, 0, 0, height, width) if six else (height, width, 0, 0, 6)
        found["added_cond_kwargs"]["time_ids"] = like.new_tensor(ids).expand(len(states[TEXT]), -1)
    return found


def latent_shape(unet: Any) -> tuple[int, int, int]:
    """Channels, height and width of the latents that a UNet was made for."""
    size = unet.config.sample_size or 64
    height, width = (size, size) if isinstance(size, int) else size
    return unet.config.in_channels, height, width


def text_layers(reader: nn.Module, parts: Iterable[str]) -> list[str]:
    """Paths of `parts` (`to_q`, `to_k`, `to_v`, `to_out.0`) of every attention that reads text."""
    return [f"{path}.{part}" for path, _ in _text_attentions(unwrapped(reader)) for part in parts]


def original_weights(reader: nn.Module) -> dict[str, Tensor]:
    """Every weight of `reader` as it is without erasures and without LoRAs, by its name in a plain state dict.

    Raises:
        EraseError: a LoRA is fused into it, or its weights lie on a disk.
    """
    _check_in_memory(reader)
    module = unwrapped(reader)
    if merged := [path for path, part in module.named_modules() if getattr(part, "merged", False)]:
        raise EraseError(
            f"a LoRA is fused into {merged[0]}, so the original weights are not here: call unfuse_lora() first"
        )
    attachment = getattr(module, ATTRIBUTE, None)
    records = attachment.kept.items() if attachment else ()
    kept: dict[int, Tensor] = {id(linear.weight): record.base for linear, record in records}
    return {
        name.replace(".base_layer.", "."): kept[id(weight)] if id(weight) in kept else weight.detach()
        for name, weight in module.named_parameters()
        if "lora_" not in name
    }


def working_copy(unet: nn.Module) -> nn.Module:
    """A UNet with modules of its own over the same tensors, without LoRAs, erasures, hooks: what is put on it does not reach `unet`.

    Raises:
        EraseError: no UNet that makes pictures from noise and text alone, or weights that are quantised or not in memory.
    """
    module: Any = unwrapped(unet)
    if family_of(unet).denoiser != "unet" or module.config.in_channels != module.config.out_channels:
        raise EraseError(
            f"{type(module).__name__} with {module.config.in_channels} input channels does not draw from noise and text alone, so it is "
            f"neither trained nor searched for targets: expected a text-to-image UNet, or a closed form with its target named"
        )
    weights = original_weights(module)
    for name, weight in weights.items():
        if (
            type(weight) is not Tensor
            and type(weight) is not nn.Parameter
            or weight.dtype not in FLOATING
            or weight.is_meta
        ):
            raise EraseError(
                f"{name} holds {type(weight).__name__} {weight.dtype} on {weight.device}: training and target search need plain floating "
                f"weights in memory; load the model unquantised, or erase in closed form with the target named"
            )
    with torch.device("meta"):  # of this thread only; accelerate's `init_empty_weights` would reach into all of them
        copy = type(module).from_config(module.config)
    if beside := sorted(copy.state_dict().keys() ^ weights.keys()):
        raise EraseError(
            f"{type(module).__name__} holds more than noise and text ask for ({beside[0]}, as of an IP-Adapter or a motion model), so it "
            f"is neither trained nor searched for targets: use the plain text-to-image pipeline, or a closed form with its target named"
        )
    copy.load_state_dict(weights, assign=True)
    return copy.requires_grad_(False).eval()


def _base_layer(linear: Any) -> nn.Linear:
    return getattr(linear, "base_layer", linear)


def _check_text_paths(name: str, reader: nn.Module) -> None:
    """Raise where text comes in by a path that no map of the embeddings sees."""
    config = getattr(unwrapped(reader), "config", None)
    if config is None or not {"cross_attention_dim", "joint_attention_dim"} & {k for k, v in config.items() if v}:
        raise EraseError(
            f"{name} is a {type(unwrapped(reader)).__name__}, which does not read prompt embeddings by cross-attention"
        )
    widths = config.get("cross_attention_dim")
    if isinstance(widths, (tuple, list)) and len(set(widths)) > 1:
        raise EraseError(
            f"{name} reads text of several widths {tuple(widths)}: expected one; this model is not supported"
        )
    if config.get("addition_embed_type") not in (None, "text_time"):
        raise EraseError(
            f"{name} takes additional text or images ({config.addition_embed_type}), by which a concept would survive: not supported yet"
        )
    if config.get("class_embed_type") is not None:
        raise EraseError(
            f"{name} also takes class embeddings ({config.class_embed_type}, as unCLIP does), by which a concept would survive: "
            f"not supported yet"
        )
    if config.get("encoder_hid_dim_type") not in (None, "ip_image_proj"):
        raise EraseError(f"{name} projects text ({config.encoder_hid_dim_type}) before it reads it: not supported yet")


# --- the families: cross-attention UNets, and transformers whose text enters by one layer ---


def _text_attentions(reader: nn.Module) -> list[tuple[str, Any]]:
    """Path and module of every attention whose keys and values read text, not the picture itself."""
    modules = reader.named_modules()
    return [(path, m) for path, m in modules if hasattr(m, "to_k") and getattr(m, "is_cross_attention", False)]


def _cross_attention(reader: nn.Module) -> dict[str, Any]:
    """`to_k` and `to_v` of every attention that reads text, and `to_kv` where the host reads that copy instead."""
    return {
        f"{path}.{part}": getattr(module, part)
        for path, module in _text_attentions(reader)
        for part in ("to_k", "to_v", "to_kv")
        if getattr(module, part, None) is not None and not (part == "to_kv" and not module.fused_projections)
    }


def _cross_attention_width(reader: Any) -> int:
    width = reader.config.cross_attention_dim
    return width if isinstance(width, int) else width[0]


def _added_embedding(reader: nn.Module) -> dict[str, Any]:
    """The layer that reads [text_embeds, time_ids]: micro-conditioning lies in its other columns."""
    return {"add_embedding.linear_1": reader.get_submodule("add_embedding.linear_1")}


def _added_embedding_width(reader: Any) -> int:
    """What that layer reads beside the embedded time ids: these are five in the refiner, whose one encoder gives both widths, else six."""
    config = reader.config
    total, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
    return total - (5 if total - 5 * each == _cross_attention_width(reader) else 6) * each


def _context_embedder(reader: nn.Module) -> dict[str, Any]:
    """The only layer that meets a clean text state: behind it, text and picture are mixed layer by layer."""
    return {"context_embedder": reader.get_submodule("context_embedder")}


def _context_width(reader: Any) -> int:
    return reader.config.joint_attention_dim


def _pooled_projection(reader: nn.Module) -> dict[str, Any]:
    path = "time_text_embed.text_embedder.linear_1"
    return {path: reader.get_submodule(path)}


def _pooled_width(reader: Any) -> int:
    return reader.config.pooled_projection_dim


def _is_unet(reader: Any) -> bool:
    return "cross_attention_dim" in getattr(reader, "config", ()) and reader.config.addition_embed_type is None


def _is_sdxl_unet(reader: Any) -> bool:
    return "cross_attention_dim" in getattr(reader, "config", ()) and reader.config.addition_embed_type == "text_time"


def _is_flux(reader: nn.Module) -> bool:
    return type(reader).__name__ in ("FluxTransformer2DModel", "FluxControlNetModel")


def _is_sd3(reader: nn.Module) -> bool:
    return type(reader).__name__ in ("SD3Transformer2DModel", "SD3ControlNetModel")


GUIDED = tuple(
    f"diffusers.pipelines.{name}."
    for name in ("stable_diffusion", "stable_diffusion_xl", "controlnet", "pag", "animatediff")
)
"""Pipelines that put the unconditional part of a batch first, then the conditional one, then PAG's perturbed one."""

CONTROL_ARGUMENTS = ("mid_block_additional_residual", "controlnet_block_samples", "block_controlnet_hidden_states")
"""Under these a denoiser receives what a ControlNet made of the prompt."""

_UNET_TEXT = Space(("encoder_hidden_states",), 2, _cross_attention_width, _cross_attention)
_JOINT_TEXT = Space(("encoder_hidden_states",), 1, _context_width, _context_embedder)
_JOINT_POOLED = Space(("pooled_projections",), 2, _pooled_width, _pooled_projection)

FAMILIES = (
    Family(
        "Stable Diffusion 1.x and 2.x", "unet", _is_unet, {TEXT: _UNET_TEXT}, (("tokenizer", "text_encoder"),)
    ),
    Family(
        "SDXL", "unet", _is_sdxl_unet,
        {TEXT: _UNET_TEXT, POOLED: Space(("added_cond_kwargs", "text_embeds"), None, _added_embedding_width, _added_embedding)},
        (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2")), pooled_by=2,
    ),
    Family(
        "FLUX.1", "transformer", _is_flux, {TEXT: _JOINT_TEXT, POOLED: _JOINT_POOLED},
        (("tokenizer_2", "text_encoder_2"),), pooled_by=1, encode=(), experimental=True,
    ),
    Family(
        "SD3", "transformer", _is_sd3, {TEXT: _JOINT_TEXT, POOLED: _JOINT_POOLED},
        (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"), ("tokenizer_3", "text_encoder_3")),
        pooled_by=2, experimental=True,
    ),
)  # fmt: skip
"""Every architecture that is known. The next one is one entry, and where its layers are new a function that finds them."""


# --- layers by name: what factors and foreign files speak of ---


def layer(reader: nn.Module, path: str) -> Layer:
    """The linear layer or 1×1 convolution at `path`, without PEFT's wrapper; `matrix` gives its weight as `[out, in]`.

    Raises:
        EraseError: there is none, or it is of another kind.
    """
    try:
        module = _base_layer(unwrapped(reader).get_submodule(path))
    except AttributeError as error:
        raise EraseError(
            f"{type(unwrapped(reader)).__name__} has no layer {path!r}: made for another model"
        ) from error
    if not _is_matrix(module):
        raise EraseError(f"{path} is {_say_layer(module)}: only linear layers and 1×1 convolutions take factors")
    return module


def matrix(weight: Tensor) -> Tensor:
    """A layer's weight as `[out, in]`, a view."""
    return weight.flatten(1)


def layer_names(reader: nn.Module) -> dict[str, str]:
    """Module path of every linear layer and convolution of a UNet under each name that LoRA files use for it.

    Names are the path itself and, with `_` for `.`, kohya's stem of the path and of CompVis' name of it
    (`input_blocks_4_1_…`, which files for SDXL carry).
    """
    found, theirs = {}, _compvis_names(unwrapped(reader))
    for path, module in unwrapped(reader).named_modules():
        plain = "base_layer" not in path and "lora_" not in path
        if plain and isinstance(_base_layer(module), (nn.Linear, nn.Conv2d)):
            names = [path] + [
                name + path[len(ours) :] for ours, name in theirs.items() if f"{path}.".startswith(f"{ours}.")
            ]
            found |= dict.fromkeys([path, *(name.replace(".", "_") for name in names)], path)
    return found


def _compvis_names(unet: Any) -> dict[str, str]:
    """{path of a group of layers: CompVis' name of it}. Input blocks count conv_in, every layer and every downsampler."""
    blocks = {"mid_block.attentions.0": "middle_block.1"}
    blocks |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    for b, block in enumerate(getattr(unet, "down_blocks", ())):
        count = len(block.resnets) + 1
        for a in range(len(getattr(block, "attentions", None) or ())):
            blocks[f"down_blocks.{b}.attentions.{a}"] = f"input_blocks.{1 + b * count + a}.1"
    for b, block in enumerate(getattr(unet, "up_blocks", ())):
        for a in range(len(getattr(block, "attentions", None) or ())):
            blocks[f"up_blocks.{b}.attentions.{a}"] = f"output_blocks.{b * len(block.resnets) + a}.1"
    return blocks


def _is_matrix(module: Any) -> bool:
    return isinstance(module, nn.Linear) or (
        isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    )


def _say_layer(module: Any) -> str:
    if isinstance(module, nn.Conv2d):
        return f"a convolution of {module.kernel_size[0]}×{module.kernel_size[1]}"
    return f"a {type(module).__name__}"
