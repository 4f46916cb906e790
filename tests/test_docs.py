"""Examples in docs/ run as they stand, and the pages name files and targets that exist."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_PAGES = sorted((_ROOT / "docs").glob("*.md"))
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
    assert floats and all(bool(jnp.isfinite(value).all()) for value in floats)


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in target or (page.parent / target).is_file(), target
