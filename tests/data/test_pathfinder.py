"""Pathfinder: tracing solves every picture, nothing simpler does, and each is the same for ever."""

import hashlib
import random

import numpy as np
import pytest

from sparsejax.data import DataConfig, describe_data, make_data
from sparsejax.data.pathfinder_pictures import draw_pathfinder

NUM_PICTURES = 1_600


@pytest.fixture(scope="module")
def examples():
    rng = random.Random(0)
    return [draw_pathfinder(rng) for _ in range(NUM_PICTURES)]


def find_circles(pixels):
    """Return the centres of the squares of nine lit pixels."""
    windows = np.lib.stride_tricks.sliding_window_view(pixels > 0, (3, 3))
    return [(row + 1, column + 1) for row, column in np.argwhere(windows.all((2, 3)))]


def trace_paths(pixels):
    """Return the sets of lit pixels that steps of at most two pixels connect."""
    left = {(row, column) for row, column in np.argwhere(pixels)}
    paths = []
    while left:
        path, open_cells = set(), [left.pop()]
        while open_cells:
            row, column = open_cells.pop()
            path.add((row, column))
            around = {(row + i, column + j) for i in range(-2, 3) for j in range(-2, 3)} & left
            left -= around
            open_cells += around
        paths.append(path)
    return paths


@pytest.mark.ci
def test_following_dashes_from_one_circle_tells_the_label(examples):
    for pixels, label in examples[:500]:
        first, second = find_circles(pixels)
        (path,) = [path for path in trace_paths(pixels) if first in path]
        assert (second in path) == label


@pytest.mark.ci
def test_a_picture_has_two_long_paths_three_short_ones_and_circles_at_ends(examples):
    for pixels, label in examples[:500]:
        assert set(np.unique(pixels)) == {0, 255}
        # 14 dashes of 2 pixels, or 4; a circle adds 7 pixels to the 2 of the dash in it.
        sizes = sorted(len(path) for path in trace_paths(pixels))
        assert sizes == [8, 8, 8, *([28, 42] if label else [35, 35])]


@pytest.mark.ci
def test_a_long_path_comes_nowhere_near_itself(examples):
    # Erasing nine pixels cuts a path in two, unless they lie at an end: a loop would hold together.
    pictures = [pixels for pixels, label in examples[:60] if not label]
    for path in (path for pixels in pictures for path in trace_paths(pixels) if len(path) == 35):
        uncut = 0
        for row, column in path:
            around = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)}
            rest = np.zeros((32, 32))
            rest[tuple(np.transpose(sorted(path - around)))] = 255
            uncut += len(trace_paths(rest)) == 1
        assert uncut <= 10


def measure(pixels):
    """Return statistics of a picture that need no tracing."""
    lit = np.argwhere(pixels) - 15.5
    ends = np.array(find_circles(pixels)) - 15.5
    middle = ends.mean(0)
    distance = np.linalg.norm(ends[1] - ends[0])
    along = np.clip((lit - ends[0]) @ (ends[1] - ends[0]) / distance**2, 0, 1)[:, None]
    off_line = np.linalg.norm(lit - ends[0] - along * (ends[1] - ends[0]), axis=1)
    return {
        "lit pixels": len(lit),
        "distance of the circles": distance,
        "middle of the circles": np.linalg.norm(middle),
        "circles from the centre": np.linalg.norm(ends, axis=1).sum(),
        "spread": lit.std(),
        "lit between the circles": (off_line < 2).sum(),
        "lit around the middle": (np.linalg.norm(lit - middle, axis=1) < 5).sum(),
    }


def fit_and_score(features, labels):
    """Return the accuracy of logistic regression, fitted on one half, on the other half."""
    features = (features - features.mean(0)) / (features.std(0) + 1e-6)
    features = np.hstack([np.ones((len(features), 1)), features])
    train, test = slice(0, len(labels) // 2), slice(len(labels) // 2, None)
    weights = np.zeros(features.shape[1])
    for _ in range(20):
        chances = 1 / (1 + np.exp(-features[train] @ weights))
        curvature = (features[train].T * (chances * (1 - chances))) @ features[train]
        slope = features[train].T @ (labels[train] - chances)
        weights += np.linalg.solve(curvature + np.eye(len(weights)), slope)
    return np.mean((features[test] @ weights > 0) == labels[test])


@pytest.mark.ci
def test_no_simple_statistic_tells_the_label(examples):
    labels = np.array([label for _, label in examples])
    assert labels.mean() == pytest.approx(0.5, abs=0.05)
    measured = [measure(pixels) for pixels, _ in examples]
    features = np.array([list(statistics.values()) for statistics in measured])
    # A label may hide in the deviation from a typical value as well.
    squares = (features - features.mean(0)) ** 2
    for index, name in enumerate(measured[0]):
        pair = np.stack([features[:, index], squares[:, index]], 1)
        assert fit_and_score(pair, labels) < 0.6, name
    assert fit_and_score(np.hstack([features, squares]), labels) < 0.6


@pytest.mark.ci
def test_circles_are_as_far_apart_under_either_label(examples):
    distances = [[], []]
    for pixels, label in examples:
        distances[label].append(np.linalg.norm(np.subtract(*find_circles(pixels))))
    shares = [np.mean(np.array(found)[:, None] <= np.arange(46), axis=0) for found in distances]
    # 0.08 where pairs of ends are circled as they come.
    assert np.abs(shares[0] - shares[1]).max() < 0.06


def test_pictures_of_a_version_never_change():
    pixels, labels = zip(*(draw_pathfinder(random.Random(str(i))) for i in range(20)), strict=True)
    digest = hashlib.sha256(np.array(pixels).tobytes() + bytes(labels)).hexdigest()
    assert digest[:16] == "69b9926f180828dc", "a new Pathfinder.VERSION is due"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_dashes": 1}, "num_dashes=1: expected at least 2"),
        ({"num_distractors": -1}, "num_distractors=-1: expected at least 0"),
        ({"size": 12}, "size=12: 2 paths of 14 dashes .* found no room in 1000 attempts"),
    ],
)
def test_what_cannot_be_drawn_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        draw_pathfinder(random.Random(0), **settings)


def make_config(data_dir, **settings):
    defaults = {"sequence_length": 1024, "batch_size": 16, "seed": 0, "pathfinder_examples": 80}
    return DataConfig(source="pathfinder", data_dir=str(data_dir), **defaults | settings)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("pathfinder")
    make_data(make_config(path))
    return path


def collect(data, split):
    """Return every example of a split as (pixels, label)."""
    batches = [next(data.train) for _ in range(5)] if split == "train" else data.validation(None)
    return {
        ((inputs - 1).astype(np.uint8).tobytes(), int(label))
        for batch in batches
        for inputs, label in zip(batch["inputs"], batch["labels"], strict=True)
    }


def draw_split(split, size):
    drawn = (draw_pathfinder(random.Random(f"1.0.0 {split} {i}")) for i in range(size))
    return {(pixels.tobytes(), label) for pixels, label in drawn}


def test_batches_are_rows_of_pixels(data_dir):
    data = make_data(make_config(data_dir))
    batch = next(data.train)
    assert batch["inputs"].shape == (16, 1024) and batch["mask"].all()
    assert set(np.unique(batch["inputs"])) == {1, 256}
    spec = describe_data(make_config(data_dir))
    expected = ("classification", 257, 2)
    assert data.spec[:3] == spec[:3] == expected


def test_each_picture_follows_from_its_split_and_index_alone(data_dir):
    data = make_data(make_config(data_dir))
    assert collect(data, "train") == draw_split("train", 80)
    assert collect(data, "validation") == draw_split("validation", 10)
    test = make_data(make_config(data_dir, validation_split="test"))
    assert collect(test, "validation") == draw_split("test", 10)


def test_files_are_readable_by_tfds_alone(data_dir):
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():
        folder = data_dir / "pathfinder" / "full_80" / "1.0.0"
        records = tfds.builder_from_directory(folder).as_data_source("validation")
    assert records[0]["image"].shape == (32, 32)
    assert {(x["image"].tobytes(), x["label"]) for x in records} == draw_split("validation", 10)


def test_an_unknown_split_is_refused(data_dir):
    with pytest.raises(ValueError, match="validation_split='dev': expected 'validation' or 'test'"):
        make_data(make_config(data_dir, validation_split="dev"))
