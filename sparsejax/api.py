"""Train, evaluate and load from Python; `sparsejax` itself offers all of it."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparsejax.config.parse import ConfigError, describe_unused, parse_config
from sparsejax.config.schema import TrainConfig
from sparsejax.data import DataConfig, Source
from sparsejax.dotted import name_function
from sparsejax.generation import generate as generate
from sparsejax.models import Transformer
from sparsejax.recipes import Recipe, RecipeFacts
from sparsejax.report.progress import say
from sparsejax.report.writers import OptionalWriter, RowWriter
from sparsejax.tools.choices import evaluate_choices as evaluate_choices
from sparsejax.tools.evaluate import evaluate_run
from sparsejax.tools.load import TrainedModel as TrainedModel
from sparsejax.tools.load import load_model as load_model
from sparsejax.training.compilation_cache import use_compilation_cache
from sparsejax.training.loop import train_and_evaluate


def train(
    config: TrainConfig | Mapping[str, Any],
    workdir: str | os.PathLike,
    *,
    recipe: Callable[[RecipeFacts], Recipe] | None = None,
    data: Callable[[DataConfig], Source] | None = None,
    model: type[Transformer] | None = None,
    writers: Sequence[RowWriter] = (),
) -> dict[str, Any] | None:
    """Train to the last step, from where the folder's newest checkpoint stands.

    Args:
      config: settings: what `configs.base.get_config()` returns, changed; a nested mapping with the
        same keys; or a TrainConfig.
      workdir: folder of the run. The same folder resumes.
      recipe: function at the top of a module, which makes the recipe; the run records its name.
        None = what `config.recipe.name` says.
      data: function at the top of a module, which makes the source of the data, likewise.
      model: subclass of Transformer at the top of a module, which takes its place, likewise.
      writers: told of every row of `metrics.jsonl`, and closed at the end, whatever ends the run: a
        tracking service, say. Training goes on without one that fails.

    Returns:
      Scalars by name, also written to `summary.json`; None if a signal stopped the run.

    Raises:
      ConfigError: if a setting has to be changed; the message says which.
      NonFiniteError: if too many steps in a row were skipped, their loss, gradient, weights or
        optimizer state not being finite, or the last validation is not finite.
      CheckpointError: if a checkpoint cannot be saved.
      OSError: if another file of the run cannot be written.
    """
    if not isinstance(writers, Sequence) or not all(hasattr(w, "write") for w in writers):
        raise ConfigError(f"writers must be a sequence of RowWriter, got {writers!r:.60}")
    with contextlib.ExitStack() as stack:
        told = [OptionalWriter(writer, say) for writer in writers]
        for writer in told:
            stack.callback(writer.close)
        mapping = _make_mapping(config, recipe=recipe, data=data, model=model)
        use_compilation_cache()
        command = f"sparsejax.train(config, {str(workdir)!r})"
        parsed = parse_config(mapping)
        if unused := describe_unused(mapping):
            say(unused)
        return train_and_evaluate(parsed, workdir, resume_command=command, writers=told)


def evaluate(
    workdir: str | os.PathLike,
    *,
    split: str | None = None,
    source: str | None = None,
    mesh: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Evaluate the newest checkpoint of a run on its validation split, or on other data.

    The setting `num_eval_batches` of the run limits what is evaluated; 0 is no limit.

    Args:
      workdir: folder of the run.
      split: "train", "validation" or "all" of both; None = "validation" of the run's data, "all" of
        another source.
      source: other data, written as `config.data.source`, such as "text:/path": read with the run's
        tokenizer and lengths. The run's own data need not be there. None = the run's data.
      mesh: sizes of `config.mesh`, such as {"fsdp": 2}; None = the mesh that the run had, or, if
        the devices are not as many, each with a whole state.

    Returns:
      "step", "phase", "validation_loss" in nats per token or example, "validation_accuracy",
      "attention_density" and, if the phase has sparse weights, "weight_density". The names of
      another split begin with it; "loss" and "accuracy" are those of "all". Of a language model
      also "tokens", "perplexity" and, unless its ids stand for no bytes, "bytes" and
      "bits_per_byte", for which a separator of documents is one byte.

    Raises:
      ConfigError: if the folder holds no whole checkpoint, the data is no longer there or does not
        fit the model, or the mesh does not fit the devices.
    """
    use_compilation_cache()
    return evaluate_run(workdir, split=split, source=source, mesh=mesh)


def _make_mapping(
    config: TrainConfig | Mapping[str, Any],
    *,
    recipe: Callable[[RecipeFacts], Recipe] | None,
    data: Callable[[DataConfig], Source] | None,
    model: type[Transformer] | None,
) -> dict[str, Any]:
    """Return settings as nested dicts, with the names of what is of the caller's own."""
    if not isinstance(config, TrainConfig | Mapping) and not hasattr(config, "items"):
        raise ConfigError(f"config must be a mapping or a TrainConfig, got {config!r:.60}")
    mapping = config.to_dict() if isinstance(config, TrainConfig) else _to_dict(config)
    for name in ("recipe", "model", "data"):
        if not isinstance(mapping.get(name), dict):
            raise ConfigError(f"missing section {name} of config")
    try:
        if recipe is not None:
            mapping["recipe"] = {"own": {"sparse_weights": ""}} | mapping["recipe"]
            mapping["recipe"]["name"] = name_function(recipe, "recipe")
        if model is not None:
            mapping["model"]["own_class"] = name_function(model, "model")
        if data is not None:
            mapping["data"]["source"] = f"own:{name_function(data, 'data')}"
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return mapping


def _to_dict(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a ConfigDict, or any nested mapping, as nested dicts."""
    return {
        name: _to_dict(value) if isinstance(value, Mapping) or hasattr(value, "to_dict") else value
        for name, value in config.items()
    }
