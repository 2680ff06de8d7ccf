"""Rows as values: the edit, the base pack it stands on, and how edits are combined.

An `Edit` is a set of rows (c, d, s): where the text state is c, behave as if it were c + d, with strength s. A row with
offset 0 preserves its key. Edits hold no solution: composing is the union of the rows, solved again, which makes it exact,
commutative, associative and idempotent. Taking a concept out is solving without its rows.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from . import solve
from .errors import ConflictError, EraseError


class Gate(NamedTuple):
    """Soft threshold on a detector x = e·a: the row acts as x·σ((|x| − threshold)/width), so weak resemblance is let through."""

    threshold: float
    width: float = 0.04


class Label(NamedTuple):
    """What a row is about. Names are compared by `same_name`."""

    concept: str
    """The concept that the row belongs to; of a preserved row, the preserved name."""
    name: str
    """The name whose text state is the key: the concept's own or a coreference."""
    role: str
    """Token role: `subject`, `eot`, `pads`, or `name:i` for the i-th token of a name."""
    targets: tuple[str, ...] | None
    """Where the key is sent: one name, the mean of several, `()` for the empty prompt, None for a preserved row."""
    gate: Gate | None = None

    @classmethod
    def from_json(cls, entry: Sequence) -> "Label":
        concept, name, role, targets, gate = entry
        return cls(
            concept, name, role, None if targets is None else tuple(targets), None if gate is None else Gate(*gate)
        )


def same_name(name: str) -> str:
    """The form in which names are compared: case and runs of white space do not tell concepts apart."""
    return " ".join(name.split()).casefold()


def contains(name: str, part: str) -> bool:
    """Whether `name` holds `part`, or its plural, as whole words: "cat food" and "Cats" hold "cat", "catfish" does not."""
    words, wanted = ([_forms(word) for word in re.findall(r"\w+", same_name(text))] for text in (name, part))
    if not wanted:  # a name of signs only, such as "++"
        return same_name(name) == same_name(part)
    places = range(len(words) - len(wanted) + 1)
    return any(all(a & b for a, b in zip(words[i:], wanted, strict=False)) for i in places)


def _forms(word: str) -> set[str]:
    """The word, and what it may be the regular plural of. Irregular ones (mice) are left to the model's own judgement."""
    found = {word}
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        found.add(word[:-1])
        if word.endswith("ies"):
            found.add(word[:-3] + "y")
        elif word.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
            found.add(word[:-2])
    return found


def names_of(given: str | Iterable[str], *, once: bool = True) -> tuple[str, ...]:
    """Names as they were given, each once; a text is one name. Whether it can be read, `Encoder.check_name` says.

    Raises:
        EraseError: no names, or a word among them that stands for something else.
    """
    if not isinstance(given, Iterable):
        raise EraseError(f"a name is a text such as 'Van Gogh', names are a list of texts: got {given!r}")
    if isinstance(given, str):
        return (given.strip(),)
    names = tuple(name.strip() if isinstance(name, str) else name for name in given)
    if reserved := [name for name in names if name in RESERVED]:
        raise EraseError(
            f"{reserved[0]!r} is no name and stands alone: give it instead of the list, or names without it"
        )
    return tuple(dict.fromkeys(names)) if once else names


def check_residual(residual: float) -> None:
    """Raise unless `residual` is a share that can be left."""
    if not 0 < residual < 1:
        raise EraseError(
            f"residual is the share of the concept that is left, between 0 and 1, such as 0.02: got {residual}"
        )


RESERVED = ("auto", "null")
"""What is said instead of names: they are searched for, or the empty prompt is meant."""

MANY = 512
"""Beyond so many rows a set is solved by taking rows out of a larger one that is solved already, where there is one."""

IDENTITY = "identity"
"""How the digest of a pack without a background begins."""

SATURATED = 0.6
"""Saturation up to which other concepts were seen to stay: 56 of 56 pictures at 0.61 on emoji-sd, 47 at 0.83 (docs/benchmarks.md)."""


@dataclass(frozen=True, eq=False)
class Pack:
    """A base pack: what every edit that stands on it leaves alone.

    Softly, through H = ridge·I + moment; absolutely, through the hard rows. UCE's λI is a pack without moment and hard rows.
    The digest names the recipe and the encoder, never tensor bytes, so that two machines agree on it.
    """

    name: str
    digest: str
    ridge: float
    width: int
    moment: Tensor | None = None
    """`[d, d]`, second moment of background states."""
    hard: Tensor | None = None
    """`[h, d]`, states that must not move: the start token and the centroids of the empty prompt."""

    def pull(self, keys: Tensor) -> Tensor:
        """U = C G `[k, d]` in float64: keys seen through this pack (see `solve.pull`)."""
        if self.moment is None and self.hard is None:
            return keys.double() / self.ridge
        gram = torch.eye(self.width, dtype=torch.float64) * self.ridge
        if self.moment is not None:
            gram = gram + self.moment.double()
        return solve.pull(keys, gram, keys.new_zeros(0, self.width) if self.hard is None else self.hard)


class Leftover(NamedTuple):
    """What a solved set leaves of its rows' offsets: with e = d − cX of each row, `[k]` each, float64."""

    squares: Tensor
    """‖e‖²."""
    inner: Tensor
    """⟨d, e⟩."""

    @classmethod
    def of(cls, offsets: Tensor, left: Tensor) -> "Leftover":
        """From D and D − CX `[k, d]`."""
        return cls(torch.linalg.vector_norm(left, dim=1) ** 2, (offsets * left).sum(dim=1))

    def less(self, rows: list[int], moved: Tensor, kept: Tensor, asked: Tensor, change: Tensor) -> "Leftover":
        """For some of the rows, when each e becomes e + L Q: L `[k, r]`, with E Qᵀ, D Qᵀ `[k, r]` and Q `[r, d]`."""
        L = moved[rows].double()
        squares = self.squares[rows] + (L * (2 * kept[rows] + L @ (change @ change.mT))).sum(dim=1)
        return Leftover(squares.clamp_min(0), self.inner[rows] + (L * asked[rows]).sum(dim=1))


@dataclass(frozen=True, eq=False)  # tensors have no useful ==; compare .digest
class Edit:
    """Rows (c, d, s) on one base pack. Frozen, checked on construction; its identity is `digest`.

    Example:
        >>> edit = compose(van_gogh.edit, monet.edit)
        >>> edit.residuals()
        {'Monet': 0.02, 'Van Gogh': 0.02}
    """

    labels: tuple[Label, ...]
    keys: Tensor
    """C `[k, d]`: text states, one a row."""
    offsets: Tensor
    """D `[k, d]`: target minus key; 0 where the key is preserved."""
    strengths: Tensor
    """s `[k]`, positive: weight of each row in the ridge problem."""
    pulled: Tensor
    """U `[k, d]`: all that composing needs to know of the pack."""
    pack: str
    """Name of the base pack."""
    pack_digest: str

    def __post_init__(self):
        k = len(self.labels)
        shapes = [tuple(t.shape) for t in (self.keys, self.offsets, self.pulled)]
        if self.keys.ndim != 2 or len(set(shapes)) > 1 or self.keys.shape[0] != k or self.strengths.shape != (k,):
            raise EraseError(
                f"an edit pairs each of its {k} labels with one key, offset and pulled row [k, d] and one strength [k]: "
                f"got {', '.join(map(str, shapes))} and strengths {tuple(self.strengths.shape)}"
            )
        if not all(bool(torch.stack(t.aminmax()).isfinite().all()) for t in self.rows if t.numel()):
            raise EraseError("an edit holds finite numbers only: found NaN or infinity; erase the concept again")
        if not bool((self.strengths > 0).all()):
            raise EraseError("every row of an edit has a positive strength; leave a row out instead of giving it none")
        for gate in filter(None, (label.gate for label in self.labels)):
            if not (math.isfinite(gate.threshold) and 0 < gate.width < math.inf):
                raise EraseError(f"a gate has a finite threshold and a positive width: got {tuple(gate)}")
        if self.moving.tolist() != [label.targets is not None for label in self.labels]:
            raise EraseError("a row has an offset exactly where its label names a target: labels and offsets disagree")

    @property
    def width(self) -> int:
        """d, the width of the text states."""
        return self.keys.shape[1]

    @property
    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(C, D, U, s), as `solve` takes them."""
        return self.keys, self.offsets, self.pulled, self.strengths

    @cached_property
    def moving(self) -> Tensor:
        """`[k]` bool: rows with an offset; the others preserve their key."""
        return torch.linalg.vector_norm(self.offsets, ord=math.inf, dim=1) > 0

    @property
    def concepts(self) -> tuple[str, ...]:
        """The erased concepts, each once."""
        return tuple(dict.fromkeys(label.concept for label in self.labels if label.targets is not None))

    @property
    def preserved(self) -> tuple[str, ...]:
        """The preserved names, each once."""
        return tuple(dict.fromkeys(label.name for label in self.labels if label.targets is None))

    @property
    def digest(self) -> str:
        """sha256 over labels, pack and the bytes of all rows in canonical order."""
        ordered = _unique([self])
        head = json.dumps([ordered.pack_digest, ordered.labels], ensure_ascii=False, separators=(",", ":"))
        digest = hashlib.sha256(head.encode())
        for tensor in (ordered.keys, ordered.offsets, ordered.strengths, ordered.pulled):
            digest.update(str(tensor.dtype).encode() + _bytes(tensor))
        return digest.hexdigest()

    def take(self, rows: Iterable[int]) -> "Edit":
        """The edit of these rows alone."""
        rows = list(rows)
        return replace(
            self,
            labels=tuple(self.labels[i] for i in rows),
            keys=self.keys[rows],
            offsets=self.offsets[rows],
            strengths=self.strengths[rows],
            pulled=self.pulled[rows],
        )

    def alone(self, concept: str) -> "Edit":
        """The rows of one concept, with all preserved rows."""
        return self.take(i for i, row in enumerate(self.labels) if row.targets is None or row.concept == concept)

    def only(self, concept: str) -> "Edit":
        """The moving rows of one concept, without any preserved row."""
        return self.take(i for i, row in enumerate(self.labels) if row.targets is not None and row.concept == concept)

    def to(self, dtype: torch.dtype) -> "Edit":
        """All rows in `dtype`; float32 is what files hold."""
        keys, offsets, strengths, pulled = (
            t.to(dtype) for t in (self.keys, self.offsets, self.strengths, self.pulled)
        )
        return replace(self, keys=keys, offsets=offsets, strengths=strengths, pulled=pulled)

    def detectors(self) -> Tensor:
        """A `[k, d]` in float64, solved over all rows together."""
        return solve.detectors(self.keys, self.pulled, self.strengths)

    @cached_property
    def matrix(self) -> Tensor:
        """X = AᵀD `[d, d]` in float64: the edit as one matrix, e ↦ e + e X."""
        if len(self.labels) > self.width:
            return solve.dense(*self.rows).edit
        return self.detectors().mT @ self.offsets.double()

    @cached_property
    def leftover(self) -> "Leftover":
        """What is left of each row's offset when all rows are solved together."""
        if len(self.labels) > self.width:
            return Leftover.of(self.offsets, solve.left_over(self.keys, self.offsets, self.matrix))
        return Leftover.of(self.offsets, solve.unmoved(self.keys, self.offsets, self.detectors()))

    def residuals(self) -> dict[str, float]:
        """Of each concept, the share of its offsets that is left when all rows are solved together."""
        left, asked = (torch.zeros(len(self.concepts), dtype=torch.float64) for _ in range(2))
        number = {concept: i for i, concept in enumerate(self.concepts)}
        moving = self.moving
        owner = torch.tensor(
            [number[label.concept] for label in self.labels if label.targets is not None], dtype=torch.int64
        )
        left.index_add_(0, owner, self.leftover.squares[moving])
        asked.index_add_(0, owner, self._asked[moving])
        return dict(zip(number, (left / asked).sqrt().tolist(), strict=True))

    @property
    def saturation(self) -> float | None:
        """How far the background moves, as a share of how far the erased concepts do (root mean squares): 0 is not at all.

        The background is the base pack's: √(tr(XᵀHX) / mean‖d‖²), found from the rows alone (docs/maths.md). It grows with every
        concept; beyond `SATURATED` it is not known that other concepts stay. None on a pack without a background (UCE's λI).
        """
        if self.pack_digest.startswith(IDENTITY):
            return None
        if not self.concepts:
            return 0.0
        squares, inner = self.leftover
        # tr(XᵀHX) = Σ s⟨cX, e⟩, because at the optimum HX = CᵀS(D − CX) wherever hard rows allow a move.
        energy = float((self.strengths.double() * (inner - squares)).sum())
        return math.sqrt(max(energy, 0.0) / float(self._asked[self.moving].mean()))

    @cached_property
    def _asked(self) -> Tensor:
        """`[k]`: squared norm of each offset."""
        return torch.linalg.vector_norm(self.offsets, dim=1, dtype=torch.float64) ** 2

    def calibrated(self, goal: float) -> "Edit":
        """This edit with one scalar strength for all its moving rows, so that the residual of the whole is `goal`.

        Args:
            goal: share of the offsets that is left, in (0, 1); 0.02 is strong, 0.3 mild.
        """
        weights = torch.where(self.moving, torch.ones_like(self.strengths), self.strengths)
        s = solve.strength_for(self.keys, self.offsets, self.pulled, weights, goal)
        if s is None:
            raise EraseError(
                f"no strength erases {', '.join(self.concepts)} to residual {goal}: a preserved name or the base pack holds "
                f"its text state in place; preserve fewer names or ask for a larger residual"
            )
        return replace(self, strengths=torch.where(self.moving, weights * s, weights))

    def softened(self, strength: float) -> "Edit":
        """This edit with `strength` w of its effect: residual r of each concept alone becomes 1 − w(1 − r)."""
        if strength == 1.0:
            return self
        found = self._milder.get(strength)
        if found is None:
            found = self._softened(strength)
            self._milder.clear()
            self._milder[strength] = found
        return found

    @cached_property
    def _milder(self) -> dict[float, "Edit"]:
        """What `softened` gave last: calibrating is the slow part, and a `Pool` knows its edits by identity."""
        return {}

    def _softened(self, strength: float) -> "Edit":
        strengths = self.strengths.clone()
        for concept in self.concepts:
            alone = self.alone(concept)
            r = solve.residual(alone.keys, alone.offsets, alone.detectors())
            milder = alone.calibrated(1 - strength * (1 - r))
            rows = [i for i, label in enumerate(self.labels) if label.targets is not None and label.concept == concept]
            strengths[rows] = milder.strengths[milder.moving]
        return replace(self, strengths=strengths)


def compose(*edits: Edit, chains: str = "error", residual_max: float | None = 0.2) -> Edit:
    """All rows of `edits`, each once, in canonical order; conflicts decided by name.

    Commutative, associative and idempotent to the last bit (a followed chain sums offsets: associative to rounding).

    - A name that one edit preserves and another erases is erased: its preserved rows are left out.
    - A target that another edit erases is an error, or with `chains="follow"` the key goes on to where that target goes.
    - One key with two targets is an error.

    Args:
        residual_max: a concept may not end with more than this share of its offsets left (nor 0.1 above its own residual,
            where it was meant milder); None switches the check off.

    Raises:
        ConflictError: the edits stand on different packs, or contradict each other.
    """
    return Pool(edits).compose(edits, chains=chains, residual_max=residual_max)


class Pool:
    """Some edits' rows, each once and in canonical order: any choice among the edits composes by picking rows from it.

    `Pool(edits).compose(chosen)` has the rows of `compose(*chosen)`, to the bit. Where there are many, its solution is that of
    the whole pool less the rows that are missing (`solve.without`), equal up to rounding and a hundred times cheaper. A pool
    is a value: what it has solved for depends on its edits alone, never on what was chosen before.
    """

    def __init__(self, edits: Sequence[Edit]):
        if not edits:
            raise EraseError("compose needs at least one edit")
        for other in edits[1:]:
            if other.pack_digest != edits[0].pack_digest or other.width != edits[0].width:
                raise ConflictError(
                    f"cannot compose {', '.join(edits[0].concepts)} with {', '.join(other.concepts)}: they stand on different "
                    f"base packs ({edits[0].pack} {edits[0].pack_digest[:8]}, {other.pack} {other.pack_digest[:8]}); "
                    f"erase one of them again on the other's pack or with the same method options"
                )
        self.edits = tuple(edits)
        self.union, self.owners = _union(edits)

    def holds(self, edits: Iterable[Edit]) -> bool:
        """Whether these very edits are among the pool's."""
        own = {id(edit) for edit in self.edits}
        return all(id(edit) in own for edit in edits)

    def compose(self, chosen: Sequence[Edit], *, chains: str = "error", residual_max: float | None = 0.2) -> Edit:
        """`compose` of some of the pool's own edits."""
        wanted = {id(edit) for edit in chosen}
        places = {n for n, edit in enumerate(self.edits) if id(edit) in wanted}
        rows = [i for i, owners in enumerate(self.owners) if not places.isdisjoint(owners)]
        edit = self.union if len(rows) == len(self.owners) else self.union.take(rows)
        if self._plain:
            self._solve(edit, rows)
        else:
            edit = _decided(edit, chains)
        if residual_max is not None:
            _check_residuals(edit, residual_max)
        return edit

    @cached_property
    def _plain(self) -> bool:
        """Whether no name is erased that another row preserves or is sent to: then there is no conflict in any choice either."""
        erased = _erased(self.union)
        named = (t for row in self.union.labels for t in ((row.name,) if row.targets is None else row.targets))
        if any(same_name(name) in erased for name in named):
            return False
        try:
            _check_one_target(self.union)
        except ConflictError:
            return False
        return True

    @cached_property
    def _solved(self) -> solve.Dense:
        return solve.dense(*self.union.rows)

    @cached_property
    def _left(self) -> tuple[Tensor, Leftover]:
        left = solve.left_over(self.union.keys, self.union.offsets, self._solved.edit)
        return left.to(self.union.keys.dtype), Leftover.of(self.union.offsets, left)

    def _solve(self, edit: Edit, rows: list[int]) -> None:
        """Give `edit`, whose rows these are, its solution, where taking rows out of the pool's is cheaper than solving."""
        gone = sorted(set(range(len(self.owners))) - set(rows))
        if len(rows) <= max(MANY, edit.width) or len(gone) > edit.width // 4:
            return
        matrix, (left, leftover) = self._solved.edit, self._left
        if gone:
            P, Q = solve.without(self._solved, *(t[gone] for t in self.union.rows))
            matrix = matrix - P @ Q
            # What is left is a measure, not a result: the rows' own precision does, and touches half the memory.
            p, q = P.to(left.dtype), Q.to(left.dtype)
            leftover = leftover.less(rows, self.union.keys @ p, left @ q.mT, self.union.offsets @ q.mT, Q)
        # As if computed by the edit itself, up to rounding.
        vars(edit).update(matrix=matrix, leftover=leftover, _asked=self.union._asked[rows])


def compose_spaces(
    sets: Sequence[Mapping[str, Edit]],
    *,
    chains: str = "error",
    residual_max: float | None = 0.2,
    pools: dict[str, Pool] | None = None,
) -> dict[str, Edit]:
    """`compose` in every space of text states that one of `sets` (edits by space) has.

    Args:
        pools: by space; a pool that holds the edits is used, another is put in its place. None: none is kept.
    """
    pools = {} if pools is None else pools
    composed = {}
    for space in sorted({space for edits in sets for space in edits}, reverse=True):  # text first
        chosen = [edits[space] for edits in sets if space in edits]
        if space not in pools or not pools[space].holds(chosen):
            pools[space] = Pool(chosen)
        composed[space] = pools[space].compose(chosen, chains=chains, residual_max=residual_max)
    return composed


def marks(edits: Mapping[str, Edit]) -> dict[str, dict[str, str]]:
    """Of each erased concept a digest of its rows in each space: equal where it is erased by the same rows."""
    found: dict[str, dict[str, str]] = {}
    for space, edit in edits.items():
        ordered = _unique([edit])
        digests = {concept: hashlib.sha256() for concept in edit.concepts}
        for label, *row in zip(ordered.labels, *ordered.rows, strict=True):
            if label.targets is not None:
                digests[label.concept].update(json.dumps(label).encode() + b"".join(map(_bytes, row)))
        for concept, digest in digests.items():
            found.setdefault(concept, {})[space] = digest.hexdigest()
    return found


def saturation(edits: Mapping[str, Edit]) -> float | None:
    """`Edit.saturation` of several spaces, the largest; None where none is known."""
    return max((found for edit in edits.values() if (found := edit.saturation) is not None), default=None)


def too_full(saturation: float | None) -> str:
    """A warning for a set that moves other concepts more than was seen to be harmless, else nothing."""
    if saturation is None or saturation <= SATURATED:
        return ""
    return (
        f": beyond {SATURATED:g} other concepts may suffer; erase fewer together, or with a gate, and look at pictures"
    )


def overruled(edits: Sequence[Edit]) -> tuple[str, ...]:
    """Names that some of `edits` preserve and others erase: composing leaves their preserved rows out."""
    erased = {same_name(row.name) for edit in edits for row in edit.labels if row.targets is not None}
    return tuple(sorted({name for edit in edits for name in edit.preserved if same_name(name) in erased}))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def _unique(edits: Sequence[Edit]) -> Edit:
    """The rows of all edits, each once, ordered by label and then by bytes: the same set always gives the same tensors."""
    return _union(edits)[0]


def _union(edits: Sequence[Edit]) -> tuple[Edit, list[list[int]]]:
    """The rows of all edits as `_unique` has them, and of each the places of the edits that hold it."""
    table = [torch.cat([e.keys, e.offsets, e.pulled, e.strengths[:, None]], dim=1) for e in edits]
    rows = torch.cat(table).contiguous()
    labels = [(label, n) for n, edit in enumerate(edits) for label in edit.labels]
    raw, size = memoryview(_bytes(rows)), rows.shape[1] * rows.element_size()
    found: dict[tuple[str, bytes], list[int]] = {}
    for i, (label, _) in enumerate(labels):
        found.setdefault((json.dumps(label, ensure_ascii=False), bytes(raw[i * size : (i + 1) * size])), []).append(i)
    same = [found[key] for key in sorted(found)]
    order, d = [places[0] for places in same], edits[0].width
    union = replace(
        edits[0],
        labels=tuple(labels[i][0] for i in order),
        keys=rows[order, :d],
        offsets=rows[order, d : 2 * d],
        pulled=rows[order, 2 * d : 3 * d],
        strengths=rows[order, -1],
    )
    return union, [[labels[i][1] for i in places] for places in same]


def _erased(edit: Edit) -> set[str]:
    return {same_name(label.name) for label in edit.labels if label.targets is not None}


def _decided(edit: Edit, chains: str) -> Edit:
    """A union of rows with its conflicts decided by name."""
    erased = _erased(edit)
    kept = [i for i, row in enumerate(edit.labels) if row.targets is not None or same_name(row.name) not in erased]
    edit = edit if len(kept) == len(edit.labels) else edit.take(kept)
    _check_one_target(edit)
    return _follow_chains(edit, erased, chains)


def _check_one_target(edit: Edit) -> None:
    seen: dict[object, tuple[Label, bytes]] = {}
    for label, key, offset in zip(edit.labels, edit.keys, edit.offsets, strict=True):
        if label.targets is None:
            continue
        for identity in ((same_name(label.name), label.role), _bytes(key)):
            first, to = seen.setdefault(identity, (label, _bytes(offset)))
            same = list(map(same_name, first.targets or ())) == list(map(same_name, label.targets))
            if not same or (identity == _bytes(key) and to != _bytes(offset)):
                raise ConflictError(
                    f"one key with two targets: {label.name!r} ({label.role}) is sent to {_say(first.targets)} and to "
                    f"{_say(label.targets)}; keep one of the two adapters"
                )


def _follow_chains(edit: Edit, erased: set[str], chains: str) -> Edit:
    """Rows whose target is itself erased, sent on to where that target goes; unchanged where there is none."""
    if not any(same_name(goal) in erased for row in edit.labels for goal in row.targets or ()):
        return edit
    where = {(same_name(row.name), row.role): i for i, row in enumerate(edit.labels) if row.targets is not None}
    labels, offsets = list(edit.labels), edit.offsets.clone()
    for i, label in enumerate(edit.labels):
        visited = {same_name(label.name)}
        while (goals := labels[i].targets) and any(same_name(t) in erased for t in goals):
            target = goals[0]
            # As `Task` does: inner tokens of a longer name went to the target's last token.
            onward = where.get((same_name(target), "subject" if label.role.startswith("name:") else label.role))
            if chains != "follow":
                raise ConflictError(
                    f"{label.concept!r} is sent to {target!r}, which is erased too, so it would land on an erased concept; "
                    f"erase both together, erase(pipe, [{label.concept!r}, {target!r}]), choose another target for "
                    f"{label.concept!r}, or compose with chains='follow'"
                )
            if len(goals) > 1 or onward is None or same_name(target) in visited:
                raise ConflictError(
                    f"the chain {label.concept!r} → {_say(goals)} cannot be followed: it is a circle, a mixture, or "
                    f"{target!r} has no row for the role {label.role!r}; choose another target for {label.concept!r}"
                )
            visited.add(same_name(target))
            offsets[i] = edit.keys[onward] + edit.offsets[onward] - edit.keys[i]  # exact also where templates differ
            labels[i] = labels[i]._replace(targets=edit.labels[onward].targets)
    return replace(edit, labels=tuple(labels), offsets=offsets)


def _check_residuals(edit: Edit, residual_max: float) -> None:
    for concept, reached in edit.residuals().items():
        if reached <= residual_max:
            continue
        alone = edit.alone(concept)
        own = solve.residual(alone.keys, alone.offsets, alone.detectors())
        if reached > max(residual_max, own + 0.1):
            raise ConflictError(
                f"in this set {reached:.0%} of {concept!r} would be left (alone: {own:.0%}, allowed: {residual_max:.0%}): "
                f"the concepts crowd each other; erase fewer together, or pass a larger residual_max"
            )


def _say(targets: tuple[str, ...] | None) -> str:
    return " + ".join(map(repr, targets)) if targets else "the empty prompt"
