"""What is found out about a try beside its labels, in one file: measures of its pictures, and what probes brought back."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .. import hub
from ..errors import MismatchError
from .metrics import Estimate, Score
from .plan import Plan
from .probes import Setting
from .suites import EFFICACY, GENERALITY, Suite


@dataclass(frozen=True)
class Beside:
    """Frozen, and JSON as it stands."""

    measures: Mapping[str, Estimate]
    by: Sequence[Mapping[str, Any]] = ()
    """What each measure says of itself, with its digest."""
    probes: tuple[Mapping[str, Any], ...] = ()
    """`ProbeResult.to_json()` of each."""

    def probed(self, name: str, concept: str, budget: int) -> bool:
        """Whether this probe was run already, with this budget."""
        return any((p["name"], p["concept"], p["budget"]) == (name, concept, budget) for p in self.probes)

    def with_probe(self, result: Mapping[str, Any]) -> "Beside":
        """The same and one more result, in place of an older one of that probe and concept."""
        same = (result["name"], result["concept"])
        return replace(self, probes=(*(p for p in self.probes if (p["name"], p["concept"]) != same), result))

    def save(self, folder: str | Path, plan: Plan) -> None:
        """Write it where `load` finds it: beside the pictures of `plan`."""
        told = {
            "measures": {name: e.to_json() for name, e in self.measures.items()},
            "by": self.by,
            "probes": self.probes,
        }
        path = _path(folder, plan)
        path.parent.mkdir(parents=True, exist_ok=True)
        hub.write_text(path, json.dumps(told, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path, plan: Plan) -> "Beside":
        """What was saved for `plan`; nothing, if nothing was.

        Raises:
            MismatchError: the file is damaged.
        """
        path = _path(folder, plan)
        if not path.is_file():
            return cls({})
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            return cls({name: score(e) for name, e in told["measures"].items()}, told["by"], tuple(told["probes"]))
        except (ValueError, KeyError, TypeError) as error:
            raise MismatchError(f"{path} is damaged ({error!r}): delete it and evaluate again") from error


def score(told: Mapping[str, Any]) -> Score:
    """The estimate that `Estimate.to_json` told."""
    value, low, high = (
        other if told[name] is None else told[name]
        for name, other in (("value", math.nan), ("low", -math.inf), ("high", math.inf))
    )
    return Score(value, low, high, told["n"], told["coverage"])


def setting_of(suite: Suite, concept: str) -> Setting:
    """How probes draw `concept`: in the contexts and at the settings of its own prompts, with the other names that they use."""
    own = {part.name: [suite.prompts[i].text for i in part.indices] for part in suite.parts([concept]) if part.gone}
    contexts = tuple(dict.fromkeys(t.replace(concept, "{}") for t in own.get(EFFICACY, ()) if t.count(concept) == 1))
    names = (name for text in own.get(GENERALITY, ()) for context in contexts if (name := _name_in(text, context)))
    settings = suite.settings
    size = None if settings.height is None or settings.width is None else (settings.height, settings.width)
    plain = Setting(names=tuple(dict.fromkeys(names)), steps=settings.steps, guidance=settings.guidance, size=size)
    return replace(plain, templates=contexts) if contexts else plain


def _name_in(text: str, context: str) -> str:
    """What stands in `text` where `context` has its braces; "" if it is another context."""
    before, _, after = context.partition("{}")
    fits = text.startswith(before) and text.endswith(after) and len(text) > len(before) + len(after)
    return text[len(before) : len(text) - len(after)] if fits and (before or after) else ""


def _path(folder: str | Path, plan: Plan) -> Path:
    return Path(folder) / "beside" / f"{plan.digest[:24]}.json"
