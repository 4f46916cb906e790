"""ListOps: the published grammar, right values, and TFDS files that survive damage."""

import os
import random
import shutil

import numpy as np
import pytest

from sparsejax.data import DataConfig, describe_data, make_data
from sparsejax.data.generated import ListOps, ListOpsConfig
from sparsejax.data.listops_grammar import SYMBOLS, sample_expression


def parse(words):
    """Consume a list of words; return a digit or [operator, argument, ...]."""
    word = words.pop(0)
    if not word.startswith("["):
        return int(word)
    node = [word]
    while words[0] != "]":
        node.append(parse(words))
    words.pop(0)
    return node


def evaluate(node):
    if isinstance(node, int):
        return node
    values = np.array([evaluate(argument) for argument in node[1:]])
    return {
        "[MIN": values.min,
        "[MAX": values.max,
        "[MED": lambda: int(np.median(values)),
        "[SM": lambda: values.sum() % 10,
    }[node[0]]()


def walk(node, depth=1):
    yield node, depth
    if isinstance(node, list):
        for argument in node[1:]:
            yield from walk(argument, depth + 1)


def to_tree(ids):
    words = [SYMBOLS[i] for i in ids]
    tree = parse(words)
    assert not words
    return tree


def make_config(data_dir, **settings):
    defaults = {"source": "listops:short", "sequence_length": 199, "batch_size": 16, "seed": 0}
    config = {"data_dir": str(data_dir), "listops_examples": 480} | defaults | settings
    return DataConfig(**config)


def make_listops(data_dir, **settings):
    return make_data(make_config(data_dir, **settings))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("listops")
    make_listops(path)
    return path


def collect(data, split):
    """Return every example of a split as (ids, label)."""
    if split == "train":
        batches = [next(data.train) for _ in range(30)]
    else:
        batches = list(data.validation(None))
    return [
        (tuple(inputs[mask] - 1), int(label))
        for batch in batches
        for inputs, mask, label, weight in zip(
            *(batch[name] for name in ("inputs", "mask", "labels", "loss_weights")), strict=True
        )
        if weight
    ]


def test_values_agree_with_an_independent_evaluator(data_dir):
    examples = collect(make_listops(data_dir), "train")
    assert len(set(examples)) == 480
    assert all(evaluate(to_tree(ids)) == label for ids, label in examples)
    assert {label for _, label in examples} == set(range(10))


@pytest.mark.ci
def test_lengths_lie_strictly_between_the_bounds(data_dir, tmp_path):
    lengths = [len(ids) for ids, _ in collect(make_listops(data_dir), "train")]
    assert min(lengths) > 20 and max(lengths) < 200 and max(lengths) > 150
    full = make_listops(tmp_path, source="listops", sequence_length=1999, listops_examples=48)
    lengths = [len(ids) for ids, _ in collect(full, "train")]
    assert min(lengths) > 500 and max(lengths) < 2000 and max(lengths) > 1000


@pytest.mark.ci
def test_grammar_has_the_published_probabilities():
    rng = random.Random(1)
    samples = [sample_expression(rng, 10**6) for _ in range(3000)]
    nodes = [item for ids, _ in samples for item in walk(to_tree(ids))]
    assert all(isinstance(node, int) for node, depth in nodes if depth == 10)
    assert max(depth for _, depth in nodes) == 10
    shallow = [node for node, depth in nodes if depth < 10]
    operators = [node for node in shallow if isinstance(node, list)]
    assert len(operators) / len(shallow) == pytest.approx(0.25, abs=0.01)
    digits = [node for node, _ in nodes if isinstance(node, int)]
    for values, expected in [
        (digits, range(10)),
        ([len(node) - 1 for node in operators], range(2, 11)),
        ([node[0] for node in operators], SYMBOLS[10:14]),
    ]:
        found, counts = np.unique(values, return_counts=True)
        assert set(found.tolist()) == set(expected)
        np.testing.assert_allclose(counts / len(values), 1 / len(expected), rtol=0.1)


def test_an_expression_is_given_up_at_the_bound_and_only_there():
    kept = 0
    for seed in range(400):
        ids, value = sample_expression(random.Random(seed), 10**6)
        for bound in (len(ids), len(ids) + 1):
            expected = (ids, value) if len(ids) < bound else None
            assert sample_expression(random.Random(seed), bound) == expected
        kept += len(ids) > 1
    assert kept > 50


def test_splits_are_disjoint_and_of_the_published_proportions(data_dir):
    train = set(collect(make_listops(data_dir), "train"))
    validation = set(collect(make_listops(data_dir), "validation"))
    test = set(collect(make_listops(data_dir, validation_split="test"), "validation"))
    assert (len(train), len(validation), len(test)) == (480, 10, 10)
    assert len(train | validation | test) == 500


def test_no_expression_occurs_twice_even_where_there_are_few(tmp_path):
    variant = ListOpsConfig(name="tiny", min_length=3, max_length=6, train_examples=480)
    builder = ListOps(config=variant, data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    records = [
        record["tokens"].tobytes()
        for split in ("train", "validation", "test")
        for record in builder.as_data_source(split)
    ]
    assert len(records) == len(set(records)) == 500
    assert {len(tokens) for tokens in records} == {4, 5}


def test_classification_batches_pad_with_zero_and_mask_it(data_dir):
    data = make_listops(data_dir)
    batch = next(data.train)
    assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
        "inputs": ("int32", (16, 199)),
        "mask": ("bool", (16, 199)),
        "labels": ("int32", (16,)),
        "loss_weights": ("float32", (16,)),
    }
    np.testing.assert_array_equal(batch["inputs"] > 0, batch["mask"])
    lengths = batch["mask"].sum(1)
    np.testing.assert_array_equal(batch["mask"], np.arange(199) < lengths[:, None])
    spec = describe_data(make_config(data_dir))
    assert data.spec[:3] == spec[:3] == ("classification", 16, 10)
    assert batch["inputs"].max() == 15


def test_generation_is_reproducible_and_readable_by_tfds_alone(data_dir, tmp_path):
    import tensorflow_datasets as tfds

    assert make_listops(tmp_path).fingerprint == make_listops(data_dir).fingerprint
    with tfds.core.registered.skip_registration():
        folder = tmp_path / "list_ops" / "short_480" / "1.0.0"
        records = tfds.builder_from_directory(folder).as_data_source("train")
    assert len(records) == 480
    assert evaluate(to_tree(records[7]["tokens"])) == records[7]["label"]


@pytest.mark.ci
def test_damaged_tfds_files_are_generated_again(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "tokens")
    (file,) = (tmp_path / "copy").rglob("*train.array_record*")
    os.truncate(file, file.stat().st_size // 2)
    again = make_listops(tmp_path / "copy")
    assert again.fingerprint == make_listops(data_dir).fingerprint


def test_longer_examples_are_refused_unless_truncation_is_asked_for(data_dir):
    message = r"sequence_length=64: \d+ of 480 documents of the train split are longer, the longest"
    with pytest.raises(ValueError, match=message):
        make_listops(data_dir, sequence_length=64)
    whole = dict.fromkeys(ids[:64] for ids, _ in collect(make_listops(data_dir), "train"))
    cut = make_listops(data_dir, sequence_length=64, truncate=True)
    assert {ids for ids, _ in collect(cut, "train")} == set(whole)


def test_an_unknown_split_is_refused(data_dir):
    with pytest.raises(ValueError, match="validation_split='dev': expected 'validation' or 'test'"):
        make_listops(data_dir, validation_split="dev")
