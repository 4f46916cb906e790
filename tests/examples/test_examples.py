"""The examples run, and show what they say."""

import jax
import numpy as np
import pytest

import sparsejax
from examples import masks_of_arrays, ops_in_flax, own_source, train_and_use
from sparsejax.masks import random_mask
from sparsejax.report.metrics import read_metrics
from sparsejax.strict_json import load_json

_SHORT = {
    "num_steps": 6,
    "eval_every_steps": 6,
    "num_eval_batches": 1,
    "model__model_dim": 32,
    "model__mlp_dim": 64,
    "model__block_size": 16,
    "data__sequence_length": 64,
    "data__batch_size": 2,
    "optimizer__warmup_fraction": 1 / 6,
    "recipe__spion__probe_interval_fraction": 2 / 6,
    "recipe__spion__latest_switch_fraction": 4 / 6,
    "recipe__spion__filter_size": 3,
    "checkpoint__every_steps": 6,
}


@pytest.mark.ci
def test_train_and_use(tmp_path):
    steps, losses, written = train_and_use.main(str(tmp_path / "run"), **_SHORT)
    assert steps == (1, 2, 3, 4, 5, 6) and np.isfinite(losses).all()
    assert written.startswith("import numpy as") and len(written.encode()) >= 15 + 40


@pytest.mark.ci
def test_ops_in_flax():
    losses = ops_in_flax.main(num_steps=12)
    assert np.isfinite(losses).all() and losses[-1] < 0.8 * losses[0]


def test_masks_of_arrays():
    found = masks_of_arrays.main()
    # By chance three tenths, and more with each update.
    assert 0.25 < found[0] < 0.35 and found == sorted(found) and found[-1] > 0.7


def test_a_share_in_place_of_a_count_is_told_what_to_pass():
    with pytest.raises(ValueError, match=r"number of entries: of a share, round\(share \* size\)"):
        random_mask(jax.random.key(0), (4, 4), 0.3)


@pytest.mark.ci
def test_own_source(tmp_path):
    config = train_and_use.spion_small.get_config()
    for name, value in _SHORT.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    config.data.data_dir = str(tmp_path / "data")
    sparsejax.train(config, tmp_path / "run", data=own_source.make_sums)
    recorded = load_json((tmp_path / "run" / "checkpoints" / "run.json").read_text())
    assert recorded["config"]["data"]["source"] == "own:examples.own_source:make_sums"
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) > 6
    _, _, tokenizer = sparsejax.load_model(tmp_path / "run")
    assert tokenizer.decode([49, 43, 49]) == b"1+1"
