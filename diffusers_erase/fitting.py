"""Whether an erasure fits a pipeline: widths, base model, text encoder, and its effect on the names that it erases. Changes nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .adapter import ErasureAdapter
from .errors import EraseError, MismatchError
from .mapping import effects
from .sites import ATTRIBUTE, check_fusable, layer, matrix, text_readers, unwrapped, widths
from .text import Encoder, TextSide

EFFECT_TOLERANCE = 0.15
"""How far the effect measured at load may lie from the one recorded when the concept was erased."""


def verify(pipe: Any, adapters: Sequence[ErasureAdapter], strict: bool) -> tuple[list[bool], TextSide | None]:
    """Whether the pipe's encoder is each adapter's and its concepts' names still land on their targets, and its text side now.

    Raises:
        EraseError: one does not, and `strict`.
    """
    try:
        encoder = Encoder(pipe)
        side = encoder.side()
    except EraseError:
        if strict:
            raise
        return [False] * len(adapters), None
    passed = []
    for adapter in adapters:
        try:
            adapter.encoder.check(side.fingerprint)
            check_base(adapter, text_readers(pipe), same=True)
        except EraseError:
            if strict:
                raise
            passed.append(False)
        else:
            passed.append(True)
    wrong = _off_target(encoder, [adapter for adapter, ok in zip(adapters, passed, strict=True) if ok])
    if strict and wrong:
        raise MismatchError(next(iter(wrong.values())))
    return [ok and adapter.digest not in wrong for adapter, ok in zip(adapters, passed, strict=True)], side


def check_width(adapter: ErasureAdapter, readers: Mapping[str, nn.Module]) -> None:
    made = {space: edit.width for space, edit in adapter.edits.items()}
    for name, reader in readers.items():
        if wrong := [space for space, width in made.items() if widths(reader).get(space) != width]:
            raise MismatchError(
                f"the adapter edits {wrong[0]} states of width {made[wrong[0]]}, {name} reads width {widths(reader).get(wrong[0])}: it was "
                f"made for another base model; erase the concept again on this one (an SDXL refiner needs its own adapter)"
            )


def check_base(adapter: ErasureAdapter, readers: Mapping[str, nn.Module], *, same: bool) -> None:
    """Raise unless the denoiser's original weights are those that factors were made for; of `same` False, have their shapes."""
    if adapter.factors is None:
        return
    reader = next(iter(readers.values()))
    check_fusable(reader, (), adapter.factors.paths)
    found = unwrapped(reader).__dict__.get(ATTRIBUTE)
    kept = found.kept if found else {}
    layers = {path: layer(reader, path) for path in adapter.factors.paths}
    weights = {path: kept[part].base if part in kept else part.weight for path, part in layers.items()}
    adapter.factors.check({path: matrix(weight) for path, weight in weights.items()}, same=same)


def _off_target(encoder: Encoder, adapters: Sequence[ErasureAdapter]) -> dict[str, str]:
    """What to say of each adapter, by digest, one of whose names goes elsewhere than where it went when it was erased."""
    asked = [(a, recipe) for a in adapters for recipe in a.recipes if recipe.effect is not None]
    found = effects(encoder, [(adapter.edits, recipe.concept) for adapter, recipe in asked])
    return {
        adapter.digest: f"under this adapter {recipe.concept!r} goes {share:.2f} of the way to its target here, {recipe.effect:.2f} "
        f"where it was made: the text side of this pipeline differs; erase the concept again on it"
        for (adapter, recipe), share in zip(asked, found, strict=True)
        if recipe.effect is not None and abs(share - recipe.effect) > EFFECT_TOLERANCE
    }
