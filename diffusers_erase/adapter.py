"""The artefact: an erasure as a frozen value that is saved, loaded, composed and exported.

An adapter is an `Edit` for each space of text states, and its provenance. It holds no pipeline and no solution; the same rows
have three forms, the map on text states, edited weights, and a LoRA. Where an erasure is no map of text states, the adapter
holds `Factors` instead of rows: they have the last two forms.
"""

import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import card, edits, factors, hub, signing
from .edits import Edit, Label
from .errors import ConflictError, EraseError, MismatchError
from .factors import Factors, Pair
from .sites import ATTRIBUTE, TEXT, family_of, kohya_name, layer, matrix, sites, text_readers, unwrapped, widths
from .text import Fingerprint
from .version import __version__

TENSORS = ("keys", "offsets", "pulled", "strengths")


@dataclass(frozen=True)
class Recipe:
    """How one concept was erased: enough to do it again."""

    concept: str
    coreferences: tuple[str, ...]
    targets: tuple[str, ...]
    preserve: tuple[str, ...]
    method: str
    options: dict[str, Any]
    tokens: str
    templates: tuple[str, ...] | None
    """None for the package's own list."""
    residual: float | None
    """Reached on the concept alone; None where its rows or factors do not tell."""
    effect: float | None
    """Share of the way to its target that the bare name goes under these rows alone: measured again at every load. None
    where composing has changed the concept's rows (two recipes for it, or a followed chain)."""

    @property
    def row(self) -> tuple[str, ...]:
        """What `card.COLUMNS` says of this concept, in words."""
        target = " + ".join(self.targets) or "the empty prompt"
        measured = [(self.residual, "g"), (self.effect, ".3f")]
        numbers = ("not measured" if value is None else format(value, form) for value, form in measured)
        return self.concept, target, self.method, self.tokens, *numbers

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Recipe":
        recipe = cls(**data)
        lists = {name: tuple(getattr(recipe, name)) for name in ("coreferences", "targets", "preserve")}
        return replace(recipe, templates=None if recipe.templates is None else tuple(recipe.templates), **lists)


@dataclass(frozen=True, eq=False)
class ErasureAdapter:
    """An erasure of one or several concepts, for every pipeline with the text encoder that it was made on.

    Example:
        >>> adapter = erase(pipe, "Van Gogh", target="a painter")
        >>> adapter.save_pretrained("erase-van-gogh")
        >>> pipe.load_erasure("erase-van-gogh")
    """

    edits: Mapping[str, Edit]
    """By space: `text`, and `pooled` for a family that has it; empty beside factors. Never changed after construction."""
    encoder: Fingerprint
    recipes: tuple[Recipe, ...]
    base_model: str = ""
    origin: hub.Origin | None = None
    """What it was read from, a repository's commit included; None for one that was made here. No part of the digest."""
    factors: Factors | None = None
    """Changes of single layers; an adapter that has them has no rows."""
    readme: str = field(default="", repr=False)
    """The card that lay beside it: what people wrote on it goes on to where the adapter is saved. No part of the digest."""

    def __post_init__(self):
        if self.factors is not None and self.edits:
            raise EraseError("an adapter holds rows or factors, not both: save them apart and load both")
        if self.factors is None and TEXT not in self.edits:
            raise EraseError(f"an adapter edits the text states: got edits of {', '.join(self.edits) or 'nothing'}")

    @property
    def kind(self) -> str:
        """`rows` or `factors`."""
        return "rows" if self.factors is None else "factors"

    @property
    def edit(self) -> Edit:
        """The edit of the text states, one for each token. An adapter of factors has none: ask for its `kind` first."""
        return self.edits[TEXT]

    @property
    def concepts(self) -> tuple[str, ...]:
        """The erased concepts."""
        return self.edit.concepts if self.factors is None else tuple(dict.fromkeys(r.concept for r in self.recipes))

    @property
    def digest(self) -> str:
        """sha256 over rows, labels, pack (or factors) and recipes: two adapters with one digest do the same."""
        more = [[space, edit.digest] for space, edit in sorted(self.edits.items()) if space != TEXT]
        content = self.edit.digest if self.factors is None else self.factors.digest
        return hub.digest([content, [asdict(r) for r in self.recipes], self.encoder.to_json(), *more])

    @property
    def saturation(self) -> float | None:
        """How far it moves everything else (`Edit.saturation`), of several spaces the most; None where that is not known."""
        return edits.saturation(self.edits)

    @property
    def gated(self) -> bool:
        """Whether a row has a gate, which acts as a map only."""
        return any(label.gate for edit in self.edits.values() for label in edit.labels)

    @property
    def linear(self) -> "ErasureAdapter":
        """The same rows without gates: what the fused weights and LoRA twins of a gated adapter are. Itself where there is no gate.

        Example:
            >>> report = evaluate(pipe, {"map": adapter, "linear part": adapter.linear}, suite, judges, "evaluation")
            >>> adapter.save_pretrained("erase-van-gogh", model=pipe, report=report.to_json())  # the card states both
        """
        if not self.gated:
            return self
        plain = {
            space: replace(edit, labels=tuple(label._replace(gate=None) for label in edit.labels))
            for space, edit in self.edits.items()
        }
        recipes = tuple(replace(recipe, effect=None) for recipe in self.recipes)  # it was measured with the gate
        return replace(self, edits=plain, recipes=recipes, origin=None, readme="")

    @property
    def size(self) -> int:
        """Bytes of the rows or factors."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    @property
    def name(self) -> str:
        """A short name made from the concepts, for files and for the list of what is loaded."""
        return re.sub(r"[^a-z0-9]+", "-", "-".join(self.concepts).lower()).strip("-")[:60].rstrip("-") or "erasure"

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        model: Any = None,
        report: str | Path | Mapping[str, Any] | None = None,
        images: Mapping[str, Any] | None = None,
        license: str | None = None,
    ) -> Path:
        """Write the adapter folder: `erasure.safetensors`, `erasure_config.json` and `README.md`, its card.

        A card that is there, or came with this adapter, is carried on: its fields and what somebody wrote are never lost.

        Args:
            model: a pipeline or its UNet; given one, the LoRA twins for it are written too, `pytorch_lora_weights.safetensors` and
                `<name>_kohya.safetensors`.
            report: the folder of an evaluation of this adapter, or its `report.json` as a file or a dict: goes into the card.
            images: prompt to picture (PIL, or an image file): shown on the card.
            license: of this adapter, as the Hub writes it (`"mit"`).
        """
        return self._save(directory, model, report, images, license, None)

    def push_to_hub(
        self,
        repository: str,
        *,
        model: Any = None,
        report: str | Path | Mapping[str, Any] | None = None,
        images: Mapping[str, Any] | None = None,
        license: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        create_pr: bool = False,
        parent_commit: str | None = None,
    ) -> hub.Origin:
        """Save and upload in one commit; the repository is made if there is none. Returns where it is now, commit included.

        The card of the repository is carried on as `save_pretrained` does. Twins of an earlier adapter are deleted.

        Args:
            model, report, images, license: see `save_pretrained`.
            parent_commit: what the branch must still be at; by default what it was at when its card was read.
            private, token, revision, subfolder, create_pr, commit_message: as everywhere in huggingface_hub.

        Raises:
            EraseError: no such branch, no right to write, or somebody else pushed in the meantime; nothing was changed.

        Example:
            >>> adapter.push_to_hub("user/erase-van-gogh", model=pipe, license="mit").commit
            '91c54ad1727ee830252e457677f467be0bfd8a57'
        """
        with tempfile.TemporaryDirectory() as folder:
            self._save(folder, model, report, images, license, repository)
            return push(
                folder,
                repository,
                license=license,
                commit_message=commit_message,
                private=private,
                token=token,
                revision=revision,
                subfolder=subfolder,
                create_pr=create_pr,
                parent_commit=parent_commit,
            )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        subfolder: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        public_key: str | Path | None = None,
    ) -> "ErasureAdapter":
        """The adapter in a folder, a file or a repository, checked: format, shapes, finite values, labels, digest.

        Args:
            source: a folder or file, or else a repository on the Hub: `"user/repo"`, `"user/repo@revision"`.
            revision, token, subfolder, cache_dir, local_files_only: as everywhere in huggingface_hub. All files come from
                the one commit that `revision` is now; `origin` of the adapter says which.
            public_key: PEM file of the key whose holder must have signed the adapter (`sign_erasure`).

        Raises:
            EraseError: it is not there, or not what it says it is.

        Example:
            >>> ErasureAdapter.from_pretrained("user/erase-van-gogh", revision="v1").origin.commit
            '91c54ad1727ee830252e457677f467be0bfd8a57'
        """
        path, origin = hub.locate(
            source,
            revision=revision,
            token=token,
            subfolder=subfolder,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            signed=public_key is not None,
        )
        tensors, head = hub.read_adapter(path)
        if public_key is not None:
            signing.verify(path, head, public_key)
        try:
            adapter = replace(
                cls._from_parts(tensors, head), origin=origin, readme=hub.read_text(path.parent / hub.CARD)
            )
            digest = adapter.digest
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, EraseError):
                raise
            raise MismatchError(
                f"{source} lacks or garbles a part of its head ({error!r}): fetch or save the adapter again"
            ) from error
        if digest != head.get("digest"):
            raise MismatchError(
                f"{source} has digest {digest[:12]}, its head promises {str(head.get('digest'))[:12]}: the file was changed "
                f"after it was saved; fetch it again"
            )
        return adapter

    def to_lora(self, model: Any) -> dict[str, Tensor]:
        """This erasure as a LoRA for stock diffusers: `pipe.load_lora_weights(adapter.to_lora(pipe))`.

        Rank = moving rows, or the largest rank of its factors (others are padded with zeros); alpha = rank. Rows of every space
        are covered, SDXL's pooled ones by `add_embedding.linear_1`. A twin is the
        linear part of a gated adapter; twins of several adapters add up instead of being solved together; and stock LoRA calls
        can switch them off: `load_erasure` has none of these limits.

        Args:
            model: the pipeline, or its denoiser, whose weights the factors are made for.
        """
        prefix = family_of(_denoiser(model)).denoiser
        return {
            f"{prefix}.{path}.{part}.weight": tensor
            for path, pair in self._twin(model).items()
            for part, tensor in zip(("lora_A", "lora_B"), pair, strict=True)
        }

    def to_kohya(self, model: Any) -> dict[str, Tensor]:
        """The LoRA twin under kohya's names (`lora_unet_…lora_down.weight`, `.lora_up.weight`, `.alpha`)."""
        state = {}
        for path, (down, up) in self._twin(model).items():
            name = kohya_name(path)
            state |= {
                f"{name}.lora_down.weight": down,
                f"{name}.lora_up.weight": up,
                f"{name}.alpha": torch.tensor(float(len(down))),
            }
        return state

    def card(self, **about: Any) -> str:
        """The model card: what was erased, how, and what was not tested. `about`: see `card.new`."""
        return card.new(
            [recipe.row for recipe in self.recipes],
            kind=self.kind,
            content=self._content(),
            digest=self.digest,
            linear=self.linear.digest if self.gated else None,
            base_model=self.base_model,
            **{"files": (), "repository": None, "report": None, "pictures": {}, "license": None} | about,
        )

    def _content(self) -> str:
        """What the adapter holds and where it is from, in a few sentences for the card."""
        imported = [_imported(recipe) for recipe in self.recipes if recipe.method == "import"]
        if self.factors is not None:
            return " ".join([f"Factors of {len(self.factors.pairs)} layers: {self.size} bytes.", *imported])
        preserved = ", ".join(self.edit.preserved) or "none by name"
        gated = [card.GATED] if self.gated else []
        rows = f"Preserved: {preserved}. Base pack: {self.edit.pack}. Rows: {self.size} bytes."
        return " ".join([rows, *gated, *imported])

    def _save(
        self,
        directory: str | Path,
        model: Any,
        report: str | Path | Mapping[str, Any] | None,
        images: Mapping[str, Any] | None,
        license: str | None,
        repository: str | None,
    ) -> Path:
        """See `save_pretrained`; `repository` is where the card says that the adapter will be."""
        facts = report if report is None or isinstance(report, Mapping) else hub.read_report(report)
        twins = {}
        if model is not None:
            twins = {hub.LORA: self.to_lora(model), f"{self.name}{hub.KOHYA}": self.to_kohya(model)}
        old = hub.read_text(Path(directory, hub.CARD)) or (card.carried(self.readme) if self.readme else "")
        card.merge(old, self.card(report=facts))  # whatever is wrong with them is said before anything is written
        folder = hub.write_adapter(directory, self._tensors(), self._head(), twins, linear=self.gated)
        about = {"pictures": hub.write_pictures(folder, images or {}), "files": tuple(hub.folder_files(folder))}
        text = self.card(report=facts, license=license, repository=repository, **about)
        hub.write_text(folder / hub.CARD, card.merge(old, text, license))
        return folder

    def _twin(self, model: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """A `[r, in]` and B `[o, r]` of every layer, float32, contiguous, one rank r for all; of rows B = W Dᵀ at every site."""
        reader = _denoiser(model)
        attachment = getattr(unwrapped(reader), ATTRIBUTE, None)
        if attachment is not None and attachment.kept:
            raise EraseError(
                "an erasure is fused into this model, a twin is made for the original weights: call unfuse_erasure() first"
            )
        if self.factors is not None:
            return _padded(self.factors, reader)
        read = widths(reader)
        if odd := [space for space, edit in self.edits.items() if read.get(space) != edit.width]:
            raise MismatchError(
                f"the adapter edits {odd[0]} states of width {self.edits[odd[0]].width}; this model reads another width"
            )
        rank = max(int(edit.moving.sum()) for edit in self.edits.values())
        return {
            path: lora_pair(linear.weight, edit, rank)
            for space, edit in self.edits.items()
            for path, linear in sites(reader, space).items()
            if not path.endswith("to_kv")
        }

    def _tensors(self) -> dict[str, Tensor]:
        """What a file holds: the rows of the text space under their names, those of another with the space before them; or
        the factors by layer."""
        if self.factors is not None:
            return {f"{path}.{part}": t for path, p in self.factors.pairs.items() for part, t in p._asdict().items()}
        return {
            name if space == TEXT else f"{space}.{name}": getattr(edit, name)
            for space, edit in self.edits.items()
            for name in TENSORS
        }

    def _head(self) -> dict[str, Any]:
        if self.factors is None:
            more = {space: _describe(edit) for space, edit in self.edits.items() if space != TEXT}
            content = _describe(self.edit) | ({"spaces": more} if more else {})
        else:
            shapes = {p: [len(down), down.shape[1], len(up)] for p, (down, up) in self.factors.pairs.items()}
            content = {"layers": shapes, "base": list(self.factors.base)}
        return content | {
            "kind": self.kind,
            "encoder": self.encoder.to_json(),
            "recipes": [asdict(recipe) for recipe in self.recipes],
            "base_model": self.base_model,
            "digest": self.digest,
            "made_with": __version__,
        }

    @classmethod
    def _from_parts(cls, tensors: dict[str, Tensor], head: dict[str, Any]) -> "ErasureAdapter":
        if head["kind"] not in ("rows", "factors"):
            raise MismatchError(
                f"this file holds {head['kind']!r}, this version reads 'rows' and 'factors': install a newer diffusers-erase"
            )
        made = {
            "encoder": Fingerprint.from_json(head["encoder"]),
            "recipes": tuple(Recipe.from_json(r) for r in head["recipes"]),
            "base_model": head["base_model"],
        }
        if head["kind"] == "factors":
            shapes = {path: (r, i, o) for path, (r, i, o) in head["layers"].items()}
            expected = {f"{path}.down": (r, i) for path, (r, i, _) in shapes.items()}
            _check_tensors(tensors, expected | {f"{path}.up": (o, r) for path, (r, _, o) in shapes.items()})
            pairs = {path: Pair(tensors[f"{path}.down"], tensors[f"{path}.up"]) for path in shapes}
            return cls({}, factors=Factors(pairs, tuple(float(value) for value in head["base"])), **made)
        described = {TEXT: head} | dict(head.get("spaces", {}))
        names = {space: [n if space == TEXT else f"{space}.{n}" for n in TENSORS] for space in described}
        expected = {}
        for space, part in described.items():
            k, d = part["rows"], part["width"]
            expected |= {n: (k, d) if not n.endswith("strengths") else (k,) for n in names[space]}
        _check_tensors(tensors, expected)
        return cls(
            {space: _edit(part, [tensors[n] for n in names[space]]) for space, part in described.items()}, **made
        )


def compose(*adapters: ErasureAdapter, chains: str = "error", residual_max: float | None = 0.2) -> ErasureAdapter:
    """One adapter of all rows of `adapters`, solved together: exact, in any order, each row once (see `edits.compose`).

    Adapters of factors are added up, which is inexact (see `factors.add`). Rows and factors do not make one adapter: load
    both, and the weights are those edited by the rows, plus the factors.

    Raises:
        ConflictError: they contradict each other or stand on different base packs, or are of two kinds.
        MismatchError: they were made on different text encoders.
    """
    if not adapters:
        raise EraseError("compose needs at least one adapter")
    encoders = sorted({a.encoder for a in adapters}, key=lambda e: e.states)
    for other in encoders[1:]:
        encoders[0].check(other)
    if len({a.kind for a in adapters}) > 1:
        raise ConflictError(
            "rows and factors do not make one adapter: rows are solved together, factors only add up; load both instead"
        )
    union = edits.compose_spaces([a.edits for a in adapters], chains=chains, residual_max=residual_max)
    theirs = edits.marks(union)
    joined = []
    for adapter in adapters:
        own = edits.marks(adapter.edits)
        same = {concept for concept in own if own[concept] == theirs.get(concept)}
        joined += [r if r.concept in same else replace(r, effect=None) for r in adapter.recipes]
    recipes = {hub.canonical(asdict(r)): r for r in joined}
    return ErasureAdapter(
        edits=union,
        encoder=encoders[0],
        recipes=tuple(recipes[key] for key in sorted(recipes)),
        base_model=min(a.base_model for a in adapters),
        factors=factors.add(*terms) if (terms := [a.factors for a in adapters if a.factors is not None]) else None,
    )


def push(
    folder: str | Path,
    repository: str,
    *,
    license: str | None = None,
    commit_message: str | None = None,
    **where: Any,
) -> hub.Origin:
    """Check a saved adapter folder and upload it as it is: rows, card, twins, pictures, signature. See `push_to_hub`."""
    adapter = ErasureAdapter.from_pretrained(folder)
    return hub.upload(
        folder,
        repository,
        lambda there: card.merge(there, adapter.readme or adapter.card(), license),
        message=commit_message or f"Erasure: {', '.join(adapter.concepts)}",
        **where,
    )


def pull(
    source: str,
    directory: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    public_key: str | Path | None = None,
) -> ErasureAdapter:
    """Check an adapter on the Hub, then copy its whole folder. Arguments as in `ErasureAdapter.from_pretrained`."""
    where: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    adapter = ErasureAdapter.from_pretrained(
        source, revision=revision, subfolder=subfolder, public_key=public_key, **where
    )
    assert adapter.origin is not None
    hub.download(adapter.origin, directory, **where)
    return adapter


def sign_erasure(folder: str | Path, private_key: str | Path, password: str | None = None) -> Path:
    """Check a saved adapter folder and sign it: writes `erasure.sig` beside its file. Needs `diffusers-erase[sign]`.

    Args:
        private_key: PEM file of an Ed25519 key, as `openssl genpkey -algorithm ed25519` makes it.

    Raises:
        EraseError: no such key, or not its password.
        MismatchError: the adapter in the folder is damaged.

    Example:
        >>> sign_erasure("erase-van-gogh", "key.pem")
        >>> load_erasure(pipe, "erase-van-gogh", public_key="key.pub.pem")
    """
    ErasureAdapter.from_pretrained(Path(folder))
    path, _ = hub.locate(Path(folder))
    return signing.sign(path, hub.read_adapter(path)[1], private_key, password)


def _denoiser(model: Any) -> nn.Module:
    return model if isinstance(model, nn.Module) else next(iter(text_readers(model).values()))


def _describe(edit: Edit) -> dict[str, Any]:
    """What the head says of the rows of one space."""
    facts = {"rows": len(edit.labels), "width": edit.width, "labels": edit.labels}
    return facts | {"pack": [edit.pack, edit.pack_digest]}


def _edit(described: dict[str, Any], tensors: list[Tensor]) -> Edit:
    """The edit of one space, from what the head says of it and its tensors in the order of TENSORS."""
    pack, pack_digest = described["pack"]
    labels = tuple(Label.from_json(entry) for entry in described["labels"])
    return Edit(labels=labels, pack=pack, pack_digest=pack_digest, **dict(zip(TENSORS, tensors, strict=True)))


def _check_tensors(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    """Raise unless a file holds exactly these tensors, in float32."""
    if odd := sorted(set(tensors) ^ set(expected)):
        raise MismatchError(
            f"the file's tensors are not those of an erasure ({odd[0]!r} is missing or foreign): expected {', '.join(list(expected)[:8])}"
        )
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name] or tensor.dtype != torch.float32:
            raise MismatchError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, the head promises {expected[name]} float32: the file is damaged"
            )


def _padded(changes: Factors, reader: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors with zero terms added up to one rank, in the shapes of the layers: loaders guess alpha from the rank."""
    changes.check({path: matrix(layer(reader, path).weight) for path in changes.paths})
    rank = max(len(pair.down) for pair in changes.pairs.values())
    found = {}
    for path, (down, up) in changes.pairs.items():
        A, B = down.new_zeros(rank, down.shape[1]), up.new_zeros(len(up), rank)
        A[: len(down)], B[:, : len(down)] = down, up
        ends = (1, 1) if layer(reader, path).weight.ndim == 4 else ()
        found[path] = (A.view(*A.shape, *ends), B.view(*B.shape, *ends))
    return found


def lora_pair(weight: Tensor, edit: Edit, rank: int) -> tuple[Tensor, Tensor]:
    """(A, W Dᵀ) for one layer; zero where the layer reads more than the states, and in rows beyond the edit's own."""
    moving = edit.moving
    W = weight.detach().cpu().double()
    r, d = int(moving.sum()), edit.width
    A, B = W.new_zeros(rank, W.shape[1]), W.new_zeros(len(W), rank)
    A[:r, :d] = edit.detectors()[moving]
    B[:, :r] = W[:, :d] @ edit.offsets.double()[moving].mT
    return A.float(), B.float()


def _imported(recipe: Recipe) -> str:
    told = recipe.options
    return (
        f"{recipe.concept} was imported from `{told['file']}` (sha256 `{told['sha256']}`); {told['error']:.2%} of the change of the "
        f"weights was lost on the way."
    )
