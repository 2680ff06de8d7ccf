"""LoRA layers on a module: which act now, and ours put beside them and taken off. The only file that knows PEFT's layers.

A LoRA layer wraps a linear layer, keeps its factors by adapter name, and can be switched off, scaled or merged by the host
at any time, so all of this is read from the layers, never remembered.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .edits import Edit
from .errors import EraseError
from .sites import sites, unwrapped

NAME = "erasure"
"""Under this name an erasure in LoRA form lies beside the user's own."""

TWIN = 0.999
"""Cosine from which a LoRA's row is one of an edit's detectors; half precision leaves 0.99999."""


def scales(reader: nn.Module, name: str, space: str) -> dict[str, float]:
    """How strongly the LoRA `name` acts on each site that reads `space`; 0 where it is absent, switched off or taken apart."""
    return {path: _scale(unwrapped(reader).get_submodule(path), name) for path in sites(reader, space)}


def twin_of(reader: nn.Module, space: str, edits: Mapping[str, Edit]) -> tuple[str, str] | None:
    """(name of a LoRA that acts on `reader`, key of the edit whose twin it is), or None.

    A twin has an edit's detectors as its rows, whatever it is called, scaled by, padded with or stored as.
    """
    layer: Any = unwrapped(reader).get_submodule(next(iter(sites(reader, space))))
    acting = [name for name in getattr(layer, "lora_A", {}) if name != NAME and _scale(layer, name)]
    for name in acting:
        rows = nn.functional.normalize(layer.lora_A[name].weight.detach().double().cpu(), dim=1)
        for key, edit in edits.items():
            detectors = nn.functional.normalize(edit.detectors()[edit.moving], dim=1)
            if bool(((detectors @ rows[:, : edit.width].mT).abs().amax(1) > TWIN).all()):
                return name, key
    return None


def check(reader: Any) -> None:
    """Raise unless `put` will work on `reader`."""
    if not hasattr(reader, "load_lora_adapter"):
        raise EraseError(f"{type(reader).__name__} takes no LoRAs: keep the erasure as a map")
    for path, module in reader.named_modules():
        if hasattr(module, "lora_A") and (module.disable_adapters or module.merged):
            raise EraseError(
                f"a LoRA is fused into or switched off at {path}: unfuse_lora() or enable_lora() first, or keep the erasure as a map"
            )


@torch.no_grad()
def put(reader: Any, state: dict[str, Tensor]) -> None:
    """Load `state` (names without a prefix) as LoRA `NAME` of `reader`, beside those that act now."""
    acting = _acting(reader)
    reader.load_lora_adapter(state, prefix=None, adapter_name=NAME)
    reader.set_adapter([*acting, NAME])


def take(reader: Any) -> None:
    """Take LoRA `NAME` off `reader`; with the last one the layers' wrappers go too. Does nothing where it is gone."""
    if NAME not in getattr(reader, "peft_config", {}):
        return
    acting = [name for name in _acting(reader) if name != NAME]
    if len(reader.peft_config) == 1:
        return reader.unload_lora()
    reader.delete_adapters(NAME)
    reader.set_adapter(acting)


def _acting(reader: Any) -> Sequence[str]:
    if not getattr(reader, "peft_config", None):
        return []
    acting = reader.active_adapters()
    return [acting] if isinstance(acting, str) else list(acting)


def _scale(layer: Any, name: str) -> float:
    if name not in getattr(layer, "lora_A", {}):
        return 0.0
    acts = (
        name in layer.merged_adapters if layer.merged else name in layer.active_adapters and not layer.disable_adapters
    )
    return float(layer.scaling[name]) if acts else 0.0
