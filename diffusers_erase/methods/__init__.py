"""The methods, one paper a file; importing this package registers them. None imports another."""

from . import age, ap, esd, ridge, uce

__all__ = ["age", "ap", "esd", "ridge", "uce"]
