"""Which base pack a pipeline's edits stand on, and its background states, computed once for an encoder and cached."""

from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from . import hub
from .edits import Pack
from .sites import TEXT
from .text import Encoder, PackRecipe, background, base_pack, pack_digest

PARTS = ("moment", "hard")
"""What is cached of a base pack, of each space."""


def recipe_of(pipe: Any, pack: str | Path | PackRecipe | None = None) -> PackRecipe:
    """The recipe `pack`, or the one in that file; None: the model's own (`erasure_pack.json` in its folder), else general English."""
    if isinstance(pack, PackRecipe):
        return pack
    source = pack or hub.own_pack(pipe) or Path(str(resources.files("diffusers_erase") / "data" / "english.json"))
    return PackRecipe.from_json(hub.read_pack(source))


def pack_on(encoder: Encoder, recipe: PackRecipe, space: str = TEXT) -> Pack:
    """The base pack of `recipe` in one space of this encoder; its background states are cached in the user's cache folder."""
    fingerprint = encoder.fingerprint()
    key = f"background-{pack_digest(recipe, fingerprint)[:16]}-{encoder.states_digest()[:16]}"

    def make() -> dict[str, Tensor]:
        return {
            f"{space}.{name}": t
            for space, pair in background(encoder, recipe).items()
            for name, t in zip(PARTS, pair, strict=True)
        }

    states = hub.cached(key, make)
    moment, hard = (states[f"{space}.{name}"] for name in PARTS)
    return base_pack(recipe, fingerprint, moment, hard, space)
