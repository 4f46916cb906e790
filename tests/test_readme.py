"""What the README shows runs as it stands."""

import pathlib
import re

import jax.numpy as jnp

from pallas_kernels import aot

_README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
_EXAMPLES = re.findall(r"```python\n(.*?)```", _README, re.DOTALL)


def test_the_example_runs():
    (example,) = _EXAMPLES
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["out"].shape == (1, 256, 4, 64) and jnp.isfinite(names["out"]).all()


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
