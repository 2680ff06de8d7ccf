"""The methods, one paper a file; importing this package registers them. None imports another."""

from . import ridge, uce

__all__ = ["ridge", "uce"]
