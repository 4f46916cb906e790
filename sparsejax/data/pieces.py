"""Documents that are read in pieces, put together again for tokenizers that want them whole."""

import re
from collections.abc import Iterable, Iterator

from sparsejax.data.source import Example
from sparsejax.data.tokenizer import decode_text

# Of text that is encoded as one. The library encodes several at once, each in a hundred times its
# size.
_MOST_CHARACTERS = 256 << 10
# All of a text up to the end of a word that another follows; of a line that is not beside an empty
# one; of any line.
_PLACES = (
    re.compile(r".*[^\W\d_](?= [^\W\d_])", re.DOTALL),
    re.compile(r".*\S\n(?=\S)", re.DOTALL),
    re.compile(r".*\n", re.DOTALL),
)


def join_pieces(examples: Iterable[Example]) -> Iterator[Example]:
    """Join the pieces of each document of a corpus, so that ids are those of the whole.

    A document of more than 262,144 characters is divided into parts of about that size. They end
    between two words with one space between them, where all common rules of splitting text split
    it. In text without such a place they end with a line, or anywhere, and an id there may be
    another than in the whole. A tokenizer that puts a space before a text puts one before each
    part.

    Args:
      examples: The corpus, one document or piece of one each.

    Yields:
      The corpus in as few examples as that.

    Raises:
      ValueError: A document is not UTF-8.
    """
    text = ""
    for example in examples:
        (piece,) = example.documents
        text += decode_text(bytes(piece))
        start = 0
        while len(text) - start > _MOST_CHARACTERS:
            part = _cut(text[start : start + _MOST_CHARACTERS])
            yield Example((part.encode(),), complete=False)
            start += len(part)
        text = text[start:]
        if example.complete:
            yield Example((text.encode(),))
            text = ""


def _cut(text: str) -> str:
    """Return a text up to its last good place."""
    found = next(filter(None, (place.match(text) for place in _PLACES)), None)
    return found[0] if found else text
