"""Every run of every experiment can begin: configs exist, and settings are of what they name."""

import importlib

import numpy as np
import pytest

from benchmarks.experiments.catalogue import EXPERIMENTS
from benchmarks.experiments.mst_budgets import RATES
from benchmarks.experiments.running import choose_candidates
from benchmarks.harness import RESULTS
from benchmarks.records import Results
from sparsejax.config.parse import parse_config
from sparsejax.config.schema import make_recipe, make_transformer_config
from sparsejax.data import describe_data
from tests.data.test_files import write_idx


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Return a folder of images as large as those of MNIST, for machines that lack them."""
    folder = tmp_path_factory.mktemp("images")
    for split in ("train", "t10k"):
        write_idx(folder / f"{split}-images", np.zeros((10, 28, 28)))
        write_idx(folder / f"{split}-labels", np.arange(10))
    return folder


def check_setting(config: str, overrides, images):
    """Parse settings and build their recipe, as a run does before it trains."""
    path, _, argument = config.partition(":")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    settings = module.get_config(*([argument] if argument else []))
    with settings.ignore_type():
        settings.update_from_flattened_dict(dict(overrides))
    if settings.data.source.startswith("idx:"):
        settings.data.source = f"idx:{images}"
    parsed = parse_config(settings.to_dict())
    model = make_transformer_config(parsed, **describe_data(parsed.data)._asdict())
    make_recipe(parsed, model)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_setting_builds_its_recipe(name, images):
    experiment = EXPERIMENTS[name]
    settings = dict(experiment.settings)
    tuning = experiment.tuning
    by_name = {} if tuning is None else tuning.candidates
    for setting in settings.values():
        for candidate in by_name.get(setting.tuned or "", [{}]):
            check_setting(setting.config, {**setting.overrides, **candidate}, images)


def test_rates_that_are_not_searched_anew_are_those_that_were_found():
    best = choose_candidates(EXPERIMENTS["mst_small"], Results(RESULTS / "mst_small.json"))
    assert {row: best[row]["optimizer.learning_rate"] for row in RATES} == RATES
