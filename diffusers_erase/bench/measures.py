"""Scores of pictures without labels: CLIP score, perceptual distance of a pair, and features for distances between sets.

Like judges they own their networks and preprocessing, are recorded with a digest, and answer NaN where they fail.

    emoji_distance()(before, after)                     # how far each pair lies apart, [n]
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .. import hub, world
from ..errors import EraseError
from .networks import Classifier, Clip, Picture, weights_digest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Measure:
    """Rows of numbers for pictures, computed in batches; a picture on which it fails has a row of NaN.

    Example:
        >>> scores = clip_score("clip-vit-base-patch32")(pictures, ["a photo of a dog"] * len(pictures))      # [n]
    """

    name: str
    look: Callable[..., Tensor]
    """Batches of pictures (and of what belongs to each: texts, or second pictures) to a tensor `[n]` or `[n, d]`."""
    settings: Mapping[str, Any]
    batch: int = 32

    def __call__(self, images: Sequence[Picture | Path], *beside: Sequence[Any]) -> Tensor:
        """`[n]` or `[n, d]`, float32; NaN is unknown. Files are opened a batch at a time."""
        columns = [list(images), *map(list, beside)]
        if len({len(column) for column in columns}) > 1:
            raise EraseError(f"{self.name} measures pictures one by one: got {[len(c) for c in columns]} of each kind")
        starts = range(0, len(columns[0]), self.batch)
        parts = [part for i in starts for part in self._rows([c[i : i + self.batch] for c in columns])]
        width = next((part.shape for part in parts if part is not None), torch.Size())
        rows = [torch.full(width, math.nan) if part is None else part for part in parts]
        return torch.stack(rows) if rows else torch.zeros(0)

    def to_json(self) -> dict[str, Any]:
        """Name and settings: what the report says of it."""
        return {"name": self.name, **self.settings}

    @property
    def digest(self) -> str:
        """sha256 of `to_json()`."""
        return hub.digest(self.to_json())

    def _rows(self, columns: list[list[Any]]) -> list[Tensor | None]:
        n = len(columns[0])
        try:
            rows = self.look(*([_opened(item) for item in column] for column in columns))
            if len(rows) != n:
                raise EraseError(f"{len(rows)} rows for {n} pictures")
        except Exception as error:  # as with judges: one broken picture must not end a run, nor count
            if n > 1:
                return [row for i in range(n) for row in self._rows([[column[i]] for column in columns])]
            logger.warning("%s could not measure a picture: %s", self.name, error)
            return [None]
        return [row.float() if bool(row.isfinite().all()) else None for row in rows]


def _opened(item: Any) -> Any:
    if not isinstance(item, Path):
        return item
    with Image.open(item) as image:
        return image.convert("RGB")


def clip_score(folder: str | Path, *, batch: int = 32, device: str | torch.device = "cpu") -> Measure:
    """100 times the cosine of picture and text in a CLIP model's space (CLIPScore, Hessel et al. 2021, without its 2.5 and floor).

    Six-CD's *in-prompt CLIP* (2406.14855) is this score of a picture drawn from the prompt with the concept, against the
    *clean* text without it: does the edited model still draw the rest?
    """
    network = Clip(folder, device)

    def look(images: list[Picture], texts: list[str]) -> Tensor:
        return 100 * (network.images(images) * network.texts(texts)).sum(dim=1)

    return Measure(f"CLIP score, {network.folder.name}", look, network.to_json(), batch)


def emoji_features(*, batch: int = 256) -> Measure:
    """What emoji-sd's judge of objects reads before it decides, `[n, 640]`: for distances between sets of 64 x 64 pictures."""
    from ..world.judging import as_tensor

    network = world.judge().object_net

    @torch.inference_mode()
    def look(images: list[Picture]) -> Tensor:
        return _outputs(network, [len(network) - 2], as_tensor(images))[0]

    return Measure("emoji-sd's judge of objects, last layer", look, {"weights": weights_digest(network)}, batch)


def clip_features(folder: str | Path, *, batch: int = 32, device: str | torch.device = "cpu") -> Measure:
    """CLIP's image rows, which CMMD compares (2401.09603; its authors use ViT-L/14 at 336 pixels)."""
    network = Clip(folder, device)
    return Measure(f"CLIP {network.folder.name}", network.images, network.to_json(), batch)


def classifier_features(folder: str | Path, *, batch: int = 32, device: str | torch.device = "cpu") -> Measure:
    """What the head of an image classifier of transformers reads."""
    network = Classifier(folder, device)
    return Measure(f"classifier {network.folder.name}, last layer", network.features, network.to_json(), batch)


def emoji_distance(*, batch: int = 128) -> Measure:
    """Perceptual distance of two 64 x 64 pictures in emoji-sd's judge of objects, every layer alike: not a number of LPIPS."""
    from ..world.judging import as_tensor

    network = world.judge().object_net
    stages = [i for i, layer in enumerate(network) if isinstance(layer, nn.ReLU)]

    @torch.inference_mode()
    def look(images: list[Picture], others: list[Picture]) -> Tensor:
        a, b = (_outputs(network, stages, as_tensor(pictures)) for pictures in (images, others))
        return perceptual_distance(a, b)

    name = "perceptual distance, emoji-sd's judge of objects"
    return Measure(name, look, {"weights": weights_digest(network)}, batch)


def lpips(
    backbone: str | Path, heads: str | Path | None = None, *, batch: int = 16, device: str | torch.device = "cpu"
) -> Measure:
    """LPIPS 0.1 with AlexNet (Zhang et al. 2018, 1801.03924), of two pictures of one size. Needs no torchvision.

    Args:
        backbone: torchvision's AlexNet weights (`alexnet-owt-7be5be79.pth`), a local file.
        heads: the learned weights of the layers, by default those that the package `lpips` ships (its `v0.1/alex.pth`).

    Raises:
        EraseError: a file is missing or holds something else, or `lpips` is not installed.
    """
    network, learned = (
        _alexnet(_state(Path(backbone))).to(device),
        _state(_own_heads() if heads is None else Path(heads)),
    )
    weights = [learned[f"lin{i}.model.1.weight"].flatten().to(device) for i in range(len(ALEXNET_STAGES))]
    mean = torch.tensor([-0.030, -0.088, -0.188], device=device)[:, None, None]
    std = torch.tensor([0.458, 0.448, 0.450], device=device)[:, None, None]

    @torch.inference_mode()
    def look(images: list[Picture], others: list[Picture]) -> Tensor:
        a, b = (
            _outputs(network, ALEXNET_STAGES, (_pixels(pictures).to(device) - mean) / std)
            for pictures in (images, others)
        )
        return perceptual_distance(a, b, weights).cpu()

    settings = {"weights": weights_digest(network), "heads": hub.digest([w.tolist() for w in weights])}
    return Measure("LPIPS 0.1, AlexNet", look, settings, batch)


def perceptual_distance(first: Sequence[Tensor], second: Sequence[Tensor], weights: Sequence[Tensor] = ()) -> Tensor:
    """d = Σₗ mean over places of Σ_c w_lc (ŷ_lc − ŷ'_lc)² `[n]`, ŷ the activations with channels of unit length (1801.03924, eq. 1).

    Args:
        first, second: of each layer, activations `[n, c, h, w]`.
        weights: of each layer, w `[c]`; none takes all channels alike, w = 1 (the paper's baseline: twice the cosine distance).
    """
    total = torch.zeros(len(first[0]), device=first[0].device)
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        gap = (F.normalize(a, dim=1, eps=1e-10) - F.normalize(b, dim=1, eps=1e-10)) ** 2
        total = total + (gap * weights[i][:, None, None] if weights else gap).sum(dim=1).mean(dim=(1, 2))
    return total


ALEXNET_STAGES = (1, 4, 7, 9, 11)
"""Layers of AlexNet that LPIPS compares: the output of each ReLU."""


def _alexnet(state: Mapping[str, Tensor]) -> nn.Sequential:
    """The convolutions of AlexNet (Krizhevsky 2014, 1404.5997), with torchvision's names for its weights."""
    layers = nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip
    own = {name.removeprefix("features."): weight for name, weight in state.items() if name.startswith("features.")}
    if {n: w.shape for n, w in own.items()} != {n: w.shape for n, w in layers.state_dict().items()}:
        raise EraseError(
            f"the backbone holds {len(own)} weights of other names or shapes: expected torchvision's AlexNet"
        )
    layers.load_state_dict(own)
    return layers.eval()


def _own_heads() -> Path:
    spec = find_spec("lpips")  # its files are read, it is not imported: that would need torchvision
    if spec is None or not spec.submodule_search_locations:
        raise EraseError("LPIPS needs the learned weights of the package lpips: pip install 'diffusers-erase[lpips]'")
    return Path(spec.submodule_search_locations[0]) / "weights" / "v0.1" / "alex.pth"


def _outputs(network: nn.Sequential, stages: Sequence[int], x: Tensor) -> list[Tensor]:
    """Outputs of the layers `stages` of `network`, `[n, c, h, w]` each."""
    seen = []
    for i, layer in zip(range(stages[-1] + 1), network, strict=False):
        x = layer(x)
        if i in stages:
            seen.append(x)
    return seen


def _pixels(pictures: Sequence[Picture]) -> Tensor:
    """Pictures in [−1, 1], `[n, 3, h, w]`."""
    planes = [torch.frombuffer(bytearray(p.convert("RGB").tobytes()), dtype=torch.uint8) for p in pictures]
    shaped = [plane.view(p.height, p.width, 3).movedim(-1, 0) for plane, p in zip(planes, pictures, strict=True)]
    return torch.stack(shaped).float() / 127.5 - 1


def _state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise EraseError(f"no weights at {path}: expected a local file")
    return torch.load(path, map_location="cpu", weights_only=True)
