"""Examples in docs/ run as they stand, and the pages name files and targets that exist."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_PAGES = sorted((_ROOT / "docs").glob("*.md"))
_LINKING = [*_PAGES, _ROOT / "CONTRIBUTING.md", _ROOT / "CHANGELOG.md"]
_EXAMPLES = [
    (page.name, example)
    for page in _PAGES
    for example in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
]


@pytest.mark.parametrize("page, example", _EXAMPLES, ids=[page for page, _ in _EXAMPLES])
def test_example_runs(page, example):
    names = {}
    exec(compile(example, page, "exec"), names)
    arrays = [value for value in names.values() if isinstance(value, jax.Array)]
    floats = [value for value in arrays if jnp.issubdtype(value.dtype, jnp.floating)]
    assert all(bool(jnp.isfinite(value).all()) for value in floats)


def _list_anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", _LINKING, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, heading = target.partition("#")
        found = page.parent / name if name else page
        assert found.is_file(), target
        assert not heading or heading in _list_anchors(found), target
