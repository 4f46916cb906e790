"""A folder as `transformers` saves it: config.json, tensors in safetensors, tokenizer.json."""

from pathlib import Path
from typing import Any

import numpy as np

from sparsejax.data import Tokenizer
from sparsejax.data.tokenizer import TOKENIZER_FILE
from sparsejax.data.tokenizer_files import open_tokenizer_file
from sparsejax.pretrained.checkpoint import Checkpoint
from sparsejax.strict_json import load_json

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TYPES = ("F32", "F16", "BF16")


def open_folder(folder: Path) -> Checkpoint:
    """Open a folder.

    Raises:
      ValueError: if a file is missing or is not what it should be.
    """
    settings = _read_object(folder, "config.json")
    quantised = settings.get("quantization_config")
    if quantised is not None:
        raise ValueError(
            f"{folder / 'config.json'} must be of weights that are not quantised, got "
            f"quantization_config={quantised!r:.60}"
        )
    files, shapes = {}, {}
    for path in _list_files(folder):
        with _open(path) as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        for name, shape in found.items():
            if name in files:
                raise ValueError(f"{folder} must hold the tensor {name!r} once, found it twice")
            files[name], shapes[name] = path, shape

    def read(name: str) -> np.ndarray:
        # Opened anew each time: opening maps a file, and reads the list of its tensors only.
        with _open(files[name]) as file:
            kind = file.get_slice(name).get_dtype()
            if kind not in _TYPES:
                raise ValueError(
                    f"{files[name]}: the tensor {name!r} must be one of {_TYPES}, got {kind}"
                )
            return file.get_tensor(name)

    def load_tokenizer() -> Tokenizer | None:
        found = (folder / TOKENIZER_FILE).is_file()
        return open_tokenizer_file(f"file:{folder}") if found else None

    return Checkpoint(str(folder), settings, shapes, read, load_tokenizer)


def _list_files(folder: Path) -> list[Path]:
    if (folder / _WHOLE).is_file():
        return [folder / _WHOLE]
    if (folder / _INDEX).is_file():
        index = _read_object(folder, _INDEX).get("weight_map")
        names = sorted(set(map(str, index.values()))) if isinstance(index, dict) else []
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"{folder / _INDEX} must map tensors to files of its folder")
        for name in names:
            if not (folder / name).is_file():
                raise ValueError(f"{folder} must hold {name!r}, which its index names, found none")
        return [folder / name for name in names]
    found = sorted(path.name for path in folder.glob("*.bin"))
    convert = f"; convert {found[0]} to safetensors, for it is a pickle" if found else ""
    raise ValueError(f"{folder} must hold {_WHOLE} or {_INDEX}, found neither{convert}")


def _open(path: Path):
    try:
        import ml_dtypes  # noqa: F401, NumPy learns the name bfloat16
        import safetensors
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path}: reading it needs the package {error.name}: pip install {error.name}"
        ) from error
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a whole safetensors file: {error}") from error


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{folder} must hold {name}, found none")
    try:
        value = load_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be a JSON object, got {value!r:.60}")
    return value
