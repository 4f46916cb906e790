"""From the command line: continue prompts, with a run's model or a pretrained one."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsejax.config.parse import ConfigError
from sparsejax.generation import LoadedModel, generate
from sparsejax.pretrained import load_pretrained
from sparsejax.tools.load import load_model


def load_any(
    workdir: str | os.PathLike | None, pretrained: str | os.PathLike | None
) -> LoadedModel:
    """Load a model of either kind.

    Args:
      workdir: folder of a run, whose newest checkpoint is loaded.
      pretrained: as `load_pretrained` takes it.

    Raises:
      ConfigError: if it cannot be loaded.
    """
    if pretrained is None:
        assert workdir is not None, "one of both is given"
        return load_model(workdir)
    try:
        return load_pretrained(pretrained)
    except (ValueError, OSError) as error:
        raise ConfigError(f"pretrained: {error}") from error


def write_texts(model: LoadedModel, prompts: Sequence[str], **options: Any) -> str:
    """Write prompts with their continuations, a line "---" between two texts.

    Args:
      model: what continues them.
      prompts: texts.
      **options: of `generate`.

    Raises:
      ConfigError: if `generate` refuses them.
    """
    try:
        new = generate(model, prompts, **options)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return "\n---\n".join(f"{a}{b}" for a, b in zip(prompts, new, strict=True))


def read_prompts(path: str | os.PathLike) -> list[str]:
    """Read a file whose every line is a prompt.

    Args:
      path: of the file.

    Raises:
      ConfigError: if it cannot be read, is no UTF-8 or empty, or a line is empty.
    """
    try:
        lines = Path(path).read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompt_file={str(path)!r} must be readable text: {error}") from error
    if not lines[-1]:
        lines.pop()
    if "" in lines or not lines:
        number = lines.index("") + 1 if lines else 1
        raise ConfigError(f"{path}, line {number}: a prompt must not be empty")
    return lines
