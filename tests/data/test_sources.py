"""The table of sources, what each file of it offers, and what batches of every task hold."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import sparsejax.data.sources
from sparsejax.batch import describe_batch, get_targets
from sparsejax.data import Contents, DataConfig, Example, describe_data, make_data
from sparsejax.data.sources import SOURCES, load_source
from sparsejax.data.token_files import write_examples
from sparsejax.data.tokenizer import value_tokenizer
from tests.data.test_files import write_idx

_TASKS = {
    "language_model": {"source": "text:{}/corpus.txt"},
    "masked_language_model": {"source": "text:{}/corpus.txt", "mask_fraction": 0.25},
    "classification": {"source": "idx:{}"},
    "patches": {"source": "idx:{}", "patch_size": 2},
    "matching": {"source": "aan:{}"},
    "translation": {"source": "pairs:{}"},
}


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory):
    """Return a folder with files for every source that reads files."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "corpus.txt").write_text("All work and no play makes Jack a dull boy.\n" * 20)
    for name, count in (("train", 5), ("t10k", 3)):
        write_idx(folder / f"{name}-images", np.arange(count * 16).reshape(count, 4, 4))
        write_idx(folder / f"{name}-labels", np.arange(count) % 2)
    for name in ("train", "eval"):
        lines = [f"{i % 2}\ta\tb\tone\ttwo\n" for i in range(5)]
        (folder / f"new_aan_pairs.{name}.tsv").write_text("".join(lines))
    for name in ("train", "validation"):
        for side in ("src", "tgt"):
            (folder / f"{name}.{side}").write_text("one\ntwo\nthree\n")
    return folder


def make_config(folder, task, **changes):
    settings = {"data_dir": str(folder / "data"), "sequence_length": 16, "batch_size": 2}
    settings |= _TASKS[task]
    settings["source"] = settings["source"].format(changes.pop("root", folder))
    return DataConfig(**settings | changes)


@pytest.mark.parametrize("task", _TASKS)
def test_batches_are_as_described(task, folder):
    config = make_config(folder, task)
    data, spec = make_data(config), describe_data(config)
    assert data.spec == spec
    assert spec.task == ("classification" if task == "patches" else task)
    expected = describe_batch(
        spec.task, batch_size=2, sequence_length=16, patch_values=spec.patch_values
    )
    for batch in (next(data.train), *data.validation(None)):
        assert {name: (x.shape, x.dtype) for name, x in batch.items()} == expected
        weights = batch["loss_weights"]
        assert get_targets(batch).shape[: weights.ndim] == weights.shape


def test_every_file_is_in_the_table():
    folder = pathlib.Path(sparsejax.data.sources.__file__).parent
    assert {path.stem for path in folder.glob("*.py")} == {"__init__", *SOURCES}


@pytest.mark.parametrize("kind", SOURCES)
def test_options_of_a_source_are_settings(kind):
    options = load_source(kind).options
    names = {field.name for field in dataclasses.fields(DataConfig)}
    assert names.issuperset(options.always) and names.issuperset(options.with_patches)
    assert not options.always.intersection(options.with_patches)
    assert not options.with_patches or "patch_size" in options.always
    tokenizer = "bytes" if "bytes" in options.tokenizers else "ids:9"
    configs = [DataConfig(source=s, tokenizer=tokenizer) for s in SOURCES[kind].spellings]
    assert {config.kind for config in configs} == {kind}


def test_settings_and_most_specs_need_no_package_of_data():
    code = """
import sys
for name in ("grain", "tensorflow_datasets", "tokenizers", "pyarrow", "PIL", "tqdm", "jax"):
    sys.modules[name] = None
import json
from sparsejax.data import DataConfig, describe_data
from sparsejax.data.sources import SOURCES
configs = [
    DataConfig(source=row.spellings[0], tokenizer="ids:9" if kind == "bin" else "bytes")
    for kind, row in SOURCES.items() if kind not in sys.argv[1:]
]
print(json.dumps({c.kind: describe_data(c) for c in configs}))
"""
    asking = ("idx", "tfds", "own", "hf", "images")
    result = subprocess.run([sys.executable, "-c", code, *asking], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    specs = {kind: tuple(spec) for kind, spec in json.loads(result.stdout).items()}
    assert specs["listops"] == ("classification", 16, 10, 0)
    assert specs.keys() == SOURCES.keys() - set(asking)


@pytest.mark.parametrize("task", _TASKS)
def test_the_home_folder_may_be_written_as_a_tilde(task, folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    plain = make_data(make_config(folder, task))
    caches = sorted(folder.rglob("manifest.json"))
    short = make_data(make_config(folder, task, root="~", data_dir="~/data"))
    assert short.fingerprint == plain.fingerprint
    assert sorted(folder.rglob("manifest.json")) == caches


def test_a_set_that_tfds_does_not_know_is_refused_in_one_line_with_the_command(tmp_path):
    config = DataConfig(source="tfds:no_such_set", data_dir=str(tmp_path))
    command = f"python -m sparsejax.data.prepare --source=tfds:no_such_set --data_dir={tmp_path}"
    with pytest.raises(ValueError, match=f"no such set is prepared .*{command}") as refused:
        describe_data(config)
    assert "\n" not in str(refused.value)
    assert describe_data(DataConfig(source="tfds:cifar10", data_dir=str(tmp_path))) == (
        "classification",
        257,
        10,
        0,
    )


@pytest.mark.parametrize("task", ["language_model", "classification"])
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array([3, -1]), r"has values from -1 to 3; expected values in \[0, 4\)"),
        (np.array([0, 4], np.uint8), r"has values from 0 to 4; expected values in \[0, 4\)"),
        (np.array([0, 2**40]), r"has values from 0 to 1099511627776; expected values in"),
        (np.array([0.5]), r"is float64\[1\]; expected whole numbers along one axis"),
        (np.array([[1]]), r"is int64\[1, 1\]; expected whole numbers along one axis"),
    ],
)
def test_values_of_a_source_are_never_cast(task, ids, message, tmp_path):
    examples = [Example((np.array([0, 3]),)), Example((ids,))]
    contents = Contents(task, num_values=4, num_classes=1)
    with pytest.raises(ValueError, match=f"example 1 {message}"):
        write_examples(tmp_path, iter(examples), value_tokenizer(4), contents)
