"""Long Range Arena's Pathfinder, as `data/pathfinder_pictures.py` draws it."""

from sparsejax.data.config import DataConfig
from sparsejax.data.source import Contents, Options, Source

OPTIONS = Options({"validation_split", "pathfinder_examples", "truncate"})


def describe_pathfinder(config: DataConfig) -> Contents:
    """Describe the set without generating it.

    Args:
      config: Settings with `source="pathfinder"`.

    Returns:
      Its contents.
    """
    return Contents("classification", num_values=256, num_classes=2)


def open_pathfinder(config: DataConfig) -> Source:
    """Open Pathfinder, generating it into `data_dir` on first use.

    Args:
      config: Settings with `source="pathfinder"`.

    Returns:
      The set; a document is a picture, row by row.

    Raises:
      ValueError: `validation_split` is not a split.
    """
    from sparsejax.data.generated import Pathfinder, open_generated

    return open_generated(
        config,
        Pathfinder,
        contents=describe_pathfinder(config),
        variant="full",
        train_examples=config.pathfinder_examples,
        input_key="image",
    )
