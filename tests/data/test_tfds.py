"""TFDS sets: features and splits found, read without their code, refused when not there."""

import io
import json
import math
import os
import shutil
import urllib.error
import urllib.request

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from sparsejax.data import DataConfig, describe_data, make_data, progress
from sparsejax.data.patches import scale_middle
from sparsejax.data.tfds_builders import make_prepare_command

TEXTS = [f"Opinion number {i}, with enough words to read." for i in range(12)]
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), np.uint8)

with tfds.core.registered.skip_registration():

    class Opinions(tfds.core.GeneratorBasedBuilder):
        """Texts with labels, and small pictures with labels, by configuration."""

        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ("text", "image")]

        def _info(self):
            label = tfds.features.ClassLabel(num_classes=3)
            if self.builder_config.name == "text":
                features = {"opinion": tfds.features.Text(), "grade": label}
            else:
                image = tfds.features.Image(shape=(4, 4, 3), encoding_format="png")
                features = {"picture": image, "grade": label, "other": label}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(0), "validation": self._generate_examples(1)}

        def _generate_examples(self, first):
            if self.builder_config.name == "text":
                for i, text in enumerate(TEXTS[first::2]):
                    yield i, {"opinion": text, "grade": i % 3}
            else:
                for i, image in enumerate(IMAGES[first::2]):
                    # TFDS itself would need TensorFlow to compress an array.
                    png = io.BytesIO()
                    PIL.Image.fromarray(image).save(png, format="png")
                    yield i, {"picture": png.getvalue(), "grade": i % 3, "other": 0}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Prepare both variants in TFDS's own format, and return a copy of the folder."""
    origin = tmp_path_factory.mktemp("origin")
    for name in ("text", "image"):
        Opinions(config=name, data_dir=origin, file_format="array_record").download_and_prepare()
    return shutil.copytree(origin, tmp_path_factory.mktemp("elsewhere") / "data")


def make_tfds(name, data_dir, **settings):
    defaults = {"sequence_length": 64, "batch_size": 3, "seed": 0}
    config = {"source": f"tfds:{name}", "data_dir": str(data_dir)} | defaults | settings
    return make_data(DataConfig(**config))


def test_labelled_text_is_read_without_the_code_that_prepared_it(prepared):
    data = make_tfds("opinions/text", prepared)
    assert data.spec[:3] == ("classification", 257, 3)
    found = {
        bytes((ids[mask] - 1).tolist()).decode(): int(label)
        for batch in data.validation(None)
        for ids, mask, label in zip(batch["inputs"], batch["mask"], batch["labels"], strict=True)
    }
    assert found == {text: i % 3 for i, text in enumerate(TEXTS[1::2])}


def test_splits_and_bpe_are_chosen_by_configuration(prepared):
    data = make_tfds(
        "opinions/text",
        prepared,
        tokenizer="bpe:270",
        train_split="train[:50%]",
        validation_split="train[50%:]",
    )
    assert data.spec.vocab_size == 271
    assert data.fingerprint["train_examples"] == data.fingerprint["validation_examples"] == 3
    assert next(data.train)["inputs"].max() > 257


def test_images_become_grey_pixels(prepared):
    data = make_tfds("opinions/image", prepared, sequence_length=16, label_key="grade")
    batch = next(data.train)
    order = np.argsort(batch["labels"])
    grey = IMAGES[::2].astype(float) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(batch["inputs"][order] - 1, grey.reshape(3, 16), atol=0.5)
    assert batch["mask"].all()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_pixels_are_those_of_the_scaled_image(prepared, size):
    settings = {"label_key": "grade", "image_size": size, "sequence_length": size**2}
    batch = next(make_tfds("opinions/image", prepared, **settings).train)
    found = batch["inputs"][np.argsort(batch["labels"])] - 1
    scaled = np.stack([scale_middle(image, size) for image in IMAGES[::2]])
    grey = scaled.astype(float) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(found, grey.reshape(3, -1), atol=0.5)


def test_scaling_is_part_of_the_cache_and_refused_for_texts(prepared):
    settings = {"label_key": "grade", "sequence_length": 16}
    whole = make_tfds("opinions/image", prepared, **settings)
    scaled = make_tfds("opinions/image", prepared, image_size=2, **settings)
    assert next(whole.train)["mask"].sum(1).tolist() == [16, 16, 16]
    assert next(scaled.train)["mask"].sum(1).tolist() == [4, 4, 4]
    with pytest.raises(ValueError, match="image_size=2 does not apply to the texts of"):
        make_tfds("opinions/text", prepared, image_size=2)


def test_prepare_command_repeats_what_decides_the_files():
    shape = {"sequence_length": 4, "batch_size": 1, "seed": 0, "truncate": True}
    options = {"label_key": "kind of", "image_size": 2}
    config = DataConfig(source="tfds:a", data_dir="b", **shape, **options)
    flags = "--source=tfds:a --data_dir=b '--label_key=kind of' --image_size=2"
    assert make_prepare_command(config).endswith(f"data.prepare {flags}")


@pytest.fixture
def online(monkeypatch):
    """Let servers answer, if only to refuse a request for the headers alone."""

    def answer(request, **_):
        raise urllib.error.HTTPError(request.full_url, 405, "no HEAD", None, io.BytesIO())

    monkeypatch.setattr(urllib.request, "urlopen", answer)


@pytest.mark.parametrize(
    ("name", "length", "task", "num_classes"),
    [
        ("imdb_reviews", 4000, "classification", 2),
        ("cifar10", 1024, "classification", 10),
        ("ag_news_subset", 1024, "classification", 4),
        ("yelp_polarity_reviews", 1024, "classification", 2),
        ("lm1b", 16, "language_model", 0),
    ],
)
def test_published_sets_are_understood(name, length, task, num_classes, tmp_path, online):
    with tfds.testing.mock_data(num_examples=20):
        data = make_tfds(name, tmp_path, download=True, sequence_length=length)
    assert (data.spec.task, data.spec.num_classes) == (task, num_classes)
    assert data.spec.vocab_size == (256 if task == "language_model" else 257)
    batch = next(data.train)
    assert batch["inputs"].shape == (3, length)
    assert len(list(data.validation(1))) == 1


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("text", {"validation_split": "dev"}, r"split='dev': .* has \['train', 'validation'\]"),
        ("text", {"input_key": "review"}, "input_key='review': .* has .*opinion: Text"),
        ("text", {"input_key": "grade"}, "input_key='grade': .* expected the name of a Text or"),
        ("text", {"label_key": "opinion"}, "label_key='opinion': .* name of a ClassLabel"),
        ("image", {}, "label_key='': .* expected the name of a ClassLabel feature"),
        (
            "image",
            {"label_key": "grade", "tokenizer": "bpe:300"},
            "tokenizer='bpe:300' does not apply to the images",
        ),
    ],
)
def test_wrong_splits_and_features_are_refused_with_what_there_is(
    prepared, name, settings, message
):
    with pytest.raises(ValueError, match=message):
        make_tfds(f"opinions/{name}", prepared, **settings)


def test_a_set_that_is_not_prepared_is_refused_with_the_command(tmp_path):
    command = "python -m sparsejax.data.prepare --source=tfds:imdb_reviews --data_dir="
    with pytest.raises(ValueError, match=f"is not prepared in data_dir=.*{command}{tmp_path}"):
        make_tfds("imdb_reviews", tmp_path)
    with pytest.raises(ValueError, match=r"source='tfds:no_such_set': no such set is prepared"):
        make_tfds("no_such_set", tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imdb_reviewz", r"did you mean imdb_reviews.*\?\); expected a name"),
        ("opinionz", r"did you mean opinions.*\?\); expected a name"),
        ("glue/colaa", r"BuilderConfig colaa not found .*; did you mean glue/cola\?\)"),
        ("imdb_reviews:9.9.9", r"cannot be loaded at version 9\.9\.9, only: 1\.0\.0"),
        ("huggingface:imdb", r"\(sets of other registries are not read\)"),
        ("../up", r"Parsing builder name string \.\./up failed"),
    ],
)
def test_a_wrong_name_is_answered_in_one_line_without_network(
    name, message, prepared, monkeypatch, capfd
):
    def refuse(*_, **__):
        raise AssertionError("asked the network")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    config = DataConfig(source=f"tfds:{name}", data_dir=str(prepared))
    with pytest.raises(ValueError, match=message) as refused:
        describe_data(config)
    assert "\n" not in str(refused.value)
    assert capfd.readouterr() == ("", "")


def test_what_the_code_of_a_set_lacks_is_told_in_one_line(tmp_path, monkeypatch, capfd):
    def fail(*_, **__):
        print("*** Failed to import TensorFlow. ***")
        raise ModuleNotFoundError("\nNo module named 'pandas'\nInstall it.")

    monkeypatch.setattr(tfds, "builder", fail)
    config = DataConfig(source="tfds:dices", data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"prepare it here \(No module named 'pandas'\); expected"):
        describe_data(config)
    assert capfd.readouterr() == ("", "")


GARBAGE = {
    "no json": b"not json",
    "null": b"null",
    "list": b"[1,2]",
    "nothing": b"{}",
    "deep": b"[" * 200_000,
    "not utf-8": b"\xff\xfe",
    "absurd": b'{"splits": [{"name": "train", "shardLengths": ["9999999999999999999999"]}]}',
}


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("case", GARBAGE)
def test_a_garbled_set_is_refused_in_one_line(file, case, prepared, tmp_path):
    copy = shutil.copytree(prepared / "opinions" / "text", tmp_path / "opinions" / "text")
    (copy / "1.0.0" / file).write_bytes(GARBAGE[case])
    message = r"source='tfds:opinions/text': the set cannot be read in data_dir="
    with pytest.raises(ValueError, match=message) as refused:
        make_tfds("opinions/text", tmp_path)
    assert "\n" not in str(refused.value)


def test_tfds_does_not_warn_of_what_concerns_no_reader(
    prepared, tmp_path, monkeypatch, caplog, capfd
):
    # Of what takes long, a line of progress tells, however slow the machine.
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", math.inf)
    data_dir = shutil.copytree(prepared, tmp_path / "data")
    next(make_tfds("opinions/image", data_dir, label_key="grade").train)
    with pytest.raises(ValueError, match="is not prepared in"):
        make_tfds("imdb_reviews", data_dir)
    settings = {"source": "listops:short", "listops_examples": 48, "sequence_length": 199}
    make_data(DataConfig(data_dir=str(data_dir), **settings))
    assert not caplog.records and capfd.readouterr() == ("", "")


def test_what_fails_while_a_set_is_prepared_is_told_in_one_line(tmp_path, online, monkeypatch):
    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(ValueError, match=r"preparing the set .* fails \(.*No space left on device"):
        make_tfds("cifar10", tmp_path, download=True)


@pytest.mark.parametrize("source", ["tfds:opinions/text", "listops:short", "pathfinder"])
def test_a_folder_that_array_record_cannot_open_is_refused(source, tmp_path):
    data_dir = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(ValueError, match=rf"udce9': expected a name in UTF-8 for '{source}'"):
        make_data(DataConfig(source=source, data_dir=data_dir))


def test_a_stream_of_texts_cannot_be_cut(tmp_path):
    config = DataConfig(source="tfds:lm1b", data_dir=str(tmp_path), truncate=True)
    with pytest.raises(ValueError, match="truncate=True does not apply to tfds:lm1b"):
        describe_data(config)


def test_a_set_that_cannot_be_reached_is_refused_without_retries(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(ValueError, match=r"imdb_reviews': .* cannot be downloaded \(.*no network"):
        make_tfds("imdb_reviews", tmp_path, download=True)


def test_truncated_files_are_refused(prepared, tmp_path):
    copy = shutil.copytree(prepared / "opinions", tmp_path / "opinions")
    file = next((copy / "text").rglob("*train.array_record*"))
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"is damaged in split 'train' .* prepare the set again"):
        make_tfds("opinions/text", tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match=r"is damaged in split 'train'"):
        make_tfds("opinions/text", tmp_path)


def test_a_format_without_random_access_is_refused(prepared, tmp_path):
    copy = shutil.copytree(prepared / "opinions", tmp_path / "opinions")
    file = copy / "text" / "1.0.0" / "dataset_info.json"
    info = json.loads(file.read_text())
    file.write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    for record in file.parent.glob("*.array_record*"):
        record.rename(record.with_name(record.name.replace("array_record", "tfrecord")))
    with pytest.raises(ValueError, match="expected array_record: prepare the set again"):
        make_tfds("opinions/text", tmp_path)


def test_a_set_that_only_tensorflow_can_prepare_is_refused(tmp_path, online, monkeypatch):
    def fail(_):
        raise ModuleNotFoundError("No module named 'tensorflow'")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(ValueError, match=r"cifar10': .*No module named 'tensorflow'.*pip install"):
        make_tfds("cifar10", tmp_path, download=True)
