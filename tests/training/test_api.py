"""From Python: train, evaluate, and load what was trained."""

import importlib.machinery
import shutil
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver

import sparsejax
from sparsejax import command
from sparsejax.checkpoint.save import find_checkpoints
from sparsejax.config.parse import ConfigError, parse_config
from sparsejax.data import Contents, Example, Source
from sparsejax.dotted import name_function
from sparsejax.models import AttentionOptions, LinearOptions, Transformer
from sparsejax.recipes import Phase, Recipe
from sparsejax.report.metrics import read_metrics
from sparsejax.strict_json import load_json
from sparsejax.training.setup import prepare_run
from tests.tiers import tier
from tests.training.runs import make_settings, train

_STEPS = 6
_SHORT = {
    "num_steps": _STEPS,
    "eval_every_steps": _STEPS,
    "optimizer__warmup_fraction": 1 / _STEPS,
    "checkpoint__every_steps": 2,
    "checkpoint__keep_last": _STEPS,
}
_RUNS = {
    # Sparse at the end; dense at the end; weights that the forward pass sees otherwise.
    "spion": {"recipe__spion__latest_switch_fraction": 4 / _STEPS},
    "fst": {"recipe__name": "fst", "recipe__fst__dense_fraction": 0.34},
    "sste": {"recipe__name": "sste", "data__tokenizer": "bpe:300"},
}


@pytest.fixture(scope="module", params=tier({n: n for n in _RUNS}, fast=(), slow=["fst", "sste"]))
def run(request, tmp_path_factory):
    """The name of a method, its settings and the folder of its run."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = make_settings(folder, **_SHORT | _RUNS[request.param])
    train(settings, folder / "run")
    return request.param, settings, folder / "run"


def _loss(model, batch, **options):
    logits = model(jnp.asarray(batch["inputs"]), **options).logits.astype(jnp.float32)
    log_p = logits - jnp.log(jnp.exp(logits).sum(-1, keepdims=True))
    picked = jnp.take_along_axis(log_p, jnp.asarray(batch["targets"])[..., None], axis=-1)[..., 0]
    weights = jnp.broadcast_to(jnp.asarray(batch["loss_weights"])[:, None], picked.shape)
    return float(-(picked * weights).sum() / weights.sum())


@pytest.mark.ci
def test_a_loaded_model_computes_what_was_trained(run):
    name, settings, workdir = run
    model, config, tokenizer = sparsejax.load_model(workdir)
    assert config.to_dict()["recipe"]["name"] == name and config.num_steps == _STEPS
    batches = list(prepare_run(config).data.validation(2))
    weights = [batch["loss_weights"].sum() for batch in batches]
    loss = np.average([_loss(model, batch) for batch in batches], weights=weights)
    found = sparsejax.evaluate(workdir)
    assert found["step"] == _STEPS
    np.testing.assert_allclose(loss, found["validation_loss"], rtol=2e-5)
    other = {"attention_options": AttentionOptions(), "linear_options": LinearOptions()}
    if name == "fst":
        # The phase is dense, and nobody has to know it.
        assert abs(_loss(model, batches[0], **other) - _loss(model, batches[0])) > 1e-4
    assert tokenizer.decode(tokenizer.encode([b"1 plus 1"])[0]) == b"1 plus 1"


@pytest.mark.ci
def test_a_model_is_loaded_where_its_data_is_not(run, tmp_path):
    _, _, workdir = run
    moved = shutil.copytree(workdir, tmp_path / "moved")
    data = workdir.parent / "data"
    data.rename(tmp_path / "away")
    (workdir.parent / "corpus.txt").rename(tmp_path / "corpus.txt")
    try:
        model, _, tokenizer = sparsejax.load_model(moved, step=4)
        tokens = jnp.asarray(tokenizer.encode([b"12 plus 5 is "])[0], jnp.int32)[None]
        assert jnp.isfinite(model(tokens).logits).all()
        with pytest.raises(ConfigError, match=r"step=3, found those of \[2, 4, 6\]"):
            sparsejax.load_model(moved, step=3)
    finally:
        (tmp_path / "away").rename(data)
        (tmp_path / "corpus.txt").rename(workdir.parent / "corpus.txt")


@pytest.mark.ci
def test_a_run_is_evaluated_on_either_split_and_on_other_text(run, tmp_path):
    name, settings, workdir = run
    data = prepare_run(parse_config(settings)).data
    for split in ("validation", "train"):
        found = sparsejax.evaluate(workdir, split=split)
        # Text of ASCII alone: no character lies across two windows.
        texts = [
            data.tokenizer.decode(targets).replace(b"<|endoftext|>", b"\0")
            for batch in data.passes[split](settings["num_eval_batches"])
            for targets, weight in zip(batch["targets"], batch["loss_weights"], strict=True)
            if weight
        ]
        loss = found[f"{split}_loss"]
        assert found["bytes"] == sum(map(len, texts)) > 0
        assert found["tokens"] == len(texts) * settings["data"]["sequence_length"]
        bits = loss * found["tokens"] / found["bytes"] / np.log(2)
        np.testing.assert_allclose(found["bits_per_byte"], bits, rtol=1e-6)
        np.testing.assert_allclose(found["perplexity"], np.exp(loss), rtol=1e-6)
        if name != "sste":
            assert found["bytes"] == found["tokens"]
    # The run's own text, which the run no longer needs, is read as any other.
    (workdir.parent / "corpus.txt").rename(tmp_path / "moved.txt")
    try:
        other = sparsejax.evaluate(
            workdir, source=f"text:{tmp_path / 'moved.txt'}", split="validation"
        )
    finally:
        (tmp_path / "moved.txt").rename(workdir.parent / "corpus.txt")
    assert other == sparsejax.evaluate(workdir)
    short = tmp_path / "short.txt"
    short.write_text("".join(f"{i} plus 1 is {i + 1}.\n" for i in range(14)))
    found = sparsejax.evaluate(workdir, source=f"text:{short}")
    assert {"loss", "accuracy", "bits_per_byte"} < found.keys()
    assert found["tokens"] < settings["data"]["batch_size"] * settings["data"]["sequence_length"]
    with pytest.raises(ConfigError, match="eval_source='listops:short' must be data like the run"):
        sparsejax.evaluate(workdir, source="listops:short")


def _type(capsys, *arguments):
    """Run the command in this process, and return what it prints."""
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as end:
        command.run(["sparsejax", *arguments], resume_command="")
    said = capsys.readouterr()
    assert end.value.code == 0, said.err
    return said.out


@pytest.mark.ci
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_the_command_generates_evaluates_and_asks_without_a_config(run, tmp_path, capsys):
    name, _, workdir = run
    if name != "spion":
        return  # what is loaded is tested above
    model, folder, prompts = sparsejax.load_model(workdir), f"--workdir={workdir}", ["1 plus", "2"]
    drawn = {"max_new_tokens": 8, "temperature": 0.7, "top_p": 0.9, "top_k": 30, "seed": 3}
    new = sparsejax.generate(model, prompts, **drawn)
    (tmp_path / "prompts.txt").write_text("1 plus\n2\n")
    flags = [f"--{name}={value}" for name, value in drawn.items()]
    expected = f"1 plus{new[0]}\n---\n2{new[1]}\n"
    given = ["--prompt=1 plus", "--prompt=2"]
    assert _type(capsys, "--mode=generate", folder, *given, *flags) == expected
    file = f"--prompt_file={tmp_path / 'prompts.txt'}"
    assert _type(capsys, "--mode=generate", folder, file, *flags) == expected

    def tell(values):
        return "".join(f"{name}: {value}\n" for name, value in values.items())

    path = tmp_path / "questions.jsonl"
    path.write_text('{"context": "1 plus 1 is", "choices": [" 2.", "xyz"], "answer": 0}\n')
    found = sparsejax.evaluate_choices(model, path)
    assert _type(capsys, "--mode=eval", folder, f"--choices={path}") == tell(found)
    found = sparsejax.evaluate(workdir, split="train")
    assert _type(capsys, "--mode=eval", folder, "--split=train") == tell(found)


def test_a_folder_without_a_run_is_refused(tmp_path):
    for load in (sparsejax.load_model, sparsejax.evaluate):
        with pytest.raises(ConfigError, match="must hold a run's checkpoints, found none"):
            load(tmp_path)


def test_the_package_offers_its_functions_and_says_so():
    with pytest.raises(AttributeError, match="no attribute 'trian'; it has .*'train'"):
        sparsejax.trian  # noqa: B018


def make_counting_recipe(facts):
    """A dense recipe of one's own with two phases."""
    return Recipe("counting", (Phase("one", last_step=facts.num_steps // 2), Phase("two")))


def make_source(config):
    """A source of one's own: digits."""

    def read(split):
        for i in range(200 if split == "train" else 20):
            yield Example((b"0123456789" * (8 + i % 3),))

    return Source(
        contents=Contents("language_model"), identity={"digits": config.sequence_length}, read=read
    )


def make_no_source(config):
    """Forget to return a source."""
    return config.source


@pytest.mark.ci
def test_own_recipe_and_own_source_from_python(tmp_path):
    settings = make_settings(tmp_path, **_SHORT)
    summary = sparsejax.train(
        settings, tmp_path / "run", recipe=make_counting_recipe, data=make_source
    )
    assert summary["recipe"] == "counting"
    recorded = load_json((tmp_path / "run" / "checkpoints" / "run.json").read_text())
    assert recorded["config"]["recipe"]["name"] == f"{__name__}:make_counting_recipe"
    assert recorded["config"]["data"]["source"] == f"own:{__name__}:make_source"
    # The caller's settings are left as they were, and the run resumes under its recorded names.
    assert settings["recipe"]["name"] == "spion"
    assert [info.step for info in find_checkpoints(tmp_path / "run" / "checkpoints")] == [6, 4, 2]
    model, _, tokenizer = sparsejax.load_model(tmp_path / "run")
    tokens = jnp.asarray(tokenizer.encode([b"01234567"])[0], jnp.int32)[None]
    assert model(tokens).logits.shape == (1, 8, 256)


class Listener:
    """A writer of one's own, which remembers what it is told."""

    def __init__(self):
        self.told = []

    def write(self, step, row):
        self.told.append({"step": step, **row})

    def close(self):
        self.told.append("close")


class Sharper(Transformer):
    """A model of one's own: its logits are twice as large."""

    def __call__(self, tokens, **options):
        output = super().__call__(tokens, **options)
        return output._replace(logits=2 * output.logits)


def test_a_function_of_a_script_has_no_name_and_one_of_python_m_has(monkeypatch):
    function = types.FunctionType(make_source.__code__, {}, "make_source")
    function.__module__ = "__main__"
    main = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", main)
    with pytest.raises(ValueError, match="at the top of a module that can be imported"):
        name_function(function, "data")
    main.__spec__ = importlib.machinery.ModuleSpec("package.sums", None)
    assert name_function(function, "data") == "package.sums:make_source"


@pytest.mark.ci
def test_own_model_from_python(tmp_path):
    settings = make_settings(tmp_path, **_SHORT | {"num_steps": 2, "eval_every_steps": 2})
    settings["recipe"]["name"] = "dense"
    listener = Listener()
    sparsejax.train(settings, tmp_path / "run", model=Sharper, writers=[listener])
    assert listener.told == [*read_metrics(tmp_path / "run" / "metrics.jsonl"), "close"]
    sparsejax.train(settings, tmp_path / "run", model=Sharper, writers=[listener])
    assert listener.told[-2:] == ["close", "close"], "a finished run has nothing to tell"
    recorded = load_json((tmp_path / "run" / "checkpoints" / "run.json").read_text())
    assert recorded["config"]["model"]["own_class"] == f"{__name__}:Sharper"
    model, _, _ = sparsejax.load_model(tmp_path / "run")
    assert isinstance(model, Sharper)
    tokens = jnp.ones((1, 8), jnp.int32)
    np.testing.assert_array_equal(
        model(tokens).logits, 2 * Transformer.__call__(model, tokens).logits
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": make_source}, "must be a subclass of sparsejax.models.Transformer, got "),
        ({"recipe": lambda facts: None}, "recipe must be a function at the top of a module"),
        ({"data": "text:/x"}, "data must be a function at the top of a module.*got 'text:/x'"),
        ({"workdir": None}, "workdir must be the path of a folder, got None"),
        ({"writers": None}, "writers must be a sequence of RowWriter, got None"),
        ({"writers": [print]}, "writers must be a sequence of RowWriter, got .<built-in"),
        ({"data": make_no_source}, "returns a sparsejax.data.source.Source, got <class 'str'>"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        sparsejax.train(make_settings(tmp_path), **{"workdir": tmp_path / "run"} | options)


@pytest.mark.parametrize("options", [{"data": make_no_source}, {"model": make_source}])
def test_writers_are_closed_whatever_ends_the_run(options, tmp_path):
    listener = Listener()
    with pytest.raises(ConfigError):
        sparsejax.train(make_settings(tmp_path), tmp_path / "run", writers=[listener], **options)
    assert listener.told == ["close"]


def test_evaluation_keeps_compiled_programs_as_its_command_does(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr("sparsejax.api.use_compilation_cache", lambda: called.append(True))
    with pytest.raises(ConfigError):
        sparsejax.evaluate(tmp_path)
    assert called
