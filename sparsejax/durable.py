"""Write the files of a run: whole or not at all, and never through a link."""

import os
from pathlib import Path


def write_durably(path: Path, content: str | bytes) -> None:
    """Put a file in place in one step, its bytes on disk before its name.

    Args:
      path: of the file, replaced if it exists. A link is replaced by the file: what it points to
        stays as it is.
      content: text is written as UTF-8.

    Raises:
      OSError: if it cannot be written, naming the file, which is then as it was.
    """
    replacement = path.with_name(path.name + ".new")
    replacement.unlink(missing_ok=True)
    try:
        with replacement.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        replacement.replace(path)
    except OSError as error:
        replacement.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
