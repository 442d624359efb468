"""The module that `FILE.py:Name` means: the file is run statement by statement, so what breaks in it need not matter."""

from __future__ import annotations
import __future__

import ast
import difflib
import inspect
import json
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from svdtune.errors import UsageError
from svdtune.guards.tracing.running import count

_NOT_RUN = (ast.For, ast.While, ast.With)
SMALL = 50_000_000
"""Parameters up to which a module is built and run for real."""


@dataclass(frozen=True)
class Target:
    """A module from a file, and what to say about the file."""

    module: nn.Module
    notes: tuple[str, ...]


def load_target(spec: str, arguments: str = "{}") -> Target:
    """`FILE.py:Name`, a class, factory or instance; `arguments` is a JSON object of its keywords. Raises UsageError."""
    file, _, name = spec.rpartition(":")
    path = Path(file)
    if not file or not name.isidentifier():
        raise UsageError(f"{spec}: expected FILE.py:Name, as in model.py:Net")
    if not path.is_file():
        raise UsageError(f"{file}: no such file")
    keywords = _keywords(arguments)
    namespace, notes = _execute(path, name)
    if name not in namespace:
        raise UsageError(_unknown(file, name, namespace, notes))
    with redirect_stdout(sys.stderr):
        try:
            return Target(_build(spec, namespace[name], keywords), tuple(notes))
        except UsageError as error:
            raise UsageError("\n".join([str(error), *notes])) from error


def _keywords(arguments: str) -> dict[str, Any]:
    try:
        keywords = json.loads(arguments)
    except json.JSONDecodeError as error:
        raise UsageError(f"--args: not JSON ({error}); expected an object such as '{{\"hidden\": 32}}'") from error
    if not isinstance(keywords, dict):
        raise UsageError(f"--args: got {arguments}, expected an object such as '{{\"hidden\": 32}}'")
    return keywords


def _execute(path: Path, name: str) -> tuple[dict[str, Any], list[str]]:
    source = path.read_bytes()
    try:
        tree = ast.parse(source, str(path))
    except SyntaxError as error:
        raise UsageError(f"{path}:{error.lineno}: {error.msg}") from error
    made = types.ModuleType(path.stem)
    made.__file__ = str(path)
    # Relative imports start from the packages that the file lies in; dataclasses and pickle look a class's module up.
    packages = _packages(path.resolve())
    made.__package__ = ".".join(packages)
    made.__name__ = ".".join([*packages, f"_traced_{path.stem}"])
    sys.modules[made.__name__] = made
    notes: list[str] = []
    # A name that is nowhere made is not waited for through loops.
    absent = name not in _bound(tree)
    with _beside(path.resolve().parents[len(packages)], path), redirect_stdout(sys.stderr):
        for statement in tree.body:
            note = _execute_one(statement, str(path), made.__dict__, _flags(tree), absent or name in made.__dict__)
            notes += [note] if note else []
    return made.__dict__, notes


def _execute_one(statement: ast.stmt, file: str, namespace: dict[str, Any], flags: int, known: bool) -> str:
    """Run one statement; the returned sentence says what went wrong or was left out."""
    place = f"{Path(file).name}:{statement.lineno}"
    call = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
    if known and (call or isinstance(statement, _NOT_RUN)):
        return f"{place} was not run: a loop or call that comes after the module's definition"
    code = compile(ast.Module([statement], []), file, "exec", flags=flags, dont_inherit=True)
    try:
        exec(code, namespace)
    except (Exception, SystemExit) as error:
        return f"{place} raised {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")
    return ""


def _flags(tree: ast.Module) -> int:
    names = [a.name for s in tree.body if isinstance(s, ast.ImportFrom) and s.module == "__future__" for a in s.names]
    return sum(getattr(__future__, name).compiler_flag for name in names)


def _bound(tree: ast.Module) -> set[str]:
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    imported = [a for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for a in node.names]
    return names | {(alias.asname or alias.name).partition(".")[0] for alias in imported}


def _packages(path: Path) -> list[str]:
    """Names of the packages (folders with an `__init__.py`) that a file lies in, outermost first."""
    names: list[str] = []
    for folder in path.parents:
        if not (folder / "__init__.py").is_file():
            break
        names.insert(0, folder.name)
    return names


@contextmanager
def _beside(root: Path, path: Path) -> Iterator[None]:
    before, arguments = list(sys.path), sys.argv
    sys.path[:0] = [str(path.parent.resolve()), str(root)]
    sys.argv = [str(path)]
    try:
        yield
    finally:
        sys.path[:], sys.argv = before, arguments


def _unknown(file: str, name: str, namespace: dict[str, Any], notes: list[str]) -> str:
    known = [
        key for key, value in namespace.items() if _is_module(value) and "_traced_" in getattr(value, "__module__", "")
    ]
    known += [key for key, value in namespace.items() if isinstance(value, nn.Module) and key not in known]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    text = f"{file}: no {name} in it. " + (f"Did you mean {near[0]}? " if near else "")
    text += f"Its modules: {', '.join(known)}" if known else "It has no nn.Module"
    return "\n".join([text, *notes])


def _is_module(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, nn.Module)


def _build(spec: str, found: Any, keywords: dict[str, Any]) -> nn.Module:
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise UsageError(
            f"{spec} is a {type(found).__name__}; expected an nn.Module, its class or a function that makes one"
        )
    try:
        made = _small_or_meta(found, keywords)
    except Exception as error:  # whatever the user's constructor raises
        hint = _missing(found, keywords)
        raise UsageError(f"{spec} cannot be built: {type(error).__name__}: {error}{hint}") from error
    if not isinstance(made, nn.Module):
        raise UsageError(f"{spec} gave a {type(made).__name__}; expected an nn.Module")
    return made


def _small_or_meta(make: Any, keywords: dict[str, Any]) -> Any:
    """Without memory first: only what is small is built for real."""
    try:
        with torch.device("meta"):
            made = make(**keywords)
    except Exception:  # not every constructor can do without numbers; the real one says what is wrong
        return make(**keywords)
    return made if isinstance(made, nn.Module) and count(made) >= SMALL else make(**keywords)


def _missing(make: Any, keywords: dict[str, Any]) -> str:
    try:
        parameters = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):
        return ""
    needed = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    left = [name for name in needed if name not in keywords]
    example = ", ".join(f'"{name}": ...' for name in left)
    return f"\n  fix: give its arguments: --args '{{{example}}}'" if left else ""
