"""Where examples come from, one file for each kind of source.

A source is one row of `SOURCES` and the file `sources/<kind>.py`, which has

- `OPTIONS`, the options of `DataConfig` that apply to it;
- `describe_<kind>`, which tells what the examples are and reads as little as it can;
- `open_<kind>`, which opens the data.

These files import no package of data when they are imported, so that settings are checked and
described where none is installed.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class SourceRow(NamedTuple):
    """How a kind of source is named.

    Attributes:
      spellings: Values of `DataConfig.source`, as messages show them.
      any_rest: Whether the part after the colon stands for anything but an empty one.
    """

    spellings: tuple[str, ...]
    any_rest: bool = False


class SourceModule(NamedTuple):
    """What the file of a source offers.

    Attributes:
      options: `Options` of `DataConfig` that apply beyond the common ones.
      describe: DataConfig -> Contents, what the examples are.
    """

    options: Any
    describe: Callable[[Any], Any]
    open: Callable[[Any], Any]


SOURCES = {
    "stdlib": SourceRow(("stdlib",)),
    "listops": SourceRow(("listops", "listops:short")),
    "pathfinder": SourceRow(("pathfinder",)),
    "copying": SourceRow(
        ("copying:hidden_permutation", "copying:fixed_lag", "copying:associative_recall")
    ),
    "text": SourceRow(("text:/path",), any_rest=True),
    "jsonl": SourceRow(("jsonl:/path",), any_rest=True),
    "parquet": SourceRow(("parquet:/path",), any_rest=True),
    "hf": SourceRow(("hf:/folder",), any_rest=True),
    "bin": SourceRow(("bin:/path",), any_rest=True),
    "images": SourceRow(("images:/folder",), any_rest=True),
    "idx": SourceRow(("idx:/folder",), any_rest=True),
    "tfds": SourceRow(("tfds:NAME",), any_rest=True),
    "aan": SourceRow(("aan:/path",), any_rest=True),
    "pairs": SourceRow(("pairs:/folder",), any_rest=True),
    "own": SourceRow(("own:MODULE:FUNCTION",), any_rest=True),
}
"""Every kind of source, by the part of `DataConfig.source` before the colon."""


def check_spelling(source: str) -> None:
    """Refuse what names no source.

    Args:
      source: As in `DataConfig`.

    Raises:
      ValueError: No row has this spelling; the message lists them all.
    """
    kind, _, rest = source.partition(":")
    row = SOURCES.get(kind)
    if row is None or not (rest if row.any_rest else source in row.spellings):
        known = ", ".join(spelling for row in SOURCES.values() for spelling in row.spellings)
        raise ValueError(f"source={source!r}: expected one of {known}")


@contextlib.contextmanager
def refuse_unreadable(source: str) -> Iterator[None]:
    """Say of which source a file could not be read.

    Args:
      source: As in `DataConfig`.

    Raises:
      ValueError: The system refuses to read something, as a name that is too long.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(f"source={source!r} cannot be read: {error.strerror or error}") from error


def load_source(kind: str) -> SourceModule:
    """Import the file of a source.

    Args:
      kind: A key of `SOURCES`.

    Returns:
      What the file offers.
    """
    module = importlib.import_module(f"{__name__}.{kind}")
    return SourceModule(
        module.OPTIONS, getattr(module, f"describe_{kind}"), getattr(module, f"open_{kind}")
    )
