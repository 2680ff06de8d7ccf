"""Pictures by plan: same prompt, same seed, before and after; drawn once, cached, resumed after a kill at any point.

A picture's file name is the hash of all that decides it: prompt, seed, settings, model, the erasures in force, and how many
are drawn together. Whoever asks for the same picture again, in this run or another, finds it; so the unedited model's
pictures serve every adapter. A file appears whole or not at all.
"""

import hashlib
import io
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from .. import hub
from ..errors import EraseError, MismatchError
from ..sites import unwrapped
from ..status import erasure_status
from ..text import Encoder
from .plan import BATCH, WHOLE, Plan, Shard
from .suites import Prompt, Settings, Suite


def generate(
    pipe: Any, suite: Suite, folder: str | Path, on_picture: Callable[[int], Any] = lambda n: None
) -> list[Path]:
    """Every picture of `suite` as `pipe` draws it now, in the order of its prompts; those that exist are not drawn again.

    Args:
        folder: a cache that runs may share.
        on_picture: called with the number of pictures that were found or drawn, for progress.
    """
    plan = plan_for(pipe, suite.prompts, suite.settings)
    draw(pipe, plan, folder, on_picture=on_picture)
    return paths(plan, folder)


def plan_for(pipe: Any, prompts: Iterable[Prompt], settings: Settings, batch: int = BATCH) -> Plan:
    """The plan of a picture for each prompt and its seed, drawn by `pipe` with the erasures that are in force on it now.

    Args:
        batch: pictures that are drawn together.

    Example:
        >>> plan = plan_for(pipe, [Prompt("a cat", 0), Prompt("a dog", 0)], Settings(steps=20, guidance=7.5))
        >>> draw(pipe, plan, "pictures")
        >>> before = paths(plan, "pictures")
    """
    asked = tuple((prompt.text, prompt.seed) for prompt in prompts)
    return Plan(model_digest(pipe), _in_force(pipe), settings, asked, batch)


def draw(
    pipe: Any,
    plan: Plan,
    folder: str | Path,
    shard: Shard = WHOLE,
    on_picture: Callable[[int], Any] = lambda n: None,
) -> None:
    """Draw what `folder` lacks of this shard's batches; the plan is written there first.

    A batch that a kill left half saved is drawn again whole, so that its pictures have the same bits as ever.

    Raises:
        MismatchError: `pipe` is not what the plan was made for, so its pictures would have the wrong names.
    """
    if (plan.model, plan.erasures) != (model_digest(pipe), _in_force(pipe)):
        raise MismatchError(
            "this plan was made for another model, or for other erasures than are in force: plan again with this pipeline"
        )
    plan.save(folder)
    files = _files(plan, folder)
    for batch in shard.of(plan.batches):
        missing = [i for i in batch if not files[i].is_file()]
        if missing:
            for i, image in zip(batch, _drawn(pipe, plan, batch), strict=True):
                if i in missing:
                    _save(image, files[i])
        on_picture(len(batch))


def paths(plan: Plan, folder: str | Path) -> list[Path]:
    """The picture's file for each of the plan's prompts, in their order, drawn or not."""
    files = _files(plan, folder)
    return [files[i] for i in plan.places]


def undrawn(plan: Plan, folder: str | Path, shard: Shard = WHOLE) -> int:
    """How many pictures of this shard will have to be drawn: all of each batch that is not whole."""
    files = _files(plan, folder)
    return sum(len(b) for b in shard.of(plan.batches) if not all(files[i].is_file() for i in b))


def pace(pipe: Any, plan: Plan) -> float:
    """Seconds that a picture of the plan takes, told by the first batch at one step and at three; nothing is saved."""
    batch = plan.batches[0]

    def seconds(steps: int) -> float:
        start = time.perf_counter()
        _drawn(pipe, replace(plan, settings=replace(plan.settings, steps=steps)), batch)
        return time.perf_counter() - start

    seconds(1)  # what happens only once, such as compiling, is no part of the pace
    one, three = seconds(1), seconds(3)
    return (one + max(0.0, three - one) / 2 * (plan.settings.steps - 1)) / len(batch)


def read(paths: Sequence[Path]) -> list[Image.Image]:
    """The pictures at `paths`, in RGB."""
    pictures = []
    for path in paths:
        with Image.open(path) as image:
            pictures.append(image.convert("RGB"))
    return pictures


@torch.no_grad()
def model_digest(pipe: Any) -> str:
    """Digest of what draws: every component's weights, to the bit, its configuration, and the tokens of the text side.

    The same on every machine and device. It cannot see what lies in no weight and no configuration, such as a changed
    attention processor.
    """
    found = Encoder(pipe).fingerprint()
    told: list[Any] = [
        type(pipe).__name__,
        _settled(pipe.config),
        found.tokenizer,
        *(p.tokenizer for p in found.parts),
    ]
    for name, part in sorted(pipe.components.items()):
        if config := getattr(unwrapped(part), "config", None):
            told.append([name, type(unwrapped(part)).__name__, _settled(config)])
        if isinstance(part, nn.Module):
            told += [[name, path, *facts] for path, *facts in _weights(unwrapped(part))]
    return hub.digest(told)


def _in_force(pipe: Any) -> tuple[tuple[str, float], ...]:
    """(digest, strength) of every erasure in force."""
    status = erasure_status(pipe)
    asked = (status.requested[name] for name in status.in_force)
    return tuple(sorted((entry["digest"], float(entry["strength"])) for entry in asked))


def _settled(config: Any) -> str:
    """A component's configuration without what changes from machine to machine: where it was loaded from, and by which version."""
    data = dict(config) if isinstance(config, Mapping) else config.to_dict()
    skip = ("transformers_version", "torch_dtype", "dtype")
    return hub.canonical({k: str(v) for k, v in data.items() if not k.startswith("_") and k not in skip})


def _weights(module: nn.Module) -> Iterator[list[Any]]:
    """Path, shape, dtype and sha256 of each weight; of LoRA layers also which adapters act, and how strongly."""
    for path, weight in module.state_dict(keep_vars=True).items():
        if not isinstance(weight, Tensor):
            yield [path, str(weight)]
            continue
        if weight.is_meta:
            raise EraseError(
                f"{path} is not in memory (sequential offloading): evaluate with enable_model_cpu_offload() instead"
            )
        yield [path, list(weight.shape), str(weight.dtype), _sha256(weight)]
    for path, layer in module.named_modules():
        if hasattr(layer, "base_layer") and hasattr(layer, "scaling"):
            yield [path, str(layer.active_adapters), str(layer.scaling), str(layer.merged)]


def _sha256(weight: Tensor) -> str:
    if hasattr(weight, "__tensor_flatten__"):  # a quantised weight that wraps plain tensors
        return hub.digest([_sha256(getattr(weight, name)) for name in weight.__tensor_flatten__()[0]])  # type: ignore[operator]
    plain = weight.detach().as_subclass(Tensor).cpu().contiguous().reshape(-1)
    return hashlib.sha256(plain.view(torch.uint8).numpy().data).hexdigest()


def _drawn(pipe: Any, plan: Plan, batch: Sequence[int]) -> list[Image.Image]:
    """One call of the pipeline; each picture has its own generator, on the CPU, so that its noise is the same everywhere."""
    prompts = [plan.items[i][0] for i in batch]
    generators = [torch.Generator("cpu").manual_seed(plan.items[i][1]) for i in batch]
    keywords = plan.keywords
    if isinstance(negative := keywords.get("negative_prompt"), str):
        keywords["negative_prompt"] = [negative] * len(prompts)
    return pipe(prompts, generator=generators, **keywords).images


def _files(plan: Plan, folder: str | Path) -> list[Path]:
    return [Path(folder) / f"{name}.png" for name in plan.names]


def _save(image: Image.Image, path: Path) -> None:
    data = io.BytesIO()
    image.save(data, format="PNG")
    hub.write_bytes(path, data.getvalue())
