"""The package reads from top to bottom: a file imports only files above it, and each outside library has one door."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "diffusers_erase"

# fmt: off
READING_ORDER = [
    "version", "errors", "solve", "outlook", "edits", "factors", "sites", "text", "guess", "task", "train", "methods",
    "hub", "packs", "vocabulary", "targets", "card", "signing", "adapter", "lock", "mapping", "fusing", "loras", "hook", "status",
    "fitting", "attach", "verbs", "serving", "mixin", "erasing", "importing", "exporting", "world", "bench", "graph", "cli",
]
# fmt: on
"""Modules and subpackages; `__init__`, the door, comes last."""

DOORS = {
    "safetensors": "hub",
    "huggingface_hub": "hub",
    "yaml": "hub",
    "cryptography": "signing",
    "typer": "cli",
    "rich": "cli",
}
"""Libraries that only one of our files knows."""

FILES = sorted(PACKAGE.rglob("*.py"))


def place(module: str) -> int:
    """Where a module (dotted, without the package's name; "" for the door) stands in the reading order."""
    top = module.split(".")[0]
    if top in ("", "__init__"):
        return len(READING_ORDER)
    assert top in READING_ORDER, f"{top} has no place in the reading order of tests/test_imports.py: give it one"
    return READING_ORDER.index(top)


def name_of(file: Path) -> str:
    """`diffusers_erase/methods/uce.py` is "methods.uce", a subpackage's `__init__.py` is the subpackage."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> set[tuple[str, str]]:
    """What a file imports anywhere, also inside functions, as (module, name): `from a import b` is ("a", "b")."""
    found = set()
    package = ["diffusers_erase", *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*start, *filter(None, [node.module])])
            found |= {(module, alias.name) for alias in node.names}
    return found


def ours(file: Path) -> set[str]:
    """Our own modules that a file imports; "" is the door, as in `from diffusers_erase import erase`."""
    modules = {name_of(other) for other in FILES}
    found = set()
    for module, name in imports(file):
        top, _, inner = module.partition(".")
        if top == "diffusers_erase":
            submodule = f"{inner}.{name}".strip(".")
            found.add(submodule if submodule in modules else inner)
    return found


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_a_file_imports_only_files_above_it(file):
    here = place(name_of(file))
    below = {name or "the door" for name in ours(file) if place(name) > here}
    assert not below, f"{name_of(file) or '__init__'} comes before {sorted(below)} in the reading order"


def test_nothing_imports_in_circles():
    TopologicalSorter({name_of(file): ours(file) for file in FILES}).prepare()


def test_solve_stands_alone():
    assert not ours(PACKAGE / "solve.py")


def test_methods_do_not_know_each_other():
    for file in (PACKAGE / "methods").glob("[!_]*.py"):
        assert not {name for name in ours(file) if name.split(".")[0] == "methods"}, file.name


@pytest.mark.parametrize("library", DOORS)
def test_only_one_file_knows(library):
    knowing = {name_of(file) for file in FILES if library in {module.split(".")[0] for module, _ in imports(file)}}
    assert knowing <= {DOORS[library]}


def test_importing_the_package_does_not_import_diffusers():
    check = "import sys, diffusers_erase; print(sorted({'diffusers', 'transformers'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_every_public_name_exists():
    import diffusers_erase

    missing = [name for name in diffusers_erase.__all__ if not hasattr(diffusers_erase, name)]
    assert not missing
