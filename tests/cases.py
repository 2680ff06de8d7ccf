"""The table of methods: every row passes every test of test_methods.py, or of test_train.py where it trains. A new method adds
its rows here and nothing else."""

from dataclasses import dataclass, field
from typing import Any

from diffusers_erase import ErasureAdapter, PackRecipe, erase

PACK = PackRecipe(
    "tiny",
    prompts=(
        "a dog on the beach",
        "a red car in the street",
        "two people walking in a park at night",
        "a bowl of fruit on a table",
        "an old castle by the sea",
        "a drawing of a robot",
        "a white house and a tree",
        "a blue ship",
        "a close-up of an apple and a pear",
        "a painting of a woman in the style of monet",
        "a photo of a man",
        "snoopy in a landscape",
    ),
)
"""A base pack in the words of conftest's tokenizer."""


@dataclass(frozen=True)
class Case:
    """A method, and arguments for `erase` with it."""

    method: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def erase(self, pipe: Any, concept: str = "cat", **more: Any) -> ErasureAdapter:
        return erase(pipe, concept, method=self.method, **({"pack": PACK} | self.arguments | more))

    def __str__(self) -> str:
        return "-".join([self.method, *(f"{key}={value}" for key, value in self.arguments.items())])


CASES = (
    Case("ridge", {"target": "null"}),
    Case("ridge", {"target": "dog", "residual": 0.3}),
    Case("ridge", {"target": ("dog", "tree"), "tokens": "all"}),
    Case("ridge", {"target": "null", "preserve": ("wolf", "car"), "coreferences": "black cat", "tokens": "name+eot"}),
    Case("ridge", {"target": "dog", "gate": 0.3}),
    Case("uce"),
    Case("uce", {"target": "dog", "preserve": ("wolf", "car")}),
    Case("uce", {"target": "tree", "coreferences": "old cat", "lamb": 0.1, "erase_scale": 3.0}),
)

SHORT = {"updates": 2, "batch": 2, "steps": 3, "rank": 2, "templates": ("{}", "a photo of a {}"), "pack": None}

TRAINED = (
    Case("esd", SHORT),
    Case("esd", SHORT | {"layers": "kv", "target": ("dog", "wolf"), "preserve": "car", "guidance": 1.0}),
    Case("ap", SHORT | {"candidates": ("dog", "wolf", "tree")}),
    Case("age", SHORT | {"candidates": ("dog", "wolf", "tree"), "coreferences": "old cat"}),
    Case("age", SHORT | {"candidates": ("dog", "wolf", "tree"), "hard": False, "top": 2, "released": True}),
)
