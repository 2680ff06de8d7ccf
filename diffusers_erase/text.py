"""From prompts to rows: the only file that knows tokenizers.

A concept is read as one *mean row* for each token role: the state of its last subject token, of the first end-of-text
token (EOT), or of the pads, averaged over templates. The start token is never a role: it is the same for every prompt.
"""

import copy
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .edits import Pack
from .errors import EraseError, MismatchError
from .sites import POOLED, TEXT, Family, family_of, text_readers, widths

TEMPLATES = (
    "{}",
    "a photo of {}",
    "a photo of a {}",
    "a picture of the {}",
    "an image of {}",
    "a drawing of a {}",
    "a painting of {}",
    "a painting by {}",
    "art in the style of {}",
    "a close-up of {}",
    "{} on a white background",
    "{} in a landscape",
)
"""Contexts over which the rows of a name are averaged; `{}` is the name. Both kinds, things and authors, are covered."""

PROBES = ("", "a photo of a cat", "an oil painting of a house by the sea, 1889", "Zwölf rote Äpfel & two robots")
"""Fixed prompts whose states tell one text encoder from another. Part of the file format: never change them."""

COEFFICIENTS = 4
"""Cosine coefficients kept of each probed state. Part of the file format."""

FINGERPRINT_TOLERANCE = 0.05
"""Relative error within which two fingerprints are the same encoder.

Measured on emoji-sd's encoder: fp16 0.001, bf16 0.005, dynamic int8 0.012; on random encoders, whose states grow every
rounding, up to 0.003, 0.03 and 0.2; another encoder of the same shape more than 1.
"""

BATCH = 32


@dataclass(frozen=True)
class Fingerprint:
    """How a tokenizer and text encoder answer a few fixed prompts: recognises an encoder in any dtype."""

    width: int
    tokenizer: str
    """Hash of the token ids of the probe prompts."""
    states: tuple[float, ...]
    """Cosine coefficients of the probes' EOT states and last content states (of pooled states, of all probes), four significant digits."""
    parts: tuple["Fingerprint", ...] = ()
    """Where several encoders lie side by side in a state, each one's share; where a family has pooled states, last these."""

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Fingerprint":
        parts = tuple(map(cls.from_json, data.get("parts", ())))
        return cls(**(data | {"states": tuple(data["states"]), "parts": parts}))

    def to_json(self) -> dict[str, Any]:
        """Plain data; a text side of one encoder has no parts and says nothing of them."""
        data = {"width": self.width, "tokenizer": self.tokenizer, "states": self.states}
        return data | ({"parts": [part.to_json() for part in self.parts]} if self.parts else {})

    def distance(self, other: "Fingerprint") -> float:
        """Relative error of the states, of several parts the largest; infinite where width or tokenizer differ."""
        if (self.width, self.tokenizer, len(self.states)) != (other.width, other.tokenizer, len(other.states)):
            return math.inf
        if len(self.parts) != len(other.parts):
            return math.inf
        own = math.dist(self.states, other.states) / max(math.hypot(*self.states), 1e-12)
        return max([own, *(a.distance(b) for a, b in zip(self.parts, other.parts, strict=True))])

    def check(self, found: "Fingerprint") -> None:
        """Raise unless `found` is the encoder that this fingerprint was taken from."""
        if (found.width, len(found.parts)) != (self.width, len(self.parts)):
            raise MismatchError(
                f"the adapter edits text states of width {self.width}, this pipeline's encoder gives {found.width}: "
                f"it was made for another base model; erase the concept again on this one"
            )
        if found.tokenizer != self.tokenizer:
            raise MismatchError(
                f"this pipeline's tokenizer ({found.tokenizer[:8]}) is not the one that the adapter was made with "
                f"({self.tokenizer[:8]}): erase the concept again on this model"
            )
        if (error := self.distance(found)) > FINGERPRINT_TOLERANCE:
            raise MismatchError(
                f"this pipeline's text encoder answers differently from the one that the adapter was made with (relative error "
                f"{error:.3f}, allowed {FINGERPRINT_TOLERANCE}): use the encoder of the same base model, or erase again on this one"
            )


@dataclass(frozen=True)
class PackRecipe:
    """How a base pack is made: which prompts stand for "everything else", and how strongly it is held. Data, not tensors."""

    name: str
    prompts: tuple[str, ...]
    ridge: float = 0.005
    """λ, relative to the mean square of the background states' entries."""
    templates: tuple[str, ...] = TEMPLATES
    """Contexts for names in this model's language."""

    def __post_init__(self):
        if not self.prompts or not all(isinstance(prompt, str) for prompt in self.prompts):
            raise EraseError(
                f"base pack {self.name!r} needs prompts that stand for everything else: expected a list of texts"
            )
        if not 0 < self.ridge < math.inf:
            raise EraseError(
                f"base pack {self.name!r} needs a positive ridge, such as {PackRecipe.ridge}: got {self.ridge}"
            )
        check_templates(self.templates)

    @classmethod
    def from_json(cls, data: dict) -> "PackRecipe":
        return cls(
            name=data["name"],
            prompts=tuple(data["prompts"]),
            ridge=data.get("ridge", cls.ridge),
            templates=tuple(data.get("templates", TEMPLATES)),
        )


@dataclass(frozen=True, eq=False)
class States:
    """Text states of some prompts."""

    rows: Tensor
    """`[n, tokens, d]`, float32 on the CPU."""
    ids: tuple[tuple[int, ...], ...]
    """Token ids of each prompt without start token and EOT."""
    pooled: Tensor | None = None
    """`[n, p]` of a family that has them."""

    def end(self, prompt: int) -> int:
        """Index of the first EOT."""
        return len(self.ids[prompt]) + 1


class TextSide(NamedTuple):
    """What a pipeline's tokenizers and text encoders are at one moment: enough to notice that they have changed."""

    fingerprint: Fingerprint
    vocabularies: tuple[int, ...]
    """Number of tokens of each tokenizer: textual inversion adds some, which no probe prompt uses."""

    def change(self, now: "TextSide") -> str | None:
        """What is different `now`, in a few words; None where it is the same within tolerance."""
        if self.vocabularies != now.vocabularies:
            return f"its tokenizer has {sum(now.vocabularies)} tokens instead of {sum(self.vocabularies)}, as after textual inversion"
        if (distance := self.fingerprint.distance(now.fingerprint)) > FINGERPRINT_TOLERANCE:
            return f"its text encoder answers differently (relative error {distance:.3f}), as with a LoRA on it or another encoder"
        return None


class Encoder:
    """The text side of a pipeline: prompts in, states out. Reads the pipe and changes nothing.

    One object serves one call: what it has read it remembers, so after a change of the pipe make another. Nothing is kept
    longer, since nothing tells that an encoder is as it was: the scale of a LoRA on it is a number that no tensor shows.

    Example:
        >>> encoder = Encoder(pipe)
        >>> encoder.rows("Van Gogh", ("subject", "eot"), TEMPLATES)["subject"].shape
        torch.Size([768])
    """

    def __init__(self, pipe: Any):
        reader = next(iter(text_readers(pipe).values()))
        self.family: Family = family_of(reader)
        if self.family.experimental:
            raise EraseError(
                f"the text of {self.family.name} is not read by this version: expected an SD 1.x, 2.x or SDXL pipeline; an adapter "
                f"made elsewhere is attached with strict=False"
            )
        pairs = [[getattr(pipe, name, None) for name in pair] for pair in self.family.encoders]
        if None in pairs[-1]:
            raise EraseError(
                f"{type(pipe).__name__} has no text encoder or tokenizer loaded: they are needed to find the concept's text states"
            )
        self.pipe = pipe
        self.tokenizers = [tokenizer for tokenizer, encoder in pairs if tokenizer is not None and encoder is not None]
        self.tokenizer = self.tokenizers[0]
        self.window = min(10_000, *(tokenizer.model_max_length for tokenizer in self.tokenizers))
        configs = [encoder.config for tokenizer, encoder in pairs if tokenizer is not None and encoder is not None]
        self.parts: tuple[int, ...] = tuple(config.hidden_size for config in configs)
        """Width of each encoder's share of a text state."""
        self.widths = {TEXT: sum(self.parts)} | (
            {POOLED: configs[-1].projection_dim} if self.family.pooled_by is not None else {}
        )
        """d of each space of text states."""
        if self.widths != (read := widths(reader)):
            raise EraseError(
                f"the text encoder gives states of width {_say(self.widths)}, the denoiser reads {_say(read)}: "
                f"the pipeline's parts do not fit"
            )
        self._rows: dict[tuple, dict[str, Tensor]] = {}
        self._words: tuple[str, ...] | None = None

    @property
    def width(self) -> int:
        """d of the text states."""
        return self.widths[TEXT]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, cut: bool = False) -> States:
        """States of `prompts` as the host's own `encode_prompt` gives them; `cut` allows what it does to longer ones."""
        ids = self._ids(prompts, self.tokenizer)
        if cut:
            ids = tuple(tokens[: self.window - 2] for tokens in ids)
        for prompt, tokens in zip(prompts, ids, strict=True):
            if len(tokens) > self.window - 2:
                raise EraseError(
                    f"{prompt[:60]!r} has {len(tokens)} tokens, the text encoder reads {self.window - 2}: give a shorter name"
                )
        rows, pooled = [], []
        for start in range(0, len(prompts), BATCH):
            batch = list(prompts[start : start + BATCH])
            told = {"device": self.pipe._execution_device, "num_images_per_prompt": 1, **dict(self.family.encode)}
            answer = self.pipe.encode_prompt(batch, **told)
            rows.append(answer[0].detach().float().cpu())
            if self.family.pooled_by is not None:
                pooled.append(answer[self.family.pooled_by].detach().float().cpu())
        return States(torch.cat(rows), ids, torch.cat(pooled) if pooled else None)

    def rows(self, name: str, roles: Sequence[str], templates: Sequence[str]) -> dict[str, Tensor]:
        """The mean row `[d]` (float64) of `name` for each role, over all templates.

        Roles: `subject` the last token of the name, `name:i` its i-th, `eot` the first end-of-text, `pads` the mean of what
        follows; `pooled` the prompt's one state in the pooled space.
        """
        asked = (name, tuple(roles), tuple(templates))
        if asked not in self._rows:  # of a hundred concepts with one target it is read once
            self._rows[asked] = dict(zip(roles, self.table([name], roles, templates)[0], strict=True))
        return self._rows[asked]

    def table(
        self, names: Sequence[str], roles: Sequence[str], templates: Sequence[str], *, brief: bool = False
    ) -> Tensor:
        """The rows of many names, `[names, roles, d]` (float64), their prompts encoded in batches that names share.

        Args:
            brief: read by a `brief` encoder, where no pads are asked for.
        """
        check_templates(templates)
        prompts = [(template, name) for name in names for template in templates]
        if brief and "pads" not in roles:
            return self.brief([t.replace("{}", n) for t, n in prompts]).table(names, roles, templates)
        found: list[Tensor] = []
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            states = self.encode([template.replace("{}", name) for template, name in batch])
            for i, (template, name) in enumerate(batch):
                last = self._last_token(template, name, states.ids[i])
                rows = [_row(states, i, role, last, self.length(name)).double() for role in roles]
                found.append(torch.stack(rows))
        return torch.stack(
            [sum(found[i + 1 : i + len(templates)], found[i]) for i in range(0, len(found), len(templates))]
        ) / len(templates)

    def brief(self, prompts: Sequence[str]) -> "Encoder":
        """An encoder of the same states that reads no more tokens than the longest of `prompts` has, instead of a whole window.

        These encoders are causal: what follows a prompt's first EOT does not tell on its states up to there. Rounding differs,
        and there are hardly any pads: for measuring many names quickly, not for rows that are kept.
        """
        longest = 2 + max(len(ids) for tokenizer in self.tokenizers for ids in self._ids(prompts, tokenizer))
        longest = min(longest, self.window)  # whatever is longer is refused there
        view = copy.copy(self.pipe)  # shallow, and of the same class: its own `encode_prompt` reads
        for name, _ in self.family.encoders:
            if getattr(self.pipe, name, None) is not None:
                vars(view)[name] = _Brief(getattr(self.pipe, name), longest)
        return Encoder(view)

    def null_rows(self, roles: Sequence[str]) -> dict[str, Tensor]:
        """Where the empty target lies: its own EOT and pads for these roles, for names the mean of all rows but the start token.

        Row 0 is never used: CLIP's empty prompt has its "last subject token" there, the start token, an outlier.
        """
        states = self._empty
        empty = states.rows[0].double()
        places = {"eot": empty[1], "pads": empty[2:].mean(0)}
        if states.pooled is not None:
            places[POOLED] = states.pooled[0].double()
        return {role: places.get(role, empty[1:].mean(0)) for role in roles}

    def length(self, name: str) -> int:
        """Number of tokens of `name`."""
        return len(self.tokenizer(name, add_special_tokens=False)["input_ids"])

    def words(self) -> tuple[str, ...]:
        """Every whole word that the tokenizer knows as one token, of three letters and more."""
        if self._words is None:
            size = len(self.tokenizer)
            texts = dict.fromkeys(self.tokenizer.decode([i]).strip() for i in range(size))
            likely = [text for text in texts if len(text) > 2 and text.isascii() and text.isalpha()]
            ids = self.tokenizer(likely, add_special_tokens=False)["input_ids"]
            self._words = tuple(text for text, own in zip(likely, ids, strict=True) if len(own) == 1)
        return self._words

    def words_beside(self, names: Sequence[str]) -> list[str]:
        """`words` without those that name one of `names`: its own words, parts of them, and words that hold one."""
        named = " ".join(names).lower().split()
        return [w for w in self.words() if not any(w.lower() in own or own in w.lower() for own in named)]

    @torch.no_grad()
    def nearest_words(self, name: str, words: Sequence[str], count: int) -> list[str]:
        """Those of `words` whose token embeddings lie nearest to the mean of `name`'s, by cosine; the nearest first."""
        encoder = next(
            getattr(self.pipe, e) for t, e in self.family.encoders if getattr(self.pipe, t) is self.tokenizer
        )
        table = encoder.get_input_embeddings().weight.float().cpu()
        ids = self.tokenizer([name, *words], add_special_tokens=False)["input_ids"]
        means = torch.nn.functional.normalize(torch.stack([table[own].mean(0) for own in ids]), dim=-1)
        nearest: list[int] = (means[1:] @ means[0]).topk(min(count, len(words))).indices.tolist()
        return [words[i] for i in nearest]

    def spliced(self, template: str, vectors: Tensor, name: str = "") -> Tensor:
        """States `[1, tokens, d]` of `template` with words of these input embeddings `[k, e]`, and `name` after them, for its `{}`.

        Can be differentiated by `vectors`.

        Raises:
            EraseError: this pipeline has several text encoders, whose words have several embeddings.
        """
        word = next(w for w in self.words() if w not in f"{template} {name}".lower())
        prompt = template.replace("{}", " ".join([word] * len(vectors) + [name] * bool(name)))
        ids, stand_in = self._ids([prompt, word], self.tokenizer)
        places = [1 + i for i, token in enumerate(ids) if token == stand_in[0]]

        def put(module: Any, args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[:, places] = vectors.to(output)
            return output

        handle = self.embeddings().register_forward_hook(put)
        try:
            return self.pipe.encode_prompt([prompt], self.pipe._execution_device, 1, False)[0]
        finally:
            handle.remove()

    def embeddings(self) -> Any:
        """The layer that gives each token of the tokenizer its input embedding `[e]`.

        Raises:
            EraseError: this pipeline has several text encoders.
        """
        if len(self.tokenizers) > 1:
            raise EraseError(
                f"{self.family.name} reads prompts by {len(self.tokenizers)} text encoders: learning words is for models with one"
            )
        return getattr(self.pipe, self.family.encoders[0][1]).get_input_embeddings()

    def check_name(self, name: str) -> None:
        """Raise unless `name` is something that this encoder can read as a concept."""
        if not isinstance(name, str) or not name.strip():
            raise EraseError("an empty name was given: expected the concept in words, such as 'Van Gogh'")
        ids = self.tokenizer(name, add_special_tokens=False)["input_ids"]
        known = [i for i in ids if i not in (self.tokenizer.unk_token_id, self.tokenizer.eos_token_id)]
        if not known:
            raise EraseError(
                f"the tokenizer knows no part of {name!r}: the model cannot draw it by name; use another word for it"
            )

    def fingerprint(self) -> Fingerprint:
        """This encoder's answer to the fixed probe prompts."""
        states = self._probed
        probed = [rows[states.end(i)] for i, rows in enumerate(states.rows)]
        probed += [rows[len(ids)] for rows, ids in zip(states.rows, states.ids, strict=True) if ids]
        spelt = [_hash(self._ids(PROBES, tokenizer)) for tokenizer in self.tokenizers]
        parts: list[Fingerprint] = []
        if len(self.parts) > 1:
            shares = zip(*(row.split(self.parts) for row in probed), strict=True)
            parts += [_fingerprint(list(share), hashed) for share, hashed in zip(shares, spelt, strict=True)]
        if states.pooled is not None:
            parts.append(_fingerprint(list(states.pooled), spelt[-1]))
        return _fingerprint(probed, spelt[0], tuple(parts))

    def side(self) -> TextSide:
        """This text side as it is now."""
        return TextSide(self.fingerprint(), tuple(len(tokenizer) for tokenizer in self.tokenizers))

    @torch.no_grad()
    def states_digest(self) -> str:
        """Exact digest of this encoder's answers in this dtype on this machine: good as a cache key, not as an identity.

        Of each token's input embedding, too: one that textual inversion has changed need not be in the probe prompts.
        """
        states = self._probed
        seen = [states.rows] if states.pooled is None else [states.rows, states.pooled]
        for encoder in (getattr(self.pipe, name, None) for _, name in self.family.encoders):
            table = (
                None if encoder is None else encoder.get_input_embeddings().weight
            )  # a refiner has no first encoder
            if table is not None and not table.is_meta:  # where layers are offloaded one by one, it is not here
                seen.append(table.detach().float().sum(1).cpu())
        return hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in seen)).hexdigest()

    @cached_property
    def _probed(self) -> States:
        return self.encode(PROBES)

    @cached_property
    def _empty(self) -> States:
        return self.encode([""])

    def _ids(self, prompts: Sequence[str], tokenizer: Any) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(tokenizer(p, add_special_tokens=False)["input_ids"]) for p in prompts)

    def _last_token(self, template: str, name: str, ids: tuple[int, ...]) -> int:
        """Index in the states of the last token of `name`: the tokens of the text up to there, plus the start token."""
        alone, before = (
            tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in (name, template.split("{}")[0] + name)
        )
        if ids[: len(before)] != before or before[-len(alone) :] != alone:
            raise EraseError(
                f"{name!r} merges with the words beside it in the template {template!r}: put spaces around {{}}"
            )
        return len(before)


class _Brief:
    """A tokenizer whose window is short. It pads by itself: a window that is set on the tokenizer would be every thread's."""

    def __init__(self, tokenizer: Any, window: int):
        self.tokenizer = tokenizer
        self.model_max_length = window

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __call__(self, text: str | list[str], *, add_special_tokens: bool = True, **padding: Any) -> Any:
        found = self.tokenizer(text, add_special_tokens=add_special_tokens)
        if not padding:
            return found
        rows = [ids + [self.tokenizer.pad_token_id] * (self.model_max_length - len(ids)) for ids in found["input_ids"]]
        whole = torch.tensor(rows)
        read = torch.tensor([len(ids) for ids in found["input_ids"]])[:, None] > torch.arange(self.model_max_length)
        return type(found)({"input_ids": whole, "attention_mask": read.long()})


def text_side(pipe: Any) -> TextSide | None:
    """The text side of `pipe` now; None where it has none (embeddings are given to it) or one that this version does not read."""
    family = family_of(next(iter(text_readers(pipe).values())))
    absent = None in (getattr(pipe, name, None) for name in family.encoders[-1])
    return None if family.experimental or absent else Encoder(pipe).side()


def check_templates(templates: Sequence[str]) -> None:
    """Raise unless there are templates and each has one place for the name."""
    if isinstance(templates, str) or not templates:
        raise EraseError(f"templates are a list of texts, such as ['a photo of {{}}']: got {templates!r}")
    if bad := [t for t in templates if t.count("{}") != 1]:
        raise EraseError(f"a template holds the name once, as {{}}: found {bad[0]!r}")


def roles_of(tokens: str, names: int, space: str = TEXT) -> tuple[str, ...]:
    """Token roles of a policy: `last`, `name`, `eot`, `pads`, `all`, joined by `+`, for a name of `names` tokens.

    In the pooled space a prompt has one state, whatever the policy.
    """
    parts = tokens.replace("all", "name+eot+pads").split("+")
    if unknown := set(parts) - {"last", "name", "eot", "pads"}:
        raise EraseError(
            f"unknown token policy {sorted(unknown)[0]!r} in {tokens!r}: join 'last' or 'name', 'eot' and 'pads' by '+', or say 'all'"
        )
    if space == POOLED:
        return (POOLED,)
    inner = tuple(f"name:{i}" for i in range(names - 1)) if "name" in parts else ()
    subject = ("subject",) if {"last", "name"} & set(parts) else ()
    return inner + subject + tuple(role for role in ("eot", "pads") if role in parts)


def pack_digest(recipe: PackRecipe, fingerprint: Fingerprint, space: str = TEXT) -> str:
    """Digest of list, recipe and encoder (width and tokenizer; its states are compared by tolerance), never of tensor bytes."""
    told: list = [recipe.name, recipe.prompts, recipe.ridge, fingerprint.width, fingerprint.tokenizer]
    if space != TEXT:
        told += [space, fingerprint.parts[-1].width]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def background(encoder: Encoder, recipe: PackRecipe) -> dict[str, tuple[Tensor, Tensor]]:
    """The states behind a base pack, of each space: second moment `[d, d]` of the recipe's prompts, and hard rows `[h, d]`; float64.

    Of each prompt count its content rows, its EOT and the mean of its pads; never the start token, which is hard, as are
    the empty prompt's EOT and the centroid of its pads. In the pooled space a prompt is one state, and the empty one is hard.
    """
    moments = {space: torch.zeros(width, width, dtype=torch.float64) for space, width in encoder.widths.items()}
    count = 0
    for start in range(0, len(recipe.prompts), BATCH):
        states = encoder.encode(recipe.prompts[start : start + BATCH], cut=True)
        for i, rows in enumerate(states.rows.double()):
            end = states.end(i)
            kept = (
                torch.cat([rows[1 : end + 1], rows[end + 1 :].mean(0, keepdim=True)])
                if end + 1 < len(rows)
                else rows[1:]
            )
            moments[TEXT], count = moments[TEXT] + kept.mT @ kept, count + len(kept)
        if states.pooled is not None:
            moments[POOLED] += states.pooled.double().mT @ states.pooled.double()
    states = encoder.encode([""])
    empty = states.rows[0].double()
    found = {TEXT: (moments[TEXT] / count, torch.stack([empty[0], empty[1], empty[2:].mean(0)]))}
    if states.pooled is not None:
        found[POOLED] = (moments[POOLED] / len(recipe.prompts), states.pooled.double())
    return found


def base_pack(recipe: PackRecipe, fingerprint: Fingerprint, moment: Tensor, hard: Tensor, space: str = TEXT) -> Pack:
    """The pack of `recipe` in one space of an encoder with this background: H = ridge·(tr M/d)·I + M."""
    width = moment.shape[0]
    return Pack(
        name=recipe.name,
        digest=pack_digest(recipe, fingerprint, space),
        ridge=recipe.ridge * float(moment.trace()) / width,
        width=width,
        moment=moment,
        hard=hard,
    )


def _row(states: States, prompt: int, role: str, last: int, length: int) -> Tensor:
    """The row of one prompt for a role; `last` is the name's last token, `length` its number of tokens."""
    if role == POOLED:
        assert states.pooled is not None  # roles are asked for in the spaces that an encoder has
        return states.pooled[prompt]
    rows, end = states.rows[prompt].double(), states.end(prompt)
    if role == "eot":
        return rows[end]
    if role == "pads":
        return rows[end + 1 :].mean(0) if end + 1 < len(rows) else rows[end]
    return rows[last] if role == "subject" else rows[last - length + 1 + int(role.split(":")[1])]


def _fingerprint(states: list[Tensor], tokenizer: str, parts: tuple[Fingerprint, ...] = ()) -> Fingerprint:
    values = torch.cat([_cosines(state) for state in states])
    return Fingerprint(len(states[0]), tokenizer, tuple(float(f"{v:.4g}") for v in values.tolist()), parts)


def _hash(ids: tuple[tuple[int, ...], ...]) -> str:
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def _say(widths: dict[str, int]) -> str:
    return " + ".join(f"{width} ({space})" for space, width in widths.items())


def _cosines(state: Tensor) -> Tensor:
    """The first cosine coefficients of a state: a few numbers that every entry of it takes part in."""
    d = len(state)
    places = torch.arange(d, dtype=torch.float64) + 0.5
    waves = torch.cos(torch.pi * torch.arange(1, COEFFICIENTS + 1, dtype=torch.float64)[:, None] * places / d)
    return waves @ state.double() / math.sqrt(d)
