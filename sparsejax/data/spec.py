"""What a model has to know of a data set, as far as settings tell: no file is looked at."""

from typing import NamedTuple

from sparsejax.data.config import DataConfig
from sparsejax.data.source import Task


class Facts(NamedTuple):
    """The shape of a learning problem.

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


def find_facts(config: DataConfig, *, num_classes: int | None = None) -> Facts:
    """Say what `make_data` would, without the data.

    Args:
        config: Names the data set.
        num_classes: Number of labels where it stands in files only (`idx:`, `tfds:`), 0 for a
            language model; None elsewhere.

    Returns:
        The facts that `make_data(config)` has among its attributes.

    Raises:
        ValueError: `num_classes` is missing, out of range or contradicts the source or what is to
            be made of it; or the channels of images stand in files only.

    Example:
        >>> find_facts(
        ...     DataConfig(
        ...         source="aan:/aan", data_dir="data", sequence_length=64, batch_size=2, seed=0
        ...     )
        ... )
        Facts(task='matching', vocab_size=257, num_classes=2, patch_values=0)
    """
    known: dict[str, tuple[Task, int]] = {
        "stdlib": ("language_model", 0),
        "text": ("language_model", 0),
        "listops": ("classification", 10),
        "pathfinder": ("classification", 2),
        "aan": ("matching", 2),
        "pairs": ("translation", 0),
    }
    if config.kind in known:
        task, count = known[config.kind]
        if num_classes not in (None, count):
            raise ValueError(
                f"num_classes={num_classes}: source={config.source!r} has {count}; expected none"
            )
    else:
        least = 1 if config.kind == "idx" else 0
        if num_classes is None or num_classes < least:
            meaning = "" if least else ", 0 for a language model"
            raise ValueError(
                f"num_classes={num_classes}: the labels of source={config.source!r} stand in its "
                f"files; expected how many there are, at least {least}{meaning}"
            )
        task, count = ("classification" if num_classes else "language_model"), num_classes
    if config.mask_fraction:
        if task != "language_model":
            raise ValueError(
                f"num_classes={count}: texts with labels have no mask_fraction="
                f"{config.mask_fraction}; expected 0"
            )
        task = "masked_language_model"
    if config.patch_size:
        channels = config.image_channels or (1 if config.kind == "idx" else 0)
        if not count:
            raise ValueError(
                f"num_classes=0: the images of source={config.source!r} have labels; expected how "
                "many there are, at least 1"
            )
        if not channels:
            raise ValueError(
                f"num_classes={count}: the channels of the images stand in the files of source="
                f"{config.source!r} too; expected image_channels=1 or 3 among its settings, got 0"
            )
        return Facts(task, 0, count, config.patch_size**2 * channels)
    if config.kind == "listops":
        num_ids = 15
    elif config.tokenizer == "bytes":
        num_ids = 256  # grey levels too
    else:
        num_ids = int(config.tokenizer.partition(":")[2])
    # Documents that are padded are shifted up by one to make room for padding; a masked language
    # model has the mask token.
    return Facts(task, num_ids + (task != "language_model"), count)
