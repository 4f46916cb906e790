"""Progress of a long preparation: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator

_SECONDS_BETWEEN_LINES = 10.0


def show_progress[T](items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yield the items while reporting on stderr how many have passed.

    Args:
      items: What to count.
      description: What is being done, in a few words.
      total: Number of items, if known.

    Yields:
      The same items.

    Example:
      >>> list(show_progress("ab", "Counting"))
      ['a', 'b']
    """
    if sys.stderr.isatty():
        import tqdm

        yield from tqdm.tqdm(items, desc=description, total=total, unit=" examples")
        return
    of_total = "" if total is None else f" of {total:,}"
    last = time.monotonic()
    for count, item in enumerate(items):
        if time.monotonic() - last > _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"{description}: {count:,}{of_total}", file=sys.stderr, flush=True)
        yield item
