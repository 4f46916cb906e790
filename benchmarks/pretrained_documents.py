"""Real prose that every Python has, cut to as many tokens as a benchmark reads.

CPython's own documentation: pages of the language reference, of `idlelib` and of `email`. They
change little from one release to the next; a result names the SHA-256 of what it read.
"""

import hashlib
import html
import pathlib
import pydoc_data.topics
import re
from typing import Literal, NamedTuple

import numpy as np

from sparsejax.data import Tokenizer


class Document(NamedTuple):
    """The beginning of a text.

    Attributes:
      name: what results call it.
      use: "calibration" of what is chosen in advance, or "test".
      ids_T: i32[T].
      sha256: of what was encoded.
    """

    name: str
    use: Literal["calibration", "test"]
    ids_T: np.ndarray
    sha256: str


_LIBRARY = pathlib.Path(pydoc_data.topics.__file__).parents[1]
_TOPICS = {
    "types": ("calibration", ("types", "binary", "bitwise", "comparisons")),
    "classes": ("calibration", ("specialnames", "class")),
    "debugger": ("calibration", ("debugger",)),
    "strings": ("calibration", ("strings", "formatstrings")),
    "execution": ("test", ("execmodel", "import", "objects")),
    "compound statements": ("test", ("compound", "function", "with")),
}
_FILES = {"idle": "idlelib/help.html", "email": "email/architecture.rst"}


def list_documents(tokenizer: Tokenizer | None, length: int) -> list[Document]:
    """Encode the first tokens of every document.

    Args:
      tokenizer: of the model.
      length: int, tokens of each.

    Returns:
      list of Document, those for calibration first.

    Raises:
      ValueError: if a text is too short, or there is no tokenizer.
    """
    if tokenizer is None:
        raise ValueError("the model must have a tokenizer to read documents, got None")
    texts = {
        name: (use, "\n\n".join(pydoc_data.topics.topics[topic] for topic in topics))
        for name, (use, topics) in _TOPICS.items()
    }
    texts |= {name: ("test", _read(_LIBRARY / path)) for name, path in _FILES.items()}
    found = []
    for name, (use, text) in texts.items():
        (ids,) = tokenizer.encode([text.encode()])
        if len(ids) < length:
            raise ValueError(f"document {name!r} must have {length} tokens, got {len(ids)}")
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        found.append(Document(name, use, ids[:length].astype(np.int32), sha256))
    return found


def _read(path: pathlib.Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".html":
        return text
    text = re.sub(r"(?s)<(script|style|head|nav|pre).*?</\1>", "", text)
    text = re.sub(r"<(p|li|h\d|dd|dt|br|div)[^>]*>", "\n", text)
    text = html.unescape(re.sub(r"<[^>]+>", "", text)).replace("¶", "")
    return re.sub(r"\n\s*\n+", "\n\n", text).strip()
