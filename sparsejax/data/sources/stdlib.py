"""A language-model corpus on every machine: the sources of Python's standard library."""

import dataclasses
import platform
import sysconfig
from pathlib import Path

from sparsejax.data.config import DataConfig
from sparsejax.data.source import Contents, Source
from sparsejax.data.sources import text

OPTIONS = text.OPTIONS

_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}


def describe_stdlib(config: DataConfig) -> Contents:
    """Describe the corpus without reading it.

    Args:
      config: Settings with `source="stdlib"`.

    Returns:
      Its contents.
    """
    return text.describe_text(config)


def open_stdlib(config: DataConfig) -> Source:
    """Open the `.py` sources of the running Python's standard library as a corpus.

    Files are held out by the hash of their paths. The few files that are not UTF-8 (they test the
    parser) are left out.

    Args:
      config: Settings with `source="stdlib"`.

    Returns:
      The corpus; its fingerprint holds the version of Python.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in sorted(root.rglob("*.py"))
        if not _NOT_STDLIB & set(path.relative_to(root).parts)
    ]
    source = text.open_folder(config, root, files, not_text="skip")
    return dataclasses.replace(source, fingerprint={"python": platform.python_version()})
