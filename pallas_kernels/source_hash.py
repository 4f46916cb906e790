"""What a backend is made of, as a hash: its own modules and those of ours that they import."""

import ast
import functools
import hashlib
import importlib.util
import pathlib
from collections.abc import Callable, Collection
from typing import Any

_PACKAGE = __package__ or "pallas_kernels"
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def hash_source(function: Callable[..., Any]) -> str:
    """Hash the code that a function of this package rests on.

    Comments, docstrings and layout do not count.

    Args:
      function: of a module of this package, or of a test.

    Returns:
      str, 16 hexadecimal digits.
    """
    return _hash_closure(function.__module__)


def hash_modules(*names: str, without: Collection[str] = ()) -> str:
    """Hash the code of modules of ours, without what they import.

    Comments, docstrings and layout do not count.

    Args:
      *names: of modules, or of packages, which stand for the modules in their folder.
      without: file names of modules that are left out, without the suffix.

    Returns:
      str, 16 hexadecimal digits.
    """
    found = {}
    for name in names:
        path = _find_file(name)
        assert path is not None, f"there is no module {name}"
        paths = path.parent.glob("*.py") if path.stem == "__init__" else [path]
        found |= {f"{name} {path.stem}": _dump(path) for path in paths if path.stem not in without}
    return _digest(found)


@functools.cache
def _hash_closure(start: str) -> str:
    seen: dict[str, str] = {}
    open_modules = [start]
    while open_modules:
        name = open_modules.pop()
        path = None if name in seen else _find_file(name)
        if path is None:
            continue
        open_modules += _list_imports(ast.parse(path.read_text()))
        seen[name] = _dump(path)
    return _digest(seen)


def _dump(path: pathlib.Path) -> str:
    return ast.dump(_drop_docstrings(ast.parse(path.read_text())))


def _digest(modules: dict[str, str]) -> str:
    text = "\n".join(f"{name} {modules[name]}" for name in sorted(modules))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _find_file(name: str) -> pathlib.Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except (ModuleNotFoundError, ValueError):
        # A name that is taken from a module, and is none itself.
        return None
    return pathlib.Path(spec.origin) if spec is not None and spec.origin else None


def _list_imports(tree: ast.Module) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [name for name in names if name.split(".")[0] == _PACKAGE]


def _drop_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return tree
