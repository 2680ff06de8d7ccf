"""What this package raises on purpose.

One exception type, so that a server can catch it in one place and refuse the request. Every message says what was found,
what was expected and what to do, in one line.
"""


class EraseError(ValueError):
    """The request cannot be met as asked; nothing was changed."""


class ConflictError(EraseError):
    """Two erasures ask for things that exclude each other (a key with two targets, a target that is erased)."""


class MismatchError(EraseError):
    """An adapter does not belong to this pipeline, or its file is not what it says it is."""
