"""Public names say what they take, give and refuse, in Google's sections."""

import ast
import re
import textwrap

import pytest

from tests.architecture.project_files import ROOT, list_modules

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def walk_own_body(function):
    """Yield the nodes of a function without those of functions and classes inside it."""
    open_nodes = list(function.body)
    while open_nodes:
        node = open_nodes.pop()
        yield node
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Lambda)):
            open_nodes += ast.iter_child_nodes(node)


def list_arguments(function, *, is_method):
    listed = function.args
    names = [a.arg for a in (*listed.posonlyargs, *listed.args)]
    decorators = {ast.unparse(decorator) for decorator in function.decorator_list}
    if is_method and "staticmethod" not in decorators:
        names = names[1:]
    names += [a.arg for a in listed.kwonlyargs]
    names += [a.arg for a in (listed.vararg, listed.kwarg) if a is not None]
    return [name for name in names if not name.startswith("_")]


def read_section(docstring, title):
    """Return the lines of one section of a docstring, or None if it is not there."""
    match = re.search(rf"^{title}:\n((?:[ \t]+.*\n|\n)*)", docstring + "\n", re.MULTILINE)
    return match and match.group(1)


def check_function(function, *, is_method=False):
    """Return what is missing in a public function's docstring."""
    docstring = ast.get_docstring(function)
    if "overload" in {ast.unparse(decorator) for decorator in function.decorator_list}:
        return []  # a signature for type checkers; the implementation speaks for it
    if not docstring:
        return ["no docstring"]
    missing = [] if docstring.splitlines()[0].endswith(".") else ["a first line ending in a dot"]
    arguments = list_arguments(function, is_method=is_method)
    section = textwrap.dedent(read_section(docstring, "Args") or "")
    named = re.findall(r"^\*{0,2}(\w[\w, *]*):", section, re.MULTILINE)
    documented = {name.strip(" *") for names in named for name in names.split(",")}
    missing += [f"Args: {name}" for name in arguments if name not in documented]
    decorators = {ast.unparse(decorator) for decorator in function.decorator_list}
    body = list(walk_own_body(function))
    is_property = decorators & {"property", "functools.cached_property"}
    gives = any(isinstance(node, ast.Return) and node.value is not None for node in body)
    yields = any(isinstance(node, ast.Yield | ast.YieldFrom) for node in body)
    if gives and not is_property and read_section(docstring, "Returns") is None:
        missing.append("Returns")
    if yields and read_section(docstring, "Yields") is None:
        missing.append("Yields")
    raises = any(isinstance(node, ast.Raise) and node.exc is not None for node in body)
    if raises and read_section(docstring, "Raises") is None:
        missing.append("Raises")
    return missing


def check_module(source):
    """Return `line name: what is missing` for the public names of a module."""
    tree = ast.parse(source)
    missing = [] if ast.get_docstring(tree) else ["1 module: no docstring"]
    for node in tree.body:
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if isinstance(node, FUNCTIONS):
            missing += [f"{node.lineno} {node.name}: {what}" for what in check_function(node)]
        else:
            if not ast.get_docstring(node):
                missing.append(f"{node.lineno} {node.name}: no docstring")
            methods = [m for m in node.body if isinstance(m, FUNCTIONS) and m.name[0] != "_"]
            missing += [
                f"{method.lineno} {node.name}.{method.name}: {what}"
                for method in methods
                for what in check_function(method, is_method=True)
            ]
    return missing


def test_public_names_are_documented():
    found = [
        f"{path}:{line}"
        for path in list_modules().values()
        if (ROOT / path).read_text().strip()
        for line in check_module((ROOT / path).read_text())
    ]
    assert not found, "\n".join(found)


GOOD = '''
"""A module."""
def scale(x, *, by=2, **options):
    """Scale an array.

    Args:
      x: f32[N].
      by: int, factor.
      **options: ignored.

    Returns:
      f32[N].

    Raises:
      ValueError: if `by` is zero.
    """
    if not by:
        raise ValueError("by")
    return x * by
'''


def test_a_complete_docstring_passes():
    assert check_module(GOOD) == []


@pytest.mark.parametrize(
    "old, new, missing",
    [
        ('"""A module."""', "", "1 module: no docstring"),
        ("      by: int, factor.\n", "", "3 scale: Args: by"),
        ("      **options: ignored.\n", "", "3 scale: Args: options"),
        ("    Returns:\n      f32[N].\n", "", "3 scale: Returns"),
        ("    Raises:\n      ValueError: if `by` is zero.\n", "", "3 scale: Raises"),
        ("return x * by", "yield x", "3 scale: Yields"),
        ("Scale an array.", "Scale", "3 scale: a first line ending in a dot"),
    ],
)
def test_each_missing_part_is_found(old, new, missing):
    assert old in GOOD
    assert missing in check_module(GOOD.replace(old, new))


def test_methods_are_looked_at_and_private_names_are_not():
    source = (
        '"""M."""\nclass A:\n  """A."""\n  def f(self, x):\n    """F."""\n  def _g(self, x): pass'
    )
    assert check_module(source) == ["4 A.f: Args: x"]
    assert check_module('"""M."""\ndef _f(x): return x') == []
