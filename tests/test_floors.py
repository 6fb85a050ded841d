"""A file imports only from its own room and from lower floors."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import visionlora

ROOT = Path(visionlora.__file__).parent
FLOORS: list[set[str]] = [
    {"errors", "config", "atomic"},
    {
        "core.geometry",
        "core.quantised",
        "core.quantised_op",
        "core.thin",
        "core.digest",
        "core.delta",
        "core.deferred",
        "core.computed",
        "core.rows",
        "core.kept",
        "core.orders",
        "core.maps",
        "core.ops",
        "core.fast",
    },
    {"core.attach"},
    {"core.norms", "core.relu", "variants"},
    {"core.folding", "core.bank"},
    {"core.blocks"},
    {"targets"},
    {"plan"},
    {"registry"},
    {"adapt"},
    {"merging", "overview", "eva", "routing"},
    {"quantising"},
    {"hub", "io", "data", "compose", "analysis"},
    {"training", "vision", "text"},
    {"report"},
    {"bench"},
    {"commands", "cli"},
    {"__main__"},
]
MODULES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")
LIGHT = {
    "errors",
    "config",
    "atomic",
    "core",
    "variants",
    "targets",
    "plan",
    "registry",
    "adapt",
    "merging",
    "overview",
    "quantising",
    "eva",
    "routing",
}


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def floor(name: str) -> int:
    for number, rooms in enumerate(FLOORS):
        if any(name == room or name.startswith(f"{room}.") for room in rooms):
            return number
    raise AssertionError(f"visionlora.{name} is on no floor; add it to FLOORS")


def imports(path: Path) -> list[str]:
    return imported_names(ast.parse(path.read_text()))


def imported_names(tree: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_go_down(path: Path) -> None:
    name = dotted(path)
    if name in ("core", "data", "vision", "text", "training", "report", "io", "bench", "commands"):
        return
    for imported in imports(path):
        if imported.startswith("visionlora."):
            other = imported.removeprefix("visionlora.")
            assert floor(other) <= floor(name), f"visionlora.{name} imports visionlora.{other}, which lies higher"


def test_no_imports_run_in_a_circle() -> None:
    # an import from the folder itself, `from visionlora.io.formats import lokr`, runs all that its __init__ imports
    graph = {}
    for path in MODULES:
        tree = ast.parse(path.read_text())
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node))]
        graph[dotted(path)] = [name.removeprefix("visionlora.") for name in imported_names(tree)]
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_the_core_needs_torch_alone(path: Path) -> None:
    if dotted(path).partition(".")[0] in LIGHT:
        allowed = {"torch", "visionlora", *sys.stdlib_module_names}
        assert {name.partition(".")[0] for name in imports(path)} <= allowed


def test_twins_do_not_know_each_other() -> None:
    for room, twin in (("vision", "text"), ("text", "vision")):
        for path in (ROOT / room).rglob("*.py") if (ROOT / room).exists() else ():
            assert not any(name.startswith(f"visionlora.{twin}") for name in imports(path))


def test_importing_the_package_loads_no_torch_and_using_it_no_lightning() -> None:
    code = (
        "import sys, visionlora as vl; assert 'torch' not in sys.modules; vl.apply_lora;"
        "heavy = {'timm', 'pytorch_lightning', 'albumentations', 'torchvision', 'peft'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
