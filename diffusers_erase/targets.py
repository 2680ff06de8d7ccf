"""Target search: where to send a concept, so that it is gone and little else is hurt. No image, no training.

AGE (arXiv 2501.18950) found that the best target is closely related and not a synonym. Here the edit is a closed form, so
what each candidate would do to the keys and values of other names is computed (outlook.py, docs/targets.md), and the least
wins. That alone would choose a synonym: what is drawn alike is told by the denoiser's answer to pure noise (guess.py).
Candidates are compared by their bare names; the best of them again in the contexts in which `erase` reads names.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from . import packs, vocabulary
from .edits import Pack, check_residual, contains, names_of, same_name
from .errors import EraseError
from .guess import FirstGuess
from .outlook import Surroundings
from .sites import original_weights, sites, text_readers
from .text import Encoder, PackRecipe, roles_of

BARE = ("{}",)

SYNONYM_MAX, CHAIN_MAX = 0.4, 0.5
"""A candidate with a larger synonym score is refused, and one that the erasure of another concept would move further.

Measured on emoji-sd: all paraphrases of its objects score above 0.6, all their siblings below 0.2 (docs/targets.md).
"""

ALIAS = 0.5
"""A name that is more related than this to the concept is taken for another of its names: what it loses is no damage."""

NEAREST, SHORTLIST, AMONG, WORST = 3000, 8, 32, 10
"""How many of a vocabulary are compared, and how many at a time in context; how many names' damage counts; how many of these are told."""

LOOKED = 32
"""How many names `coreferences="auto"` asks the denoiser about."""

KEPT = 4
"""How many names `preserve="auto"` preserves."""


@dataclass(frozen=True)
class Target:
    """A place to send the concept, and what would come of it."""

    names: tuple[str, ...]
    """One name, several for their mean, `()` for the empty prompt."""
    collateral: float
    """Mean damage of the names that count: the share of the way to the empty prompt by which their keys and values move."""
    confusion: float
    """Mean share of its distance to the nearest other name that a name loses: damage that changes what it is read as."""
    hurt: tuple[tuple[str, float], ...]
    """The names that are hurt most, with their damage, the worst first."""
    residual: float
    """Share of the concept that stays when the target is preserved, at the strength that would do if it were not."""
    relatedness: float
    """1 − the target's distance to the concept in all keys and values, as a share of the way to the empty prompt."""
    synonym: float = math.nan
    """The same in what the denoiser makes of pure noise, of the concept's names the largest: 1 is the same picture. NaN where it was
    not asked."""

    def __str__(self) -> str:
        worst = ", ".join(f"{name} {damage:.1%}" for name, damage in self.hurt[:3])
        return f"{' + '.join(self.names) or 'the empty prompt'}: collateral {self.collateral:.2%} (worst: {worst})"


@dataclass(frozen=True)
class TargetRanking(Sequence[Target]):
    """Targets for one concept, best first, and why others were refused.

    Sorted by collateral: by bare names first, then eight at a time in context. So a longer ranking begins as a shorter one.

    Example:
        >>> ranking = search_targets(pipe, "Van Gogh", ["a painter", "Monet", "Rembrandt"])
        >>> adapter = erase(pipe, "Van Gogh", **ranking.options)
    """

    concept: str
    targets: tuple[Target, ...]
    refused: tuple[tuple[str, str], ...]
    """(name, reason)."""
    null: Target
    """The empty prompt, for comparison."""
    coreferences: tuple[str, ...]
    """Other names of the concept, erased with it."""
    preserve: tuple[str, ...]
    """Names that are preserved whatever the target is."""
    shield: bool
    """Whether the target is preserved too."""

    @property
    def options(self) -> dict[str, Any]:
        """What to give to `erase` for the best target."""
        best = self.targets[0].names
        kept = dict.fromkeys((*self.preserve, *(best if self.shield else ())))
        return {"target": best, "preserve": tuple(kept), "coreferences": self.coreferences}

    def __len__(self) -> int:
        return len(self.targets)

    @overload
    def __getitem__(self, index: int) -> Target: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Target]: ...
    def __getitem__(self, index: int | slice) -> Target | Sequence[Target]:
        return self.targets[index]


def search_targets(
    pipe: Any,
    concept: str,
    candidates: str | Path | Iterable[str] = "everyday",
    *,
    k: int = 8,
    coreferences: str | Sequence[str] = (),
    preserve: str | Sequence[str] = (),
    erased: str | Sequence[str] = (),
    among: str | Sequence[str] | None = None,
    mixture: int = 1,
    shield: bool = False,
    synonym_max: float = SYNONYM_MAX,
    residual: float = 0.02,
    tokens: str = "last+eot",
    templates: Sequence[str] | None = None,
    pack: str | Path | PackRecipe | None = None,
    on_words: Callable[[int, int], Any] = lambda done, total: None,
) -> TargetRanking:
    """The best places to send `concept`, with what each would hurt. Draws nothing, trains nothing, changes nothing.

    Args:
        concept: what to erase.
        candidates: names, or where they come from: "everyday", the words of the base pack's prompts; "neighbours" or all of the
            tokenizer's "words"; WordNet's folder (`vocabulary.candidates`).
        k: length of a ranking.
        coreferences: other names of the concept, erased with it; "auto" as in `erase`. None of them is a target.
        preserve: names that are preserved; "auto" for those that the edit would hurt most, found anew until the target repeats.
        erased: other concepts that are erased too: neither they, nor what their erasures move, are targets.
        among: names whose damage counts; None takes those that an edit of the concept moves most.
        mixture: up to this many names, 5 at most, are blended into one target, for styles; 1 looks at single names.
        shield: whether the target is preserved too, as AGE does; costs a row for each token role.
        synonym_max: candidates with a larger synonym score are refused.
        residual, tokens, templates, pack: as in `erase`. What is predicted is the method `ridge` with its own options, on its
            text states: of inner tokens (`name`) and of SDXL's pooled state nothing is told.
        on_words: called with (done, total) while many names are encoded; what is encoded is cached, a killed run goes on.

    Raises:
        EraseError: a name or number that makes no sense, or nothing to choose from; the message says why candidates were refused.

    Example:
        >>> search_targets(pipe, "Van Gogh", ["a painter", "Monet", "a photo"])[0].names
        ('a painter',)
    """
    if not 1 <= mixture <= 5:
        raise EraseError(f"mixture is the most names in one target, 1 to 5: got {mixture}")
    if not isinstance(k, int) or k < 1:
        raise EraseError(f"k is the length of the ranking, a whole number of at least 1: got {k!r}")
    recipe = packs.recipe_of(pipe, pack)
    kept = "auto" if preserve == "auto" else names_of(preserve)
    found = _searches(
        Encoder(pipe), recipe, (concept,), () if coreferences == "auto" else names_of(coreferences), names_of(erased),
        tokens=tokens, templates=recipe.templates if templates is None else tuple(templates),
        residual=residual, shield=shield, synonym_max=synonym_max, on_words=on_words,
    )  # fmt: skip
    if coreferences == "auto":
        found = _with_coreferences(found, candidates, () if kept == "auto" else kept)
    return found[0].ranking(candidates, None if among is None else names_of(among), kept, k, mixture)


class Plan(NamedTuple):
    """What is decided of one concept before anything is solved."""

    concept: str
    target: tuple[str, ...]
    preserve: tuple[str, ...]
    coreferences: tuple[str, ...]


def choose(
    encoder: Encoder,
    recipe: PackRecipe,
    concepts: Sequence[str],
    targets: Sequence[tuple[str, ...] | None],
    preserve: str | Sequence[str],
    candidates: str | Path | Iterable[str] | None,
    coreferences: str | Sequence[str] = (),
    **reading: Any,
) -> list[Plan]:
    """Of each concept a plan: where a target is None the best, where `preserve` is "auto" who is hurt most, where `coreferences` is
    "auto" the names that are drawn alike.

    Args:
        reading: tokens, templates and residual, as `erase` has decided them.
    """
    if None not in targets and "auto" not in (preserve, coreferences):
        given = zip(concepts, targets, strict=True)
        return [
            Plan(name, target, tuple(preserve), tuple(coreferences)) for name, target in given if target is not None
        ]
    source = "everyday" if candidates is None else candidates
    searches = _searches(encoder, recipe, concepts, () if coreferences == "auto" else coreferences, (), **reading)
    if coreferences == "auto":
        told = [name for target in targets for name in target or ()]
        searches = _with_coreferences(searches, source, (*told, *(() if preserve == "auto" else preserve)))
    plans = []
    for search, target in zip(searches, targets, strict=True):
        if target is None:
            best = search.ranking(source, None, preserve, 1, 1).options
            plans.append(Plan(search.own[0], **best))
        else:
            search.check(preserve)
            kept = search.hurt_most(target, search.counting(source)) if preserve == "auto" else tuple(preserve)
            plans.append(Plan(search.own[0], target, kept, search.own[1:]))
    return plans


def _with_coreferences(
    searches: Sequence["Search"], source: str | Path | Iterable[str], besides: Sequence[str]
) -> list["Search"]:
    """Each search with the names that its concept is drawn alike, and with those of the others among what is erased too.

    Args:
        source: where to look, if it says where from; else among everyday words.
        besides: names that are spoken for: targets, and what is preserved.
    """
    source = source if isinstance(source, (str, Path)) else "everyday"
    scores = [search.drawn_alike(source, besides) for search in searches]
    best = {name: max(each.get(name, 0.0) for each in scores) for each in scores for name in each}
    owner = {name: next(i for i, each in enumerate(scores) if each.get(name) == top) for name, top in best.items()}
    return [
        replace(
            search,
            own=search.own + tuple(name for name in scores[i] if owner[name] == i),
            erased=search.erased + tuple(name for name in owner if owner[name] != i),
        )
        for i, search in enumerate(searches)
    ]


def _searches(
    encoder: Encoder,
    recipe: PackRecipe,
    concepts: Sequence[str],
    coreferences: Sequence[str],
    erased: Sequence[str],
    tokens: str,
    **told: Any,
) -> list["Search"]:
    """A search for each concept, in which the others are erased too."""
    metric, pack = readout(encoder.pipe), packs.pack_on(encoder, recipe)
    known: dict[str, Tensor] = {}
    guess = FirstGuess(encoder, told["templates"])
    return [
        Search(
            encoder, pack, metric, guess, prompts=recipe.prompts, roles=roles_of(tokens, 1), own=(name, *coreferences),
            erased=(*erased, *(other for other in concepts if other != name)), known=known, **told,
        )
        for name in concepts
    ]  # fmt: skip


def readout(pipe: Any) -> Tensor:
    """M = Σ WᵀW/‖W‖² over every key and value that reads text `[d, d]`, float64: e M eᵀ is what a change e does to all layers."""
    denoiser = next(iter(text_readers(pipe).values()))
    weights = original_weights(denoiser)
    layers = [weights[f"{path}.weight"] for path in sites(denoiser) if not path.endswith("to_kv")]  # a copy
    if hidden := [weight for weight in layers if weight.is_meta or not weight.is_floating_point()]:
        raise EraseError(
            f"target search reads the key and value weights, which are {hidden[0].dtype} on {hidden[0].device} here: search on "
            f"the model in memory and unquantised, or name the target"
        )
    d = layers[0].shape[1]
    metric = torch.zeros(d, d, dtype=torch.float64)
    for weight in layers:
        W = weight.detach().cpu().double()
        metric.addmm_(W.mT, W / W.square().sum())
    return metric


@dataclass(frozen=True, eq=False)
class Search:
    """One concept on one encoder, and what a target for it has to heed."""

    encoder: Encoder
    pack: Pack
    metric: Tensor
    guess: FirstGuess
    own: tuple[str, ...]
    """The concept and its other names."""
    erased: tuple[str, ...]
    roles: tuple[str, ...]
    templates: tuple[str, ...]
    prompts: tuple[str, ...]
    """Of the base pack."""
    residual: float
    shield: bool = False
    synonym_max: float = SYNONYM_MAX
    on_words: Callable[[int, int], Any] = lambda done, total: None
    known: dict[str, Tensor] = field(default_factory=dict)
    """Rows in context that were encoded before; searches for several concepts share it."""

    def ranking(
        self,
        source: str | Path | Iterable[str],
        among: Sequence[str] | None,
        preserve: str | Sequence[str],
        k: int,
        most: int,
    ) -> TargetRanking:
        """The ranking; see `search_targets`."""
        self.check(preserve, among)
        names, refused = self._candidates(source)
        if not names:
            raise self._none_left(dict(refused))
        names, among = self._ordered(names, among)
        kept: tuple[str, ...] = () if preserve == "auto" else tuple(preserve)
        seen: set[tuple[str, ...]] = set()
        while True:
            spared = {name: "it is preserved" for name in names if preserve == "auto" and name in kept}
            left = [name for name in names if name not in spared]
            found = self._ranked(left, among, kept, k, most, dict(refused) | spared)
            best = found.targets[0].names
            if preserve != "auto" or best in seen:
                return found
            seen.add(best)
            sent = {name for target in seen for name in target}  # a target, even one of before, is not preserved
            kept = self.hurt_most(best, [name for name in among if name not in sent])

    def drawn_alike(self, source: str | Path, besides: Sequence[str] = ()) -> dict[str, float]:
        """Other names of the concept and their synonym scores: those that the denoiser answers alike, among the `LOOKED` whose text
        states lie nearest; none of `besides` and of what is erased too."""
        self.check(())
        found = vocabulary.candidates(self.encoder, self.own[0], source, self.prompts, self.templates)
        taken = {same_name(name) for name in (*self.own, *self.erased, *besides)}
        names = [name for name in found if same_name(name) not in taken]
        T = vocabulary.table(self.encoder, names, self.roles, BARE, self.on_words)
        nearest = self._around(T[:0], BARE).distance(T).argsort()[:LOOKED].tolist()
        scores = 1 - self.guess.distances(self.own[0], [(names[i],) for i in nearest])
        alike = {names[i]: score for i, score in zip(nearest, scores.tolist(), strict=True)}
        return {name: score for name, score in alike.items() if score > self.synonym_max}

    def check(self, preserve: str | Sequence[str], among: Sequence[str] | None = None) -> None:
        """Raise unless the names can be read, and none is to be erased and something else too."""
        check_residual(self.residual)
        kept = () if preserve == "auto" else preserve
        if among is not None and not among:
            raise EraseError("among is empty: name those whose damage counts, or leave it out for the most related")
        for name in (*self.own, *self.erased, *kept, *(among or ())):
            self.encoder.check_name(name)
        own = {same_name(name) for name in self.own}
        if both := [name for name in kept if same_name(name) in own]:
            raise EraseError(f"{both[0]!r} is to be erased and preserved: take it out of one of the two lists")
        if both := [name for name in among or () if same_name(name) in own]:
            raise EraseError(f"{both[0]!r} is to be erased, so what it loses is no damage: take it out of among")
        if both := [name for name in self.erased if same_name(name) in own]:
            raise EraseError(f"{both[0]!r} is the concept itself: take it out of what is erased too")

    def counting(self, source: str | Path | Iterable[str]) -> list[str]:
        """Names whose damage counts: of the candidates and the tokenizer's nearest words those that an edit of the concept moves most."""
        return self._ordered(self._candidates(source)[0], None)[1]

    def _candidates(self, source: str | Path | Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
        return self._allowed(vocabulary.candidates(self.encoder, self.own[0], source, self.prompts, self.templates))

    def _allowed(self, names: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
        """Candidates that their wording does not rule out, and the others with the reason."""
        left, refused = [], []
        for name in names:
            if any(contains(name, part) for part in self.own):
                refused.append((name, "it contains the concept"))
            elif any(contains(name, part) for part in self.erased):
                refused.append((name, "it is erased too"))
            else:
                left.append(name)
        return left, refused

    def _ordered(self, names: list[str], among: Sequence[str] | None) -> tuple[list[str], list[str]]:
        """By bare names: the candidates, those that would hurt least first, and the names whose damage counts."""
        if len(names) <= SHORTLIST and among is not None:
            return names, list(among)
        near, _ = self._allowed(self.encoder.nearest_words(self.own[0], self.encoder.words(), AMONG))
        pool = list(dict.fromkeys([*names, *(near if among is None else among)]))
        T = vocabulary.table(self.encoder, pool, self.roles, BARE, self.on_words)
        view = self._around(T[:0], BARE)
        related = 1 - view.distance(T)
        if among is None:
            following = view.following(T).where(related <= ALIAS, -1.0)
            among = [pool[i] for i in following.argsort(descending=True)[:AMONG].tolist() if following[i] >= 0]
            if not among:
                raise EraseError(
                    f"no name is near {self.own[0]!r} and another: name those whose damage counts (among)"
                )
        if len(names) <= SHORTLIST:
            return names, list(among)
        place = {name: i for i, name in enumerate(pool)}
        view = replace(view, names=T[[place[name] for name in among]])
        nearest = related[: len(names)].argsort(descending=True)[:NEAREST]
        collateral = view.damage(view.outlook(T[nearest, None])).mean(1).nan_to_num(torch.inf)
        return [names[i] for i in nearest[collateral.argsort(stable=True)].tolist()], list(among)

    def _ranked(
        self,
        names: list[str],
        among: list[str],
        preserve: tuple[str, ...],
        k: int,
        most: int,
        reasons: dict[str, str],
    ) -> TargetRanking:
        """Candidates as `erase` would read them, the best first."""
        pool = 2 * most + 2  # what blends are made of
        view = self._around(self._rows(among), self.templates, preserve)
        ranked = self._accepted(view, names, among, k if most == 1 else max(k, pool), reasons)
        if not ranked:
            raise self._none_left(reasons)
        if most > 1:
            blends = self._blends(view, ranked[:pool], among, most)
            ranked = sorted([*ranked[:pool], *blends], key=_collateral) + ranked[pool:]
        null = _judged(replace(view, shield=False), [()], view.empty[None, None], among)[0]
        null = replace(null, synonym=0.0)
        return TargetRanking(
            self.own[0], tuple(ranked[:k]), tuple(reasons.items()), null, self.own[1:], preserve, self.shield
        )

    def _none_left(self, reasons: dict[str, str]) -> EraseError:
        told = "; ".join(f"{name!r}: {reason}" for name, reason in list(reasons.items())[:3]) or "none was given"
        return EraseError(f"no candidate is left for {self.own[0]!r} ({told}): give other candidates")

    def _accepted(
        self, view: Surroundings, names: list[str], among: list[str], k: int, reasons: dict[str, str]
    ) -> list[Target]:
        """The `k` best of `names`, which come in order, and why better ones are none: no more are looked at than it takes."""
        ranked = []
        for start in range(0, len(names), SHORTLIST):
            some = names[start : start + SHORTLIST]
            T = self._rows(some)
            chains = dict(zip(some, self._chains(T), strict=True))
            for target in sorted(_judged(view, [(n,) for n in some], T[:, None], among), key=_collateral):
                name, target = target.names[0], self._looked_at(target)
                if reason := self._reason(target) or chains[name]:
                    reasons[name] = reason
                else:
                    ranked.append(target)
                if len(ranked) == k:
                    return ranked
        return ranked

    def _looked_at(self, target: Target) -> Target:
        """The target with its synonym score, unless it is none anyway."""
        if math.isnan(target.collateral):
            return target
        return replace(target, synonym=max(1 - float(self.guess.distances(name, [target.names])) for name in self.own))

    def _blends(self, view: Surroundings, ranked: Sequence[Target], among: list[str], most: int) -> list[Target]:
        """Means of 2 to `most` of these single names, each grown by the name that costs least."""
        pool = [target.names[0] for target in ranked]
        grown, mixture = [], (pool[0],)
        for _ in range(min(most, len(pool)) - 1):
            options = [(*mixture, name) for name in pool if name not in mixture]
            T = torch.stack([self._rows(names) for names in options])
            best = min(_judged(view, options, T, among), key=_collateral)
            mixture = best.names
            grown.append(self._looked_at(best))
        return [target for target in grown if not self._reason(target)]

    def _reason(self, target: Target) -> str | None:
        """Why this is no target, whatever it would hurt."""
        if math.isnan(target.collateral):
            return f"no strength erases the concept{' while it is preserved' if self.shield else ''}"
        if target.synonym > self.synonym_max:
            return f"a synonym (score {target.synonym:.2f}): the model draws nearly the concept"
        return None

    def hurt_most(self, target: tuple[str, ...], among: Sequence[str]) -> tuple[str, ...]:
        """Of `among` the names that the edit to `target` would hurt most if none were preserved: those above the mean, `KEPT` at most."""
        others = [name for name in among if name not in target]
        if not others:
            return ()
        view = self._around(self._rows(others), self.templates)
        if target:
            found = view.outlook(self._rows(target)[None])
        else:
            found = replace(view, shield=False).outlook(view.empty[None, None])
        damage = view.damage(found)[0]
        worst = damage.argsort(descending=True)[:KEPT].tolist()
        return tuple(others[i] for i in worst if damage[i] > damage.mean())

    def _chains(self, T: Tensor) -> list[str | None]:
        """Of each candidate, which other erasure would move it, if any does."""
        found: list[str | None] = [None] * len(T)
        for name in self.erased:
            moved = replace(self._around(T[:0], self.templates), concept=self._rows([name])[0]).following(T)
            for i in (moved > CHAIN_MAX).nonzero().flatten().tolist():
                found[i] = f"the erasure of {name!r} moves it too ({float(moved[i]):.0%} as far)"
        return found

    def _around(self, names: Tensor, templates: Sequence[str], preserve: Sequence[str] = ()) -> Surroundings:
        own = vocabulary.table(self.encoder, self.own, self.roles, BARE) if templates == BARE else self._rows(self.own)
        null = self.encoder.null_rows(self.roles)
        return Surroundings(
            concept=own[0],
            others=own[1:],
            names=names,
            empty=torch.stack([null[role] for role in self.roles]),
            inverse=self._inverse,
            metric=self.metric,
            residual=self.residual,
            preserved=self._rows(preserve) if preserve else own[:0],
            shield=self.shield,
        )

    def _rows(self, names: Sequence[str]) -> Tensor:
        """Rows of names in context, each encoded once."""
        if new := [name for name in dict.fromkeys(names) if name not in self.known]:
            rows = vocabulary.table(self.encoder, new, self.roles, self.templates, self.on_words)
            self.known.update(zip(new, rows, strict=True))
        return torch.stack([self.known[name] for name in names])

    @cached_property
    def _inverse(self) -> Tensor:
        return self.pack.pull(torch.eye(self.pack.width, dtype=torch.float64))


def _judged(view: Surroundings, mixtures: Sequence[tuple[str, ...]], T: Tensor, among: Sequence[str]) -> list[Target]:
    """A `Target` for each of a few mixtures with the rows T `[N, n, r, d]`; `among` are the names of `view`."""
    found = view.outlook(T)
    damage, confusion, middle = view.damage(found), view.confusion(found), T.mean(1)
    related = 1 - view.distance(middle)
    judged = []
    for i, names in enumerate(mixtures):
        worst: list[int] = damage[i].argsort(descending=True)[:WORST].tolist()
        judged.append(
            Target(
                names=names,
                collateral=float(damage[i].mean()),
                confusion=float(confusion[i]),
                hurt=tuple((among[j], float(damage[i, j])) for j in worst),
                residual=float(found.residuals[i]),
                relatedness=float(related[i]),
            )
        )
    return judged


def _collateral(target: Target) -> float:
    return math.inf if math.isnan(target.collateral) else target.collateral
