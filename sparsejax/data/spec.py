"""What a model must know of a data set, found without opening the data."""

from typing import NamedTuple

from sparsejax.batch import Task
from sparsejax.data.config import DataConfig
from sparsejax.data.source import Contents
from sparsejax.data.sources import load_source, refuse_unreadable
from sparsejax.data.tokenizer_files import open_tokenizer_file


class DataSpec(NamedTuple):
    """What a model must know of a data set.

    Attributes:
      task: What the batches are for.
      vocab_size: Ids are in [0, vocab_size); 0 for patches, which are no ids.
      num_classes: Number of labels; 0 for a language model and for translation.
      patch_values: Values of a patch, 0 for ids.
    """

    task: Task
    vocab_size: int
    num_classes: int
    patch_values: int = 0


def describe_data(config: DataConfig) -> DataSpec:
    """Say what `make_data` would, without the data.

    What only files tell is read from them: classes and the size of images, how many ids an existing
    tokenizer has. `tfds:` asks TFDS what it knows of the set. The others look at no file.

    Args:
      config: Names the data set.

    Returns:
      The spec that `make_data(config)` has.

    Raises:
      ValueError: What stands in files only is not there, or contradicts the settings.

    Example:
      >>> describe_data(DataConfig(source="aan:/aan"))
      DataSpec(task='matching', vocab_size=257, num_classes=2, patch_values=0)
    """
    with refuse_unreadable(config.source):
        contents = load_source(config.kind).describe(config)
    return make_spec(config, contents)


def make_spec(config: DataConfig, contents: Contents) -> DataSpec:
    """Say what batches are made of the contents of a source.

    Args:
      config: Settings of the data set.
      contents: What its source holds.

    Returns:
      The spec.

    Raises:
      ValueError: Examples with labels cannot be masked, those without cannot be cut, and texts
        cannot say what is hidden.
    """
    task = contents.task
    if config.truncate and task == "language_model":
        raise ValueError(
            f"truncate=True does not apply to {config.source}: texts without labels are one "
            "stream; leave it at False"
        )
    if task == "masked_language_model" and contents.num_values is None:
        raise ValueError(
            f"{config.source} says which tokens of a text are hidden, which only values can; "
            "expected num_values, or texts and mask_fraction above 0"
        )
    if config.mask_fraction:
        if task != "language_model":
            raise ValueError(
                f"mask_fraction={config.mask_fraction}: the examples of {config.source} have "
                "labels; expected 0.0, or texts without"
            )
        task = "masked_language_model"
    if contents.patch_values:
        return DataSpec(task, 0, contents.num_classes, contents.patch_values)
    num_ids = _count_ids(config.tokenizer) if contents.num_values is None else contents.num_values
    # Documents that are padded are shifted up by one to make room for padding; a masked language
    # model has the mask token.
    return DataSpec(task, num_ids + (task != "language_model"), contents.num_classes)


def _count_ids(tokenizer: str) -> int:
    """Return how many ids a tokenizer has, the separator included."""
    kind, _, rest = tokenizer.partition(":")
    match kind:
        case "bytes":
            return 256
        case "file":
            return open_tokenizer_file(tokenizer).vocab_size
        case _:
            return int(rest)
