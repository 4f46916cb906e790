"""What a run begins with: weights that are drawn, or those that another library trained."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from sparsejax.checks import check_setting
from sparsejax.config.parse import ConfigError
from sparsejax.config.pretrained import warn_of_zero_rule
from sparsejax.config.schema import TrainConfig
from sparsejax.data import Tokenizer
from sparsejax.models import TransformerConfig
from sparsejax.patterns import BlockPattern
from sparsejax.pretrained import Checkpoint, open_checkpoint, read_leaves, read_settings
from sparsejax.pretrained.leaves import flatten, nest
from sparsejax.report.progress import say
from sparsejax.training.setup import Run
from sparsejax.training.state import TrainState
from sparsejax.types import PyTree

# Settings of a model that its weights leave open.
_FREE = {
    "dropout_rate",
    "mlp_dropout_rate",
    "init_std",
    "linear_init",
    "dtype",
    "remat",
    "scan_layers",
    "max_length",
    "block",
    "sparse_weights",
    "own_class",
}


def check_initial(config: TrainConfig, checkpoints: Path) -> None:
    """Refuse settings that pretrained weights do not fit, before data is prepared.

    Args:
      config: the settings.
      checkpoints: folder of those of the run; where there is one the weights are not asked for.

    Raises:
      ConfigError: with setting, value and that of the weights.
    """
    model = config.model
    if not model.init_from or any(checkpoints.glob("*")):
        return
    settings = dataclasses.asdict(model)
    settings["num_kv_heads"] = model.num_kv_heads or model.num_heads
    if not model.vocab_size:
        del settings["vocab_size"]
    try:
        _check_settings(settings, config, open_checkpoint(model.init_from))
    except ValueError as error:
        raise ConfigError(f"model.init_from: {error}") from error


def create_initial_state(run: Run) -> TrainState:
    """Create the state at step 0, with pretrained weights if the settings name some.

    Args:
      run: the run.

    Raises:
      ConfigError: if the weights do not fit the model, or their tokenizer is not that of the data.
    """
    if not run.config.model.init_from:
        return run.create_state()
    if warning := warn_of_zero_rule(run.config.recipe, pretrained=True):
        say(f"warning: {warning}")
    try:
        params = _load_params(run)
    except ValueError as error:
        raise ConfigError(f"model.init_from: {error}") from error
    return run.create_state(params)


def _load_params(run: Run) -> PyTree:
    """Read the parameters, each device those that it is to hold."""
    checkpoint = open_checkpoint(run.config.model.init_from)
    model = run.model_config
    trained = _check_settings(vars(model), run.config, checkpoint)
    tokenizer = checkpoint.load_tokenizer()
    if tokenizer is not None:
        _check_tokenizer(run.config.data.tokenizer, run.data.tokenizer, tokenizer, checkpoint)
    abstract = flatten(run.make_abstract_state(run.recipe.phases[0].name).params)
    shapes = {path: leaf.shape for path, leaf in abstract.items()}
    family, _ = read_settings(checkpoint)
    known = {leaf.path for leaf in family.list_leaves(model, trained)}
    own = sorted(shapes.keys() - known)
    check_setting(not own, "model.own_class", model.own_class, f"without parameters such as {own}")
    leaves = read_leaves(checkpoint, family, model, shapes, trained)
    placed = {
        path: jax.make_array_from_callback(value.shape, abstract[path].sharding, value.__getitem__)
        for path, value in leaves
    }
    return nest(placed)


def _check_settings(
    settings: Mapping[str, Any], config: TrainConfig, checkpoint: Checkpoint
) -> int:
    """Compare settings of a model with those of its weights; return their longest context."""
    trained = read_settings(checkpoint)[1]
    whole = BlockPattern(block_q=trained["max_length"], block_kv=trained["max_length"])
    expected = TransformerConfig(**trained, block=whole)
    for field in dataclasses.fields(TransformerConfig):
        name, wanted = field.name, getattr(expected, field.name)
        unused = name == "use_norm_bias" and expected.norm == "rms"
        if name in _FREE or name not in settings or unused:
            continue
        value = settings[name]
        # 0 stands for the width of the model.
        same = name == "qkv_features" and value == expected.num_heads * expected.head_dim
        here = f"{wanted!r} as in {checkpoint.origin}"
        check_setting(value == wanted or same, f"model.{name}", value, here)
    length = config.data.sequence_length
    here = f"at most {expected.max_length}, the context of {checkpoint.origin}"
    check_setting(length <= expected.max_length, "data.sequence_length", length, here)
    return expected.max_length


def _check_tokenizer(setting: str, ours: Tokenizer, theirs: Tokenizer, checkpoint: Checkpoint):
    """Compare what each id stands for: files of one tokenizer may differ."""
    if ours.name == theirs.name:
        return
    for token in range(ours.vocab_size):
        text = theirs.decode([token]) if token < theirs.vocab_size else None
        if ours.decode([token]) != text:
            raise ValueError(
                f"data.tokenizer must be that of {checkpoint.origin}, in which id {token} is "
                f"{text!r}, got {setting!r}, in which it is {ours.decode([token])!r}"
            )
