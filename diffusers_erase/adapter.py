"""The artefact: an erasure as a frozen value that is saved, loaded, composed and exported.

An adapter is an `Edit` for each space of text states, and its provenance. It holds no pipeline and no solution; the same rows
have three forms, the map on text states, edited weights, and a LoRA.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import edits, hub
from .edits import Edit, Label
from .errors import EraseError, MismatchError
from .sites import ATTRIBUTE, TEXT, sites, text_readers, unwrapped, widths
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
    residual: float
    effect: float | None
    """Share of the way to its target that the bare name goes under these rows alone: measured again at every load. None
    where composing has changed the concept's rows (two recipes for it, or a followed chain)."""

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
    """By space: `text`, and `pooled` for a family that has it. Never changed after construction."""
    encoder: Fingerprint
    recipes: tuple[Recipe, ...]
    base_model: str = ""
    origin: hub.Origin | None = None
    """What it was read from, a repository's commit included; None for one that was made here. No part of the digest."""

    def __post_init__(self):
        if TEXT not in self.edits:
            raise EraseError(f"an adapter edits the text states: got edits of {', '.join(self.edits) or 'nothing'}")

    @property
    def edit(self) -> Edit:
        """The edit of the text states, one for each token."""
        return self.edits[TEXT]

    @property
    def concepts(self) -> tuple[str, ...]:
        """The erased concepts."""
        return self.edit.concepts

    @property
    def digest(self) -> str:
        """sha256 over rows, labels, pack and recipes: two adapters with one digest do the same."""
        more = [[space, edit.digest] for space, edit in sorted(self.edits.items()) if space != TEXT]
        return hub.digest([self.edit.digest, [asdict(r) for r in self.recipes], self.encoder.to_json(), *more])

    @property
    def size(self) -> int:
        """Bytes of the rows."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def save_pretrained(self, directory: str | Path, *, model: Any = None) -> Path:
        """Write the adapter folder: `erasure.safetensors`, `erasure_config.json`, `README.md`.

        Args:
            model: a pipeline or its UNet; given one, the LoRA twin for it is written too (`pytorch_lora_weights.safetensors`).
        """
        folder = hub.write_adapter(directory, self._tensors(), self._head())
        hub.write_text(folder / hub.CARD, self.card())
        if model is not None:
            hub.write_tensors(folder / hub.LORA, self.to_lora(model), {"format": "pt"})
        return folder

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
    ) -> "ErasureAdapter":
        """The adapter in a folder, a file or a repository, checked: format, shapes, finite values, labels, digest.

        Args:
            source: a folder or file, or else a repository on the Hub: `"user/repo"`, `"user/repo@revision"`.
            revision, token, subfolder, cache_dir, local_files_only: as everywhere in huggingface_hub. All files come from
                the one commit that `revision` is now; `origin` of the adapter says which.

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
        )
        tensors, head = hub.read_adapter(path)
        try:
            adapter = replace(cls._from_parts(tensors, head), origin=origin)
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

        Rank = moving rows, alpha = rank. A twin is the linear part of a gated adapter; twins of several adapters add up
        instead of being solved together; and stock LoRA calls can switch them off: `load_erasure` has none of these limits.

        Args:
            model: the pipeline, or its UNet, whose `to_k` and `to_v` weights the factors are made for.
        """
        factors = self._factors(model)
        return {
            f"unet.{path}.{part}.weight": tensor
            for path, pair in factors.items()
            for part, tensor in zip(("lora_A", "lora_B"), pair, strict=True)
        }

    def to_kohya(self, model: Any) -> dict[str, Tensor]:
        """The LoRA twin under kohya's names (`lora_unet_…lora_down.weight`, `.lora_up.weight`, `.alpha`)."""
        state = {}
        for path, (down, up) in self._factors(model).items():
            name = f"lora_unet_{path.replace('.', '_')}"
            state |= {
                f"{name}.lora_down.weight": down,
                f"{name}.lora_up.weight": up,
                f"{name}.alpha": torch.tensor(float(len(down))),
            }
        return state

    def card(self) -> str:
        """The model card: what was erased, how, and what was not tested."""
        known = re.fullmatch(r"\w[\w.-]*/[\w.-]+", self.base_model)  # a repository, not somebody's folder
        base = f"base_model: {self.base_model}\nbase_model_relation: adapter\n" if known else ""
        rows = "\n".join(
            f"| {r.concept} | {' + '.join(r.targets) or 'empty prompt'} | {r.method} | {r.tokens} | {r.residual:g} | {_effect(r)} |"
            for r in self.recipes
        )
        return _CARD.format(
            base=base,
            names=", ".join(self.concepts),
            rows=rows,
            preserved=", ".join(self.edit.preserved) or "none by name",
            pack=self.edit.pack,
            digest=self.digest,
            size=self.size,
        )

    def _factors(self, model: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """(A `[r, in]`, W Dᵀ `[o, r]`) of every site of every space, float32, contiguous; one rank r, that of the largest space."""
        reader = next(iter(text_readers(model).values())) if not isinstance(model, nn.Module) else model
        attachment = getattr(unwrapped(reader), ATTRIBUTE, None)
        if attachment is not None and attachment.kept:
            raise EraseError(
                "an erasure is fused into this model, a twin is made for the original weights: call unfuse_erasure() first"
            )
        read = widths(reader)
        if odd := [space for space, edit in self.edits.items() if read.get(space) != edit.width]:
            raise MismatchError(
                f"the adapter edits {odd[0]} states of width {self.edits[odd[0]].width}; this model reads another width"
            )
        rank = max(int(edit.moving.sum()) for edit in self.edits.values())
        return {
            path: _pair(linear.weight, edit, rank)
            for space, edit in self.edits.items()
            for path, linear in sites(reader, space).items()
            if not path.endswith("to_kv")
        }

    def _tensors(self) -> dict[str, Tensor]:
        """What a file holds: the rows of the text space under their names, those of another with the space before them."""
        return {
            name if space == TEXT else f"{space}.{name}": getattr(edit, name)
            for space, edit in self.edits.items()
            for name in TENSORS
        }

    def _head(self) -> dict[str, Any]:
        more = {space: _describe(edit) for space, edit in self.edits.items() if space != TEXT}
        return {
            "kind": "rows",
            **_describe(self.edit),
            **({"spaces": more} if more else {}),
            "encoder": self.encoder.to_json(),
            "recipes": [asdict(recipe) for recipe in self.recipes],
            "base_model": self.base_model,
            "digest": self.digest,
            "made_with": __version__,
        }

    @classmethod
    def _from_parts(cls, tensors: dict[str, Tensor], head: dict[str, Any]) -> "ErasureAdapter":
        if head["kind"] != "rows":
            raise MismatchError(
                f"this file holds {head['kind']!r}, this version reads 'rows': install a newer diffusers-erase"
            )
        described = {TEXT: head} | dict(head.get("spaces", {}))
        names = {space: [n if space == TEXT else f"{space}.{n}" for n in TENSORS] for space in described}
        expected = [name for each in names.values() for name in each]
        if set(tensors) != set(expected):
            odd = sorted(set(tensors) ^ set(expected))[0]
            raise MismatchError(
                f"the file's tensors are not those of an erasure ({odd!r} is missing or foreign): expected {', '.join(expected)}"
            )
        return cls(
            edits={space: _edit(part, [tensors[n] for n in names[space]]) for space, part in described.items()},
            encoder=Fingerprint.from_json(head["encoder"]),
            recipes=tuple(Recipe.from_json(r) for r in head["recipes"]),
            base_model=head["base_model"],
        )


def compose(*adapters: ErasureAdapter, chains: str = "error", residual_max: float | None = 0.2) -> ErasureAdapter:
    """One adapter of all rows of `adapters`, solved together: exact, in any order, each row once (see `edits.compose`).

    Raises:
        ConflictError: they contradict each other or stand on different base packs.
        MismatchError: they were made on different text encoders.
    """
    if not adapters:
        raise EraseError("compose needs at least one adapter")
    encoders = sorted({a.encoder for a in adapters}, key=lambda e: e.states)
    for other in encoders[1:]:
        encoders[0].check(other)
    union = edits.compose_spaces([a.edits for a in adapters], chains=chains, residual_max=residual_max)
    joined = [
        r if _same_rows(a.edits, union, r.concept) else replace(r, effect=None) for a in adapters for r in a.recipes
    ]
    recipes = {hub.canonical(asdict(r)): r for r in joined}
    return ErasureAdapter(
        edits=union,
        encoder=encoders[0],
        recipes=tuple(recipes[key] for key in sorted(recipes)),
        base_model=min(a.base_model for a in adapters),
    )


def _same_rows(one: Mapping[str, Edit], other: Mapping[str, Edit], concept: str) -> bool:
    """Whether a concept is erased by the same rows in two adapters."""
    return all(
        space in one and one[space].only(concept).digest == edit.only(concept).digest for space, edit in other.items()
    )


def _describe(edit: Edit) -> dict[str, Any]:
    """What the head says of the rows of one space."""
    facts = {"rows": len(edit.labels), "width": edit.width, "labels": edit.labels}
    return facts | {"pack": [edit.pack, edit.pack_digest]}


def _edit(described: dict[str, Any], tensors: list[Tensor]) -> Edit:
    """The edit of one space, from what the head says of it and its tensors in the order of TENSORS."""
    k, d = described["rows"], described["width"]
    rows = dict(zip(TENSORS, tensors, strict=True))
    for name, tensor in rows.items():
        expected = (k,) if name == "strengths" else (k, d)
        if tuple(tensor.shape) != expected or tensor.dtype != torch.float32:
            raise MismatchError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}, the head promises {expected} float32: the file is damaged"
            )
    pack, pack_digest = described["pack"]
    labels = tuple(Label.from_json(entry) for entry in described["labels"])
    return Edit(labels=labels, pack=pack, pack_digest=pack_digest, **rows)


def _pair(weight: Tensor, edit: Edit, rank: int) -> tuple[Tensor, Tensor]:
    """(A, W Dᵀ) for one layer; zero where the layer reads more than the states, and in rows beyond the edit's own."""
    moving = edit.moving
    W = weight.detach().cpu().double()
    r, d = int(moving.sum()), edit.width
    A, B = W.new_zeros(rank, W.shape[1]), W.new_zeros(len(W), rank)
    A[:r, :d] = edit.detectors()[moving]
    B[:, :r] = W[:, :d] @ edit.offsets.double()[moving].mT
    return A.float(), B.float()


def _effect(recipe: Recipe) -> str:
    return "not measured" if recipe.effect is None else f"{recipe.effect:.3f}"


_CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
{base}tags: [text-to-image, diffusers, concept-erasure, erasure]
---
# Erasure: {names}

A suppression of the text states of: {names}. Attach it to any Stable Diffusion pipeline with the same text encoder:

```python
from diffusers_erase import load_erasure

load_erasure(pipe, "this folder or repository")
```

| concept | sent to | method | tokens | residual | effect on the bare name |
|---|---|---|---|---|---|
{rows}

Preserved: {preserved}. Base pack: {pack}. Rows: {size} bytes. Digest: `{digest}`.

**Not tested by making this file:** images, paraphrases, attacks, other languages. This is guidance away from a concept by its
name, not a removal of knowledge from the weights: image prompts, inpainting, textual inversion and tuning can bring it back.
"""
