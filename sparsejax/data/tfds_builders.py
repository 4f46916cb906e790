"""Find the builder of a TFDS set, prepare the set, or say why neither can be."""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import io
import logging
import shlex
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from sparsejax.data.config import DataConfig

_CONNECT_SECONDS = 10
# What else decides which files are written; each is a flag of the prepare command.
_PREPARED_OPTIONS = (
    "tokenizer",
    "train_split",
    "validation_split",
    "input_key",
    "label_key",
    "patch_size",
    "image_size",
)


def make_builder(config: DataConfig, **options: str) -> Any:
    """Make the builder of a set that is prepared or that TFDS knows.

    Args:
      config: Settings with `source="tfds:NAME[/config]"`.
      options: Further arguments of `tfds.builder`.

    Returns:
      The TFDS builder.

    Raises:
      ValueError: Neither is so, or the files of the set are damaged.
    """
    check_data_dir(config)
    tfds = _import_tfds()
    try:
        if tfds.core.naming.parse_builder_name_kwargs(config.rest)[0].namespace:
            # TFDS would ask the registries of others, with retries, and then need TensorFlow.
            raise ValueError("sets of other registries are not read")
        # What TFDS says of TensorFlow it prints.
        with contextlib.redirect_stdout(io.StringIO()):
            return tfds.builder(config.rest, data_dir=config.data_path, try_gcs=False, **options)
    # The code of a set and the readers of its files raise anything.
    except Exception as error:
        # TFDS puts its own call before what went wrong, and a list of variants after it.
        reason = _get_first_line(error).rpartition('}": ')[2].partition(" Here are")[0]
        name = config.rest.partition("/")[0]
        state = "no such set is prepared"
        if Path(config.data_path, name).is_dir():
            state = "the set cannot be read"
        raise ValueError(
            f"source={config.source!r}: {state} in data_dir={str(config.data_path)!r}, and TFDS "
            f"cannot prepare it here ({reason}{_guess_name(config)}); expected a name that TFDS "
            "knows without TensorFlow, or a set prepared elsewhere with "
            "file_format='array_record' and copied into data_dir; prepare it where TFDS can by: "
            f"{make_prepare_command(config)}"
        ) from error


def check_data_dir(config: DataConfig) -> None:
    """Refuse a folder that ArrayRecord, in whose files TFDS sets are, cannot open.

    Args:
      config: Settings of such a set.

    Raises:
      ValueError: The name of the folder is not UTF-8.
    """
    try:
        str(config.data_path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"data_dir={config.data_dir!r}: expected a name in UTF-8 for {config.source!r}, which "
            "is kept in ArrayRecord files"
        ) from error


@functools.cache
def _import_tfds() -> Any:
    # Imported on demand: it takes a second.
    import tensorflow_datasets as tfds

    # TFDS gives up the import of its own sets at the first package that is missing, h5py for one,
    # and those of text come after it.
    with contextlib.suppress(ImportError):
        importlib.import_module("tensorflow_datasets.text")
    silence_tfds()
    return tfds


@functools.cache
def silence_tfds() -> None:
    """Keep warnings of TFDS from the user, once for the process; errors of it are still told.

    They are none of a reader's business: OpenCV that is not installed, folders not filled yet.
    """
    import tensorflow_datasets as tfds

    folder = str(Path(tfds.__file__).parent)
    logging.getLogger("absl").addFilter(
        lambda record: record.levelno >= logging.ERROR or not record.pathname.startswith(folder)
    )


def _guess_name(config: DataConfig) -> str:
    """Return the question whether names like that of the set were meant; empty if none is."""
    tfds = _import_tfds()
    folder = config.data_path
    prepared = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    name, _, variant = config.rest.partition("/")
    known = {*tfds.list_builders(with_community_datasets=False), *prepared}
    if name not in known:
        close = difflib.get_close_matches(name, known)
    elif variant and name in tfds.core.registered.list_imported_builders():
        variants = tfds.builder_cls(name).builder_configs
        close = [f"{name}/{match}" for match in difflib.get_close_matches(variant, variants)]
    else:
        close = []
    return f"; did you mean {' or '.join(close)}?" if close else ""


def find_builder(config: DataConfig) -> Any:
    """Make the builder of a prepared set, preparing it first if settings allow a download.

    Args:
      config: Settings with `source="tfds:NAME[/config]"`.

    Returns:
      The TFDS builder.

    Raises:
      ValueError: The set is neither prepared nor to be downloaded, or preparing it fails.
    """
    builder = make_builder(config)
    if builder.is_prepared():
        return builder
    if not config.download:
        raise ValueError(
            f"source={config.source!r}: the set is not prepared in data_dir="
            f"{str(config.data_path)!r}; prepare it once, with network access, by: "
            f"{make_prepare_command(config)}"
        )
    _check_reachable(config, builder)
    builder = make_builder(config, file_format="array_record")
    try:
        builder.download_and_prepare()
    except ImportError as error:
        raise ValueError(
            f"source={config.source!r}: preparing the set here fails ({error}); expected the "
            "packages its code needs, often only `pip install tensorflow-cpu`: reading the set "
            f"afterwards needs none of them. Then run: {make_prepare_command(config)}"
        ) from error
    # Servers, full disks and the code of a set raise anything.
    except Exception as error:
        raise ValueError(
            f"source={config.source!r}: preparing the set in data_dir={str(config.data_path)!r} "
            f"fails ({_get_first_line(error)}); mend that and run: {make_prepare_command(config)}"
        ) from error
    return builder


def make_prepare_command(config: DataConfig) -> str:
    """Return the shell command that prepares a data set.

    Args:
      config: Its settings.

    Returns:
      One line for a shell.

    Example:
      >>> make_prepare_command(DataConfig(source="tfds:lm1b", data_dir="data"))
      'python -m sparsejax.data.prepare --source=tfds:lm1b --data_dir=data'
    """
    flags = [f"--source={config.source}", f"--data_dir={config.data_path}"]
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in _PREPARED_OPTIONS:
        if getattr(config, name) != defaults[name]:
            flags.append(f"--{name}={getattr(config, name)}")
    return shlex.join(["python", "-m", "sparsejax.data.prepare", *flags])


def _check_reachable(config: DataConfig, builder: Any) -> None:
    """Fail within seconds where TFDS's own retries would take minutes."""
    for url in list(builder.url_infos or {})[:1]:
        request = urllib.request.Request(url, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=_CONNECT_SECONDS).close()
        except urllib.error.HTTPError as error:
            # An answer, even a refusal of HEAD: the network is there, the download may work.
            error.close()
        except OSError as error:
            raise ValueError(
                f"source={config.source!r}: the set is not prepared in data_dir="
                f"{str(config.data_path)!r} and cannot be downloaded ({error}); prepare it on a "
                f"machine with network access by: {make_prepare_command(config)}"
            ) from error


def _get_first_line(error: Exception) -> str:
    lines = (line for line in str(error).splitlines() if line)
    return next(lines, type(error).__name__)
