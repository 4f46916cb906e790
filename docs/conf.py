"""How Sphinx builds the site: `make docs`.

Its source folder is the repository, so that a link between files leads to the same place on the
site as in the repository.
"""

import itertools
import pathlib
import re
import sys
import textwrap

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flax import nnx  # noqa: E402
from sphinx.domains.python import PyObject  # noqa: E402
from sphinx.util import inspect  # noqa: E402

from sparsejax.version import __version__  # noqa: E402

project = "sparsejax"
author = "The sparsejax authors"
project_copyright = author
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
root_doc = "docs/index"
include_patterns = ["docs/**", "benchmarks/results/*.md", "*.md"]
exclude_patterns = [".*", "build", "runs"]
highlight_language = "none"
smartquotes_action = "D"  # dashes: "xla" keeps its quotes

# Anchors of headings as GitHub makes them.
myst_heading_anchors = 4

# A word in single backticks is code, and a link where it names something public.
default_role = "py:obj"
autoclass_content = "both"
autodoc_default_options = {"members": True, "special-members": "__call__"}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Numerics", "Derivatives"]

html_theme = "furo"
html_title = f"sparsejax {__version__}"
html_copy_source = False
html_show_sphinx = False
# The start page stands in docs/: another, at the top, leads to it.
html_extra_path = ["site_root"]
html_static_path = ["static"]
html_css_files = ["site.css"]


def show_formulas(app, what, name, obj, options, lines):
    """Show formulas and tables of a docstring as they stand.

    They are the paragraphs before its sections that have an indented line or are no sentence.
    """
    head, *sections = re.split(r"^(?=[A-Z][a-z]+:$)", "\n".join(lines), maxsplit=1, flags=re.M)
    summary, *paragraphs = re.split(r"\n\s*\n", head.rstrip())
    shown = [summary]
    for paragraph, following in itertools.pairwise([*paragraphs, ""]):
        is_list = paragraph.startswith("- ")
        is_sentence = paragraph[-1:] in (".", ":") or following.startswith(" ")
        if not is_list and (re.search(r"^ ", paragraph, re.M) or not is_sentence):
            paragraph = "::\n\n" + textwrap.indent(textwrap.dedent(paragraph), "  ")
        shown.append(paragraph)
    lines[:] = "\n\n".join([*shown, *sections]).split("\n")


def leave_out_fields(app, what, name, obj, skip, options):
    """Leave out the fields of a NamedTuple, which its docstring lists as attributes."""
    return True if (obj.__doc__ or "").startswith("Alias for field number") else None


def keep_colons(app, what, name, obj, options, lines):
    """Hide the first line of what is returned from napoleon: before a colon it would see a type."""
    text = re.sub(r"^(Returns|Yields):\n( +)", r"\g<0>\\\n\2", "\n".join(lines), flags=re.M)
    lines[:] = text.split("\n")


def link_papers(app, what, name, obj, options, lines):
    """Make links of the papers that a docstring names."""
    for number, line in enumerate(lines):
        line = re.sub(r"arXiv:(\d+\.\d+)", r"`\g<0> <https://arxiv.org/abs/\1>`__", line)
        lines[number] = re.sub(r"doi:(10\.[\w./]+\w)", r"`\g<0> <https://doi.org/\1>`__", line)


def sign_class(app, what, name, obj, options, signature, returns):
    """Give a Flax module the signature of its `__init__`, and a protocol none.

    Their metaclasses take anything.
    """
    if what == "class" and getattr(obj, "_is_protocol", False):
        return "", returns
    if what == "class" and isinstance(obj, type(nnx.Module)):
        own = inspect.signature(obj.__init__, bound_method=True)
        return inspect.stringify_signature(own, unqualified_typehints=True), returns
    return None


def give_title(app, docname, source):
    """Give the pages of results, which are made without one, the title that links to them need."""
    if docname.startswith("benchmarks/") and not source[0].startswith("# "):
        source[0] = f"# `{docname.rpartition('/')[2]}`\n\n{source[0]}"


def setup(app):
    """Connect what Sphinx has no setting for; a priority below 500 comes before napoleon."""
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.connect("autodoc-process-docstring", show_formulas, priority=400)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)
    app.connect("autodoc-process-docstring", link_papers)
    app.connect("autodoc-skip-member", leave_out_fields)
    app.connect("autodoc-process-signature", sign_class)
    app.connect("source-read", give_title)
