"""Models as `transformers` saved them, changed and read again."""

import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from sparsejax.pretrained import load_pretrained
from sparsejax.pretrained.leaves import flatten
from tests.pretrained.make_golden import GOLDEN


def change_folder(folder: pathlib.Path, name: str, *, settings=None, tensors=None) -> pathlib.Path:
    """Copy a golden model with other settings, and tensors; None leaves one out."""
    original = GOLDEN / name
    folder.mkdir()
    values = json.loads((original / "config.json").read_text()) | (settings or {})
    (folder / "config.json").write_text(json.dumps(values))
    saved = load_file(original / "model.safetensors") | (tensors or {})
    saved = {key: value for key, value in saved.items() if value is not None}
    save_file(saved, folder / "model.safetensors")
    return folder


@functools.cache
def load_golden(name: str):
    """Load a golden model, once; do not change it."""
    return load_pretrained(GOLDEN / name)


def read_params(model) -> dict[str, np.ndarray]:
    """Return the parameters of a model by their paths."""
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return {path: np.asarray(value) for path, value in flatten(params).items()}


def assert_same_bits(model, expected) -> None:
    """Compare all parameters of two models."""
    found, expected = read_params(model), read_params(expected)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert found[path].dtype == jnp.float32
        np.testing.assert_array_equal(found[path].view(np.int32), value.view(np.int32), path)
