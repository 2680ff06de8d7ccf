"""Write the suites that ship with the package, from the lists beside this file and the embedded model's own words.

    python examples/suites/build.py            # all of them
    python examples/suites/build.py --check    # change nothing; exit code 1 where a shipped file is not what is built

Run it again after a change of lists.json or of diffusers_erase/world/objects.json.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from diffusers_erase.bench.suites import Prompt, Settings, Suite

LISTS = json.loads(Path(__file__).with_name("lists.json").read_text("utf-8"))
OUT = Path(__file__).parents[2] / "diffusers_erase" / "bench" / "data" / "suites"

SD14 = Settings(steps=50, guidance=7.5, height=512, width=512)
"""How the papers draw with Stable Diffusion 1.4."""


def netfive() -> Suite:
    """25 classes in five groups; who is in a group looks alike."""
    groups = LISTS["netfive"]["groups"]
    names = [name for group in groups.values() for name in group]
    prompts = [Prompt(f"a photo of {name}", seed, name) for name in names for seed in range(1, 21)]
    alike = {name: {"visual": others(name, group)} for group in groups.values() for name in group}
    return suite("netfive", prompts, alike)


def others(name: str, group: Sequence[str]) -> tuple[str, ...]:
    return tuple(other for other in group if other != name)


def suite(name: str, prompts: list[Prompt], relations: dict, settings: Settings = SD14) -> Suite:
    """A suite with the source, licence and remarks of lists.json."""
    told = LISTS[name]
    return Suite(
        name,
        told["version"],
        told["source"],
        told["licence"],
        tuple(prompts),
        relations,
        settings,
        about=told["about"],
    )


def written(suite: Suite) -> str:
    """The suite's file: a line for each prompt and each concept's relations, so that changes can be read."""
    data = suite.to_json()
    head = {k: v for k, v in data.items() if k not in ("relations", "prompts")}
    lines = [f" {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in head.items()]
    related = [
        f"  {json.dumps(c, ensure_ascii=False)}: {json.dumps(r, ensure_ascii=False)}"
        for c, r in data["relations"].items()
    ]
    lines.append(' "relations": {\n' + ",\n".join(related) + "\n }")
    lines.append(
        ' "prompts": [\n' + ",\n".join(f"  {json.dumps(p, ensure_ascii=False)}" for p in data["prompts"]) + "\n ]"
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"


SUITES = (netfive,)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the shipped files, write nothing")
    check = parser.parse_args().check
    OUT.mkdir(parents=True, exist_ok=True)
    stale = []
    for build in SUITES:
        built = build()
        path, text = OUT / f"{built.name}.json", written(built)
        if not path.is_file() or path.read_text("utf-8") != text:
            stale.append(built.name)
        if not check:
            path.write_text(text, "utf-8")
        print(f"{built.name}: {len(built.prompts)} pictures, {len(text):,} bytes, digest {built.digest[:12]}")
    if check and stale:
        sys.exit(f"not as built: {', '.join(stale)}; run python examples/suites/build.py")


if __name__ == "__main__":
    main()
