"""Documents that are read in pieces, put together again for tokenizers that want them whole."""

from collections.abc import Iterable, Iterator

from sparsejax.data.source import Example

# Of text that is encoded at once; the library needs about thirty times that.
_MOST_BYTES = 4 << 20


def join_pieces(examples: Iterable[Example]) -> Iterator[Example]:
    r"""Join the pieces of each document of a corpus, so that ids are those of the whole.

    A document of more than four megabytes stays in parts of about that size. They end with a
    line, where the next begins with a character and this one does not end with a space: there the
    rules by which tokenizers split text, which look at runs of spaces, find the same words as in
    the whole. Without such a place a part ends where it was read. A tokenizer that puts a space
    before a text puts one before each part.

    Args:
      examples: The corpus, one document or piece of one each.

    Yields:
      The corpus in as few examples as that.
    """
    pieces, size = [], 0
    for example in examples:
        (piece,) = example.documents
        pieces.append(bytes(piece))
        size += len(piece)
        if example.complete:
            yield Example((b"".join(pieces),))
            pieces, size = [], 0
        elif size >= _MOST_BYTES:
            part, rest = _cut(b"".join(pieces))
            yield Example((part,), complete=False)
            pieces, size = [rest], len(rest)


def _cut(text: bytes) -> tuple[bytes, bytes]:
    """Return a text in two, after the last line that no other space surrounds, if there is one."""
    characters = text.decode()
    end = len(characters)
    while (end := characters.rfind("\n", 0, end)) > 0:
        around = characters[end - 1] + characters[end + 1 : end + 2]
        if len(around) == 2 and not any(map(str.isspace, around)):
            part = characters[: end + 1].encode()
            return part, text[len(part) :]
    return text, b""
