"""`erase`: from a pipeline and a name to an adapter, in one screen."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from . import hub, methods, packs, targets  # noqa: F401 - importing the methods registers them
from .adapter import ErasureAdapter, Recipe, compose
from .edits import Gate, same_name
from .errors import EraseError
from .mapping import effect
from .sites import TEXT
from .task import Method, Task, method_named
from .text import TEMPLATES, Encoder, PackRecipe, check_templates, roles_of


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
        concept: what to erase, in words; several are composed: `erase(pipe, [a, b])` is `compose(erase(pipe, a), erase(pipe, b))`.
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
    concepts = _names(concept)
    kept = preserve if preserve == "auto" else tuple(dict.fromkeys(_names(preserve)))
    others = "auto" if coreferences == "auto" else tuple(dict.fromkeys(_names(coreferences)))
    chosen, settings = method_named(method, options)
    goals = _targets(chosen.target if target is None else target, concepts, several=not isinstance(concept, str))
    if templates is not None:
        check_templates(templates)
    asked = {"residual": residual, "tokens": tokens, "templates": templates and tuple(templates)}
    whatever = asked | {"gate": gate, "pack": pack}
    if clash := [
        key for key, value in whatever.items() if key in chosen.fixed and value not in (None, chosen.fixed[key])
    ]:
        raise EraseError(f"method {method!r} decides {clash[0]} itself: leave it out, or use method='ridge'")
    if residual is not None and not 0 < residual < 1:
        raise EraseError(
            f"residual is the share of the concept that is left, between 0 and 1, such as 0.02: got {residual}"
        )
    if gate is not None and not 0 < gate < 1:
        raise EraseError(
            f"gate is the resemblance below which the edit lets go, between 0 and 1, such as 0.7: got {gate}"
        )
    if candidates is not None and "candidates" in chosen.options:
        settings["candidates"] = candidates
    encoder = Encoder(pipe)
    recipe = packs.recipe_of(pipe, pack)
    defaults = {"residual": 0.02, "tokens": "last+eot", "templates": recipe.templates}
    given = {key: value for key, value in asked.items() if value is not None}
    decided = defaults | given | {key: value for key, value in chosen.fixed.items() if key in defaults}
    stands = {space: cache(partial(packs.pack_on, encoder, recipe, space)) for space in encoder.widths}
    reading = defaults | {key: value for key, value in decided.items() if key in given or value}
    plans = targets.choose(encoder, recipe, concepts, goals, kept, candidates, others, **reading)
    made = []
    for name, plan in zip(concepts, plans, strict=True):
        whole = Task(
            encoder=encoder,
            concept=name,
            coreferences=plan.coreferences,
            targets=plan.target,
            preserve=plan.preserve,
            gate=None if gate is None else Gate(gate),
            pack=stands[TEXT],
            **decided,
        )
        _check(whole)
        if chosen.training is not None:
            made.append(_learned(pipe, whole, chosen, settings))
            continue
        tasks = {space: replace(whole, space=space, pack=pack) for space, pack in stands.items()}
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


def _names(given: str | Iterable[str]) -> tuple[str, ...]:
    if not isinstance(given, Iterable):
        raise EraseError(f"a name is a text such as 'Van Gogh', names are a list of texts: got {given!r}")
    names = (given,) if isinstance(given, str) else tuple(given)
    return tuple(name.strip() if isinstance(name, str) else name for name in names)


def _targets(target: Any, concepts: tuple[str, ...], several: bool) -> list[tuple[str, ...] | None]:
    """One tuple of names for each concept; `()` stands for the empty prompt, None for a target that is to be searched."""
    if not concepts:
        raise EraseError("no concept was given: expected its name, such as 'Van Gogh'")
    each = list(target) if several and not isinstance(target, str) else [target] * len(concepts)
    if len(each) != len(concepts):
        raise EraseError(
            f"{len(concepts)} concepts but {len(each)} targets: give one target, or a list with one for each concept"
        )
    return [None if goal == "auto" else () if goal in ("null", "") else _names(goal) for goal in each]


def _check(task: Task) -> None:
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
