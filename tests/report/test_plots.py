"""Pictures show what they are given, with legible text."""

import functools
import itertools
import math

import matplotlib.image
import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from sparsejax.report.live import TrainingPicture
from sparsejax.report.plots.attention import plot_attention_patterns
from sparsejax.report.plots.heads import plot_head_patterns
from sparsejax.report.plots.style import list_phases, smooth_values
from sparsejax.report.plots.topology import plot_topology
from sparsejax.report.plots.training import plot_training
from sparsejax.strict_json import dump_json

BLUE, GREY = "#0072B2", "#C4C4C4"


@pytest.fixture
def figures(monkeypatch):
    """Collect the figures that are saved."""
    saved, savefig = [], Figure.savefig

    def save(figure, *args, **kwargs):
        savefig(figure, *args, **kwargs)
        saved.append(figure)

    monkeypatch.setattr(Figure, "savefig", save)
    return saved


def fraction_of_colour(path, colour):
    pixels = matplotlib.image.imread(path)[..., :3]
    return np.isclose(pixels, to_rgb(colour), atol=0.01).all(-1).mean()


def assert_texts_do_not_overlap(figure):
    texts = figure.texts + [legend.get_title() for legend in figure.legends]
    texts += [text for legend in figure.legends for text in legend.get_texts()]
    texts += [
        text
        for panel in figure.axes
        if panel.axison
        for text in (panel.title, *panel.texts, panel.xaxis.label, panel.yaxis.label)
    ]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert len(boxes) >= 2
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def make_rows(num_steps, phases=(("dense", 0),)):
    """Rows of a run whose loss is 5 / step, with a spike at step 50."""
    rows = [{"kind": "phase", "phase": name, "step": step} for name, step in phases]
    for step in range(1, num_steps + 1):
        phase = [name for name, first in phases if first < step][-1]
        loss = 50.0 if step == 50 else 5 / step
        row = {"kind": "train", "step": step, "phase": phase, "loss": loss}
        rows.append(row | {"tokens_per_second": 9e3})
    return [*rows, {"kind": "validation", "step": num_steps, "validation_loss": float("nan")}]


def test_training_picture_shows_every_row_its_mean_and_the_phases(tmp_path, figures):
    rows = make_rows(200, [("dense", 0), ("sparse", 30), ("dense finish", 35), ("last", 36)])
    plot_training(rows, path=tmp_path / "loss.png", title="run 1: dense")
    assert figures[0].get_suptitle() == "run 1: dense"
    losses, speed = figures[0].axes
    raw, mean, validation, *lines = losses.get_lines()
    np.testing.assert_array_equal(raw.get_ydata(), [row["loss"] for row in rows if "loss" in row])
    # A fiftieth of 200 steps: two before and two after, of the same phase.
    expected = [5 / step for step in (48, 49, 51, 52)]
    np.testing.assert_allclose(mean.get_ydata()[49], (50 + sum(expected)) / 5)
    expected = [np.mean([5 / 28, 5 / 29, 5 / 30]), np.mean([5 / 31, 5 / 32, 5 / 33])]
    np.testing.assert_allclose(mean.get_ydata()[[29, 30]], expected)
    np.testing.assert_allclose(mean.get_ydata()[[0, -1]], [55 / 18, 5 / 199], rtol=1e-3)
    assert raw.get_alpha() < 1 and mean.get_label() == "training"
    assert list(validation.get_xdata()) == [200]
    assert [line.get_xdata()[0] for line in lines] == [30, 35, 36]
    texts = [text.get_text() for text in losses.texts]
    assert texts == [
        "dense",
        "sparse from step 30",
        "dense finish from step 35",
        "last from step 36",
    ]
    assert (losses.get_ylabel(), speed.get_ylabel()) == ("loss (nats)", "tokens per second")
    assert speed.get_xlabel() == "optimiser step"
    assert_texts_do_not_overlap(figures[0])
    assert fraction_of_colour(tmp_path / "loss.png", BLUE) > 1e-4


def test_a_short_run_is_drawn_as_it_is_and_nothing_is_marked_in_a_single_phase(tmp_path, figures):
    rows = [{"kind": "train", "phase": "dense", "step": s, "loss": 1.0} for s in (1, 2)]
    plot_training(rows, path=tmp_path / "a.png", title="")
    (panel,) = figures[0].axes
    assert panel.get_ylabel() == "loss (nats)" and len(panel.get_lines()) == 1
    assert not panel.texts


def test_a_mean_leaves_out_what_is_not_finite():
    values = np.array([1.0] * 50 + [math.nan, math.inf] + [3.0] * 48 + [math.nan] * 200)
    means = smooth_values(values, half=3)
    np.testing.assert_allclose(means[[0, 49, 50, 51, 99, 101]], [1, 1.4, 1.8, 2.2, 3, 3])
    assert np.isnan(means[-1])


def test_phases_are_found_where_their_own_rows_are_missing():
    rows = make_rows(9, [("dense", 0), ("sparse", 4)])
    assert list_phases(rows) == [("dense", 0), ("sparse", 4)]
    assert list_phases(rows[2:]) == [("dense", 0), ("sparse", 4)]


def test_a_run_is_drawn_at_validations_and_costs_it_a_hundredth(tmp_path):
    now = 0.0
    writer = TrainingPicture(tmp_path, "a run", clock=lambda: now)
    row = {"step": 1, "kind": "train", "phase": "dense", "loss": 1.0}
    (tmp_path / "metrics.jsonl").write_text(dump_json(row) + "\n")
    picture = tmp_path / "training.png"

    def tell(seconds, kind):
        nonlocal now
        now = seconds
        picture.unlink(missing_ok=True)
        writer.write(1, {"kind": kind})
        return picture.exists()

    assert not tell(10, "validation"), "so short a run is drawn at its end"
    assert not tell(70, "train")
    assert tell(71, "validation")


def test_topology_picture_shows_sparsity_updates_loss_and_flops(tmp_path, figures):
    rows = [{"kind": "phase", "phase": "warm-up", "step": 0, "dense_step_flops": 8.0}]
    rows.append({"kind": "phase", "phase": "ultra-sparse", "step": 4, "dense_step_flops": 8.0})
    rows.append({"kind": "phase", "phase": "restoration", "step": 40, "dense_step_flops": 8.0})
    for step in range(1, 101):
        row = {"kind": "train", "step": step, "phase": "restoration"}
        row |= {"loss": 5 / step, "step_flops": 8 - step / 20}
        if step % 10 == 0:
            row |= {"mask_density": 1 - step / 125, "update_fraction": 0.3 - step / 1000}
            row["mask_density/mlp/up"] = [1 - step / 100, 1.0]
        rows.append(row)
    rows.append({"kind": "validation", "step": 100, "validation_loss": 0.2})
    plot_topology(rows, path=tmp_path / "topology.png", title="mst: weights")
    sparsity, fraction, loss, flops = figures[0].axes
    layer, overall, *bounds = sparsity.get_lines()
    np.testing.assert_allclose(layer.get_ydata(), [step / 200 for step in range(10, 101, 10)])
    np.testing.assert_allclose(overall.get_ydata(), [step / 125 for step in range(10, 101, 10)])
    assert [line.get_xdata()[0] for line in bounds] == [4, 40]
    assert [text.get_text() for text in sparsity.texts] == [
        "warm-up",
        "ultra-sparse from step 4",
        "restoration from step 40",
    ]
    assert len(fraction.get_lines()[0].get_xdata()) == 10
    assert loss.get_lines()[2].get_ydata() == [0.2]
    np.testing.assert_allclose(flops.get_lines()[0].get_ydata()[-1], 3 / 8)
    assert_texts_do_not_overlap(figures[0])
    with pytest.raises(ValueError, match="rows must contain 'mask_density'"):
        plot_topology(rows[:2], path=tmp_path / "none.png", title="")
    # What a file lacks that was deleted meanwhile: the rows of phases.
    plot_topology(rows[3:], path=tmp_path / "later.png", title="")
    assert not figures[1].axes[3].get_lines()


def test_a_run_without_losses_cannot_be_drawn(tmp_path):
    with pytest.raises(ValueError, match="rows must contain 'loss' or .* got 1 rows"):
        plot_training([{"step": 1, "phase": "dense"}], path=tmp_path / "a.png", title="")


@pytest.mark.parametrize(
    ("layers", "with_attention"),
    [
        (1, False),
        (2, True),
        *(pytest.param(*case, marks=pytest.mark.ci) for case in ((5, False), (7, True))),
    ],
)
def test_every_layer_is_drawn_with_its_density(tmp_path, figures, layers, with_attention):
    masks_LIJ = np.zeros((layers, 4, 4), bool)
    for layer in range(layers):
        masks_LIJ[layer].flat[: layer + 1] = True
    pooled_LIJ = np.random.default_rng(0).random((layers, 4, 4)) if with_attention else None
    path = tmp_path / "patterns.png"
    plot_attention_patterns(
        masks_LIJ, pooled_LIJ, path=path, title="SPION-CF", note="What the\ntitle leaves out."
    )
    titles = [panel.get_title() for panel in figures[0].axes if "kept" in panel.get_title()]
    assert [float(title.split()[-1]) for title in titles] == [
        round((layer + 1) / 16, 2) for layer in range(layers)
    ]
    assert sum("attention" in panel.get_title() for panel in figures[0].axes) == (
        layers if with_attention else 0
    )
    assert_texts_do_not_overlap(figures[0])


def test_kept_blocks_are_blue_and_blocks_above_the_diagonal_grey(tmp_path):
    def draw(mask_IJ, causal):
        path = tmp_path / "a.png"
        plot_attention_patterns(mask_IJ[None], None, path=path, title="", causal=causal)
        return fraction_of_colour(path, BLUE), fraction_of_colour(path, GREY)

    everything, nothing = np.ones((8, 8), bool), np.zeros((8, 8), bool)
    blue, grey = draw(everything, causal=False)
    assert blue > 0.2 and grey < 0.01
    assert draw(nothing, causal=False)[0] < 0.01
    causal_blue, causal_grey = draw(everything, causal=True)
    assert causal_blue / blue == pytest.approx(36 / 64, rel=0.05)
    assert causal_grey / blue == pytest.approx(28 / 64, rel=0.05)


def test_causal_density_counts_visible_blocks_only(tmp_path, figures):
    # Blocks of 2 queries by 1 key: query block i sees the keys 0 .. 2 i + 1.
    masks_LIJ = np.ones((1, 2, 4), bool)
    masks_LIJ[0, 1, :3] = False
    plot_attention_patterns(masks_LIJ, None, path=tmp_path / "a.png", title="", causal=True)
    assert figures[0].axes[0].get_title() == "layer 0: kept, density 0.50"


@pytest.mark.parametrize(
    ("heads", "causal"),
    [(2, True), *(pytest.param(n, False, marks=pytest.mark.ci) for n in (1, 9))],
)
def test_every_head_is_drawn_with_its_density(tmp_path, figures, heads, causal):
    masks_LNIJ = np.zeros((2, heads, 4, 4), bool)
    for layer, head in np.ndindex(2, heads):
        masks_LNIJ[layer, head].flat[4 : 4 + layer + head] = True
    pooled_LNIJ = np.random.default_rng(0).random((2, heads, 4, 4))
    note = "A line that is longer than two heads are wide. " * 2 + "\nAnother."
    draw = functools.partial(plot_head_patterns, title="SPION-C", causal=causal, note=note)
    draw(masks_LNIJ, pooled_LNIJ, path=tmp_path / "a.png")
    attention, kept, *_ = figures[0].axes
    assert attention.get_title() == "layer 0: attention"
    assert [text.get_text() for text in attention.get_xticklabels()] == [
        f"head {n}" for n in range(heads)
    ]
    # Of head n, n blocks of the second row, which sees two.
    expected = [min(n, 2) / 10 if causal else n / 16 for n in range(heads)]
    shown = [float(text.get_text()) for text in kept.get_xticklabels()]
    np.testing.assert_allclose(shown, expected, atol=0.0051)
    # One grid for each head, the last as wide and at the right.
    images = kept.get_images()
    assert len(images) == heads
    assert images[-1].get_extent()[1] == kept.get_xlim()[1]
    np.testing.assert_array_equal(
        images[-1].get_array() == 1, masks_LNIJ[0, -1] & (np.tri(4, dtype=bool) | (not causal))
    )
    assert_texts_do_not_overlap(figures[0])
    draw(masks_LNIJ, None, path=tmp_path / "b.png")
    assert [panel.get_title() for panel in figures[1].axes][0] == "layer 0: kept, with density"
    with pytest.raises(ValueError, match=r"pooled_LNIJ must be finite and shaped like masks_LNIJ"):
        draw(masks_LNIJ, pooled_LNIJ[0], path=tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"masks_LNIJ must be bool\[L, N, I, J\], got bool"):
        draw(masks_LNIJ[0], None, path=tmp_path / "c.png")


@pytest.mark.parametrize(
    ("masks_LIJ", "pooled_LIJ", "message"),
    [
        (np.ones((2, 4, 4)), None, r"masks_LIJ must be bool.*got float64\[2, 4, 4\]"),
        (np.ones((4, 4), bool), None, r"masks_LIJ must be bool\[L, I, J\], got bool\[4, 4\]"),
        (np.ones((2, 4, 4), bool), np.ones((2, 4, 5)), r"pooled_LIJ .*got float64\[2, 4, 5\]"),
        (np.ones((2, 4, 4), bool), np.full((2, 4, 4), np.nan), "pooled_LIJ must be finite"),
    ],
)
def test_bad_arrays_are_refused(tmp_path, masks_LIJ, pooled_LIJ, message):
    with pytest.raises(ValueError, match=message):
        plot_attention_patterns(masks_LIJ, pooled_LIJ, path=tmp_path / "a.png", title="")


def test_no_figure_stays_open(tmp_path, figures):
    plot_training(make_rows(2), path=tmp_path / "a.png", title="")
    assert figures and not Gcf.get_all_fig_managers()
