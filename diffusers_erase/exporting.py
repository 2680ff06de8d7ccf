"""Leaving this package: a plain diffusers folder with the erasures in force written into its weights, reloaded and probed."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import hub
from .attach import loaded
from .errors import EraseError
from .sites import POOLED, TEXT, probe_arguments, reads_images, text_readers, unwrapped
from .status import erasure_status, versions
from .text import PROBES, Encoder
from .verbs import fuse_erasure, unfuse_erasure

CONTENTS = "erasures.json"
"""Beside an exported model: which erasures it holds."""

UNET = "unet_erased.safetensors"

PROBE_TOLERANCE = 1e-3
"""What the reloaded model may differ by on the probe input, as a share of the output's spread. Rounding leaves 1e-5 of it."""


def export_erased(pipe: Any, directory: str | Path, *, linear: bool = False, unet_file: bool = False) -> Path:
    """Write `pipe` with its erasures fused in, as a folder that plain diffusers loads. The pipe stays bit for bit as it was.

    The folder is loaded again and asked the same as the pipe: its weights must be those that were written, its answer on a
    probe input the same. `erasures.json` in it says what it holds. Erasures in it cannot be taken off, nor composed with others.

    Args:
        directory: a folder that is not there yet, or empty.
        linear: write a gated erasure's linear part; a gate exists only as a map. Without it such an erasure is refused.
        unet_file: write the UNet's state dict as one file too, `unet_erased.safetensors`.

    Raises:
        EraseError: nothing is in force, something in the pipe cannot be saved, or the reloaded folder answers otherwise; nothing is
            left behind.

    Example:
        >>> load_erasure(pipe, "erase-van-gogh")
        >>> plain = StableDiffusionPipeline.from_pretrained(export_erased(pipe, "sd-without-van-gogh"))
    """
    folder = Path(directory)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise EraseError(f"{folder} is there already: give a new or empty folder to export to")
    _check(pipe, linear)
    was = erasure_status(pipe).mode
    new = not folder.exists()
    try:
        if was == "map":
            fuse_erasure(pipe)
        _write(pipe, folder, unet_file)
        written = _probed(pipe)
        contents = _contents(pipe, was, _compare(written, _reloaded(pipe, folder)))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if not new:
            folder.mkdir()
        raise
    finally:
        if was == "map":
            unfuse_erasure(pipe)
    hub.write_text(folder / CONTENTS, json.dumps(contents, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    return folder


def _check(pipe: Any, linear: bool) -> None:
    """Raise where the folder would not hold what is in force."""
    readers, registry = text_readers(pipe), loaded(pipe)
    if not registry.in_force:
        raise EraseError(
            "no erasure is in force: enable_erasure() first, or save the plain model with pipe.save_pretrained"
        )
    active = {name: registry.entries[name].adapter for name in registry.in_force}
    gated = [n for n, adapter in active.items() if adapter.gated]
    if gated and not linear:
        raise EraseError(
            f"{gated[0]} has a gate, which exists only as a map and would be left out: export its linear part with linear=True, which "
            f"moves unrelated prompts more"
        )
    if registry.mode == "lora":
        raise EraseError("the erasures are in LoRA form: load them with mode='map' or 'fused' to export them")
    for name, reader in readers.items():
        if getattr(unwrapped(reader), "peft_config", None):
            raise EraseError(
                f"{name} carries a LoRA, whose layers no plain folder can hold: call unload_lora_weights() first"
            )
        if reads_images(reader):
            raise EraseError(
                f"{name} carries an IP-Adapter, which no plain folder can hold: call unload_ip_adapter() first"
            )


def _write(pipe: Any, folder: Path, unet_file: bool) -> None:
    pipe.save_pretrained(folder, safe_serialization=True)
    plain = next(
        c for c in type(pipe).__mro__ if c.__module__.startswith("diffusers.")
    )  # not a class of the user's own
    index = folder / "model_index.json"
    listed = json.loads(index.read_text("utf-8")) | {"_class_name": plain.__name__}
    hub.write_text(index, json.dumps(listed, indent=2) + "\n")
    if unet_file:
        state = unwrapped(next(iter(text_readers(pipe).values()))).state_dict()
        hub.write_tensors(folder / UNET, state, {"format": "pt"})


@torch.no_grad()
def _probed(pipe: Any) -> dict[str, Tensor]:
    """The denoiser's answer to the probe prompts, and the bits of all text readers."""
    reader = next(iter(text_readers(pipe).values()))
    states = Encoder(pipe).encode(PROBES)
    spaces = {TEXT: states.rows} | ({} if states.pooled is None else {POOLED: states.pooled})
    bits = {
        f"{name}.{key}": tensor.detach().cpu()
        for name, each in text_readers(pipe).items()
        for key, tensor in unwrapped(each).state_dict().items()
    }
    return bits | {"answer": reader(**probe_arguments(reader, spaces), return_dict=False)[0].float().cpu()}


def _reloaded(pipe: Any, folder: Path) -> dict[str, Tensor]:
    from diffusers import DiffusionPipeline

    reader = next(iter(text_readers(pipe).values()))
    like = next(reader.parameters())
    plain = DiffusionPipeline.from_pretrained(folder, torch_dtype=like.dtype, local_files_only=True)
    return _probed(plain.to(like.device))


def _compare(written: dict[str, Tensor], reloaded: dict[str, Tensor]) -> float:
    """How far the reloaded model's answer lies from the pipe's, as a share of its spread."""
    for name in reloaded.keys() - {"answer"}:
        if name not in written or not torch.equal(written[name], reloaded[name]):
            raise EraseError(
                f"the exported folder holds other weights than the pipeline in {name}: nothing was kept; try again"
            )
    expected, found = written["answer"], reloaded["answer"]
    error = float((found - expected).abs().max() / expected.std())
    if not error <= PROBE_TOLERANCE:
        raise EraseError(
            f"the exported folder answers otherwise than the pipeline (error {error:.2g} of the spread): something in this pipeline is "
            f"not saved by save_pretrained; nothing was kept"
        )
    return error


def _contents(pipe: Any, was: str, error: float) -> dict[str, Any]:
    status, registry = erasure_status(pipe), loaded(pipe)
    return {
        "base_model": hub.model_name(pipe),
        "erasures": {
            name: {**status.requested[name], "kind": registry.entries[name].adapter.kind} for name in status.in_force
        },
        "form": "fused",
        "form_before": was,
        "residuals": status.residuals,
        "notes": list(status.notes),
        "probe_error": error,
        "versions": versions(),
        "not_tested": "images, paraphrases, attacks, other languages",
    }
