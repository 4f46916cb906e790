"""Load what a run trained: the model as its checkpoint's phase has it, settings and tokenizer."""

import os
from pathlib import Path
from typing import NamedTuple

from sparsejax.checkpoint.files import CheckpointInfo
from sparsejax.checkpoint.save import find_checkpoints, restore
from sparsejax.checkpoint.workdir import read_run
from sparsejax.config.parse import ConfigError
from sparsejax.config.schema import TrainConfig, make_recipe, make_transformer_config
from sparsejax.data import Tokenizer, load_tokenizer
from sparsejax.models import Transformer
from sparsejax.optimizer import make_optimizer
from sparsejax.training.setup import find_phase
from sparsejax.training.state import make_abstract_state, merge_model
from sparsejax.training.step import make_options


class TrainedModel(NamedTuple):
    """What a run trained.

    Attributes:
      model: Transformer with parameters and masks; `model(tokens)` computes what evaluation did:
        sparse or dense as the phase of the checkpoint is, with weights as the recipe shows them.
      config: TrainConfig of the run.
      tokenizer: Tokenizer of its data: `encode` takes a list of texts as bytes, `decode` ids.
    """

    model: Transformer
    config: TrainConfig
    tokenizer: Tokenizer


def load_model(workdir: str | os.PathLike, *, step: int | None = None) -> TrainedModel:
    """Load a model from a run's folder, wherever its data is now.

    Args:
      workdir: folder of the run.
      step: of the checkpoint; None = the newest that is whole.

    Raises:
      ConfigError: if the folder holds no run, or no whole checkpoint of the step; the message lists
        those that there are.

    Example:
      `model, config, tokenizer = load_model("runs/quickstart")`
    """
    recorded = read_run(workdir)
    config = recorded.config
    info = _find_checkpoint(Path(workdir), step)
    try:
        model_config = make_transformer_config(config, **recorded.spec._asdict())
        recipe = make_recipe(config, model_config)
        optimizer = make_optimizer(config.optimizer, num_steps=config.schedule_length)
        phase = find_phase(recipe, info.metadata["phase"])
        state, _ = restore(info, make_abstract_state(model_config, recipe, optimizer, phase.name))
        tokenizer = load_tokenizer(recorded.fingerprint["tokenizer"], Path(workdir))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    params = recipe.transform_params(state.params, state.sparsity, phase)
    model = merge_model(model_config, params, state.sparsity.masks)
    options = config.step_options
    model.attention_options, linear_options = make_options(
        phase, options["implementation"], options["weight_implementation"]
    )
    model.linear_options = linear_options._replace(grad_pruning="none")
    return TrainedModel(model, config, tokenizer)


def _find_checkpoint(workdir: Path, step: int | None) -> CheckpointInfo:
    whole = [info for info in find_checkpoints(workdir / "checkpoints") if info.problem is None]
    for info in whole:
        if step in (None, info.step):
            return info
    steps = sorted(info.step for info in whole)
    wanted = "a whole checkpoint" if step is None else f"a whole checkpoint of {step=}"
    raise ConfigError(f"workdir={str(workdir)!r} must hold {wanted}, found those of {steps}")
