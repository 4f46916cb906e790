"""Folders of image files, and images in saved sets."""

import io

import numpy as np
import PIL.Image
import pytest

from sparsejax.data import DataConfig, describe_data, make_data
from sparsejax.data.patches import cut_patches
from sparsejax.data.pictures import decode_image
from sparsejax.data.sources.images import open_images
from tests.data.row_files import write_rows

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (12, 4, 6, 3), np.uint8)


def pack(pixels, form="PNG", **options):
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def write_images(folder, images, classes=("cat", "dog")):
    """Write images to the folders of classes by turns."""
    for number, pixels in enumerate(images):
        file = folder / classes[number % len(classes)] / "sub" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(pack(pixels))
    (folder / classes[0] / "notes.txt").write_text("not an image")
    return folder


def make_config(source, data_dir, **settings):
    defaults = {"sequence_length": 6, "batch_size": 2, "patch_size": 2}
    return DataConfig(source=source, data_dir=str(data_dir), **defaults | settings)


def read_images(source, split, **settings):
    examples = open_images(make_config(source, "unused", **settings)).read(split)
    return [(document, example.label) for example in examples for document in example.documents]


def find_label(patches, images, labels):
    (found,) = [n for n, x in enumerate(images) if np.array_equal(patches, cut_patches(x, 2))]
    return labels[found]


@pytest.mark.parametrize("kind", ["images", "hf"])
def test_images_become_patches_with_the_labels_of_their_classes(kind, tmp_path):
    labels = [number % 2 for number in range(12)]
    if kind == "images":
        for split, part in (("train", RGB), ("val", RGB[:4])):
            write_images(tmp_path / "set" / split, part)
        source = f"images:{tmp_path / 'set'}"
    else:
        image = {"_type": "Image"}
        features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "img": image}
        rows = [
            {"img": {"bytes": pack(pixels), "path": None}, "label": label}
            for pixels, label in zip(RGB, labels, strict=True)
        ]
        splits = {"train": rows, "validation": rows[:4]}
        source = write_rows(tmp_path / "set", "hf", splits, **features)
    config = make_config(source, tmp_path / "data")
    data = make_data(config)
    assert data.spec == describe_data(config) == ("classification", 0, 2, 12)
    for batches, count in (([next(data.train) for _ in range(6)], 12), (data.validation(None), 4)):
        found = [
            (x.tobytes(), int(label), find_label(x, RGB, labels))
            for batch in batches
            for x, label in zip(batch["inputs"], batch["labels"], strict=True)
        ]
        assert len(set(found)) == count and all(label == expected for _, label, expected in found)
    config = make_config(source, tmp_path / "data", patch_size=0, sequence_length=24)
    data = make_data(config)
    assert data.spec == describe_data(config) == ("classification", 257, 2, 0)
    batch = next(data.train)
    grey = np.rint(RGB @ [0.299, 0.587, 0.114]).reshape(12, 24)
    assert all((row == grey).all(1).any() for row in batch["inputs"] - 1)


def test_classes_of_one_folder_are_held_out_by_name(tmp_path):
    folder = write_images(tmp_path / "set", np.repeat(RGB, 5, 0))
    parts = {
        split: read_images(f"images:{folder}", split, validation_fraction=0.3)
        for split in ("train", "validation")
    }
    assert 8 <= len(parts["validation"]) <= 28
    assert sum(map(len, parts.values())) == 60
    only = write_images(tmp_path / "other" / "train", np.repeat(RGB, 5, 0)).parent
    again = read_images(f"images:{only}", "validation", validation_fraction=0.3)
    np.testing.assert_equal(again, parts["validation"])


@pytest.fixture(name="folder")
def _folder(tmp_path):
    """Return a set of images of 4 x 6 pixels, of which all but 2.png are RGB."""
    write_images(tmp_path / "set" / "train", [*RGB[:2], RGB[2, :, :, 0], *RGB[3:]])
    write_images(tmp_path / "set" / "val", RGB[:2])
    return tmp_path / "set"


def test_channels_are_those_of_the_first_image_or_as_asked(folder):
    source = f"images:{folder}"
    with pytest.raises(
        ValueError, match=r"2\.png has 1 channels where the first image has 3; expec"
    ):
        read_images(source, "train")
    found = [x for x, _ in read_images(source, "train", image_channels=3)]
    grey = cut_patches(np.repeat(RGB[2, :, :, :1], 3, -1), 2).reshape(-1)
    assert sum(np.array_equal(x, grey) for x in found) == 1 and {x.size for x in found} == {72}
    assert {x.size for x, _ in read_images(source, "train", image_channels=1)} == {24}
    scaled = read_images(source, "train", image_channels=3, image_size=2)
    assert {x.size for x, _ in scaled} == {12}


@pytest.mark.parametrize("name", ["0.png", "4.png"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image at all", "is no image; expected one that Pillow reads"),
        (pack(RGB[0])[:-30], r"is a damaged image \(.*\); expected a whole one"),
        (b"", "has no image; expected the contents of an image file"),
    ],
)
def test_damaged_images_are_refused_by_name(name, content, message, folder):
    (folder / "train" / "cat" / "sub" / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"/{name} {message}") as refused:
        read_images(f"images:{folder}", "train", image_channels=3)
    assert "\n" not in str(refused.value)


def test_images_that_do_not_fit_are_refused(folder, tmp_path):
    source = f"images:{folder}"
    file = folder / "train" / "cat" / "sub" / "4.png"
    file.write_bytes(pack(RGB[0, :2]))
    with pytest.raises(
        ValueError, match=r"4\.png is 2 x 6 pixels where the first image is 4 x 6; ex"
    ):
        read_images(source, "train", image_channels=3)
    with pytest.raises(
        ValueError, match=r"patch_size=4: the images of .* have 4 x 6 pixels; expect"
    ):
        describe_data(make_config(source, tmp_path, patch_size=4))
    (folder / "train" / "cat" / "sub").rename(tmp_path / "sub")
    with pytest.raises(ValueError, match="train/cat holds no image; expected files that end with"):
        describe_data(make_config(source, tmp_path))


def test_folders_that_are_no_classes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="set': no such folder"):
        read_images(f"images:{tmp_path / 'set'}", "train")
    (tmp_path / "set").mkdir()
    with pytest.raises(ValueError, match="set holds no folders; expected one for each class"):
        read_images(f"images:{tmp_path / 'set'}", "train")
    write_images(tmp_path / "set" / "train", RGB)
    write_images(tmp_path / "set" / "val", RGB, ("cat", "eel"))
    with pytest.raises(
        ValueError, match="val/eel is of a class that the train split lacks; expecte"
    ):
        read_images(f"images:{tmp_path / 'set'}", "train")
    write_images(tmp_path / "one", RGB[:1], ("cat",))
    with pytest.raises(
        ValueError, match="split has no image, with validation_fraction=0.05 held out"
    ):
        read_images(f"images:{tmp_path / 'one'}", "train")


@pytest.mark.parametrize(
    ("form", "mode", "options", "channels"),
    [("JPEG", "CMYK", {}, 3), ("PNG", "1", {}, 1), ("GIF", "P", {}, 3), ("JPEG", "L", {}, 1)],
)
def test_pictures_of_every_common_mode_are_decoded(form, mode, options, channels):
    file = io.BytesIO()
    PIL.Image.new("RGB", (6, 4), (200, 200, 200)).convert(mode).save(file, form, **options)
    pixels = decode_image(file.getvalue())
    assert pixels.shape == (4, 6, channels) and pixels.dtype == np.uint8 and pixels.mean() > 150


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16", "F"])
def test_what_would_lose_bits_or_transparency_is_refused(mode):
    file = io.BytesIO()
    PIL.Image.new(mode, (6, 4)).save(file, "TIFF")
    with pytest.raises(
        ValueError, match=f"is an image of mode '{mode}'.*; expected 8 bits of grey"
    ):
        decode_image(file.getvalue())
