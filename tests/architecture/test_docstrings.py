"""Public names say what their annotations cannot: shapes, units, errors, sources. No more.

Arrays need a line for their shape; what raises says when. A line that repeats a type is noise.
"""

import ast
import re
import textwrap

import pytest

from tests.architecture.project_files import ROOT, list_modules

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
ARRAY = re.compile(r"\b(?:jax\.Array|np\.ndarray|ArrayLike)\b")
SECTIONS = ("Args", "Attributes", "Returns", "Yields")
# What a line may not consist of alone: names of types, and what joins them.
TYPE_WORD = re.compile(
    r"[A-Z]\w*[a-z]\w*|[A-Z]+|jax|np|nnx|int|float|bool|str|list|tuple|dict|bytes|None|or|of|and|a|an"
)


def walk_own_body(function):
    """Yield the nodes of a function without those of functions and classes inside it."""
    open_nodes = list(function.body)
    while open_nodes:
        node = open_nodes.pop()
        yield node
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Lambda)):
            open_nodes += ast.iter_child_nodes(node)


def is_array(annotation):
    """Whether an annotation leaves a shape to be said; a missing one does."""
    return annotation is None or bool(ARRAY.search(ast.unparse(annotation)))


def list_arrays(function, *, is_method):
    """Return the names of the arguments that need a line of their own."""
    listed = function.args
    arguments = [*listed.posonlyargs, *listed.args]
    decorators = {ast.unparse(decorator) for decorator in function.decorator_list}
    if is_method and "staticmethod" not in decorators:
        arguments = arguments[1:]
    return [
        argument.arg
        for argument in (*arguments, *listed.kwonlyargs)
        if is_array(argument.annotation) and not argument.arg.startswith("_")
    ]


def read_section(docstring, title):
    """Return the lines of one section of a docstring, or None if it is not there."""
    match = re.search(rf"^{title}:\n((?:[ \t]+.*\n|\n)*)", docstring + "\n", re.MULTILINE)
    return match and textwrap.dedent(match.group(1))


def split_entries(docstring, title):
    """Return {names: text} of a section; what it returns or yields goes by the section's name."""
    section = read_section(docstring, title)
    if section is None:
        return {}
    if title in ("Returns", "Yields"):
        return {title: " ".join(section.split())}
    found = re.findall(r"^(\*{0,2}\w[\w, *]*): (.*(?:\n(?: .*|$))*)", section, re.MULTILINE)
    return {names: " ".join(text.split()) for names, text in found}


def says_nothing(text):
    """Whether a line consists of a type alone."""
    words = re.findall(r"\w+", text)
    return bool(words) and all(TYPE_WORD.fullmatch(word) for word in words)


def find_noise(docstring):
    return [
        f"{names} says its type only"
        for title in SECTIONS
        for names, text in split_entries(docstring, title).items()
        if says_nothing(text)
    ]


def check_function(function, *, is_method=False):
    """Return what is missing in a public function's docstring, and what is too much."""
    docstring = ast.get_docstring(function)
    decorators = {ast.unparse(decorator) for decorator in function.decorator_list}
    if "overload" in decorators:
        return []  # a signature for type checkers; the implementation speaks for it
    if not docstring:
        return ["no docstring"]
    faults = [] if docstring.splitlines()[0].endswith(".") else ["a first line ending in a dot"]
    entries = split_entries(docstring, "Args")
    documented = {name.strip(" *") for names in entries for name in names.split(",")}
    arrays = list_arrays(function, is_method=is_method)
    faults += [f"Args: {name}" for name in arrays if name not in documented]
    body = list(walk_own_body(function))
    gives = any(isinstance(node, ast.Return) and node.value is not None for node in body)
    is_property = decorators & {"property", "functools.cached_property"}
    if gives and not is_property and is_array(function.returns):
        faults += [] if read_section(docstring, "Returns") else ["Returns"]
    raises = any(isinstance(node, ast.Raise) and node.exc is not None for node in body)
    if raises and not read_section(docstring, "Raises"):
        faults.append("Raises")
    return faults + find_noise(docstring)


def check_module(source):
    """Return `line name: what is wrong` for the public names of a module."""
    tree = ast.parse(source)
    faults = [] if ast.get_docstring(tree) else ["1 module: no docstring"]
    for node in tree.body:
        if not isinstance(node, (*FUNCTIONS, ast.ClassDef)) or node.name.startswith("_"):
            continue
        if isinstance(node, FUNCTIONS):
            faults += [f"{node.lineno} {node.name}: {what}" for what in check_function(node)]
            continue
        docstring = ast.get_docstring(node)
        found = find_noise(docstring) if docstring else ["no docstring"]
        faults += [f"{node.lineno} {node.name}: {what}" for what in found]
        methods = [m for m in node.body if isinstance(m, FUNCTIONS) and m.name[0] != "_"]
        faults += [
            f"{method.lineno} {node.name}.{method.name}: {what}"
            for method in methods
            for what in check_function(method, is_method=True)
        ]
    return faults


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
def scale(x: jax.Array, config: Config, *, by: int = 2) -> jax.Array:
    """Scale an array.

    Args:
      x: f32[N].
      by: factor, without unit.

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
    "old, new, fault",
    [
        ('"""A module."""', "", "1 module: no docstring"),
        ("      x: f32[N].\n", "", "3 scale: Args: x"),
        ("by: int = 2", "by=2, **options", None),
        ("by: int = 2", "bias=None, by=2", "3 scale: Args: bias"),
        ("    Returns:\n      f32[N].\n", "", "3 scale: Returns"),
        ("    Raises:\n      ValueError: if `by` is zero.\n", "", "3 scale: Raises"),
        ("Scale an array.", "Scale", "3 scale: a first line ending in a dot"),
        (
            "      by: factor",
            "      config: Config.\n      by: factor",
            "3 scale: config says its type only",
        ),
        ("by: factor, without unit.", "by: int or None.", "3 scale: by says its type only"),
        (
            "    Returns:\n      f32[N].",
            "    Returns:\n      Array.",
            "3 scale: Returns says its type only",
        ),
    ],
)
def test_each_fault_is_found(old, new, fault):
    assert old in GOOD
    found = check_module(GOOD.replace(old, new))
    assert fault in found if fault else found == []


def test_methods_are_looked_at_and_private_names_are_not():
    source = (
        '"""M."""\nclass A:\n  """A."""\n  def f(self, x):\n    """F."""\n  def _g(self, x): pass'
    )
    assert check_module(source) == ["4 A.f: Args: x"]
    assert check_module('"""M."""\ndef _f(x): return x') == []
    attributes = '"""M."""\nclass A:\n  """A.\n\n  Attributes:\n    b: B.\n  """'
    assert check_module(attributes) == ["2 A: b says its type only"]
