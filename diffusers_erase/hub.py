"""Bytes and JSON, here and on the Hub: adapter folders, pack recipes, the cache. It knows no adapter type.

An adapter folder holds `erasure.safetensors` (tensors, and one metadata key `erasure` with canonical JSON, called the
*head*) and `erasure_config.json` (the same head, for people and search). The safetensors file alone suffices to load.
A repository on the Hub is such a folder at one commit. Only this file knows safetensors and huggingface_hub.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml  # comes with huggingface_hub, whose cards are YAML and text
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import EraseError, MismatchError

WEIGHTS = "erasure.safetensors"
CONFIG = "erasure_config.json"
CARD = "README.md"
LORA = "pytorch_lora_weights.safetensors"
PEFT, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
KOHYA = "_kohya.safetensors"
"""How the name of the twin for kohya's programs ends."""
SIGNATURE = "erasure.sig"
IMAGES = "images"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
REPORT = "report.json"
PACK = "erasure_pack.json"
"""A model folder that holds this file brings its own base pack."""

FORMAT = 1
MAX_BYTES = 512 * 2**20
"""Adapters are kilobytes; a file larger than this is not one."""

MAX_HEAD = 32 * 2**20
"""Largest header of a file: labels and recipes of some ten thousand concepts."""

REPOSITORY = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
"""A repository on the Hub, and perhaps a branch, tag or commit of it: `user/repo`, `user/repo@revision`."""

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Origin:
    """Where an adapter was read from: a repository at one commit, or a place on this machine."""

    source: str
    """Repository id, or path."""
    commit: str | None = None
    """The commit of the repository; None on this machine."""
    subfolder: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, [self.source, self.subfolder])) + (f"@{self.commit}" if self.commit else "")


def canonical(data: Any) -> str:
    """JSON with sorted keys and no spaces: the same data always gives the same text."""
    return json.dumps(data, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def readable(data: Any) -> str:
    """JSON for people: sorted keys, indented."""
    return json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def digest(data: Any) -> str:
    """sha256 of the canonical JSON of `data`."""
    return hashlib.sha256(canonical(data).encode()).hexdigest()


def write_adapter(
    directory: str | Path,
    tensors: Mapping[str, Tensor],
    head: dict[str, Any],
    twins: Mapping[str, Mapping[str, Tensor]],
    linear: bool = False,
) -> Path:
    """Write an adapter folder, with LoRA twins by file name; each file appears whole or not at all.

    A twin's metadata names the adapter that it is of, and says where it is its `linear` part only.

    Twins and a signature that lie there stay only if they are of this very adapter.
    """
    folder = Path(directory)
    if folder.is_file():
        raise EraseError(f"{folder} is a file: expected a folder to save the adapter in")
    folder.mkdir(parents=True, exist_ok=True)
    head = {"format": FORMAT} | head
    head["checksum"] = digest(head)
    before = _head_of(folder / WEIGHTS)
    for path in folder.iterdir():
        twin = path.name == LORA or path.name.endswith(KOHYA)
        if (twin and (twins or before.get("digest") != head["digest"])) or (
            path.name == SIGNATURE and before.get("checksum") != head["checksum"]
        ):
            path.unlink()
    write_tensors(folder / WEIGHTS, tensors, {"erasure": canonical(head)})
    write_text(folder / CONFIG, readable(head))
    of = head["digest"] + (" (linear part)" if linear else "")
    for name, state in twins.items():
        write_tensors(folder / name, state, {"erasure_twin": of})  # one key: several have no fixed order
    return folder


def write_pictures(directory: str | Path, pictures: Mapping[str, Any]) -> dict[str, str]:
    """Put pictures (PIL, or image files) into `images/` of an adapter folder; prompt to path in the folder.

    Raises:
        EraseError: a file is not there, or no picture that a card can show.
    """
    paths = {}
    for prompt, picture in pictures.items():
        suffix = ".png" if hasattr(picture, "save") else Path(picture).suffix.lower()
        if suffix not in PICTURES or not (hasattr(picture, "save") or Path(picture).is_file()):
            raise EraseError(f"no picture at {picture}: expected a file with one of {', '.join(PICTURES)}")
        name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40]
        paths[prompt] = f"{IMAGES}/{name}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}{suffix}"
    for prompt, picture in pictures.items():
        path = Path(directory, paths[prompt])
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path) if hasattr(picture, "save") else shutil.copyfile(picture, path)
    return paths


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, moved into place when complete."""
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    _write(path, lambda temporary: save_file(contiguous, temporary, metadata=dict(metadata)))


def write_text(path: Path, text: str) -> Path:
    """A text file, moved into place when complete."""
    _write(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
    return path


def write_bytes(path: Path, data: bytes) -> None:
    """Any other file, moved into place when complete."""
    _write(path, lambda temporary: Path(temporary).write_bytes(data))


def locate(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    signed: bool = False,
) -> tuple[Path, Origin]:
    """The adapter file behind `source`, and where exactly it comes from. A folder or file of this name comes before the Hub.

    From a repository its head in JSON, its card and, if `signed`, its signature are fetched too, all from the one commit that
    `revision` is now.

    Raises:
        EraseError: nothing there, or no way to it.
    """
    if not isinstance(source, (str, Path)):
        raise EraseError(
            f"an erasure is loaded from a folder, a file, a repository or an ErasureAdapter: got {type(source).__name__}"
        )
    below = _inside(subfolder)
    match = REPOSITORY.fullmatch(source) if isinstance(source, str) and not os.path.exists(source) else None
    if match is None:
        if revision is not None:
            raise EraseError(
                f"revision={revision!r} is of a repository on the Hub, {str(source)!r} is none: leave it out"
            )
        return _locate(Path(source), below), Origin(str(source), None, below)
    repository, named = match["id"], match["revision"]
    if revision and named and revision != named:
        raise EraseError(f"{source} names revision {named!r}, the argument {revision!r}: give one of them")

    def fetch(name: str, at: str | None) -> Path:
        return Path(
            hf_hub_download(
                repository,
                name,
                subfolder=below or None,
                revision=at,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        )

    with plain_errors(repository, revision or named, below):
        path = fetch(WEIGHTS, revision or named)
        commit = path.parents[len(PurePosixPath(below).parts)].name  # the cache keeps one folder for each commit
        for companion in (CONFIG, CARD, SIGNATURE) if signed else (CONFIG, CARD):
            with contextlib.suppress(EntryNotFoundError):  # the file alone suffices
                fetch(companion, commit)
    return path, Origin(repository, commit, below)


def upload(
    directory: str | Path,
    repository: str,
    card: Callable[[str], str],
    *,
    message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    create_pr: bool = False,
    parent_commit: str | None = None,
) -> Origin:
    """Upload an adapter folder in one commit, with `card(the card that is there)` as its card. Foreign files stay at home.

    Twins and a signature in the repository that are not in the folder belong to another adapter: they are deleted.
    """
    if not (match := REPOSITORY.fullmatch(repository)) or match["revision"]:
        raise EraseError(f"a repository on the Hub is called user/name: got {repository!r}")
    below = _inside(subfolder)
    files = {"/".join(filter(None, [below, name])): path for name, path in folder_files(directory).items()}
    own = f"{below}/{CARD}".lstrip("/")
    with plain_errors(repository, revision):
        api = HfApi(token=token)
        api.create_repo(repository, private=private, exist_ok=True)
        info = api.model_info(repository, revision=revision)
        there = [f.rfilename for f in info.siblings or ()]
        old = ""
        if own in there:
            old = Path(api.hf_hub_download(repository, own, revision=info.sha)).read_text(encoding="utf-8")
        changes: list[Any] = [CommitOperationAdd(name, path) for name, path in files.items() if name != own]
        changes.append(CommitOperationAdd(own, card(old).encode()))
        changes += [CommitOperationDelete(name) for name in there if name not in files and _replaced(name, below)]
        done = api.create_commit(
            repository,
            changes,
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent_commit or info.sha,
        )
    return Origin(repository, done.oid, below)


def download(origin: Origin, directory: str | Path, **where: Any) -> None:
    """Copy the adapter folder of a repository at one commit: rows, card, twins, pictures, signature.

    Raises:
        EraseError: it is not of the Hub, or something is in `directory` already.
    """
    folder = Path(directory)
    if origin.commit is None:
        raise EraseError(f"{origin} is on this machine already: expected a repository's id (user/repo)")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise EraseError(f"{folder} is there already: expected a new folder for the adapter")
    known = [WEIGHTS, CONFIG, CARD, LORA, f"*{KOHYA}", SIGNATURE, *(f"{IMAGES}/*{kind}" for kind in PICTURES)]
    wanted = [f"{origin.subfolder}/{name}".lstrip("/") for name in known]
    with plain_errors(origin.source, origin.commit, origin.subfolder):
        root = snapshot_download(origin.source, revision=origin.commit, allow_patterns=wanted, **where)
    for name, file in folder_files(Path(root, origin.subfolder)).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)


def folder_files(directory: str | Path) -> dict[str, Path]:
    """What of a folder belongs to its adapter: name in the folder to path."""
    folder = Path(directory)
    found = [folder / name for name in (WEIGHTS, CONFIG, CARD, LORA, SIGNATURE)]
    found += sorted(folder.glob(f"*{KOHYA}"))
    found += sorted(p for p in folder.glob(f"{IMAGES}/*") if p.suffix.lower() in PICTURES)
    return {path.relative_to(folder).as_posix(): path for path in found if path.is_file()}


def _replaced(name: str, below: str) -> bool:
    """Whether a file of a repository goes with the adapter that is being replaced."""
    path = PurePosixPath(name)
    return path.parent == PurePosixPath(below) and (path.name in (LORA, SIGNATURE) or path.name.endswith(KOHYA))


@contextlib.contextmanager
def plain_errors(repository: str, revision: str | None = None, subfolder: str = "") -> Iterator[None]:
    """Turns what huggingface_hub raises about a repository into an `EraseError` of one line."""
    at = f" at revision {revision!r}" if revision else ""
    try:
        yield
    except EraseError:
        raise
    except _HUB_ERRORS as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, GatedRepoError):
            said = f"{repository} is gated: ask for access on its page and pass token="
        elif isinstance(error, RepositoryNotFoundError):
            said = (
                f"nothing is called {repository!r} here, and the Hub has no such repository or does not show it: check the name, "
                f"or pass a token= that may read it"
            )
        elif isinstance(error, RevisionNotFoundError):
            said = f"{repository} has no revision {revision!r}: expected a branch, a tag or a commit of it"
        elif isinstance(error, LocalEntryNotFoundError):
            said = (
                f"{repository}{at} is neither here nor in the cache, and the Hub was not reached (offline mode, "
                f"local_files_only=True, or no connection): fetch it once with a connection"
            )
        elif isinstance(error, EntryNotFoundError):
            said = f"{repository}{at} holds no {f'{subfolder}/' if subfolder else ''}{WEIGHTS}: it is not an erasure, or lacks a subfolder="
        elif status == 412:
            said = f"{repository} has changed in the meantime: look at its newest commit and push again"
        elif status in (401, 403):
            said = f"the Hub does not let this token touch {repository} ({first}): pass a token= that may"
        else:
            said = f"the exchange with the Hub about {repository}{at} failed ({first}): try again"
        raise EraseError(said) from error


_HUB_ERRORS: tuple[type[BaseException], ...] = (
    OSError,
    ValueError,
    RuntimeError,
    EntryNotFoundError,
    *HfHubHTTPError.__bases__,  # its HTTP library's own errors: requests in old versions, httpx in new ones
)


def read_adapter(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and head of the adapter file at `path`.

    Raises:
        MismatchError: it is not a whole adapter file of a known format.
    """
    if (size := path.stat().st_size) > MAX_BYTES:
        raise MismatchError(f"{path} has {size} bytes, an adapter at most {MAX_BYTES}: this is not an erasure")
    _check_header(path)
    tensors, metadata = read_tensors(path)
    head = _json(text := metadata.get("erasure", "null"), path)
    if not isinstance(head, dict):
        raise MismatchError(
            f"{path} has no erasure in its metadata: expected a file written by save_pretrained of an ErasureAdapter"
        )
    if text != canonical(head):
        raise MismatchError(f"the head of {path} is not as it was written: fetch or save the adapter again")
    if head.get("format") != FORMAT:
        raise MismatchError(
            f"{path} has format {head.get('format')!r}, this version reads {FORMAT}: install the diffusers-erase that wrote it"
        )
    if head.get("checksum") != digest({key: value for key, value in head.items() if key != "checksum"}):
        raise MismatchError(f"the head of {path} was changed after it was saved: fetch or save the adapter again")
    config = path.parent / CONFIG
    if path.name == WEIGHTS and config.is_file() and read_json(config) != head:
        raise MismatchError(
            f"{config} describes another adapter than the {path.name} beside it: fetch or save the folder again"
        )
    return tensors, head


def read_card(text: str) -> tuple[dict[str, Any], str]:
    """Metadata and text of a model card."""
    match = REGEX_YAML_BLOCK.search(text)
    try:
        fields = yaml.safe_load(match[2]) if match else {}
    except yaml.YAMLError as error:
        raise EraseError(f"the card's metadata is not YAML ({' '.join(str(error).split())}): mend {CARD}") from error
    if not isinstance(fields, dict | None):
        raise EraseError(f"the card's metadata is a {type(fields).__name__}, expected fields with values: mend {CARD}")
    return fields or {}, text[match.end() :] if match else text


def card_text(fields: Mapping[str, Any], text: str) -> str:
    """A model card of metadata and text."""
    return f"---\n{yaml_dump(dict(fields), sort_keys=False)}---\n{text}"


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


def read_text(path: Path) -> str:
    """A text file for people, such as a card; empty where there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def read_json(path: Path) -> Any:
    """The data of a JSON file.

    Raises:
        MismatchError: it is not JSON, or larger than any that is written here.
    """
    if (size := path.stat().st_size) > MAX_HEAD:
        raise MismatchError(f"{path} has {size} bytes of JSON, expected at most {MAX_HEAD}: this is another file")
    return _json(path.read_bytes(), path)


def read_key(path: str | Path) -> bytes:
    """The bytes of a key file."""
    if not os.path.isfile(path):
        raise EraseError(f"no key at {path}: expected a PEM file")
    return Path(path).read_bytes()


def read_report(source: str | Path) -> dict[str, Any]:
    """The JSON of a report: a file, or a folder that holds `report.json`."""
    path = Path(source)
    path = path / REPORT if path.is_dir() else path
    if not path.is_file():
        raise EraseError(f"no report at {path}: expected the folder that an evaluation wrote, or its {REPORT}")
    data = read_json(path)
    if not isinstance(data, dict):
        raise EraseError(f"{path} is not a report: expected JSON with estimates")
    return data


def read_pack(source: str | Path) -> dict[str, Any]:
    """The JSON of a base pack recipe: a file, or a folder that holds `erasure_pack.json`."""
    path = Path(source)
    path = path / PACK if path.is_dir() else path
    if not path.is_file():
        raise EraseError(f"no base pack at {path}: expected a JSON file with name and prompts")
    data = read_json(path)
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


@dataclass(frozen=True, eq=False)
class Foreign:
    """Another tool's weights, read and not yet understood."""

    name: str
    """The file's name, without its place on this machine."""
    sha256: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    config: dict[str, Any] | None
    """PEFT's `adapter_config.json`, if it lies beside the file."""


def read_foreign(source: str | Path) -> Foreign:
    """The weights in a safetensors file, or in a folder with a LoRA of diffusers or PEFT. Pickles are never opened.

    Raises:
        EraseError: nothing there, or a pickle.
    """
    path = Path(source)
    if path.is_dir():
        path = next((path / name for name in (LORA, PEFT) if (path / name).is_file()), path / LORA)
    if not path.is_file():
        raise EraseError(f"no weights at {path}: expected a safetensors file, or a folder with {LORA} or {PEFT}")
    with path.open("rb") as file:
        start = file.read(9)
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    # torch's files are zip archives or begin with pickle's opcode 0x80; a safetensors file has its JSON from byte 8 on.
    if path.suffix.lower() in PICKLES or (start.startswith((b"PK", b"\x80")) and start[8:] != b"{"):
        raise EraseError(
            f"{path.name} is a pickle, which can run code when it is opened: convert it on a machine that you can lose, with "
            f"safetensors.torch.save_file(torch.load({path.name!r}, weights_only=True), 'converted.safetensors'), and import that"
        )
    tensors, metadata = read_tensors(path)
    beside = path.parent / PEFT_CONFIG
    config = _json(beside.read_bytes(), beside) if path.name == PEFT and beside.is_file() else None
    return Foreign(path.name, sha256, tensors, metadata, config)


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


def _check_header(path: Path) -> None:
    """Raise unless the header is of a believable size and written exactly as safetensors writes it.

    JSON has many ways to say the same (blanks, escapes, a key twice); with one way allowed, no byte can change unnoticed.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(MAX_HEAD, path.stat().st_size - 8):
            raise MismatchError(
                f"{path} is not a whole safetensors file (it promises a header of {size} bytes): fetch or save it again"
            )
        text = file.read(size)
    plain = json.dumps(_json(text, path), ensure_ascii=False, separators=(",", ":")).encode()
    if plain + b" " * (len(text) - len(plain)) != text:
        raise MismatchError(f"the header of {path} is not as safetensors writes it: fetch or save it again")


def _head_of(path: Path) -> dict[str, Any]:
    """The head of the adapter file at `path`, or nothing where there is none that can be read."""
    try:
        return read_adapter(path)[1] if path.is_file() else {}
    except MismatchError:
        return {}


def _source(pipe: Any) -> str:
    return str(getattr(getattr(pipe, "config", None), "_name_or_path", "") or "")


def _inside(subfolder: str | None) -> str:
    """A subfolder in one form: it may not lead out of its repository."""
    place = PurePosixPath(subfolder or "")
    if place.is_absolute() or ".." in place.parts or {"\\", "\0"} & set(subfolder or ""):
        raise EraseError(f"a subfolder is a relative path inside its repository, such as 'a/b': got {subfolder!r}")
    return "/".join(place.parts)


def _locate(path: Path, subfolder: str) -> Path:
    path = path / subfolder
    if os.path.isdir(path):  # unlike Path.is_dir, this says no to what cannot be a path
        path = path / WEIGHTS
    if not os.path.isfile(path):
        raise EraseError(
            f"no erasure at {str(path)[:200]!r}: expected a folder with {WEIGHTS}, such a file, or a repository's id (user/repo)"
        )
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
