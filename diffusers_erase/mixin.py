"""The verbs as methods: `ErasureLoaderMixin`, and `enable` to give them to pipelines that exist already."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from . import status, verbs
from .errors import EraseError
from .status import ErasureStatus


class ErasureLoaderMixin:
    """Erasure verbs for a pipeline class; named like diffusers' LoRA verbs, and each one a function of `diffusers_erase`.

    Example:
        >>> class MyPipeline(ErasureLoaderMixin, StableDiffusionPipeline): ...
        >>> pipe = MyPipeline.from_pretrained("runwayml/stable-diffusion-v1-5")
        >>> pipe.load_erasure("erase-van-gogh")
    """

    def load_erasure(self, source: Any, adapter_name: str | Sequence[str] | None = None, **options: Any) -> None:
        """See `diffusers_erase.load_erasure`."""
        verbs.load_erasure(self, source, adapter_name, **options)

    def unload_erasure(self) -> None:
        """See `diffusers_erase.unload_erasure`."""
        verbs.unload_erasure(self)

    def delete_erasures(self, adapter_names: str | Sequence[str]) -> None:
        """See `diffusers_erase.delete_erasures`."""
        verbs.delete_erasures(self, adapter_names)

    def set_erasures(
        self, adapter_names: str | Sequence[str], strengths: float | Sequence[float] | None = None
    ) -> None:
        """See `diffusers_erase.set_erasures`."""
        verbs.set_erasures(self, adapter_names, strengths)

    def enable_erasure(self, **options: Any) -> None:
        """See `diffusers_erase.enable_erasure`."""
        verbs.enable_erasure(self, **options)

    def disable_erasure(self) -> AbstractContextManager[None]:
        """See `diffusers_erase.disable_erasure`."""
        return verbs.disable_erasure(self)

    def get_active_erasures(self) -> list[str]:
        """See `diffusers_erase.get_active_erasures`."""
        return status.get_active_erasures(self)

    def get_list_erasures(self) -> dict[str, list[str]]:
        """See `diffusers_erase.get_list_erasures`."""
        return status.get_list_erasures(self)

    def fuse_erasure(self) -> None:
        """See `diffusers_erase.fuse_erasure`."""
        verbs.fuse_erasure(self)

    def unfuse_erasure(self) -> None:
        """See `diffusers_erase.unfuse_erasure`."""
        verbs.unfuse_erasure(self)

    def save_erasure(self, directory: str | Path, adapter_name: str | None = None) -> Path:
        """See `diffusers_erase.save_erasure`."""
        return verbs.save_erasure(self, directory, adapter_name)

    def lock_erasures(self, path: str | Path = "erasures.lock") -> Path:
        """See `diffusers_erase.lock_erasures`."""
        return verbs.lock_erasures(self, path)

    def erasure_status(self) -> ErasureStatus:
        """See `diffusers_erase.erasure_status`."""
        return status.erasure_status(self)


VERBS = {name: verb for name, verb in vars(ErasureLoaderMixin).items() if not name.startswith("_")}


def enable(pipe: Any = None) -> None:
    """Give one pipeline the erasure verbs as methods; without an argument every `DiffusionPipeline`, until `disable()`.

    An attribute that exists already under a verb's name is never replaced.

    Example:
        >>> pipe = StableDiffusionPipeline.from_pretrained("runwayml/stable-diffusion-v1-5")
        >>> enable(pipe)
        >>> pipe.load_erasure("erase-van-gogh")
    """
    if pipe is not None:
        for name, verb in VERBS.items():
            if not hasattr(pipe, name):
                object.__setattr__(pipe, name, verb.__get__(pipe))
        return
    from diffusers import DiffusionPipeline

    if taken := [n for n in VERBS if n in vars(DiffusionPipeline) and vars(DiffusionPipeline)[n] is not VERBS[n]]:
        raise EraseError(
            f"DiffusionPipeline has its own {taken[0]!r} in this diffusers: use the functions of diffusers_erase instead"
        )
    for name, verb in VERBS.items():
        setattr(DiffusionPipeline, name, verb)


def disable() -> None:
    """Take back what `enable()` gave to every pipeline. Erasures that are loaded stay in force."""
    from diffusers import DiffusionPipeline

    for name, verb in VERBS.items():
        if vars(DiffusionPipeline).get(name) is verb:
            delattr(DiffusionPipeline, name)
