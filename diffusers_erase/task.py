"""What a method may see, and the table of methods.

A method in closed form is a function from a `Task` to an `Edit`, registered by name; one that trains is registered in
train.py. Its own options are keyword-only arguments with defaults; `erase` passes them on and records them as given. A new
method touches its own file only.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .edits import Edit, Gate, Label, Pack
from .errors import EraseError
from .sites import TEXT
from .text import Encoder, roles_of


@dataclass(frozen=True)
class Task:
    """One concept to erase, and everything a method may know about it."""

    encoder: Encoder
    concept: str
    coreferences: tuple[str, ...]
    """Other names of the concept, sent to the same target."""
    targets: tuple[str, ...]
    """One name, several for their mean, `()` for the empty prompt."""
    preserve: tuple[str, ...]
    tokens: str
    templates: tuple[str, ...]
    residual: float | None
    """None where the method decides its strengths."""
    gate: Gate | None
    pack: Callable[[], Pack]
    """The base pack, made when first asked for: a method that brings its own never pays for it."""
    erased: tuple[str, ...] = ()
    """Names that are erased at the same time: no targets."""
    space: str = TEXT
    """Which kind of text state this is about; a method is run once for each that the pipeline has."""

    def rows(self, tokens: str, templates: Sequence[str]) -> tuple[list[Label], Tensor, Tensor]:
        """Labels, keys and offsets `[k, d]` (float64) of the concept and its coreferences, one mean row per name and role."""
        labels, keys, offsets = [], [], []
        for name in (self.concept, *self.coreferences):
            roles = roles_of(tokens, self.encoder.length(name), self.space)
            own, goal = self.encoder.rows(name, roles, templates), self._target_rows(roles, templates)
            for role in roles:
                labels.append(Label(self.concept, name, role, self.targets, self.gate))
                keys.append(own[role])
                offsets.append(goal[role] - own[role])
                if not bool(offsets[-1].any()):
                    raise EraseError(
                        f"{name!r} has the same text state as its target ({role}): the model cannot tell them apart; choose another target"
                    )
        return labels, torch.stack(keys), torch.stack(offsets)

    def preserved_rows(self, tokens: str, templates: Sequence[str]) -> tuple[list[Label], Tensor]:
        """Labels and keys `[m, d]` (float64) of the preserved names; m may be 0."""
        labels, keys = [], []
        for name in self.preserve:
            for role, row in self.encoder.rows(name, roles_of(tokens, 1, self.space), templates).items():
                labels.append(Label(name, name, role, None))
                keys.append(row)
        return labels, torch.stack(keys) if keys else torch.zeros(
            0, self.encoder.widths[self.space], dtype=torch.float64
        )

    def _target_rows(self, roles: Sequence[str], templates: Sequence[str]) -> dict[str, Tensor]:
        if not self.targets:
            return self.encoder.null_rows(roles)
        # Inner tokens of a longer name go to the target's last token: targets are read as wholes.
        asked = {role: "subject" if role.startswith("name:") else role for role in roles}
        found = [self.encoder.rows(target, tuple(dict.fromkeys(asked.values())), templates) for target in self.targets]
        return {role: torch.stack([rows[asked[role]] for rows in found]).mean(0) for role in roles}


@dataclass(frozen=True)
class Method:
    """A way to erase: its function, the paper that it comes from, and its options with their defaults."""

    name: str
    paper: str
    run: Callable[..., Any]
    """From a task to an edit; of a method that trains, from a task and its pipeline to what it learned."""
    fixed: dict[str, Any]
    """Arguments of `erase` that the paper decides, and their values."""
    target: str = "null"
    """Where it sends a concept unless told: what its paper does."""
    training: dict[str, Any] | None = None
    """Of a method that trains, the options of the training loop and their defaults; None for a closed form."""

    @property
    def options(self) -> dict[str, Any]:
        """Keyword options of the method and their defaults."""
        parameters = inspect.signature(self.run).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} | (self.training or {})

    @property
    def summary(self) -> str:
        """First line of the method's docstring."""
        return (inspect.getdoc(self.run) or "").split("\n", 1)[0]


METHODS: dict[str, Method] = {}
"""Every registered method, by name."""


def method(
    name: str, *, paper: str, target: str = "null", **fixed: Any
) -> Callable[[Callable[..., Edit]], Callable[..., Edit]]:
    """Register the decorated function as the method `name`; `fixed` are the task's fields that its paper decides."""

    def register(run: Callable[..., Edit]) -> Callable[..., Edit]:
        METHODS[name] = Method(name, paper, run, fixed, target)
        return run

    return register


def method_named(name: str, options: dict[str, Any]) -> tuple[Method, dict[str, Any]]:
    """The method `name`, and its options in force: those given over its defaults."""
    if name not in METHODS:
        raise EraseError(f"unknown method {name!r}: expected one of {', '.join(sorted(METHODS))}")
    known = METHODS[name].options
    if unknown := set(options) - set(known):
        raise EraseError(
            f"method {name!r} has no option {sorted(unknown)[0]!r}: its options are {', '.join(known) or 'none'}"
        )
    for option, value in options.items():
        number, switch = isinstance(known[option], (int, float)), isinstance(known[option], bool)
        if number and (not isinstance(value, (int, float)) or isinstance(value, bool) != switch):
            raise EraseError(
                f"{option} of method {name!r} is {'true or false' if switch else 'a number'}: got {value!r}"
            )
    return METHODS[name], known | options
