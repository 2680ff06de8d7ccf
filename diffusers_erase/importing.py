"""Other erasers' files as adapters: full matrices (UCE, ESD) and LoRAs (diffusers, PEFT, kohya, SPM) become rows or factors.

A file of matrices is compared with the base model that it was made from. If one map of the text states explains the change
of every site, the result is rows: portable, and solved together with others where the concepts' own states explain them.
Else each layer's change is factored, and what the truncation loses is measured and recorded. Nothing is ever unpickled.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import hub, solve
from .adapter import ErasureAdapter, Recipe
from .edits import Edit, Label, Pack, names_of
from .errors import EraseError, MismatchError
from .factors import Factors, Pair, probe, truncated
from .mapping import effect
from .sites import TEXT, layer, layer_names, matrix, original_weights, sites, text_readers
from .text import Encoder

MAP_TOLERANCE, ROUNDED_TOLERANCE = 0.01, 0.1
"""Share of a change that one text map may leave unexplained and still be called that: the first in an exact file, up to the second
where the file's dtype has rounded more away. Measured on emoji-sd, UCE's files: float32 1e-7, float16 0.001, bfloat16 0.011."""

SAME_MODEL = 0.5
"""Cosine between edited and base weights, median over layers, below which the base is another model: edits keep it near 1."""

LAMBDA = 0.5
"""UCE's released λ: the pack on which a concept's own states are tried."""

UNNAMED = "(not recorded)"
"""Target of imported rows: the files do not say where a concept was sent."""

TAKEN = "taken from its file"


def import_erasure(
    pipe: Any,
    source: str | Path,
    concept: str | Sequence[str],
    *,
    preserve: str | Sequence[str] = (),
    rank: int | None = None,
    tolerance: float = 0.05,
    multiplier: float = 1.0,
    drop_biases: bool = False,
) -> ErasureAdapter:
    """The erasure in another tool's weight file, as an adapter. Computes only: the pipe stays bit for bit as it was.

    Args:
        pipe: the base model that the file was made from, best in float32.
        source: a safetensors file (full matrices of the UNet, or a LoRA), or a folder with a LoRA in diffusers' or PEFT's layout.
        concept: what the file erases, in words: such files do not say. Names that UCE was given make the rows composable.
        preserve: names that UCE was told to preserve.
        rank: rank of each layer's factors; None lets `tolerance` decide.
        tolerance: share of each layer's change that its factors may lose, ‖Δ − B A‖_F / ‖Δ‖_F.
        multiplier: of a LoRA; SPM's is 1, sliders erase with a negative one.
        drop_biases: leave changed biases out (ESD-x trains a few); their share is in the recorded error. Without it they are refused.

    Raises:
        EraseError: the file is a pickle, of an unknown layout, changes nothing, or changes what no adapter can hold.
        MismatchError: it was made from another base model.

    Example:
        >>> adapter = import_erasure(pipe, "esd-van_gogh.safetensors", "Van Gogh", rank=16, drop_biases=True)
        >>> load_erasure(pipe, adapter)
    """
    names = [concept] if isinstance(concept, str) else list(concept)
    kept = list(names_of([preserve] if isinstance(preserve, str) else preserve))
    if not 0 < tolerance < 1 or (rank is not None and rank < 1) or not math.isfinite(multiplier) or multiplier == 0:
        raise EraseError(
            f"tolerance lies between 0 and 1, rank is at least 1 and multiplier is not 0: got {tolerance}, {rank}, {multiplier}"
        )
    encoder = Encoder(pipe)
    for name in (*names, *kept) or ("",):
        encoder.check_name(name)
    reader = text_readers(pipe)["unet"]
    file = hub.read_foreign(source)
    base = original_weights(reader)
    told: dict[str, Any] = {"file": file.name, "sha256": file.sha256}
    edit = None
    if any("lora" in key for key in file.tensors):
        pairs = {path: Pair(down, up * multiplier) for path, (down, up) in _lora(reader, file).items()}
        told |= {"layout": "lora", "multiplier": multiplier, "error": 0.0}
    else:
        changes = _changes(reader, base, file.tensors, drop_biases)
        edit, error = _rows(encoder, reader, base, changes, names, kept, file.sha256)
        told |= {"layout": "matrices", "one_map_residual": float(f"{error:.3g}")}
        pairs = {}
        if edit is None:
            pairs, error = _factored(changes, rank, tolerance)
        told["error"] = float(f"{error:.3g}")
    factors = (
        None
        if edit is not None
        else Factors(pairs, tuple(probe(matrix(base[f"{path}.weight"])) for path in sorted(pairs)))
    )
    if factors is not None:
        told["rank"] = max(len(pair.down) for pair in pairs.values())
    made = ErasureAdapter(
        edits={TEXT: edit} if edit is not None else {},
        factors=factors,
        encoder=encoder.fingerprint(),
        recipes=tuple(_recipe(name, encoder, edit, told, kept) for name in (names if edit is None else edit.concepts)),
        base_model=hub.model_name(pipe),
    )
    if made.size > hub.MAX_BYTES:
        raise EraseError(
            f"the factors would have {made.size} bytes, an adapter at most {hub.MAX_BYTES}: give a smaller rank or a larger tolerance"
        )
    return made


def _recipe(name: str, encoder: Encoder, edit: Edit | None, told: dict[str, Any], preserve: list[str]) -> Recipe:
    own = edit is not None and edit.only(name).labels[0].role == "subject"
    return Recipe(
        concept=name,
        coreferences=(),
        targets=(UNNAMED,),
        preserve=tuple(preserve) if own else (),
        method="import",
        options=told,
        tokens="last" if own else TAKEN,
        templates=("{}",) if own else None,
        residual=float(f"{edit.residuals()[name]:.3g}") if edit is not None and own else None,
        effect=round(effect(encoder, {TEXT: edit}, name), 4) if edit is not None and own else None,
    )


# --- full matrices ---


class Changes(NamedTuple):
    """What a file of matrices changes."""

    matrices: dict[str, Tensor]
    """Δ `[out, in]` (float64) by path."""
    lost: float
    """Norm of the bias changes that were dropped."""
    rounding: float
    """Norm of what the file's dtype alone may have changed."""

    @property
    def norm(self) -> float:
        """‖Σ Δ‖_F, with what was dropped."""
        return math.hypot(self.lost, *(float(change.norm()) for change in self.matrices.values()))


def _changes(
    reader: nn.Module, base: Mapping[str, Tensor], tensors: Mapping[str, Tensor], drop_biases: bool
) -> Changes:
    """The difference of a file's weights and the base's.

    Raises:
        EraseError: there is none, or one that no adapter can hold.
        MismatchError: the file belongs to another base.
    """
    state = {key.removeprefix("unet."): tensor for key, tensor in tensors.items()}
    changes, cosines, biases, rounded = {}, [], {}, []
    for key, new in state.items():
        old = base.get(key)
        if old is None or old.shape != new.shape:
            found = "has no such weight" if old is None else f"holds it as {tuple(old.shape)}"
            raise MismatchError(
                f"the file has {key} {tuple(new.shape)}, this model {found}: expected full matrices of the same base model's UNet "
                f"under diffusers' names"
            )
        if not (new.is_floating_point() and old.is_floating_point() and bool(new.isfinite().all())):
            raise EraseError(
                f"{key} holds NaN, infinity or no floating numbers: only plain finite weights can be compared"
            )
        old = old.detach().cpu()
        coarse = min(old.dtype, new.dtype, key=lambda dtype: -torch.finfo(dtype).eps)
        if torch.equal(old.to(coarse), new.to(coarse)):
            continue
        path, _, kind = key.rpartition(".")
        # Training in a coarse dtype started from the base in that dtype: its rounding is no part of the change.
        change = new.double() - old.to(coarse).double()
        if kind == "weight" and new.ndim in (2, 4):
            layer(reader, path)
            changes[path] = matrix(change)
            rounded.append(torch.finfo(coarse).eps / math.sqrt(6) * float(new.double().norm()))  # of both, uniform
            cosines.append(float(torch.cosine_similarity(old.double().flatten(), new.double().flatten(), dim=0)))
        elif kind == "bias":
            biases[path] = float(change.norm())
        else:
            raise EraseError(
                f"the file changes {key} {tuple(new.shape)}: only linear layers and 1×1 convolutions take factors"
            )
    if not changes:
        raise EraseError(
            f"nothing to import: all {len(state) - len(biases)} weights of the file are those of this model; "
            f"is it the model that was edited, and not its base?"
        )
    if (typical := sorted(cosines)[len(cosines) // 2]) < SAME_MODEL:
        raise MismatchError(
            f"the file's weights do not resemble this model's (median cosine {typical:.2f}, an edit keeps it near 1): "
            f"it was made from another base model"
        )
    if biases and not drop_biases:
        raise EraseError(
            f"the file changes {len(biases)} biases too (such as {next(iter(biases))}.bias), which adapters cannot hold: "
            f"pass drop_biases=True to leave them out, or use the file as it is"
        )
    return Changes(changes, math.hypot(*biases.values()), math.hypot(*rounded))


def _factored(changes: Changes, rank: int | None, tolerance: float) -> tuple[dict[str, Pair], float]:
    """A truncated pair for each layer, and the share of the whole change that is lost."""
    found = {path: truncated(change, rank=rank, tolerance=tolerance) for path, change in changes.matrices.items()}
    left = [float(changes.matrices[path].norm()) * error for path, (_, error) in found.items()]
    return {path: pair for path, (pair, _) in found.items()}, math.hypot(changes.lost, *left) / changes.norm


class SharedMap(NamedTuple):
    """The text map Y `[d, d]` with W + Δ = W (I + Y) in every layer, by joint least squares."""

    map: Tensor
    root: Tensor
    """M^½ with M = Σ WᵀW: ‖M^½ Z‖_F is what Z changes in all keys and values together."""
    residual: float
    """‖Σ (W Y − Δ)‖_F / ‖Σ Δ‖_F: 0 where the change is a text map."""
    norm: float
    """‖Σ Δ‖_F."""


def shared_map(weights: Mapping[str, Tensor], changes: Mapping[str, Tensor]) -> SharedMap:
    """Joint least squares Σ_l ‖W_l Y − Δ_l‖² over all layers; a layer without a change counts with Δ = 0.

    UCE and every other ridge edit whose targets are W times a text state have one such map (methods: W' = W T);
    attention losses, layer-wise filters and training have none.

    Args:
        weights: W `[out, d]` of every layer that reads text.
        changes: Δ `[out, d]` by the same paths.
    """
    d = next(iter(weights.values())).shape[1]
    gram, cross = torch.zeros(d, d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    for path, weight in weights.items():
        W = weight.detach().cpu().double()
        gram += W.mT @ W
        if path in changes:
            cross += W.mT @ changes[path]
    values, vectors = torch.linalg.eigh(gram)
    kept = values > 1e-12 * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    Y = vectors @ ((vectors.mT @ cross) / values[:, None])
    norm = math.hypot(*(float(change.norm()) for change in changes.values()))
    left = [
        float((weight.detach().cpu().double() @ Y - changes.get(path, torch.zeros(()))).norm())
        for path, weight in weights.items()
    ]
    return SharedMap(Y, values.sqrt()[:, None] * vectors.mT, math.hypot(*left) / norm, norm)


def _rows(
    encoder: Encoder,
    reader: nn.Module,
    base: Mapping[str, Tensor],
    changes: Changes,
    names: list[str],
    preserve: list[str],
    sha256: str,
) -> tuple[Edit | None, float]:
    """Rows whose map is the file's, and the share of the change that they lose; no rows where it is not one text map."""
    weights = {path: base[f"{path}.weight"] for path in sites(reader) if not path.endswith("to_kv")}
    if not set(changes.matrices) <= set(weights):
        return None, 1.0
    found = shared_map(weights, changes.matrices)
    unexplained = math.hypot(found.residual * found.norm, changes.lost) / changes.norm
    allowed = min(math.hypot(MAP_TOLERANCE, changes.rounding / changes.norm), ROUNDED_TOLERANCE)
    if unexplained > allowed:
        return None, unexplained
    noise = max(unexplained, MAP_TOLERANCE / 10)  # directions of the map below it are the file's rounding
    for edit in (_named(encoder, found.map, names, preserve), _principal(found, noise, names, sha256)):
        if edit is None:
            continue
        edit = edit.to(torch.float32)
        moving = edit.moving
        Y = edit.offsets[moving].double().mT @ edit.detectors()[moving]
        missed = float((found.root @ (found.map - Y)).norm()) / found.norm
        if missed <= allowed:
            return edit, math.hypot(unexplained, missed)
    raise AssertionError("the principal rows are as many as it takes")


def _named(encoder: Encoder, Y: Tensor, names: list[str], preserve: list[str]) -> Edit | None:
    """Rows with the concepts' own states as keys, as UCE has them, and the offsets that give Y; None where Y leaves one at rest."""
    C = torch.stack([encoder.rows(name, ("subject",), ("{}",))["subject"] for name in (*names, *preserve)])
    pack = Pack(name=f"identity-{LAMBDA:g}", digest=f"identity-{LAMBDA!r}", ridge=LAMBDA, width=C.shape[1])
    strengths = torch.ones(len(C), dtype=torch.float64)
    A = solve.detectors(C, pack.pull(C), strengths)[: len(names)]
    D = torch.linalg.lstsq(A.mT, Y.mT).solution  # Y = DᵀA
    if not bool((D.norm(dim=1) > 1e-6 * D.norm()).all()):
        return None
    return Edit(
        labels=(
            *(Label(name, name, "subject", (UNNAMED,)) for name in names),
            *(Label(name, name, "subject", None) for name in preserve),
        ),
        keys=C,
        offsets=torch.cat([D, torch.zeros(len(preserve), C.shape[1], dtype=D.dtype)]),
        strengths=strengths,
        pulled=pack.pull(C),
        pack=pack.name,
        pack_digest=pack.digest,
    )


def _principal(found: SharedMap, noise: float, names: list[str], sha256: str) -> Edit:
    """The fewest unit keys that give the map but for `noise`, on a pack of their own: whose states they are is not known, so they
    compose with nothing."""
    U, S, Vh = torch.linalg.svd(found.root @ found.map, full_matrices=False)
    left = S.square().flip(0).cumsum(0).flip(0).sqrt() / found.norm
    k = int((left > noise).sum())
    C = Vh[:k]  # orthonormal, so that each detector is its key times a number
    pack = Pack(name=f"imported-{sha256[:8]}", digest=f"imported-{sha256}", ridge=LAMBDA / 50, width=C.shape[1])
    concept = ", ".join(names)
    return Edit(
        labels=tuple(Label(concept, concept, f"map:{i}", (UNNAMED,)) for i in range(k)),
        keys=C,
        offsets=(1 + pack.ridge) * (C @ found.map.mT),
        strengths=torch.ones(k, dtype=torch.float64),
        pulled=pack.pull(C),
        pack=pack.name,
        pack_digest=pack.digest,
    )


# --- LoRAs ---

LORA_KEY = re.compile(
    r"(?P<layer>.+?)(?:\.lora_(?P<peft>[AB])(?:\.\w+)?|\.lora_(?P<kohya>down|up)|[._]lora(?:_linear_layer)?\.(?P<old>down|up))\.weight"
)
"""PEFT and diffusers: `x.lora_A.weight`; kohya and SPM: `x.lora_down.weight`; diffusers before PEFT: `x.lora.down.weight`,
`x_lora.down.weight`."""

PREFIXES = ("unet.base_model.model.", "base_model.model.", "unet.", "lora_unet_")


def _lora(reader: nn.Module, file: hub.Foreign) -> dict[str, Pair]:
    """B A · alpha/rank of every layer, exactly: nothing is truncated."""
    paths = layer_names(reader)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in file.tensors.items():
        match = LORA_KEY.fullmatch(key)
        if match is None and not key.endswith(".alpha"):
            raise EraseError(
                f"the file has {key}, which is no part of a plain LoRA: expected pairs named lora_A/lora_B, lora_down/lora_up or "
                f"lora.down/lora.up, and alpha"
            )
        name, part = (key.removesuffix(".alpha"), "alpha") if match is None else (match["layer"], _part(match))
        if name.startswith(("text_encoder", "lora_te")):
            raise EraseError(
                f"the LoRA changes the text encoder too ({key}), which an adapter for the UNet cannot hold: import one without it"
            )
        parts.setdefault(_path(name, paths), {})[part] = tensor
    scale = _scales(file)
    return {path: _pair(reader, path, found, scale) for path, found in parts.items()}


def _part(match: re.Match[str]) -> str:
    return {"A": "down", "B": "up"}.get(match["peft"], match["kohya"] or match["old"])


def _path(name: str, paths: Mapping[str, str]) -> str:
    """The module path of a layer under one of its foreign names."""
    prefix = next((p for p in PREFIXES if name.startswith(p)), "")
    plain = name.removeprefix(prefix).replace(".processor.", ".")
    plain = re.sub(r"\.to_out$", ".to_out.0", plain)
    if plain not in paths:
        raise MismatchError(f"the LoRA has {name}, this model no such layer: it was made for another base model")
    return paths[plain]


def _pair(reader: nn.Module, path: str, found: Mapping[str, Tensor], scale: Any) -> Pair:
    if not {"down", "up"} <= set(found):
        raise EraseError(f"the LoRA has only {' and '.join(sorted(found))} of {path}: the file is not whole")
    weight = matrix(layer(reader, path).weight)
    down, up = found["down"], found["up"]
    if any(t.ndim not in (2, 4) or t.shape[2:] not in ((), (1, 1)) for t in (down, up)):
        raise EraseError(
            f"the LoRA of {path} is a convolution of {tuple(down.shape)}: expected linear layers and 1×1 convolutions"
        )
    down, up = down.flatten(1).double(), up.flatten(1).double()
    if (up.shape[0], down.shape[1]) != tuple(weight.shape) or down.shape[0] != up.shape[1]:
        raise MismatchError(
            f"the LoRA of {path} has A {tuple(down.shape)} and B {tuple(up.shape)}, this model's layer is {tuple(weight.shape)}: "
            f"it was made for another base model"
        )
    factor = float(found["alpha"]) / len(down) if "alpha" in found else scale(path, len(down))
    return Pair(down.float().contiguous(), (up * factor).float().contiguous())


def _scales(file: hub.Foreign) -> Any:
    """(path, rank) → alpha/rank of layers that carry no alpha of their own: from PEFT's configuration, else 1."""
    config = file.config
    if config is None and "lora_adapter_metadata" in file.metadata:
        told = json.loads(file.metadata["lora_adapter_metadata"])
        config = {key.removeprefix("unet."): value for key, value in told.items() if key.startswith("unet.")}
    if config is None:
        if any(key.startswith("base_model.model.") for key in file.tensors):
            raise EraseError(
                f"{file.name} is in PEFT's layout, which keeps alpha in adapter_config.json: import the folder that holds both"
            )
        return lambda path, rank: 1.0
    if config.get("use_dora") or config.get("fan_in_fan_out") or config.get("bias", "none") != "none":
        raise EraseError(
            f"{file.name} is no plain LoRA (DoRA, transposed, or with biases): it cannot be held as factors"
        )

    def scale(path: str, rank: int) -> float:
        patterns = config.get("alpha_pattern") or {}
        own = [alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key.removeprefix('^')})$", path)]
        alpha = float(own[0] if own else config.get("lora_alpha", rank))
        return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank

    return scale
