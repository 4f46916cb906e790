"""The tasks of SAT have the published settings, and their TFDS sets become batches."""

import io
import urllib.error
import urllib.request

import pytest
import tensorflow_datasets as tfds

from configs import sat
from sparsejax.config.parse import parse_config
from sparsejax.data import make_data
from sparsejax.masks import count_kept_blocks
from sparsejax.shares import count_share

# Layers, positions, block, batch, rate, warm-up, steps, steps between validations, kept blocks.
PUBLISHED = {
    "image": (2, 1024, 32, 512, 2e-3, 175, 10_000, 500, 51),
    "nature": (2, 1024, 32, 512, 3e-3, 800, 10_000, 500, 40),
    "news": (4, 1024, 32, 512, 9e-4, 80, 30_000, 200, 81),
    "yelp": (4, 1024, 32, 512, 7e-4, 80, 30_000, 200, 51),
    "listops": (4, 2048, 64, 128, 8e-4, 1_000, 30_000, 500, 40),
    "retrieval": (2, 4096, 64, 32, 5e-4, 800, 40_000, 200, 86),
}
NUM_CLASSES = {"image": 10, "nature": 14, "news": 4, "yelp": 2}


def _parse(task, **data):
    config = sat.get_config(task)
    config.data.update(data)
    return parse_config(config.to_dict())


@pytest.mark.parametrize("task", PUBLISHED)
def test_a_task_has_the_published_settings(task):
    config = _parse(task)
    assert config.recipe.name == "sat"
    num_blocks = config.data.sequence_length // config.model.block_size
    density = config.recipe.settings["density"]
    assert (
        config.model.num_layers,
        config.data.sequence_length,
        config.model.block_size,
        config.data.batch_size,
        config.optimizer.learning_rate,
        count_share(config.optimizer.warmup_fraction, config.num_steps),
        config.num_steps,
        config.eval_every_steps,
        count_kept_blocks(num_blocks, density=density),
    ) == PUBLISHED[task]
    model, optimizer = config.model, config.optimizer
    assert (model.model_dim, model.num_heads, model.mlp_dim) == (64, 2, 128)
    assert (model.dropout_rate, model.positions, model.dtype) == (0.1, "learned", "bfloat16")
    assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.999, 1e-6)
    assert (optimizer.weight_decay, optimizer.clip_norm, optimizer.clip_value) == (0.0, None, 1.0)


@pytest.mark.parametrize(
    "task",
    ["yelp", *(pytest.param(t, marks=pytest.mark.ci) for t in NUM_CLASSES if t != "yelp")],
)
def test_a_published_set_becomes_batches(task, tmp_path, monkeypatch):
    def answer(request, **_):
        raise urllib.error.HTTPError(request.full_url, 405, "no HEAD", None, io.BytesIO())

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    config = _parse(task, data_dir=str(tmp_path), download=True, batch_size=8)
    with tfds.testing.mock_data(num_examples=20):
        data = make_data(config.data)
    batch = next(data.train)
    assert batch["inputs"].shape == (8, 1024)
    assert batch["mask"].any(1).all()
    assert (data.spec.num_classes, data.spec.vocab_size) == (NUM_CLASSES[task], 257)
    assert batch["labels"].max() < NUM_CLASSES[task]
    assert len(list(data.validation(1))) == 1


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="sat.py:text: expected one of image, nature, news"):
        sat.get_config("text")
