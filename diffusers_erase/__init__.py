"""Take a concept out of a text-to-image pipeline, keep everything else, prove both, undo it, combine it and ship it.

    from diffusers_erase import erase, load_erasure

    adapter = erase(pipe, "Van Gogh")       # computes; the pipe stays as it was
    load_erasure(pipe, adapter)             # attaches; unload_erasure(pipe) gives back every bit

Read the package in the order of its files' imports: errors, solve, outlook, edits, sites, text, task, train, methods, hub, packs,
vocabulary, targets, adapter, mapping, fusing, loras, hook, status, fitting, attach, verbs, serving, mixin, erasing. The embedded model is
`diffusers_erase.world`, the judging of pictures `diffusers_erase.bench`.
"""

from . import world
from .adapter import ErasureAdapter, compose, sign_erasure
from .erasing import erase
from .errors import ConflictError, EraseError, MismatchError
from .exporting import export_erased
from .factors import Factors
from .graph import ConceptGraph, concept_graph
from .importing import import_erasure
from .mixin import ErasureLoaderMixin, disable, enable
from .serving import ErasurePolicy, enforce_policy, erasing, release_policy
from .status import ErasureStatus, Receipt, erasure_status, get_active_erasures, get_list_erasures
from .targets import Target, TargetRanking, search_targets
from .task import METHODS, method
from .text import PackRecipe
from .verbs import (
    delete_erasures,
    disable_erasure,
    enable_erasure,
    fuse_erasure,
    load_erasure,
    lock_erasures,
    save_erasure,
    set_erasures,
    unfuse_erasure,
    unload_erasure,
)
from .version import __version__

__all__ = [
    "METHODS",
    "ConceptGraph",
    "ConflictError",
    "EraseError",
    "ErasureAdapter",
    "ErasureLoaderMixin",
    "ErasurePolicy",
    "ErasureStatus",
    "Factors",
    "MismatchError",
    "PackRecipe",
    "Receipt",
    "Target",
    "TargetRanking",
    "__version__",
    "compose",
    "concept_graph",
    "delete_erasures",
    "disable",
    "disable_erasure",
    "enable",
    "enable_erasure",
    "enforce_policy",
    "erase",
    "erasing",
    "erasure_status",
    "export_erased",
    "fuse_erasure",
    "get_active_erasures",
    "get_list_erasures",
    "import_erasure",
    "load_erasure",
    "lock_erasures",
    "method",
    "release_policy",
    "save_erasure",
    "search_targets",
    "set_erasures",
    "sign_erasure",
    "unfuse_erasure",
    "unload_erasure",
    "world",
]
