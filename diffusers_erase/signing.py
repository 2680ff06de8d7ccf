"""Detached signatures: who vouches for an adapter. Ed25519, over the checksum of its head, which covers everything else.

Needs `cryptography` (`pip install diffusers-erase[sign]`), which only this file knows and only imports when it is asked to sign
or to verify. A digest tells damage; a signature tells also whether somebody else wrote the file.
"""

from pathlib import Path
from typing import Any

from . import hub
from .errors import EraseError, MismatchError

PURPOSE = b"diffusers-erase signature 1\n"
"""Stands before what is signed, so that a signature made for this can be used for nothing else."""


def sign(path: Path, head: dict[str, Any], private_key: str | Path, password: str | None) -> Path:
    """Write `erasure.sig` beside the adapter file at `path`, whose `head` was checked. See `sign_erasure`."""
    key = _key(private_key, "private", None if password is None else password.encode())
    signature = {"algorithm": "ed25519", "signature": key.sign(_message(head)).hex()}
    return hub.write_text(path.parent / hub.SIGNATURE, hub.canonical(signature) + "\n")


def verify(path: Path, head: dict[str, Any], public_key: str | Path) -> None:
    """Raise unless `erasure.sig` beside the adapter file at `path` was made for its `head` by the holder of a key.

    Args:
        public_key: PEM file of the Ed25519 public key.

    Raises:
        EraseError: no such key.
        MismatchError: no signature, or not of this adapter by this key.
    """
    from cryptography.exceptions import InvalidSignature

    key = _key(public_key, "public")
    file = path.parent / hub.SIGNATURE
    found = hub.read_json(file) if file.is_file() else None
    if found is None:
        raise MismatchError(
            f"{path} is not signed: expected {hub.SIGNATURE} beside it; ask its author, or load without a key"
        )
    try:
        if found["algorithm"] != "ed25519":
            raise ValueError(found["algorithm"])
        key.verify(bytes.fromhex(found["signature"]), _message(head))
    except (InvalidSignature, KeyError, TypeError, ValueError) as error:
        raise MismatchError(
            f"{file} is no signature of this adapter by the holder of {public_key}: do not use it"
        ) from error


def _message(head: dict[str, Any]) -> bytes:
    return PURPOSE + head["checksum"].encode()


def _key(path: str | Path, kind: str, password: bytes | None = None) -> Any:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric import ed25519
        from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
    except ImportError as error:
        raise EraseError("signatures need cryptography: pip install diffusers-erase[sign]") from error
    data = hub.read_key(path)
    try:
        key = load_pem_private_key(data, password) if kind == "private" else load_pem_public_key(data)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise EraseError(
            f"{path} is no {kind} key in PEM that can be read ({error}): expected an Ed25519 key"
        ) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey if kind == "private" else ed25519.Ed25519PublicKey):
        raise EraseError(
            f"{path} holds another kind of key: expected Ed25519, as openssl genpkey -algorithm ed25519 makes it"
        )
    return key
