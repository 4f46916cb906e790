"""Masked language modelling: which tokens are hidden, how, and that it can be repeated."""

import json

import numpy as np
import pytest

from sparsejax.data import DataConfig, describe_data, make_data
from sparsejax.data.masking import make_masking

LENGTH, FRACTION = 40, 0.15
COUNT = 6
MASK = 256  # the next id after the bytes


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory):
    """Return a folder with a corpus of 23 training windows, no two alike."""
    folder = tmp_path_factory.mktemp("masking")
    numbers = np.random.default_rng(0).integers(33, 127, 34 * LENGTH, np.uint8)
    (folder / "corpus.txt").write_bytes(numbers.tobytes())
    return folder


def make_config(folder, **settings):
    defaults = {
        "source": f"text:{folder / 'corpus.txt'}",
        "data_dir": str(folder / "data"),
        "sequence_length": LENGTH,
        "batch_size": 4,
        "seed": 3,
        "validation_fraction": 0.3,
        "mask_fraction": FRACTION,
    }
    return DataConfig(**defaults | settings)


def make_masked(folder, process_index=0, process_count=1, **settings):
    config = make_config(folder, **settings)
    return make_data(config, process_index=process_index, process_count=process_count)


def take(iterator, num_batches):
    """Return the examples of some batches, each as its three rows."""
    batches = [next(iterator) for _ in range(num_batches)]
    rows = zip(
        *(
            np.concatenate([b[name] for b in batches])
            for name in ("inputs", "targets", "loss_weights")
        ),
        strict=True,
    )
    return [(i.tolist(), t.tolist(), w.tolist()) for i, t, w in rows]


def test_batches_have_the_documented_arrays(folder):
    data = make_masked(folder)
    for batch in (next(data.train), next(data.validation(1))):
        assert {name: (array.dtype.name, array.shape) for name, array in batch.items()} == {
            "inputs": ("int32", (4, LENGTH)),
            "targets": ("int32", (4, LENGTH)),
            "loss_weights": ("float32", (4, LENGTH)),
        }
    spec = describe_data(make_config(folder))
    assert data.spec == spec
    assert spec == ("masked_language_model", MASK + 1, 0, 0)


def test_targets_are_the_corpus_and_inputs_differ_at_chosen_tokens_only(folder):
    text = (folder / "corpus.txt").read_bytes()
    windows = {text[i : i + LENGTH] for i in range(0, 23 * LENGTH, LENGTH)}
    examples = take(make_masked(folder).train, 6)
    assert {bytes(targets) for _, targets, _ in examples[:23]} == windows
    for inputs, targets, weights in examples:
        assert sum(weights) == COUNT and set(weights) == {0.0, 1.0}
        assert all(i == t for i, t, w in zip(inputs, targets, weights, strict=True) if not w)
        assert MASK not in targets


def test_chosen_tokens_are_masked_replaced_or_kept_8_to_1_to_1():
    size, vocab_size = 200_000, 1000
    hide = make_masking(sequence_length=size, mask_fraction=0.15, vocab_size=vocab_size)
    rng = np.random.default_rng(0)
    targets = rng.integers(0, vocab_size, size, np.int32)
    before = targets.copy()
    example = hide({"targets": targets, "loss_weights": np.float32(1)}, rng)
    np.testing.assert_array_equal(targets, before, "the corpus itself is not written to")
    chosen = example["loss_weights"] > 0
    assert chosen.sum() == 30_000
    inputs, told = example["inputs"][chosen], targets[chosen]
    shares = [(inputs == vocab_size).mean(), (inputs == told).mean()]
    # A random token is the right one once in a thousand times.
    np.testing.assert_allclose(shares, [0.8, 0.1001], atol=0.006)
    others = inputs[(inputs != vocab_size) & (inputs != told)]
    assert others.min() < 10 and 990 <= others.max() < vocab_size
    assert abs(others.mean() - 499.5) < 20, "random tokens are drawn from all alike"
    # Positions are chosen alike: the first tenth has a tenth of them.
    assert abs(chosen[: size // 10].sum() - 3000) < 200


def test_every_position_is_asked_for_in_time(folder):
    examples = take(make_masked(folder).train, 60)
    counts = np.sum([weights for _, _, weights in examples], axis=0)
    assert counts.min() > 10 and counts.max() < 80  # 240 examples, 36 expected


@pytest.mark.parametrize("threads", [pytest.param(0, marks=pytest.mark.ci), 1])
@pytest.mark.parametrize("num_batches", [pytest.param(1, marks=pytest.mark.ci), 17])
def test_a_restored_state_continues_with_the_same_masks(folder, threads, num_batches):
    train = make_masked(folder, num_reading_threads=threads).train
    take(train, num_batches)
    state = json.loads(json.dumps(train.get_state()))
    assert state == {"next_index": num_batches}
    expected = take(train, 8)
    restored = make_masked(folder, num_reading_threads=threads).train
    take(restored, 2)
    restored.set_state(state)
    assert take(restored, 8) == expected


@pytest.mark.parametrize("process_count", [2, pytest.param(4, marks=pytest.mark.ci)])
def test_processes_together_have_the_masks_of_one(folder, process_count):
    shares = [
        take(make_masked(folder, index, process_count).train, 15) for index in range(process_count)
    ]
    whole = take(make_masked(folder).train, 15)
    per_process = 4 // process_count
    for step in range(15):
        batch = whole[4 * step : 4 * step + 4]
        parts = [share[per_process * step : per_process * (step + 1)] for share in shares]
        assert [example for part in parts for example in part] == batch


def test_masks_are_fresh_in_every_epoch_and_for_every_seed(folder):
    def masks_by_text(seed):
        found = {}
        # 6 batches are 24 examples, one more than an epoch.
        for _, targets, weights in take(make_masked(folder, seed=seed).train, 18):
            found.setdefault(bytes(targets), []).append(tuple(weights))
        return found

    first = masks_by_text(3)
    assert all(len(masks) >= 3 for masks in first.values())
    assert all(len(set(masks)) == len(masks) for masks in first.values())
    # What stands at a position of the stream follows the seed too: masks are compared by position.
    streams = [take(make_masked(folder, seed=seed).train, 5) for seed in (3, 4)]
    assert all(a[2] != b[2] for a, b in zip(*streams, strict=True))


def test_validation_is_the_same_at_every_pass_and_for_every_seed(folder):
    data = make_masked(folder)
    passes = [list(data.validation(None)) for _ in range(2)]
    passes.append(list(make_masked(folder, seed=4).validation(None)))
    for other in passes[1:]:
        np.testing.assert_equal(other, passes[0], strict=True)
    shares = [list(make_masked(folder, i, 2).validation(None)) for i in range(2)]
    for whole, *parts in zip(passes[0], *shares, strict=True):
        rows = np.concatenate([part["inputs"] for part in parts])
        assert sorted(rows.tolist()) == sorted(whole["inputs"].tolist())


def test_what_fills_up_the_last_batch_of_validation_counts_for_nothing(folder):
    *_, last = make_masked(folder, batch_size=7).validation(None)
    sums = last["loss_weights"].sum(1).tolist()
    assert sums == sorted(sums, reverse=True) and set(sums) == {float(COUNT), 0.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_fraction": 1.0}, r"mask_fraction=1.0: expected a number in \[0, 1\)"),
        ({"mask_fraction": -0.1}, r"mask_fraction=-0.1: expected a number in \[0, 1\)"),
        (
            {"mask_fraction": 0.15, "sequence_length": 3},
            "mask_fraction=0.15: not one of sequence_length=3 tokens would be hidden; .* more",
        ),
        ({"source": "listops"}, "mask_fraction=0.15 does not apply to source='listops'"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **{"validation_fraction": 0.05} | settings)


def test_a_labelled_set_is_not_masked(tmp_path):
    config = make_config(tmp_path, source="tfds:lm1b", validation_fraction=0.05)
    assert describe_data(config) == ("masked_language_model", MASK + 1, 0, 0)
    config = make_config(tmp_path, source="tfds:imdb_reviews", validation_fraction=0.05)
    with pytest.raises(ValueError, match="mask_fraction=0.15: the examples of tfds:imdb_reviews"):
        describe_data(config)
