"""Write a model so that `transformers` loads it."""

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx

from sparsejax.checks import check_setting
from sparsejax.data import Tokenizer
from sparsejax.data.tokenizer import TOKENIZER_FILE
from sparsejax.data.tokenizer_files import open_tokenizer_file
from sparsejax.durable import write_durably
from sparsejax.models import SparsityMask, Transformer, TransformerConfig, make_transformer
from sparsejax.pretrained.families import match_family
from sparsejax.pretrained.family import Family
from sparsejax.pretrained.leaves import flatten, write_leaf

MASKS_FILE = "masks.safetensors"
"""Name of the file of masks."""


def export_hf(
    model: Any,
    folder: str | os.PathLike,
    *,
    tokenizer: Tokenizer | str | os.PathLike | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Write a model as a folder that `transformers` and `load_pretrained` read.

    Pruned weights are zeros, as far as the model's `linear_options` are sparse. Attention of
    `transformers` is dense: which blocks a model keeps stands in `masks.safetensors`, beside the
    masks of weights, see `read_masks`.

    Args:
      model: Transformer shaped as Llama, GPT-2 or BERT, or what `load_model` and `load_pretrained`
        return.
      folder: new, or empty; it is there whole or not at all.
      tokenizer: of what was loaded, of a run's data, or path of a tokenizer.json or its folder;
        None = that of what was loaded, if it has a file.
      dtype: type of the tensors.

    Raises:
      ValueError: if `transformers` has no such model, the folder is not empty, or the tokenizer has
        no file.
      OSError: if a file cannot be written.
    """
    check_setting(dtype in ("float32", "bfloat16"), "dtype", dtype, "'float32' or 'bfloat16'")
    kept = _find_tokenizer(model, tokenizer)
    model = getattr(model, "model", model)
    if type(model) is not Transformer:
        raise ValueError(
            f"model must be a sparsejax.models.Transformer, got {type(model).__qualname__}"
        )
    family, folder = match_family(model.config), Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder must be new or empty, got {str(folder)!r}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    replacement = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        _write(model, family, replacement, dtype, kept)
        _open_to_all(replacement)
        replacement.replace(folder)
    except BaseException:
        shutil.rmtree(replacement, ignore_errors=True)
        raise


def read_masks(folder: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read the masks that `export_hf` wrote, those that prune something.

    Masks are packed, eight entries of the last axis to a byte, and the file's metadata have their
    shapes.

    Returns:
      dict from paths, such as "blocks.mlp.up.kernel_mask", to bool arrays.

    Raises:
      ValueError: if the file is damaged.
    """
    import safetensors

    path = Path(folder) / MASKS_FILE
    if not path.is_file():
        return {}
    masks = {}
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            shapes = {name: json.loads(shape) for name, shape in file.metadata().items()}
            for name, shape in shapes.items():
                packed = file.get_tensor(name)
                masks[name] = np.unpackbits(packed, axis=-1, count=shape[-1]).astype(bool)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} must be what `export_hf` writes: {error}") from error
    return masks


def list_sparsity(model: Transformer) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the weights of a model as its calls see them, and the masks that prune.

    Returns:
      dict from paths to f32 arrays, zero where pruned, and dict from paths to bool arrays.
    """
    _, params, masks = nnx.split(model, nnx.Param, SparsityMask)
    weights, pruning = {}, {}
    kept = flatten(nnx.to_pure_dict(masks))
    for path, value in flatten(nnx.to_pure_dict(params)).items():
        weights[path] = np.asarray(value, np.float32)
        mask = kept.get(f"{path}_mask")
        if mask is not None and model.linear_options.sparse and not mask.all():
            mask = pruning[f"{path}_mask"] = np.asarray(mask)
            for axis in (-2, -1):
                mask = mask.repeat(value.shape[axis] // mask.shape[axis], axis)
            weights[path] = np.where(mask, weights[path], np.float32(0))
    path = "blocks.attention.block_mask"
    if model.attention_options.sparse and not kept[path].all():
        pruning[path] = np.asarray(kept[path])
    return weights, pruning


def _write(
    model: Transformer, family: Family, folder: Path, dtype: str, tokenizer: Tokenizer | None
) -> None:
    import ml_dtypes
    from safetensors.numpy import save_file

    config = model.config
    weights, pruning = list_sparsity(model)
    leaves = family.list_leaves(config, config.max_length)
    if family.has_biases:
        weights = _make_zeros(config) | weights
    storage = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    tensors = {}
    for leaf in leaves:
        for name, tensor in write_leaf(leaf, weights.pop(leaf.path)):
            tensors[name] = tensor.astype(storage)
    # `transformers` asks for this word.
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if pruning:
        packed = {name: np.packbits(mask, axis=-1) for name, mask in pruning.items()}
        shapes = {name: json.dumps(mask.shape) for name, mask in pruning.items()}
        save_file(packed, folder / MASKS_FILE, metadata=shapes)
    described = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": None if tokenizer is None else tokenizer.separator,
        "pad_token_id": None,
    }
    _write_json(folder / "config.json", described | family.write_config(config))
    if tokenizer is not None and tokenizer.file is not None:
        write_durably(folder / TOKENIZER_FILE, tokenizer.file.read_bytes())
        described = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.max_length,
            "eos_token": tokenizer.decode([tokenizer.separator]).decode(),
        }
        _write_json(folder / "tokenizer_config.json", described)


def _make_zeros(config: TransformerConfig) -> dict[str, np.ndarray]:
    """Return zeros for the parameters of a model with all biases."""
    config = dataclasses.replace(config, use_bias=True, use_norm_bias=True)
    model = nnx.eval_shape(lambda: make_transformer(config, rngs=nnx.Rngs(0)))
    shapes = flatten(nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[1]))
    # Views of one number, until they are written.
    return {path: np.broadcast_to(np.float32(0), leaf.shape) for path, leaf in shapes.items()}


def _find_tokenizer(
    model: Any, tokenizer: Tokenizer | str | os.PathLike | None
) -> Tokenizer | None:
    """Return the tokenizer whose file is to be copied."""
    if tokenizer is None:
        own = getattr(model, "tokenizer", None)
        return own if own is not None and own.file is not None else None
    if not isinstance(tokenizer, Tokenizer):
        return open_tokenizer_file(f"file:{os.fspath(tokenizer)}")
    if tokenizer.file is None:
        raise ValueError(f"tokenizer must have a file to copy, got that of {tokenizer.name!r}")
    return tokenizer


def _open_to_all(folder: Path) -> None:
    """Let whoever may read files of this process read these, which are their owner's alone."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_durably(path, json.dumps(value, indent=2) + "\n")
