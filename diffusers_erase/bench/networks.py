"""The networks that judges and measures look through, each from a local folder, with its own preprocessing.

Nothing is fetched. Images are prepared by the host's own image processor in its PIL form, which needs no torchvision and
gives the same numbers on every machine.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..errors import EraseError

Picture = Image.Image

PREPARED = (
    "do_resize size resample do_center_crop crop_size crop_pct do_rescale rescale_factor do_normalize image_mean image_std"
).split()
"""Settings of an image processor that decide what the network sees."""


class Clip:
    """A CLIP model: pictures and texts as unit rows of one space.

    Raises:
        EraseError: `folder` holds no CLIP model with tokenizer and `preprocessor_config.json`.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu"):
        from transformers import AutoTokenizer, CLIPModel

        _check_type(folder, ("clip",))
        self.folder, self.device = Path(folder), torch.device(device)
        self.model: Any = _load(CLIPModel, folder).eval().to(self.device)
        self.tokenizer, self.prepare = _load(AutoTokenizer, folder), Preparation(folder)
        self.scale = float(self.model.logit_scale.detach().exp())

    @torch.inference_mode()
    def images(self, images: Sequence[Picture]) -> Tensor:
        """Unit rows `[n, d]`, float32 on the CPU."""
        seen = self.model.vision_model(pixel_values=self.prepare(images).to(self.device, self.model.dtype))
        return _unit(self.model.visual_projection(seen[1]))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit rows `[n, d]`, float32 on the CPU; what is beyond the encoder's window is cut off, as every CLIP score does."""
        window = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=window, return_tensors="pt")
        ids, mask = tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device)
        return _unit(self.model.text_projection(self.model.text_model(input_ids=ids, attention_mask=mask)[1]))

    def to_json(self) -> dict[str, Any]:
        return {"model": self.folder.name, "weights": weights_digest(self.model)} | self.prepare.to_json()


class Classifier:
    """An image classifier of `transformers`: probabilities of its own labels, and the features that its head reads.

    Raises:
        EraseError: `folder` holds no image classifier with `preprocessor_config.json`.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu"):
        from transformers import AutoModelForImageClassification

        _check_type(folder, None)
        self.folder, self.device = Path(folder), torch.device(device)
        self.model: Any = _load(AutoModelForImageClassification, folder).eval().to(self.device)
        self.prepare = Preparation(folder)
        self.labels = tuple(str(self.model.config.id2label[i]) for i in range(self.model.config.num_labels))

    @torch.inference_mode()
    def probabilities(self, images: Sequence[Picture]) -> Tensor:
        """`[n, labels]`, float32 on the CPU."""
        pixels = self.prepare(images).to(self.device, self.model.dtype)
        return self.model(pixel_values=pixels).logits.float().softmax(dim=1).cpu()

    @torch.inference_mode()
    def features(self, images: Sequence[Picture]) -> Tensor:
        """What the last linear layer reads, `[n, d]`, float32 on the CPU."""
        seen: list[Tensor] = []
        head = [m for m in self.model.modules() if isinstance(m, nn.Linear) and m.out_features == len(self.labels)][-1]
        hook = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            self.probabilities(images)
        finally:
            hook.remove()
        return seen[0].float().cpu()

    def to_json(self) -> dict[str, Any]:
        return {"model": self.folder.name, "weights": weights_digest(self.model)} | self.prepare.to_json()


class Preparation:
    """Pictures as the network in `folder` wants them, by its `preprocessor_config.json`."""

    def __init__(self, folder: str | Path):
        import transformers

        form = {"backend": "pil"} if int(transformers.__version__.split(".")[0]) >= 5 else {"use_fast": False}
        self.processor: Any = _load(transformers.AutoImageProcessor, folder, **form)

    def __call__(self, images: Sequence[Picture]) -> Tensor:
        """Pixels `[n, 3, h, w]`."""
        return self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]

    def to_json(self) -> dict[str, Any]:
        told = {name: getattr(self.processor, name, None) for name in PREPARED}
        return {"preprocessing": {name: _plain(value) for name, value in told.items() if value is not None}}


def weights_digest(module: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of all weights: the same for the same weights in any file format."""
    digest = hashlib.sha256()
    for name, weight in sorted(module.state_dict().items()):
        weight = weight.detach().cpu().contiguous()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows.float(), dim=-1).cpu()


def _check_type(folder: str | Path, types: Sequence[str] | None) -> None:
    """Raise unless `folder` holds a model (of one of `types`); also keeps a name from being taken for a repository."""
    from transformers import AutoConfig

    if not (Path(folder) / "config.json").is_file():
        raise EraseError(f"no model in {str(folder)!r}: expected a local folder with config.json and weights")
    found = _load(AutoConfig, folder).model_type
    if types and found not in types:
        raise EraseError(f"{str(folder)!r} holds a model of type {found!r}: expected {' or '.join(types)}")


def _load(kind: Any, folder: str | Path, **more: Any) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True, **more)
    except (OSError, ValueError, KeyError) as error:
        why = str(error).strip().splitlines()[0]
        raise EraseError(f"{str(folder)!r} is not whole: {kind.__name__} could not be loaded ({why})") from error


def _plain(value: Any) -> Any:
    """A processor's setting as JSON; the hosts' versions hold sizes as dictionaries or as objects of their own."""
    if isinstance(value, (bool, int, float, str)):
        return int(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return {name: _plain(size) for name, size in dict(value).items() if size is not None}
