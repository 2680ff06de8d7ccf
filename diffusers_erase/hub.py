"""Bytes and JSON: adapter folders, pack recipes, the cache. The only file that knows safetensors; it knows no adapter type.

An adapter folder holds `erasure.safetensors` (tensors, and one metadata key `erasure` with canonical JSON, called the
*head*) and `erasure_config.json` (the same head, for people and search). The safetensors file alone suffices to load.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import EraseError, MismatchError

WEIGHTS = "erasure.safetensors"
CONFIG = "erasure_config.json"
LORA = "pytorch_lora_weights.safetensors"
PACK = "erasure_pack.json"
"""A model folder that holds this file brings its own base pack."""

FORMAT = 1
MAX_BYTES = 512 * 2**20
"""Adapters are kilobytes; a file larger than this is not one."""


def canonical(data: Any) -> str:
    """JSON with sorted keys and no spaces: the same data always gives the same text."""
    return json.dumps(data, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def digest(data: Any) -> str:
    """sha256 of the canonical JSON of `data`."""
    return hashlib.sha256(canonical(data).encode()).hexdigest()


def write_adapter(directory: str | Path, tensors: Mapping[str, Tensor], head: dict[str, Any]) -> Path:
    """Write an adapter folder; each file appears whole or not at all."""
    folder = Path(directory)
    if folder.is_file():
        raise EraseError(f"{folder} is a file: expected a folder to save the adapter in")
    folder.mkdir(parents=True, exist_ok=True)
    head = {"format": FORMAT} | head
    head["checksum"] = digest(head)
    write_tensors(folder / WEIGHTS, tensors, {"erasure": canonical(head)})
    write_text(folder / CONFIG, json.dumps(head, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    return folder


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, moved into place when complete."""
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    _write(path, lambda temporary: save_file(contiguous, temporary, metadata=dict(metadata)))


def write_text(path: Path, text: str) -> None:
    """A text file, moved into place when complete."""
    _write(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def read_adapter(source: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and head of the adapter at `source`, a folder or a safetensors file.

    Raises:
        EraseError: nothing there.
        MismatchError: it is not a whole adapter file of a known format.
    """
    path = _locate(source)
    if (size := path.stat().st_size) > MAX_BYTES:
        raise MismatchError(f"{path} has {size} bytes, an adapter at most {MAX_BYTES}: this is not an erasure")
    tensors, metadata = read_tensors(path)
    head = _json(metadata.get("erasure", "null"), path)
    if not isinstance(head, dict):
        raise MismatchError(
            f"{path} has no erasure in its metadata: expected a file written by save_pretrained of an ErasureAdapter"
        )
    if head.get("format") != FORMAT:
        raise MismatchError(
            f"{path} has format {head.get('format')!r}, this version reads {FORMAT}: install the diffusers-erase that wrote it"
        )
    if head.get("checksum") != digest({key: value for key, value in head.items() if key != "checksum"}):
        raise MismatchError(f"the head of {path} was changed after it was saved: fetch or save the adapter again")
    config = path.parent / CONFIG
    if path.name == WEIGHTS and config.is_file() and _json(config.read_bytes(), config) != head:
        raise MismatchError(
            f"{config} describes another adapter than the {path.name} beside it: fetch or save the folder again"
        )
    return tensors, head


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        MismatchError: it is not one, or not whole.
    """
    try:
        with safe_open(path, framework="pt") as file:
            # Cloned: some versions map the file, and writing over it would change tensors that were read.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no dict
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise MismatchError(f"{path} is not a whole safetensors file ({error}): fetch or save it again") from error


def read_pack(source: str | Path) -> dict[str, Any]:
    """The JSON of a base pack recipe: a file, or a folder that holds `erasure_pack.json`."""
    path = Path(source)
    path = path / PACK if path.is_dir() else path
    if not path.is_file():
        raise EraseError(f"no base pack at {path}: expected a JSON file with name and prompts")
    data = _json(path.read_bytes(), path)
    if not isinstance(data, dict) or not data.get("name") or not isinstance(data.get("prompts"), list):
        raise EraseError(f"{path} is not a base pack: expected JSON with a name and a list of prompts")
    return data


def own_pack(pipe: Any) -> Path | None:
    """The pack recipe that a model folder brings with it, if `pipe` was loaded from one."""
    source = _source(pipe)
    file = Path(source) / PACK
    return file if source and file.is_file() else None


def model_name(pipe: Any) -> str:
    """What `pipe` was loaded from: a repository's id, or the name of a folder without its place on this machine."""
    source = _source(pipe)
    return Path(source).name if Path(source).exists() else source


def cached(key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors made once for a key and kept in the user's cache folder (`DIFFUSERS_ERASE_CACHE`, else `~/.cache/diffusers-erase`)."""
    folder = Path(os.environ.get("DIFFUSERS_ERASE_CACHE") or Path.home() / ".cache" / "diffusers-erase")
    path = folder / f"{key}.safetensors"
    if path.is_file():
        try:
            return read_tensors(path)[0]
        except MismatchError:
            path.unlink()  # a broken cache file is made again, never trusted
    tensors = make()
    with contextlib.suppress(OSError):  # homes are read-only in many containers: then it is made every time
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, {})
    return tensors


def _source(pipe: Any) -> str:
    return str(getattr(getattr(pipe, "config", None), "_name_or_path", "") or "")


def _locate(source: str | Path) -> Path:
    if not isinstance(source, (str, Path)):
        raise EraseError(
            f"an erasure is loaded from a folder, a file or an ErasureAdapter: got {type(source).__name__}"
        )
    path = Path(source)
    if path.is_dir():
        path = path / WEIGHTS
    if not path.is_file():
        raise EraseError(f"no erasure at {path}: expected a folder with {WEIGHTS}, or such a file")
    return path


def _json(text: str | bytes, path: Path) -> Any:
    """Parsed JSON of text that says nothing beyond JSON: no NaN, and no half of a character, which no digest could cover."""
    try:
        data = json.loads(text)
        canonical(data).encode()
    except (ValueError, RecursionError) as error:
        raise MismatchError(f"{path} does not hold readable JSON ({error}): fetch or save it again") from error
    return data


def _write(path: Path, write: Callable[[str], Any]) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
