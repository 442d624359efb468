"""DESIGN's table of who may import whom, lazy imports, and that optional packages stay optional."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import svdtune

ROOT = Path(svdtune.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

STAGES = {"data", "diffusion", "model", "checkpoint", "sample"}
BOTTOM = {"errors", "contracts", "config"}
MODEL_FILES = {f"model.{name}" for name in ("facts", "headers", "original", "single_file", "source", "weights")}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "contracts": {"errors"},
    "config": {"errors"},
    "data": BOTTOM,
    "diffusion": BOTTOM,
    "model": BOTTOM,
    "checkpoint": BOTTOM | MODEL_FILES,
    "sample": BOTTOM | {"model", "checkpoint"},
    "convert": BOTTOM | {"model", "checkpoint", "sample"},
    "trainer": BOTTOM | STAGES | {"engine", "launch"},
    "guards": BOTTOM | STAGES | {"engine", "launch", "trainer"},
    "engine": set(),
    "launch": {"errors"},
    "cli": BOTTOM | STAGES | {"convert", "launch", "trainer", "guards"},
    "__main__": {"cli"},
    "__init__": set(),
}
OPTIONAL = ("decord", "wandb", "xformers", "tensorboard", "bitsandbytes")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def owner(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports_of(tree: ast.AST) -> list[str]:
    """Full names of the modules of ours that `tree` imports, wherever in the file; relative imports are an error."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole module"
            module = node.module or ""
            found += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return sorted({name for name in found if name.startswith("svdtune.")})


def modules_of(names: list[str]) -> set[str]:
    """Those of `names` that are modules; `from svdtune.a import b` also lists svdtune.a.b, which may be a function."""
    known = {module_name(path) for path in FILES}
    return set(names) & known - {"svdtune"}


def violations(package: str, names: list[str]) -> list[str]:
    allowed = MAY_IMPORT[package] | {package}
    return [name for name in names if not any(f"{name}.".startswith(f"svdtune.{rule}.") for rule in allowed)]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_who_imports_whom(path: Path) -> None:
    names = modules_of(imports_of(ast.parse(path.read_text(encoding="utf-8"))))
    # `import svdtune.model.original` also needs the package above it, whose __init__ is empty of imports.
    parents = {name.rpartition(".")[0] for name in names}
    assert violations(owner(path), sorted(names - parents)) == []


def test_the_trainers_own_tests_need_no_guards() -> None:
    """guards/ may be deleted and they stay green: what lies outside tests/guards and tests/mutations does not import it."""
    tests = Path(__file__).parent
    guarded = {tests / "guards", tests / "mutations"}
    others = [path for path in tests.rglob("*.py") if not guarded & set(path.parents)]
    assert len(others) > 40
    users = [path for path in others if any("svdtune.guards" in n for n in imports_of(ast.parse(path.read_text())))]
    assert users == []


def test_the_rule_sees_what_it_forbids() -> None:
    bad = "def f():\n    from svdtune.model.load import load\n    import svdtune.trainer.loop\n"
    assert violations("data", imports_of(ast.parse(bad))) != []
    assert violations("guards", imports_of(ast.parse(bad))) == []
    assert violations("checkpoint", ["svdtune.model.original"]) == []
    assert violations("checkpoint", ["svdtune.model.load"]) == ["svdtune.model.load"]
    assert violations("data", ["svdtune.data_extra"]) == ["svdtune.data_extra"]


def test_no_sentence_is_cut_in_two() -> None:
    """A string alone on its line is the lost half of one above; docstrings, also those of attributes, have three quotes."""
    assert lost_strings('x = "one "\n"two"') == [2]
    tests = sorted(Path(__file__).parent.rglob("*.py"))
    assert {path.name: lines for path in [*FILES, *tests] if (lines := lost_strings(path.read_text()))} == {}


def lost_strings(source: str) -> list[int]:
    statements = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr))
    strings = [
        node for node in statements if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    return [
        node.lineno
        for node in strings
        if not (ast.get_source_segment(source, node) or "").lstrip("r").startswith('"""')
    ]


def test_no_two_way_imports() -> None:
    """A cycle of any length, among modules, counting lazy imports too."""
    edges = {module_name(path): modules_of(imports_of(ast.parse(path.read_text(encoding="utf-8")))) for path in FILES}
    assert find_cycle(edges) is None
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]


def find_cycle(edges: dict[str, set[str]]) -> list[str] | None:
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str] | None:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return None
        for target in sorted(edges.get(name, set()) - {name}):
            if cycle := visit(target, [*trail, name]):
                return cycle
        done.add(name)
        return None

    return next((cycle for name in sorted(edges) if (cycle := visit(name, []))), None)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=300)


@pytest.mark.parametrize("module", ["svdtune.contracts", "svdtune.config.load", "svdtune.cli", "svdtune.launch"])
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    heavy = ("torch", "diffusers", "transformers", "accelerate", "peft", "av", "decord", "wandb", "pydantic")
    done = run_python(f"import sys, {module}\nprint(*[name for name in {heavy!r} if name in sys.modules])")
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_the_heavy_test_would_see_torch() -> None:
    done = run_python("import sys, svdtune.contracts, torch\nprint('torch' in sys.modules)")
    assert done.stdout.split() == ["True"]


def test_every_module_imports_without_optional_packages() -> None:
    """One process for all: what is slow is torch, not our modules."""
    modules = [module_name(path) for path in FILES if path.name != "__main__.py"]
    code = f"""
import importlib, sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {OPTIONAL!r} else find(name, path, target)
PathFinder.find_spec = find_spec
failed = []
for module in {modules!r}:
    try:
        importlib.import_module(module)
    except ImportError as error:
        failed.append(f"{{module}}: {{error}}")
print(*failed, sep="\\n")
try:
    import decord
except ModuleNotFoundError:
    print("refused")
"""
    done = run_python(code)
    assert (done.returncode, done.stdout.split("\n")) == (0, ["", "refused", ""]), done.stderr


def test_the_pairs_of_stages_are_all_forbidden_but_the_stated_ones() -> None:
    stated = {("sample", "model"), ("sample", "checkpoint")}
    allowed = {(one, other) for one in STAGES for other in STAGES - {one} if other in MAY_IMPORT[one]}
    assert allowed == stated
