"""What a run needs on a GPU, said without the GPU and without the data."""

import dataclasses
import math
import pathlib
import subprocess
import sys

import jax
import pytest

from pallas_kernels import aot
from pallas_kernels.dispatch import make_abstract_gpu
from sparsejax import command
from sparsejax.config.parse import ConfigError, parse_config
from sparsejax.config.schema import make_recipe, make_transformer_config
from sparsejax.data import describe_data, make_data
from sparsejax.tools.plan import estimate_largest_batch, make_plan
from sparsejax.tools.plan_text import format_plan
from sparsejax.tools.programs import make_abstract_batch, make_steps
from tests.training.runs import make_settings

_ROOT = pathlib.Path(__file__).parents[2]

_LISTS = "lists of attention blocks"


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """Plan a run whose data is not there."""
    folder = tmp_path_factory.mktemp("plan")
    settings = make_settings(folder, model__num_layers=1, model__dropout_rate=0.0)
    (folder / "corpus.txt").unlink()
    result = make_plan(parse_config(settings))
    assert not list(folder.iterdir())
    return result


def _read(text):
    """Return the numbers of each line of a printed plan by the line's label."""
    cells = [line.split("  ") for line in text.splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in cells]
    return {row[0]: row[1:] for row in cells if row}


@pytest.mark.slow
def test_parts_of_both_phases_add_up_to_what_xla_reports(plan):
    assert [phase.name for phase in plan.phases] == ["dense", "sparse"]
    dense, sparse = plan.phases
    for phase in plan.phases:
        assert sum(phase.parts.values()) == phase.programs["train step"].peak_bytes
        assert all(size > 0 for part, size in phase.parts.items() if part != _LISTS)
        # Two moments of every parameter, and the counter of Adam.
        assert phase.parts["optimizer state"] == 2 * phase.parts["parameters"] + 4
    # The probe remembers one map of 64 x 64 probabilities; the sparse phase has none.
    name = "masks, statistics, counters"
    assert dense.parts[name] - sparse.parts[name] >= 64 * 64 * 4
    # Counts and indices of four blocks a side, both ways, in one layer.
    assert (dense.parts[_LISTS], sparse.parts[_LISTS]) == (0, 2 * (4 + 4 * 4) * 4)
    assert set(dense.programs) - set(sparse.programs) == {"probing train step"}


@pytest.mark.ci
def test_more_fits_where_less_is_needed(plan):
    for phase in plan.phases:
        train = phase.programs["train step"]
        assert 4 * plan.usable_bytes > 4 * phase.peak_bytes >= 4 * train.peak_bytes
        # A line through the origin and the peak is steeper than one with the state below it.
        assert phase.largest_batch_size > 4 * plan.usable_bytes // train.peak_bytes


def test_largest_batch_is_where_the_line_meets_the_memory():
    estimate = {"batch_size": 4, "usable_bytes": 1000, "multiple_of": 1}
    assert estimate_largest_batch((300, 500), **estimate) == 18
    assert estimate_largest_batch((300, 500), **estimate | {"multiple_of": 4}) == 16
    assert estimate_largest_batch((2100, 2200), **estimate) == 0
    assert estimate_largest_batch((300, 300), **estimate) is None


@pytest.mark.ci
def test_table_shows_phases_side_by_side(plan):
    lines = _read(format_plan(plan))
    dense, sparse = plan.phases
    assert lines["memory, MB"] == ["dense", "sparse"]
    for part in dense.parts:
        assert lines[part] == [f"{phase.parts[part] / 1e6:,.1f}" for phase in plan.phases]
    probe = dense.programs["probing train step"].temp_bytes / 1e6
    assert lines["temporaries of the probing train step"] == [f"{probe:,.1f}", "–"]
    assert lines["largest batch, examples"] == [f"{p.largest_batch_size:,}" for p in plan.phases]
    # Triton takes f32, and on an H200 it is taken to be right.
    assert "Mosaic and Triton kernels" in lines and "backends of the sparse ops" in lines


@pytest.mark.slow
def test_a_small_gpu_is_planned_for(tmp_path):
    settings = make_settings(tmp_path, model__num_layers=1, recipe__name="dense")
    small = make_plan(parse_config(settings), target="rtx4090")
    text = format_plan(small)
    assert "on one NVIDIA GeForce RTX 4090" in text
    assert _read(text)["GPU memory that JAX takes, MB"] == ["18,938.0"]
    (phase,) = small.phases
    assert phase.peak_bytes < small.usable_bytes < aot.TARGETS["rtx4090"].memory_bytes


@pytest.mark.slow
def test_devices_share_the_state_and_what_they_send_is_told(tmp_path):
    settings = make_settings(
        tmp_path,
        model__num_layers=3,
        recipe__name="dense",
        num_micro_batches=2,
        data__batch_size=8,
        mesh__fsdp=2,
        mesh__data=2,
    )
    config = parse_config(settings)
    shared = make_plan(config, hosts=2)
    (each,) = shared.phases
    train = each.programs["train step"]
    assert sum(each.parts.values()) == train.peak_bytes
    phase = make_recipe(config, make_transformer_config(config, **shared.spec._asdict())).phases[0]
    state, batch, _ = make_steps(config, shared.spec, phase).arguments
    weights, examples = (
        sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
        for tree in (state.params, batch)
    )
    # Scales of layer norms are everywhere.
    assert weights / 2 < each.parts["parameters"] < weights * 0.6
    assert each.parts["batch"] == examples / 4
    assert each.largest_batch_size and each.largest_batch_size % (2 * 4) == 0
    gathers = [x for x in each.collectives if x.kind == "all-gather" and x.axes == ("fsdp",)]
    assert gathers and all(x.group_hosts == 1 for x in gathers)
    # The first loop is that of micro-batches, the second one that of layers.
    assert {x.trips[:1] for x in gathers} == {(2,)} and {len(x.trips) for x in gathers} == {1, 2}
    # Weights of a layer are gathered, never those of all.
    layer_bytes = 4 * 32 * (4 * 32 + 2 * 64)
    assert max(x.whole_bytes for x in gathers) < 3 * layer_bytes
    added = [x for x in each.collectives if x.kind == "all-reduce" and "data" in x.axes]
    assert added and all(x.group_hosts == 2 for x in added)
    text = format_plan(shared)
    assert "on 4 NVIDIA H200 on 2 hosts" in text
    assert "mesh of data=2 x fsdp=2 x context=1 x tensor=1\n" in text
    lines = _read(text)
    sent = sum(x.sent_bytes * math.prod(x.trips) for x in each.collectives)
    assert lines["dense, together"][1] == f"{sent / 1e6:,.1f}"
    largest = f"{each.largest_batch_size // 4:,}"
    assert lines["of these on each device"] == [largest]


@pytest.mark.ci
def test_kernels_are_listed_with_what_ptxas_made_of_them(plan):
    kernel = aot.KernelReport(
        name="forward_0",
        registers=168,
        stack_bytes=0,
        spill_bytes=12,
        shared_memory_bytes=151_824,
        remarks=(),
        ptx="",
        sass="",
    )
    (_, sparse) = plan.phases
    report = dataclasses.replace(sparse.programs["train step"], kernels=(kernel,))
    phase = dataclasses.replace(sparse, programs={"train step": report})
    lines = _read(format_plan(dataclasses.replace(plan, phases=(phase,))))
    assert lines["sparse, train step, forward_0"] == ["168", "12", "151,824"]


def test_abstract_batches_are_those_of_the_data(tmp_path):
    for split in ("train", "eval"):
        lines = [f"{i % 2}\ta\tb\tsome text\tmore\n" for i in range(4)]
        (tmp_path / f"new_aan_pairs.{split}.tsv").write_text("".join(lines))
    pairs = {"data__source": f"aan:{tmp_path}", "recipe__name": "dense"}
    for changes in ({}, pairs):
        config = parse_config(make_settings(tmp_path, **changes))
        batch = next(make_data(config.data).train)
        expected = {name: (array.shape, array.dtype) for name, array in batch.items()}
        abstract = make_abstract_batch(config, describe_data(config.data))
        assert {name: (x.shape, x.dtype) for name, x in abstract.items()} == expected


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"target": "v100"}, r"--target must be one of \['h200', 'h100', .*\], got 'v100'"),
        (
            {"data__source": "tfds:x"},
            {},
            r"data.source='tfds:x': no such set is prepared .*: python",
        ),
        ({"data__source": "idx:/x"}, {}, "data.source='idx:/x': no such folder"),
        (
            {
                "recipe__name": "static_attention",
                "recipe__static_attention__density": 0.5,
                "model__attention_implementation": "mosaic_sm90",
            },
            {},
            "model.attention_implementation='mosaic_sm90' must run on one NVIDIA H200: .*float32",
        ),
        (
            {
                "recipe__name": "static_attention",
                "recipe__static_attention__density": 0.5,
                "model__attention_implementation": "mosaic_sm90",
            },
            {"target": "a100"},
            "model.attention_implementation='mosaic_sm90' must run on one NVIDIA A100-SXM4-80GB: ",
        ),
        (
            {"mesh__fsdp": 4},
            {"hosts": 3},
            "--hosts must divide the number of devices of the mesh, 4, got 3",
        ),
        ({}, {"hosts": 0}, "--hosts must divide .*, 1, got 0"),
        (
            {"mesh__tensor": 4},
            {},
            "model.num_heads must be a multiple of mesh.tensor=4 x mesh.context=1, got 2",
        ),
    ],
    ids=["target", "tfds", "idx", "kernel", "gpu", "hosts", "no host", "heads"],
)
def test_what_cannot_be_planned_is_refused(changes, options, message, tmp_path):
    config = parse_config(make_settings(tmp_path, **changes))
    with pytest.raises(ConfigError, match=message):
        make_plan(config, **options)


def test_missing_packages_are_refused_with_the_command_that_has_them(tmp_path, monkeypatch):
    config = parse_config(make_settings(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'sparsejax\[compile\]'; or run `make plan"):
        make_plan(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["--mode=plan", "--target=v100"],
            "--target=v100: value should be one of <h200|h100|",
            marks=pytest.mark.slow,
        ),
        pytest.param(["--mode=eval"], "--workdir must be a folder, got none", marks=pytest.mark.ci),
        pytest.param(
            ["--hosts=2"], "--hosts must not be given with --mode=train", marks=pytest.mark.slow
        ),
    ],
    ids=["target", "workdir", "hosts"],
)
def test_command_refuses_with_one_line_and_code_2(arguments, message):
    result = subprocess.run(
        [sys.executable, "train.py", "--config=configs/quickstart.py", *arguments],
        cwd=_ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert message in result.stderr


def test_command_knows_the_targets_and_lists_them_without_jax():
    assert list(aot.TARGETS) == command.flags.FLAGS["target"].parser.enum_values
    help_and_modules = (
        "import runpy, sys; sys.argv = ['train.py', '--help']\n"
        "try: runpy.run_path('train.py', run_name='__main__')\n"
        "finally: print('jax' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", help_and_modules], cwd=_ROOT, capture_output=True, text=True
    )
    assert f"<{'|'.join(aot.TARGETS)}>" in result.stdout
    assert result.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize(
    "target, backend",
    [
        pytest.param("h200", "mosaic_sm90", marks=pytest.mark.ci),
        pytest.param("a100", "triton", marks=pytest.mark.slow),
    ],
)
def test_a_plan_takes_what_a_right_verdict_would_choose_and_says_so(
    target, backend, tmp_path, monkeypatch
):
    gpu = aot.TARGETS[target]

    def trace(step, *arguments, mesh, **_):
        with jax.sharding.use_abstract_mesh(mesh):
            jax.eval_shape(step, *arguments)
        names = ("argument_bytes", "output_bytes", "alias_bytes", "temp_bytes")
        return aot.AotReport(**dict.fromkeys(names, 0), kernels=(), hlo="")

    monkeypatch.setattr(aot, "compile_for", trace)
    monkeypatch.setattr(
        aot, "make_gpu_mesh", lambda gpu, **_: make_abstract_gpu(gpu.name, gpu.cores)
    )
    settings = make_settings(
        tmp_path,
        model__num_layers=1,
        model__dtype="bfloat16",
        model__model_dim=64,
        model__block_size=32,
    )
    text = format_plan(make_plan(parse_config(settings), target=target))
    call = "block_sparse_attention(dtype=bfloat16, head_dim=32, block_q=32, block_kv=32, "
    assert f"  {backend} for {call}pruned_logits=zero, mask=shared, causal)\n" in text
    assert f"run on one {gpu.name} if the doctor finds them right and faster there." in text
    settings["model"]["attention_implementation"] = "xla"
    named = format_plan(make_plan(parse_config(settings), target=target))
    assert f"  xla for {call}pruned_logits=zero, mask=shared, causal)\n" in named
