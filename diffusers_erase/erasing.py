"""`erase`: from a pipeline and a name to an adapter, in one screen."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from . import hub, methods, packs, targets  # noqa: F401 - importing the methods registers them
from .adapter import ErasureAdapter, Recipe, compose
from .edits import Gate, check_residual, names_of, same_name
from .errors import ConflictError, EraseError
from .mapping import effect
from .sites import TEXT
from .task import Method, Task, method_named
from .text import TEMPLATES, Encoder, PackRecipe, check_templates, roles_of

READ = {"residual": 0.02, "tokens": "last+eot"}
"""How names are read and moved unless told; contexts are the base pack's."""


def erase(
    pipe: Any,
    concept: str | Sequence[str],
    *,
    target: str | Sequence[str | Sequence[str]] | None = None,
    preserve: str | Sequence[str] = (),
    candidates: str | Path | Sequence[str] | None = None,
    coreferences: str | Sequence[str] = (),
    method: str = "ridge",
    residual: float | None = None,
    tokens: str | None = None,
    templates: Sequence[str] | None = None,
    gate: float | None = None,
    pack: str | Path | PackRecipe | None = None,
    **options: Any,
) -> ErasureAdapter:
    """An adapter that erases `concept` from `pipe`. Computes only: the pipe stays bit for bit as it was.

    Args:
        pipe: a Stable Diffusion 1.x, 2.x or XL pipeline; its tokenizers, text encoders and UNet configuration are read, and where
            something is searched (`"auto"`) or trained, the UNet's weights.
        concept: what to erase, in words; several are composed, and none is sent to another.
        target: where to send it: `"auto"` the best that `search_targets` finds, `"null"` (or `""`) the empty prompt, a name, or
            several names for their mean. With several concepts, one target for all, or a list with one for each. By default
            `"auto"`; methods of papers send to the empty prompt, `"age"` finds its target itself.
        preserve: names that should stay as they are, softly; `"auto"` for those that the edit would hurt most.
        candidates: where `"auto"` looks for a target: names, `"everyday"` (default), `"neighbours"`, `"words"` or WordNet's folder
            (see `search_targets`); and among what `"ap"` and `"age"` choose: names, or `"neighbours"` (their default).
        coreferences: other names of the same concept; `"auto"` for those of the base pack's words (or of `candidates`, where it
            says where from) that the denoiser draws alike.
        method: `"ridge"`, `"uce"`, or one that trains (`"esd"`, `"ap"`, `"age"`); see `diffusers_erase.METHODS`.
        residual: share of the way to the target that is left, in (0, 1); 0.02 (default) is strong, 0.3 mild.
        tokens: which rows to edit: `last` subject token or all of the `name`, `eot`, `pads`, joined by `+`; `all`.
            By default `last+eot`. `"uce"` has its own tokens, templates and strength.
        templates: contexts over which a name is averaged, each with one `{}`; by default the pack's.
        gate: threshold τ below which a resemblance is let through (map form only), such as 0.7; None for a linear edit.
        pack: base pack: a JSON file, a recipe, or None for the model's own (`erasure_pack.json` in its folder), else general English.
        options: the method's own.

    Raises:
        EraseError: in one line, what is wrong with the request.

    Example:
        >>> adapter = erase(pipe, "Van Gogh", target="a painter")
        >>> adapter.save_pretrained("erase-van-gogh")
    """
    concepts = names_of(concept, once=False)
    kept = "auto" if preserve == "auto" else names_of(preserve)
    others = "auto" if coreferences == "auto" else names_of(coreferences)
    chosen, settings = method_named(method, options)
    goals = _targets(chosen.target if target is None else target, concepts, several=not isinstance(concept, str))
    _check_request(chosen, residual, tokens, templates, gate, pack)
    looked_in = None in goals or kept == "auto" or (others == "auto" and isinstance(candidates, (str, Path)))
    if candidates is not None and "candidates" in chosen.options:
        settings["candidates"] = candidates
    elif candidates is not None and not looked_in:
        raise EraseError("nothing is searched among these candidates: say target='auto', or leave them out")
    encoder = Encoder(pipe)
    recipe = packs.recipe_of(pipe, pack)
    asked = {"residual": residual, "tokens": tokens, "templates": templates and tuple(templates)}
    reading: dict[str, Any] = READ | {"templates": recipe.templates}
    reading |= {key: value for key, value in asked.items() if value is not None}
    decided = reading | {key: value for key, value in chosen.fixed.items() if key in reading}
    searched = {key: value or reading[key] for key, value in decided.items()}  # where a method has none of its own
    plans = targets.choose(encoder, recipe, concepts, goals, kept, candidates, others, **searched)
    stands = {space: cache(partial(packs.pack_on, encoder, recipe, space)) for space in encoder.widths}
    whole = [
        Task(
            encoder=encoder,
            concept=plan.concept,
            coreferences=plan.coreferences,
            targets=plan.target,
            preserve=plan.preserve,
            erased=tuple(n for other in plans if other is not plan for n in (other.concept, *other.coreferences)),
            gate=None if gate is None else Gate(gate),
            pack=stands[TEXT],
            **decided,
        )
        for plan in plans
    ]
    _check(whole)
    made = []
    for task in whole:
        if chosen.training is not None:
            made.append(_learned(pipe, task, chosen, settings))
        else:
            tasks = {space: replace(task, space=space, pack=pack) for space, pack in stands.items()}
            made.append(_adapter(tasks, chosen, settings, hub.model_name(pipe)))
    return made[0] if len(made) == 1 else compose(*made)


def _adapter(tasks: dict[str, Task], method: Method, settings: dict[str, Any], base_model: str) -> ErasureAdapter:
    edits = {space: method.run(task, **settings).to(torch.float32) for space, task in tasks.items()}
    task = tasks[TEXT]
    recipe = Recipe(
        concept=task.concept,
        coreferences=task.coreferences,
        targets=task.targets,
        preserve=task.preserve,
        method=method.name,
        options=settings,
        tokens=task.tokens,
        templates=None if task.templates == TEMPLATES else task.templates,
        residual=float(f"{max(edit.residuals()[task.concept] for edit in edits.values()):.3g}"),
        effect=round(effect(task.encoder, edits, task.concept), 4),
    )
    return compose(ErasureAdapter(edits, task.encoder.fingerprint(), (recipe,), base_model))


def _learned(pipe: Any, task: Task, method: Method, settings: dict[str, Any]) -> ErasureAdapter:
    learned = method.run(task, pipe, **settings)
    recipe = Recipe(
        concept=task.concept,
        coreferences=task.coreferences,
        targets=learned.targets or task.targets,
        preserve=task.preserve,
        method=method.name,
        options=learned.told,
        tokens="all",
        templates=None if task.templates == TEMPLATES else task.templates,
        residual=None,
        effect=None,
    )
    return compose(
        ErasureAdapter({}, task.encoder.fingerprint(), (recipe,), hub.model_name(pipe), factors=learned.factors)
    )


def _check_request(
    method: Method,
    residual: float | None,
    tokens: str | None,
    templates: Sequence[str] | None,
    gate: float | None,
    pack: Any,
) -> None:
    """Raise on numbers and contexts that make no sense, and on what the method decides itself."""
    if templates is not None:
        check_templates(templates)
    asked = {
        "residual": residual,
        "tokens": tokens,
        "templates": templates and tuple(templates),
        "gate": gate,
        "pack": pack,
    }
    for name, value in asked.items():
        if name in method.fixed and value not in (None, method.fixed[name]):
            raise EraseError(f"method {method.name!r} decides {name} itself: leave it out, or use method='ridge'")
    if residual is not None:
        check_residual(residual)
    if gate is not None and not 0 < gate < 1:
        raise EraseError(
            f"gate is the resemblance below which the edit lets go, between 0 and 1, such as 0.7: got {gate}"
        )


def _targets(target: Any, concepts: tuple[str, ...], several: bool) -> list[tuple[str, ...] | None]:
    """One tuple of names for each concept; `()` stands for the empty prompt, None for a target that is to be searched."""
    if not concepts:
        raise EraseError("no concept was given: expected its name, such as 'Van Gogh'")
    each = list(target) if several and not isinstance(target, str) else [target] * len(concepts)
    if len(each) != len(concepts):
        raise EraseError(
            f"{len(concepts)} concepts but {len(each)} targets: give one target, or a list with one for each concept"
        )
    return [None if goal == "auto" else () if goal in ("null", "") else names_of(goal) for goal in each]


def _check(tasks: Sequence[Task]) -> None:
    """Raise unless every task makes sense, and none sends its concept to one that another erases."""
    for task in tasks:
        _check_names(task)
        if both := [target for target in task.targets if same_name(target) in map(same_name, task.erased)]:
            raise ConflictError(
                f"{task.concept!r} would be sent to {both[0]!r}, which is erased too: choose another target, or let it be searched"
            )


def _check_names(task: Task) -> None:
    for name in (task.concept, *task.coreferences, *task.targets, *task.preserve):
        task.encoder.check_name(name)
    if same_name(task.concept) in map(same_name, task.coreferences):
        raise EraseError(
            f"{task.concept!r} is the concept itself: leave it out of coreferences, which are its other names"
        )
    own = {same_name(name) for name in (task.concept, *task.coreferences)}
    if both := [t for t in task.targets if same_name(t) in own]:
        raise EraseError(
            f"{task.concept!r} would be sent to {both[0]!r}, itself: choose a target that is something else"
        )
    if both := [p for p in task.preserve if same_name(p) in own]:
        raise EraseError(f"{both[0]!r} is to be erased and preserved: take it out of one of the two lists")
    if task.tokens and "pads" in roles_of(task.tokens, 1) and task.gate is None and task.pack().hard is None:
        raise EraseError("tokens with 'pads' need a base pack with hard rows: every prompt's pads resemble each other")
