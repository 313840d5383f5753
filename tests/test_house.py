"""The package keeps its order: data flows from low ranks to high ones, so a module imports only from below."""

import ast
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "scaleup"

# In the order in which data flows. A new module gets its place here first.
RANKS = [
    {"rules", "yamlfile", "int8", "quantised", "fresh", "meter"},
    {"watchdog", "tokens", "product"},
    {"config", "gate", "runtime", "tuner", "weights", "short"},
    {"arguments", "precision", "readers", "backbone", "adapter", "prefix"},
    {"sites", "data", "sequences"},
    {"attention", "lora", "tasks"},
    {"attach", "checks"},
    {"unipelt", "standalone"},
    {"checkpoint", "activations", "memory", "fold"},
    {"journal", "ship", "card"},
    {"resume"},
    {"loop", "calibrate", "proof"},
    {"train", "export", "plan", "bench", "runs", "claims", "grid", "machine"},
    {"sweep", "tables", "gateviews"},
    {"figures"},
    {"report", "gatereport"},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
SOURCES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.glob("*.py")) if path.stem != "__init__"}


def own_imports(tree: ast.AST) -> list[tuple[str, int]]:
    """(module, line) for every import of a module of the package; "" is the package itself."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            paths = [alias.name.split(".") for alias in node.names]
            found += [(path[1] if len(path) > 1 else "", node.lineno) for path in paths if path[0] == "scaleup"]
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "scaleup"):
            inside = node.module or "" if node.level else (node.module or "").partition(".")[2]
            found += [(name, node.lineno) for name in ([inside.split(".")[0]] if inside else [a.name for a in node.names])]
    return found


def too_high(name: str, tree: ast.AST) -> list[str]:
    """Imports of `name` that do not come from a lower rank."""
    rank = RANK[name]
    above = [(other, line) for other, line in own_imports(tree) if RANK.get(other, len(RANKS)) >= rank]
    return [f"scaleup/{name}.py:{line} imports {other or 'the package'}" for other, line in above]


def inside_functions(tree: ast.AST) -> list[tuple[str, int]]:
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))]
    return [found for function in functions for found in own_imports(function)]


def test_every_module_has_a_rank():
    assert set(SOURCES) - set(RANK) == set(), "say in tests/test_house.py where in the flow it stands"


@pytest.mark.parametrize("name", sorted(SOURCES.keys() & RANK.keys()))
def test_a_module_imports_only_from_lower_ranks(name):
    assert too_high(name, SOURCES[name]) == []


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_own_modules_are_imported_at_the_top(name):
    assert inside_functions(SOURCES[name]) == []


def test_there_is_no_import_cycle():
    graph = {name: {other for other, _ in own_imports(tree) if other in SOURCES} for name, tree in SOURCES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize(
    "line",
    ["from scaleup import train", "from scaleup.train import run", "import scaleup.train", "import scaleup"]
    + ["from . import train", "from .train import run"],
)
def test_the_check_sees_every_way_to_import_upwards(line):
    assert too_high("data", ast.parse(line)) != []
    assert inside_functions(ast.parse(f"def f():\n    {line}")) != []


@pytest.mark.parametrize(
    "line", ["import torch", "from scaleup.config import Settings", "from . import gate", "from scaleups import train"]
)
def test_the_check_lets_downward_and_foreign_imports_pass(line):
    assert too_high("data", ast.parse(line)) == []
