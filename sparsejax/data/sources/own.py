"""A source of a user's own: a function that makes it, by its dotted name."""

from sparsejax.data.config import DataConfig
from sparsejax.data.source import Contents, Options, Source
from sparsejax.dotted import find_function

OPTIONS = Options({"truncate", "mask_fraction"})


def describe_own(config: DataConfig) -> Contents:
    """Describe the examples of a source of one's own.

    Args:
      config: Settings with `source="own:package.module:function"`.

    Returns:
      Their contents.

    Raises:
      ValueError: As `open_own`.
    """
    return open_own(config).contents


def open_own(config: DataConfig) -> Source:
    """Make a source with a function of one's own.

    Args:
      config: Settings with `source="own:package.module:function"`; the function takes them and
        returns a Source.

    Returns:
      The source.

    Raises:
      ValueError: There is no such function, or it does not return a Source.
    """
    source = find_function(config.rest, "source")(config)
    if not isinstance(source, Source):
        raise ValueError(
            f"source={config.source!r}: expected a function that returns a "
            f"sparsejax.data.source.Source, got {type(source)}"
        )
    return source
