"""What a backend is made of, as a hash: its own modules and those of ours that they import."""

import ast
import functools
import hashlib
import importlib.util
import pathlib
from collections.abc import Callable
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
    return _hash_modules(function.__module__)


@functools.cache
def _hash_modules(start: str) -> str:
    seen: dict[str, str] = {}
    open_modules = [start]
    while open_modules:
        name = open_modules.pop()
        path = None if name in seen else _find_file(name)
        if path is None:
            continue
        tree = ast.parse(path.read_text())
        open_modules += _list_imports(tree)
        seen[name] = ast.dump(_drop_docstrings(tree))
    text = "\n".join(f"{name} {seen[name]}" for name in sorted(seen))
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
