"""What will be drawn, settled before anything is drawn; and which part of it one worker takes. Knows no model and no picture.

A plan is a file. From it alone every worker knows each picture's prompt, seed, settings and name, and which batches are
its own, so a laptop, several processes, and an array job run the same command.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from .. import hub
from ..errors import EraseError, MismatchError
from .suites import Settings

FORMAT = 1
BATCH = 16

KEYWORDS = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
"""What a pipeline's call calls a suite's settings, where the names differ."""


class Shard(NamedTuple):
    """One worker's share of the work: every `count`-th batch, from `index` on."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """The shard that is written `i/n`, counted from 1.

        >>> Shard.parse("2/8")
        Shard(index=1, count=8)
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        i, n = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 1 <= i <= n:
            raise EraseError(f"a shard is written i/n with i from 1 to n, such as 1/4 and 4/4: got {text!r}")
        return cls(i - 1, n)

    def split(self, environment: Mapping[str, str] = os.environ) -> "Shard":
        """This process's share of the shard, where `accelerate launch` or `torchrun` started several (RANK of WORLD_SIZE)."""
        rank, world = (int(environment.get(name) or default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
        if not 0 <= rank < world:
            raise EraseError(f"the launcher gave this process RANK={rank} of WORLD_SIZE={world}: start it again")
        return Shard(self.index * world + rank, self.count * world)

    def of(self, units: Sequence[Any]) -> Sequence[Any]:
        """The shard's share of `units`: the shares of all shards are disjoint, and together they are everything."""
        return units[self.index :: self.count]

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"


WHOLE = Shard()
"""One worker does everything."""


@dataclass(frozen=True)
class Plan:
    """One picture for each prompt and seed, as one model draws it under some erasures.

    How many pictures are drawn together decides how sums are rounded, so the plan fixes the batches and a shard takes
    whole ones: the result does not depend on the number of workers.
    """

    model: str
    """Digest of everything that draws (see `images.model_digest`)."""
    erasures: tuple[tuple[str, float], ...]
    """(digest, strength) of every adapter in force, sorted; none for the unedited model."""
    settings: Settings
    prompts: tuple[tuple[str, int], ...]
    """(prompt, seed) in the suite's order; one that comes twice is drawn once."""
    batch: int = BATCH

    def __post_init__(self):
        if not self.prompts:
            raise EraseError("there is nothing to draw: the suite has no prompts")
        if self.batch < 1:
            raise EraseError(f"a batch holds at least one picture: got {self.batch}")

    def erased(self, adapters: Iterable[tuple[str, float]]) -> "Plan":
        """The same pictures under erasures: (digest, strength) of each adapter."""
        return replace(self, erasures=tuple(sorted((digest, float(strength)) for digest, strength in adapters)))

    @functools.cached_property
    def items(self) -> tuple[tuple[str, int], ...]:
        """`prompts` without repetitions: what is drawn."""
        return tuple(dict.fromkeys(self.prompts))

    @functools.cached_property
    def batches(self) -> tuple[range, ...]:
        """Indices into `items` of the pictures that are drawn together."""
        return tuple(
            range(start, min(start + self.batch, len(self.items))) for start in range(0, len(self.items), self.batch)
        )

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Of each item the hash of all that decides its picture, to the last bit on one kind of machine."""
        return tuple(self._name(*self.items[i], len(batch)) for batch in self.batches for i in batch)

    @functools.cached_property
    def places(self) -> tuple[int, ...]:
        """For each of `prompts` the index of its item."""
        index = {item: i for i, item in enumerate(self.items)}
        return tuple(index[prompt] for prompt in self.prompts)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 over everything in the plan."""
        return hub.digest(self._told())

    @property
    def keywords(self) -> dict[str, Any]:
        """The settings under the names that a pipeline's call has for them, without those that are left to it."""
        return {KEYWORDS.get(name, name): value for name, value in asdict(self.settings).items() if value is not None}

    def save(self, folder: str | Path) -> Path:
        """Write `plan-<digest>.json`, with each picture's name; whole or not at all, and the same from every worker."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"plan-{self.digest[:16]}.json"
        if not path.is_file():
            rows = [[name, *item] for name, item in zip(self.names, self.items, strict=True)]
            told = self._told() | {"digest": self.digest, "pictures": rows}
            hub.write_text(path, json.dumps(told, indent=1, ensure_ascii=False) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """The plan in a file that `save` wrote.

        Raises:
            MismatchError: it is not one, or was changed.
        """
        try:
            told = json.loads(Path(path).read_text(encoding="utf-8"))
            if told["format"] != FORMAT:
                raise MismatchError(f"{path} has format {told['format']!r}, this version reads {FORMAT}: plan again")
            lists = {name: tuple(map(tuple, told[name])) for name in ("erasures", "prompts")}
            plan = cls(told["model"], settings=Settings(**told["settings"]), batch=told["batch"], **lists)
            digest = told["digest"]
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise MismatchError(f"{path} is not a plan ({error!r}): expected a file that Plan.save wrote") from error
        if plan.digest != digest:
            raise MismatchError(f"{path} was changed after it was written: plan again")
        return plan

    def _told(self) -> dict[str, Any]:
        return {"format": FORMAT} | json.loads(json.dumps(asdict(self)))

    def _name(self, prompt: str, seed: int, together: int) -> str:
        told = [prompt, seed, asdict(self.settings), together, self.model, self.erasures]
        return hashlib.sha256(hub.canonical(told).encode()).hexdigest()[:24]
