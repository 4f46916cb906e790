"""Images in patches: how they are cut, scaled, varied at random, and refused."""

import gzip
import io
import json
import struct

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from sparsejax.data import DataConfig, describe_data, make_data
from sparsejax.data.patches import (
    PatchGrid,
    cut_patches,
    find_grid,
    join_patches,
    make_augmentation,
    read_patches,
)
from sparsejax.data.prepare import main
from sparsejax.data.tfds_builders import make_prepare_command

GRID = PatchGrid(rows=2, columns=3, side=4, channels=3)
IMAGE = np.random.default_rng(0).integers(0, 256, GRID.image_shape, np.uint8)
RGB = np.random.default_rng(1).integers(0, 256, (8, 8, 8, 3), np.uint8)
SIZES = [(8, 8), (10, 6), (6, 14), (9, 12)]


def test_patches_and_their_pixels_are_in_reading_order():
    # The value of a pixel says where it is: 100 y + 10 x + channel.
    y, x, c = np.indices((4, 6, 2))
    patches = cut_patches(100 * y + 10 * x + c, 2)
    assert patches.shape == (6, 8)
    assert patches[0].tolist() == [0, 1, 10, 11, 100, 101, 110, 111]
    assert patches[1].tolist() == [20, 21, 30, 31, 120, 121, 130, 131]
    assert patches[3].tolist() == [200, 201, 210, 211, 300, 301, 310, 311]
    np.testing.assert_array_equal(join_patches(cut_patches(IMAGE, 4), GRID), IMAGE)


def test_the_middle_square_is_scaled():
    wide = np.random.default_rng(2).integers(0, 256, (8, 20, 3), np.uint8)
    whole = np.asarray(PIL.Image.fromarray(wide).resize((10, 4), PIL.Image.Resampling.BICUBIC))
    for image, scaled in (
        (wide, whole[:, 3:7]),
        (wide.swapaxes(0, 1), whole[:, 3:7].swapaxes(0, 1)),
    ):
        patches = read_patches(image, PatchGrid(2, 2, 2, 3), 4).reshape(4, -1)
        np.testing.assert_allclose(patches.astype(int), cut_patches(scaled, 2), atol=1)
    exact = read_patches(RGB[0], PatchGrid(4, 4, 2, 3), 8)
    np.testing.assert_array_equal(exact, cut_patches(RGB[0], 2).reshape(-1))
    grey = read_patches(RGB[0, :, :, :1], PatchGrid(2, 2, 2, 1), 4)
    assert grey.shape == (16,) and abs(grey.mean() - RGB[0, :, :, 0].mean()) < 15


def vary(image, seed=0, **options):
    grid = PatchGrid(image.shape[0] // 4, image.shape[1] // 4, 4, 3)
    example = {"inputs": np.zeros((grid.num_patches + 4, 48), np.uint8), "labels": 7}
    example["inputs"][: grid.num_patches] = cut_patches(image, 4)
    before = example["inputs"].copy()
    options = {"crop": False, "flip": False} | options
    result = make_augmentation(grid, **options)(example, np.random.default_rng(seed))
    np.testing.assert_array_equal(example["inputs"], before, "the cache is not written to")
    assert result["labels"] == 7 and not result["inputs"][grid.num_patches :].any()
    return join_patches(result["inputs"][: grid.num_patches], grid)


def test_half_of_the_images_are_mirrored_whole():
    results = [vary(IMAGE, seed, flip=True) for seed in range(40)]
    mirrored = [np.array_equal(result, IMAGE[:, ::-1]) for result in results]
    same = [np.array_equal(result, IMAGE) for result in results]
    assert all(a or b for a, b in zip(mirrored, same, strict=True))
    assert 10 <= sum(mirrored) <= 30


def test_crops_are_parts_of_the_image_within_the_published_bounds():
    # Red says how far down, green how far right: a crop shows its own borders.
    down, right = np.meshgrid(np.arange(64) * 4, np.arange(64) * 4, indexing="ij")
    image = np.stack([down, right, np.zeros_like(down)], -1).astype(np.uint8)
    areas, ratios = [], []
    for seed in range(200):
        red, green = vary(image, seed, crop=True).astype(float)[..., :2].transpose(2, 0, 1)
        # Two pixels of the result apart, inside, where scaling has no edge to deal with.
        height = (red[40] - red[20]).mean() / 4 / 20 * 64
        width = (green[:, 40] - green[:, 20]).mean() / 4 / 20 * 64
        areas.append(height * width / 64**2)
        ratios.append(width / height)
    assert 0.07 < min(areas) < 0.15 and 0.85 < max(areas) < 1.01
    assert 0.68 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.45
    assert 0.3 < np.mean(areas) < 0.6


def write_idx(path, array):
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture(name="idx")
def _idx(tmp_path):
    """Return grey images of 4 x 6 by split, written as IDX files with labels 0, 1, 2..."""
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (n, 4, 6), np.uint8) for name, n in SPLITS.items()}
    for name, values in images.items():
        write_idx(tmp_path / f"{name}-images.gz", values)
        write_idx(tmp_path / f"{name}-labels.gz", np.arange(len(values)))
    return images


SPLITS = {"train": 6, "t10k": 3}


def make_config(folder, **settings):
    defaults = {
        "source": f"idx:{folder}",
        "data_dir": str(folder / "data"),
        "sequence_length": 8,
        "batch_size": 3,
        "seed": 0,
        "patch_size": 2,
    }
    return DataConfig(**defaults | settings)


def test_batches_of_images_in_idx_format(idx, tmp_path):
    config = make_config(tmp_path)
    data = make_data(config)
    spec = describe_data(config)
    assert data.spec == spec
    assert spec == ("classification", 0, 6, 4)
    batches = {"train": [next(data.train), next(data.train)], "t10k": list(data.validation(None))}
    for name, split in batches.items():
        for batch in split:
            assert {key: (x.dtype.name, x.shape) for key, x in batch.items()} == {
                "inputs": ("uint8", (3, 8, 4)),
                "mask": ("bool", (3, 8)),
                "labels": ("int32", (3,)),
                "loss_weights": ("float32", (3,)),
            }
            for patches, mask, label in zip(
                batch["inputs"], batch["mask"], batch["labels"], strict=True
            ):
                # Six patches of four; two places are padding.
                np.testing.assert_array_equal(mask, np.arange(8) < 6)
                expected = cut_patches(idx[name][label][..., None], 2)
                np.testing.assert_array_equal(patches[mask], expected)
                assert not patches[~mask].any()


def test_training_images_vary_by_position_and_validation_does_not(idx, tmp_path):
    config = make_config(tmp_path, random_flip=True)
    iterator = make_data(config).train
    stream = [next(iterator) for _ in range(12)]
    state = {"next_index": 4}
    iterator.set_state(state)
    np.testing.assert_equal(next(iterator), stream[4], strict=True)
    seen = {label: set() for label in range(6)}
    for batch in stream:
        for patches, label in zip(batch["inputs"], batch["labels"], strict=True):
            image = join_patches(patches[:6], PatchGrid(2, 3, 2, 1))[..., 0]
            seen[int(label)].add(np.array_equal(image, idx["train"][label]))
    assert list(seen.values()) == [{True, False}] * 6, "both ways round in six epochs"
    plain = make_data(make_config(tmp_path))
    varied = list(make_data(config).validation(None))
    np.testing.assert_equal(list(plain.validation(None)), varied, strict=True)
    shares = [make_data(config, process_index=i, process_count=3).train for i in range(3)]
    rows = np.concatenate([next(share)["inputs"] for share in shares])
    np.testing.assert_equal(rows, stream[0]["inputs"])


with tfds.core.registered.skip_registration():

    class Pictures(tfds.core.GeneratorBasedBuilder):
        """RGB pictures with labels, all of one size or of many, by configuration."""

        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("same", "mixed")]

        def _info(self):
            shape = (8, 8, 3) if self.builder_config.name == "same" else (None, None, 3)
            features = {
                "image": tfds.features.Image(shape=shape, encoding_format="png"),
                "label": tfds.features.ClassLabel(num_classes=8),
                "caption": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager):
            return {name: self._generate_examples() for name in ("train", "validation")}

        def _generate_examples(self):
            for i, image in enumerate(RGB):
                if self.builder_config.name == "mixed":
                    image = np.resize(image, (*SIZES[i % 4], 3))
                png = io.BytesIO()
                PIL.Image.fromarray(image).save(png, format="png")
                yield i, {"image": png.getvalue(), "label": i, "caption": "none"}


@pytest.fixture(name="prepared", scope="module")
def _prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("same", "mixed"):
        Pictures(config=name, data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def make_tfds_config(folder, name, **settings):
    source = {"source": f"tfds:pictures/{name}", "data_dir": str(folder), "sequence_length": 16}
    return make_config(folder, **source | settings)


def test_pictures_keep_their_colours(prepared):
    config = make_tfds_config(prepared, "same", image_channels=3)
    data = make_data(config)
    spec = describe_data(config)
    assert data.spec == spec
    assert spec == ("classification", 0, 8, 12)
    batch = next(data.train)
    for patches, label in zip(batch["inputs"], batch["labels"], strict=True):
        np.testing.assert_array_equal(patches, cut_patches(RGB[label], 2))
    assert batch["mask"].all()


def test_pictures_of_many_sizes_are_scaled(prepared):
    data = make_data(make_tfds_config(prepared, "mixed", image_size=4, sequence_length=4))
    rows = {
        int(label): patches
        for batch in data.validation(None)
        for patches, label in zip(batch["inputs"], batch["labels"], strict=True)
    }
    assert set(rows) == set(range(8))
    for label, patches in rows.items():
        image = np.resize(RGB[label], (*SIZES[label % 4], 3))
        expected = read_patches(image, PatchGrid(2, 2, 2, 3), 4)
        np.testing.assert_array_equal(patches.reshape(-1), expected)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("mixed", {}, "image_size=0: the images of .* differ in size; expected the side"),
        (
            "same",
            {"patch_size": 3},
            "patch_size=3: the images of .* have 8 x 8 pixels; expected a divisor of both",
        ),
        (
            "same",
            {"image_channels": 1},
            "image_channels=1: the images of .* have 3 channels; expected 1",
        ),
        (
            "same",
            {"sequence_length": 15},
            "sequence_length=15: the images of .* have 16 patches; expected at least that",
        ),
        (
            "same",
            {"input_key": "caption"},
            "patch_size=2: .* has texts in 'caption'; expected images, or 0",
        ),
        (
            "same",
            {"patch_size": 0, "mask_fraction": 0.5},
            "mask_fraction=0.5: the examples of tfds:pictures/same have labels; expected 0.0",
        ),
    ],
)
def test_pictures_that_do_not_fit_are_refused(prepared, name, settings, message):
    with pytest.raises(ValueError, match=message):
        make_data(make_tfds_config(prepared, name, **settings))


def test_images_that_are_not_as_the_first_are_refused(idx, tmp_path):
    write_idx(tmp_path / "t10k-images.gz", idx["t10k"][:, :, :4])
    with pytest.raises(ValueError, match=r"has the shape \(4, 4, 1\); expected \(4, 6, 1\)"):
        make_data(make_config(tmp_path))
    with pytest.raises(ValueError, match="has the type uint16; expected uint8"):
        read_patches(IMAGE.astype(np.uint16), GRID, 0)
    with pytest.raises(ValueError, match="have 4 channels; expected 1 .* or 3"):
        find_grid(make_config(tmp_path), (8, 8, 4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": -1}, r"patch_size=-1: expected an integer in \[0, 8192\]"),
        ({"image_size": 5}, "image_size=5: expected a multiple of patch_size=2"),
        ({"image_channels": 2}, "image_channels=2: expected 1 .grey., 3 .RGB. or 0"),
        ({"truncate": True}, "truncate=True does not apply to patches; leave it at False"),
        (
            {"source": "tfds:x", "tokenizer": "bpe:300"},
            "tokenizer='bpe:300' does not apply to patches",
        ),
        ({"patch_size": 0, "random_flip": True}, "random_flip=True: expected patch_size above 0"),
        (
            {"source": "idx:x", "patch_size": 0, "image_size": 8},
            "image_size=8: expected patch_size above 0 too",
        ),
        ({"source": "listops"}, "patch_size=2 does not apply to source='listops'"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **settings)


def test_images_are_described_by_their_headers_and_labels(idx, tmp_path):
    """The pixels may be damaged: nobody looks at them."""
    for name in SPLITS:
        (tmp_path / f"{name}-images.gz").write_bytes(
            gzip.compress(bytes((0, 0, 8, 3)) + struct.pack(">3I", 9, 4, 6))
        )
    assert describe_data(make_config(tmp_path)) == ("classification", 0, 6, 4)
    with pytest.raises(ValueError, match="patch_size=4: the images of .* have 4 x 6 pixels"):
        describe_data(make_config(tmp_path, patch_size=4))
    with pytest.raises(ValueError, match="source='idx:/nowhere': no such folder"):
        describe_data(make_config(tmp_path, source="idx:/nowhere"))


def test_the_command_that_prepares_images_makes_the_cache_of_the_run(prepared, tmp_path, capsys):
    config = make_tfds_config(prepared, "mixed", image_size=6, sequence_length=9)
    command = make_prepare_command(config)
    assert command.endswith(" --patch_size=2 --image_size=6")
    main(command.split()[3:])
    caches = {path: path.stat().st_mtime_ns for path in prepared.rglob("tokens.bin")}
    assert next(make_data(config).train)["inputs"].shape == (3, 9, 12)
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("tokens.bin")} == caches
    assert json.dumps(find_grid(config, (None, None, 3))) == "[3, 3, 2, 3]"
