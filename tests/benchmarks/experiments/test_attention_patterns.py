"""What is recorded of attention patterns: which blocks a run kept, and how many of the needed."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.experiments import pattern_pictures
from benchmarks.experiments.attention_patterns import (
    measure_kept,
    name_row,
    split_row,
    unpack_kept,
)
from benchmarks.experiments.copying import measure_blocks
from benchmarks.experiments.pattern_pictures import draw_kept, plot_accuracy
from sparsejax.data.copying import draw_permutation


@pytest.fixture
def finish(tmp_path, monkeypatch):
    """Return a function that makes a folder of a finished run look as if it had such masks."""

    def finish(kept_LNIJ, *, recipe="spion", source="copying:fixed_lag", lines=()):
        mask = SimpleNamespace(block_mask=np.asarray(kept_LNIJ)[:, None])
        model = SimpleNamespace(blocks=SimpleNamespace(attention=mask))
        data = SimpleNamespace(source=source, copy_permutation=1)
        config = SimpleNamespace(recipe=SimpleNamespace(name=recipe), data=data)
        monkeypatch.setattr("sparsejax.tools.load.load_model", lambda _: (model, config, None))
        monkeypatch.setattr(
            "sparsejax.checkpoint.workdir.read_run", lambda _: SimpleNamespace(config=config)
        )
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        return tmp_path

    return finish


@pytest.mark.parametrize("side", [5, 16])
def test_what_is_recorded_is_what_any_head_of_each_layer_keeps(side, finish):
    kept_LNIJ = np.random.default_rng(0).random((3, 2, side, side)) < 0.2
    values = measure_kept(finish(kept_LNIJ))
    np.testing.assert_array_equal(unpack_kept(values["kept"]), kept_LNIJ.any(1))
    assert "untrained_share" not in values


def test_the_share_of_an_untrained_pattern_is_the_mean_over_layers(finish):
    lines = [{"step": 1, "loss": 2.0}, {"phase_metrics": {"untrained_share": [0.5, 0.75]}}]
    workdir = finish(np.ones((2, 1, 4, 4), bool), recipe="sat", lines=lines)
    assert measure_kept(workdir)["untrained_share"] == 0.625


@pytest.mark.parametrize("recipe", ["dense", "dynamic_attention"])
def test_recipes_without_a_mask_have_nothing_to_record(recipe, finish):
    workdir = finish(np.ones((1, 1, 4, 4), bool), recipe=recipe)
    assert measure_kept(workdir) == measure_blocks(workdir) == {}


@pytest.mark.parametrize("source", ["copying:fixed_lag", "copying:hidden_permutation"])
def test_needed_are_the_blocks_that_the_second_half_copies(source, finish):
    source_I = np.arange(4)
    if source == "copying:hidden_permutation":
        source_I = draw_permutation(4, 1)
    kept_NIJ = np.zeros((2, 8, 8), bool)
    # Of four needed blocks one head keeps one and the other two; what is left keeps none.
    for head, i in ((0, 0), (1, 2), (1, 3)):
        kept_NIJ[head, 4 + i, source_I[i]] = True
    kept_NIJ[:, np.arange(8), np.arange(8)] = True
    assert measure_blocks(finish(kept_NIJ[None], source=source))["needed_kept"] == 0.75


def test_rows_are_split_as_they_are_named():
    for pattern in ("dense", "SPION-C, heads", "SAT"):
        assert split_row(name_row(pattern, 0.15)) == (pattern, 0.15)
    assert split_row("SAT, own switch") is None


def test_a_picture_has_a_panel_for_each_layer_of_each_pattern(finish, tmp_path, monkeypatch):
    kept = measure_kept(finish(np.eye(4, dtype=bool)[None, None].repeat(2, 0)))["kept"]
    record = {"values": {"summary": {"kept": kept, "validation_accuracy": 0.5}}}
    figures = []
    make = pattern_pictures.Figure
    monkeypatch.setattr(
        pattern_pictures, "Figure", lambda **options: figures.append(make(**options)) or figures[-1]
    )
    groups = {name_row(name, 0.15): [record] * 2 for name in ("SPION-C", "SAT")}
    draw_kept(groups | {"dense": [record]}, tmp_path / "kept.png", needed=[(1, 1), (2, 3)])
    titles = [axes.get_title() for axes in figures[0].axes if axes.images]
    assert titles == [
        f"{name}, layer {layer}\n1 of 2 needed" for name in ("SPION-C", "SAT") for layer in (0, 1)
    ]
    plot_accuracy(groups | {name_row("SAT", 0.3): [record]}, tmp_path / "plot.png", chance=0.1)
    labels = figures[1].axes[0].get_legend_handles_labels()[1]
    assert sorted(labels) == ["SAT", "SPION-C", "chance"]
