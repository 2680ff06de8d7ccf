"""What happens at a call of a text reader: its states are mapped, and what could make that wrong is looked for.

The hook is a top-level forward pre-hook. It is pure and traceable: under `torch.compile` the map becomes part of the graph,
and the checks run at every call as one opaque operator, which also works with `fullgraph=True`. State lives on the modules,
not on the pipeline: pipelines that share a UNet share its erasures, and mapping happens once.
"""

import functools
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import loras
from .adapter import ErasureAdapter
from .edits import Edit, Pool
from .errors import EraseError
from .factors import Factors
from .fusing import Kept
from .mapping import EmbeddingMap
from .sites import (
    ATTRIBUTE,
    TEXT,
    Layer,
    family_of,
    feeds_controlnet,
    guided_parts,
    holds,
    states_of,
    text_readers,
    unwrapped,
    with_text,
)
from .text import TextSide, text_side


@dataclass(frozen=True)
class Entry:
    """One loaded adapter."""

    adapter: ErasureAdapter
    strength: float = 1.0
    active: bool = True
    verified: bool = True
    """False where it was loaded with `strict=False` and its checks did not pass or did not run."""

    @property
    def acts(self) -> bool:
        """Whether it acts while erasures are enabled."""
        return self.active and self.strength > 0


class Rules(NamedTuple):
    """What loading was allowed to do (see `load_erasure`); changing what is active later is held to the same."""

    chains: str = "error"
    residual_max: float | None = 0.2
    text_changes: bool = False

    def loosened(self, other: "Rules") -> "Rules":
        """Whatever one of the two allows."""
        limits = [rules.residual_max for rules in (self, other) if rules.residual_max is not None]
        follow = "follow" in (self.chains, other.chains)
        allowed = self.text_changes or other.text_changes
        return Rules("follow" if follow else "error", max(limits) if len(limits) == 2 else None, allowed)


class Pools(NamedTuple):
    """By space, what was solved already and a choice is taken from quickly: edits as they are, and at their strengths."""

    full: dict[str, Pool]
    soft: dict[str, Pool]


class PerCall(NamedTuple):
    """The sets of one `with erasing(...)`."""

    which: tuple[int, ...] | None
    """For each row of the batch the number of its set; None where the only set acts on all."""
    token: object
    """What `OPENED` holds wherever this is meant: other threads draw without it."""


OPENED: ContextVar[object] = ContextVar("diffusers_erase_opened", default=None)
"""The token of the `with erasing(...)` that this thread or task is in."""


def _nowhere() -> None:
    return None


@dataclass(eq=False)
class Registry:
    """What is loaded on a set of modules and in which form. One registry is shared by all text readers of a pipeline."""

    entries: dict[str, Entry] = field(default_factory=dict)
    enabled: bool = True
    mode: str = "map"
    branch: str = "both"
    rules: Rules = Rules()
    mandatory: dict[str, float] | None = None
    """By a policy: the least strength of each erasure that must stay in force."""
    optional: frozenset[str] = frozenset()
    """By a policy: what a request may add."""
    edits: dict[str, Edit] = field(default_factory=dict)
    """What acts now, by space of text states; empty where nothing does."""
    pools: Pools = field(default_factory=lambda: Pools({}, {}))
    factors: Factors | None = None
    """What acts on the denoiser's layers beside them; in fused form only."""
    maps: dict[str, EmbeddingMap] = field(default_factory=dict)
    """Its map form, empty in another mode."""
    call: PerCall | None = None
    """The sets of the call that is being made, instead of `edits`; `maps` holds their map form."""
    side: TextSide | None = None
    """The text side of the pipeline through which was loaded last."""
    home: Callable[[], Any] = _nowhere
    """That pipeline, weakly."""
    modules: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet)
    """Every module it is attached to, through whichever pipeline: all of them follow each change."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    """Held by a `with erasing(...)`."""

    @property
    def in_force(self) -> tuple[str, ...]:
        """Names of the adapters that act now."""
        return tuple(n for n, e in self.entries.items() if e.acts) if self.enabled else ()

    def __getstate__(self) -> dict[str, Any]:
        """A copy acts the same but is attached to nothing yet: its own attachments join it (see `Attachment`)."""
        here = {"entries": dict(self.entries), "modules": None, "home": None, "lock": None}
        return vars(self) | here

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, modules=weakref.WeakSet(), home=_nowhere, lock=threading.RLock())


KEYS: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
MODULES: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
"""A number for each module that was ever attached to, by which a compiled graph names it; attaching again compiles nothing new."""

COUNT = itertools.count()


class Attachment:
    """The pre-hook on one module. An object rather than a closure, so that a deep copy of the module carries its own."""

    def __init__(self, registry: Registry, module: nn.Module, name: str):
        self.module = module
        self.name = name
        self.controls = name.startswith("controlnet")
        self.spaces = family_of(module).spaces
        self.kept: dict[Layer, Kept] = {}
        self.handle = module.register_forward_pre_hook(self, with_kwargs=True)
        self.join(registry)

    def join(self, registry: Registry) -> None:
        """Follow `registry` from now on."""
        self.registry = registry
        self.checked: Callable[[], Any] = _nowhere
        registry.modules.add(self.module)
        self.key = KEYS.setdefault(self.module, next(COUNT))
        MODULES[self.key] = self.module

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"checked": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.join(self.registry)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]):
        registry = self.registry
        if not (registry.edits or registry.maps):
            return None
        states = states_of(self.spaces, args, kwargs)
        fed, scaled = feeds_controlnet(kwargs), _scaled(kwargs)
        if torch.compiler.is_compiling():
            share = torch.ops.diffusers_erase.share(states, self.key, _sets(registry), fed, scaled)
            if not registry.maps:  # the operator must be used, or the compiler leaves it out
                return with_text(self.spaces, args, kwargs, {TEXT: functools.partial(_unchanged, share=share)})
        else:
            share = _untraced()(self, states, fed, scaled)
        maps = {space: functools.partial(mapping, share=share) for space, mapping in registry.maps.items()}
        return with_text(self.spaces, args, kwargs, maps) if maps else None

    def share(self, states: Tensor, fed: bool, scaled: bool) -> Tensor | None:
        """Check one call; which sets act on which rows of its batch `[n, sets]`, None where the only set acts on all.

        Args:
            states: the text states of the call.
            fed: whether a ControlNet feeds it.
            scaled: whether it scales its LoRAs.

        Raises:
            EraseError: what is in force would not be what acts.
        """
        registry = self.registry
        if registry.call is not None and OPENED.get() is not registry.call.token:
            raise EraseError(
                "another thread is in a `with erasing(...)` on this model: open one here too, which waits its turn, or give each "
                "thread its own pipeline"
            )
        pipe = calling_pipeline(self.module)
        if self.checked() is not states:  # once for each tensor of states: encoding the probe prompts takes time
            self.check(pipe, fed)
            self.checked = weakref.ref(states)
        if registry.mode == "lora":
            self.check_lora(scaled)
        return self.rows(pipe, states) if registry.call is not None or registry.branch == "cond" else None

    def check(self, pipe: Any, fed: bool) -> None:
        """Raise unless every text reader of `pipe` is attached, its text side is as it was, and nothing acts twice."""
        registry = self.registry
        if pipe is not None:
            bare = [name for name, reader in text_readers(pipe).items() if not follows(reader, registry)]
        else:
            controlled = any(module.__dict__[ATTRIBUTE].controls for module in registry.modules)
            bare = ["controlnet"] if fed and not controlled else []
        if bare:
            raise EraseError(
                f"{', '.join(bare)} of this pipeline reads the prompt without the erasure: call enable_erasure on the pipeline that "
                f"has it, so that it is attached there too"
            )
        if not (self.controls or registry.rules.text_changes):  # the denoiser is asked in the same step
            check_text_side(registry.side, registry.home() if pipe is None else pipe)
        check_twins(self.module, registry.edits, registry.entries)

    def check_lora(self, scaled: bool) -> None:
        """Raise unless the LoRA form acts whole on every layer."""
        whole = (
            s == 1.0 for space in self.registry.edits for s in loras.scales(self.module, loras.NAME, space).values()
        )
        if scaled or not all(whole):
            raise EraseError(
                "the erasure was loaded in LoRA form, and a LoRA call has since switched it off, scaled or replaced it: undo that "
                "call, or load the erasure with mode='map', which no LoRA call touches"
            )

    def rows(self, pipe: Any, states: Tensor) -> Tensor:
        """`[n, sets]`: which sets act on which rows of the batch, as the sets of this call and the branch say."""
        registry, n = self.registry, len(states)
        which = registry.call.which if registry.call else None
        parts = (True,) if pipe is None and registry.branch == "both" else self.parts(pipe)
        if self.controls and which is not None and n == len(which):
            parts = (True,)  # a ControlNet in guess mode is given the conditional part alone
        each = n // len(parts) if which is None else len(which)
        if n != each * len(parts):
            raise EraseError(
                f"this call draws {n} rows in {len(parts)} parts of guidance, erasing(rows=...) names {each}: give one set for each "
                f"picture of the batch (num_images_per_prompt counts), or none"
            )
        sets = torch.zeros(each, _sets(registry))
        sets[range(each), list(which) if which is not None else [0] * each] = 1.0
        halves = [
            sets if conditional or registry.branch == "both" else torch.zeros_like(sets) for conditional in parts
        ]
        return torch.cat(halves).to(states.device)

    def parts(self, pipe: Any) -> tuple[bool, ...]:
        """See `guided_parts`; with `branch="cond"` only for the pipeline on which that was asked."""
        if self.registry.branch == "cond" and (pipe is None or pipe is not self.registry.home()):
            raise EraseError(
                "branch='cond' was asked for on another pipeline that shares this UNet, and the halves of this call's batch cannot "
                "be told: unload_erasure() and load it here, or use branch='both'"
            )
        if self.controls and self.registry.call is None:
            raise EraseError(
                "branch='cond' cannot be told from branch='both' in a ControlNet, which is given both halves or, in guess mode, one: "
                "use branch='both'"
            )
        if pipe is None:
            raise EraseError(
                "this call comes from no pipeline, so the rows of its batch cannot be told: call the pipeline"
            )
        return guided_parts(pipe)


@functools.cache
def _untraced() -> Callable:
    """`Attachment.share`, which a compiler that gave up on the frames above it may not enter; made late, since it loads the compiler."""
    return torch.compiler.disable(Attachment.share)


def _scaled(kwargs: Mapping[str, Any]) -> bool:
    return (kwargs.get("cross_attention_kwargs") or {}).get("scale", 1.0) != 1.0


def _sets(registry: Registry) -> int:
    return 1 if registry.call is None or registry.call.which is None else max(registry.call.which) + 1


def _unchanged(states: Tensor, share: Tensor) -> Tensor:
    return states * share.view(len(share), *[1] * (states.ndim - 1)).to(states.dtype)


@torch.library.custom_op("diffusers_erase::share", mutates_args=())
def _share(states: Tensor, key: int, sets: int, fed: bool, scaled: bool) -> Tensor:
    """`Attachment.share` for compiled graphs: runs at every call, whatever was traced."""
    share = MODULES[key].__dict__[ATTRIBUTE].share(states, fed, scaled)
    return states.new_ones(len(states), sets, dtype=torch.float32) if share is None else share


@_share.register_fake
def _(states: Tensor, key: int, sets: int, fed: bool, scaled: bool) -> Tensor:
    return states.new_empty(states.shape[0], sets, dtype=torch.float32)


def follows(reader: nn.Module, registry: Registry) -> bool:
    """Whether `reader` is attached to `registry`."""
    attachment = unwrapped(reader).__dict__.get(ATTRIBUTE)
    return attachment is not None and attachment.registry is registry


def calling_pipeline(module: nn.Module) -> Any:
    """The pipeline in whose call `module` is being called, None where it is called by hand.

    Found on the stack: several pipelines may share the module, and it is not told which of them calls.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            owner = frame.f_locals.get("self")
            if hasattr(type(owner), "encode_prompt") and holds(owner, module):
                return owner
        frame = frame.f_back
    return None


def check_text_side(side: TextSide | None, pipe: Any) -> None:
    """Raise where the text side of `pipe` is not `side`, what it was when the erasures were loaded."""
    if side is None or pipe is None:
        return
    skipped = getattr(pipe, "clip_skip", None)
    now = text_side(pipe)
    change = f"clip_skip={skipped} gives other text states" if skipped else now and side.change(now)
    if change:
        raise EraseError(
            f"the text side of this pipeline has changed since the erasure was attached: {change}; undo that, or accept it with "
            f"enable_erasure(allow_text_changes=True)"
        )


def check_twins(module: nn.Module, acting: Mapping[str, Edit], entries: Mapping[str, Entry]) -> None:
    """Raise where a LoRA twin of an erasure that acts, or of all of them together, acts on `module` as well."""
    for space, edit in acting.items():
        own = {name: e.adapter.edits[space] for name, e in entries.items() if e.acts and space in e.adapter.edits}
        if twin := loras.twin_of(module, space, own | {"the set": edit}):
            raise EraseError(
                f"the LoRA {twin[0]!r} is the twin of {twin[1]}, an erasure in force, which would act twice: "
                f"delete_adapters({twin[0]!r}), or unload_erasure()"
            )
