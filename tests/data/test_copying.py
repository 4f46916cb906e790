"""Copying tasks: which block is a copy of which, what is hidden, and what draws the same."""

import functools

import numpy as np
import pytest

from sparsejax.data import Contents, DataConfig, Example, Source, describe_data, make_data
from sparsejax.data.copying import Half, draw_copies, draw_permutation

HALF = Half(num_blocks=6, block_size=3, num_symbols=7)
KINDS = ("hidden_permutation", "fixed_lag", "associative_recall")


def draw(copying, *, permutation=0, seed=0, num_examples=5):
    """Return blocks u8[N, 2, I, R] of both halves, and which positions are hidden."""
    drawn = draw_copies(
        copying, HALF, permutation=permutation, seed=seed, num_examples=num_examples
    )
    return (np.stack(x).reshape(num_examples, 2, 6, 3) for x in zip(*drawn, strict=True))


@pytest.mark.parametrize("copying", KINDS)
def test_the_second_half_copies_blocks_of_the_first(copying):
    symbols, hidden = draw(copying)
    first, second = symbols.swapaxes(0, 1)
    if copying == "associative_recall":
        # A block is found by its first symbol, which is shown and stands before one block only.
        assert all(len(set(keys)) == 6 for keys in first[..., 0].tolist())
        place = (second[:, :, None, 0] == first[:, None, :, 0]).argmax(2)
        assert len(np.unique(place, axis=0)) == 5, "each example has an order of its own"
    else:
        source = draw_permutation(6, 0) if copying == "hidden_permutation" else np.arange(6)
        place = np.broadcast_to(source, (5, 6))
    np.testing.assert_array_equal(second, np.take_along_axis(first, place[..., None], axis=1))
    assert not hidden[:, 0].any() and hidden[:, 1, :, 1:].all()
    assert (hidden[:, 1, :, 0] == (copying != "associative_recall")).all()


def test_a_permutation_leaves_no_block_where_it_is_and_differs_by_its_seed():
    drawn = [draw_permutation(6, seed) for seed in range(20)]
    for source in drawn:
        assert sorted(source) == list(range(6)) and (source != np.arange(6)).all()
    assert len({tuple(source) for source in drawn}) > 10


def test_what_is_drawn_depends_on_its_seeds():
    make = functools.partial(draw, "hidden_permutation")
    first, *others = (next(make(**seeds)) for seeds in ({}, {}, {"seed": 1}, {"permutation": 1}))
    same, other, permuted = others
    np.testing.assert_array_equal(first, same)
    assert (first != other).any() and (first[:, 1] != permuted[:, 1]).any()
    np.testing.assert_array_equal(first[:, 0], permuted[:, 0])
    # More examples begin with the same ones, whatever is drawn at once.
    more, _ = draw("associative_recall", num_examples=1500)
    again, _ = draw("associative_recall", num_examples=1024)
    np.testing.assert_array_equal(more[:1024], again)


def make_config(folder, **changes):
    settings = {"source": "copying:hidden_permutation", "data_dir": str(folder)}
    sizes = {"sequence_length": 32, "batch_size": 2, "copy_block": 4, "copy_examples": 40}
    return DataConfig(**settings | sizes | changes)


def test_batches_hide_what_has_to_be_predicted(tmp_path):
    data = make_data(make_config(tmp_path))
    assert data.spec == ("masked_language_model", 17, 0, 0)
    assert len(list(data.validation())) == 2, "a tenth of 40 examples"
    batch = next(data.train)
    weights, symbols = batch["loss_weights"], batch["targets"]
    np.testing.assert_array_equal(weights, np.broadcast_to(np.arange(32) >= 16, (2, 32)))
    np.testing.assert_array_equal(batch["inputs"], np.where(weights > 0, 16, symbols))
    source = draw_permutation(4, 0)
    blocks = symbols.reshape(2, 2, 4, 4)
    np.testing.assert_array_equal(blocks[:, 1], blocks[:, 0, source])


def test_splits_share_no_example(tmp_path):
    data = make_data(make_config(tmp_path, copy_examples=200))
    seen = {
        split: {row.tobytes() for batch in data.passes[split](None) for row in batch["targets"]}
        for split in ("train", "validation")
    }
    assert len(seen["train"]) == 200 and not seen["train"] & seen["validation"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"copy_block": 5}, "copy_block=5: expected half of sequence_length=32 to be two blocks"),
        ({"copy_block": 16}, "copy_block=16: expected half of sequence_length=32"),
        (
            {"source": "copying:associative_recall", "copy_symbols": 3},
            "copy_symbols=3: expected at least 4, so that blocks begin differently",
        ),
        ({"copy_symbols": 257}, r"copy_symbols=257: expected an integer in \[2, 256\]"),
        ({"copy_examples": 9}, r"copy_examples=9: expected an integer in \[10, "),
        ({"source": "copying:reversal"}, "expected one of .*copying:fixed_lag"),
        ({"mask_fraction": 0.1}, "mask_fraction=0.1 does not apply to source='copying:"),
    ],
)
def test_what_cannot_be_drawn_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        describe_data(make_config(tmp_path, **changes))


def _make_source(documents, num_values=8):
    contents = Contents("masked_language_model", num_values=num_values)
    return Source(contents=contents, identity={}, read=lambda split: iter([Example(documents)] * 4))


_VALUES = np.arange(8, dtype=np.uint8)


def make_short(config):
    """Make sequences that are shorter than the settings say."""
    return _make_source((_VALUES[:6], np.ones(6, np.uint8)))


def make_weighted(config):
    """Make sequences whose second documents are no flags."""
    return _make_source((_VALUES, 2 * np.ones(8, np.uint8)))


def make_unmarked(config):
    """Make sequences that say nothing of what is hidden."""
    return _make_source((_VALUES,))


def make_text(config):
    """Make texts that have parts hidden."""
    return _make_source((b"a text", b"\0\0\1\1\1\1"), num_values=None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_short, "sequence_length=8: a sequence .* has 6 positions"),
        (make_weighted, "which of them are hidden, 0 or 1, got"),
        (make_unmarked, "which of them are hidden, 0 or 1, got"),
        (make_text, "hidden, which only values can; expected num_values"),
    ],
)
def test_sources_that_do_not_say_what_is_hidden_are_refused(make, message, tmp_path):
    source = f"own:{__name__}:{make.__name__}"
    config = DataConfig(source=source, data_dir=str(tmp_path), sequence_length=8, batch_size=2)
    with pytest.raises(ValueError, match=message):
        make_data(config)
