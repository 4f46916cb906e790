"""What the README shows runs as it stands."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot

_README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
_EXAMPLES = re.findall(r"```python\n(.*?)```", _README, re.DOTALL)


def test_readme_has_the_examples_it_announces():
    assert len(_EXAMPLES) == 4


@pytest.mark.parametrize("example", _EXAMPLES, ids=["first", "op", "linen", "masks"])
def test_example_runs(example):
    attention = jax.nn.softmax(jax.random.normal(jax.random.key(0), (2, 256, 256)))
    names = {"attention_maps": attention, "x": jnp.ones((2, 256, 64))}
    exec(compile(example, "README.md", "exec"), names)
    if "pattern" in names:
        assert names["pattern"].shape == (2, 4, 4)
    elif "out" in names:
        assert names["out"].shape == (1, 256, 4, 64) and jnp.isfinite(names["out"]).all()
    else:
        assert names["y"].shape == names["x"].shape
        assert jnp.isfinite(names["y"]).all()


def test_readme_names_files_and_targets_that_exist():
    root = pathlib.Path(__file__).parents[1]
    for link in re.findall(r"\]\((docs/[^)]+)\)", _README):
        path, _, heading = link.partition("#")
        assert (root / path).is_file(), link
        if heading:
            headings = re.findall(r"^#+ (.+)$", (root / path).read_text(), re.M)
            slugs = [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings]
            assert heading in slugs, link
    targets = set(re.findall(r"^([a-z-]+)(?: [a-z-]+)*:", (root / "Makefile").read_text(), re.M))
    for target in re.findall(r"make ([a-z-]+)", _README):
        assert target in targets or f" {target}:" in (root / "Makefile").read_text(), target


def test_readme_names_every_gpu_that_can_be_planned_for():
    (listed,) = re.findall(r"Targets are ([^.]+)\.", _README)
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(aot.TARGETS)
