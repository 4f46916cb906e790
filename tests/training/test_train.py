"""The command a user types: what it accepts, what it says, and the code it exits with."""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from sparsejax.config.parse import ConfigError, parse_config
from sparsejax.report.metrics import read_metrics
from sparsejax.tools.evaluate import evaluate
from tests.training.runs import assert_documented, make_settings, train

_ROOT = pathlib.Path(__file__).parents[2]


def _type(*arguments):
    return subprocess.run(
        [sys.executable, "train.py", *arguments], cwd=_ROOT, capture_output=True, text=True
    )


def test_help_does_not_wait_for_jax():
    imported = "import sys, train; print('jax' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", imported], cwd=_ROOT, capture_output=True, text=True
    )
    assert result.stdout == "False\n"


_ERRORS = {
    "key": (["--config.modle.num_layers=3"], "did you mean 'model.num_layers'?"),
}
_MORE_ERRORS = {
    "value": (
        ["--config.model.block_size=100"],
        "model.block_size must be a positive divisor of data.sequence_length=1024, got 100",
    ),
    "file": (["--config=configs/missing.py"], "an existing .py file, got 'configs/missing.py'"),
    "argument": (["num_steps=3"], "unknown argument 'num_steps=3'"),
    "cleared": (
        ["--config.optimizer.clip_norm=None", "--config.num_steps=None"],
        "num_steps must be of type int, got None",
    ),
    "cleared_key": (
        ["--config.optimizer.clip_nrm=None"],
        "did you mean 'optimizer.clip_norm'",
    ),
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [pytest.param(*case, id=name) for name, case in _ERRORS.items()]
    + [pytest.param(*case, id=name, marks=pytest.mark.slow) for name, case in _MORE_ERRORS.items()],
)
def test_user_errors_exit_with_code_2_and_one_message(arguments, message, tmp_path):
    result = _type("--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


def test_missing_data_file_is_refused(tmp_path):
    settings = make_settings(tmp_path)
    settings["data"]["source"] = "text:missing.txt"
    with pytest.raises(ConfigError, match=r"data.*missing.txt"):
        train(settings, tmp_path / "run")


def test_a_type_that_a_cpu_does_not_multiply_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="model.dtype must be 'float32' or .*, got 'float16'"):
        train(make_settings(tmp_path, model__dtype="float16"), tmp_path / "run")


def test_evaluation_without_a_checkpoint_is_refused(tmp_path):
    settings = make_settings(tmp_path)
    with pytest.raises(ConfigError, match=r"must hold a run's checkpoints, found none"):
        evaluate(parse_config(settings), tmp_path)


def test_unwritable_workdir_is_refused(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match=r"--workdir=.*file must be a writable folder"):
        train(make_settings(tmp_path), file)


def test_full_disk_is_refused_before_training(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"must have room .* 0.0 MB are free"):
        train(make_settings(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.ci
def test_classification_trains_from_a_set_in_tfds_format(tmp_path):
    import tensorflow_datasets as tfds

    class Parity(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            label = tfds.features.ClassLabel(num_classes=2)
            features = {"text": tfds.features.Text(), "label": label}
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("text", "label"),
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(64), "test": self._generate_examples(10)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"text": "ab"[i % 2] * (10 + i % 20), "label": i % 2}

    folder = tmp_path / "data"
    Parity(data_dir=folder, file_format="array_record").download_and_prepare()
    settings = make_settings(
        tmp_path, data__source="tfds:parity", data__data_dir=str(folder), num_steps=30,
        checkpoint__every_steps=30, num_eval_batches=0, optimizer__learning_rate=1e-2,
        recipe__name="dense",
    )  # fmt: skip
    assert train(settings, tmp_path / "run")["validation_accuracy"] == 1.0


@pytest.mark.slow
def test_a_healthy_run_has_no_nan_and_says_what_walks_do_not_reach(tmp_path, capsys):
    # SPION's; those of the other methods are trained like this in their own files.
    walks = {"walk": "greedy", "quantile": None, "density": 1.0}
    changes = {f"recipe__spion__{name}": value for name, value in walks.items()}
    settings = make_settings(tmp_path, checkpoint__every_steps=10, **changes)
    with jax.debug_nans(True):
        summary = train(settings, tmp_path / "run")
    assert_documented(tmp_path / "run")
    began = summary["phase_metrics"]["sparse"]
    assert began["wanted_density"] == 1 and min(began["reach"]) < 1
    assert np.mean(began["reach"]) == pytest.approx(summary["sparse_attention_density"])
    assert "warning: greedy walks reach 0." in capsys.readouterr().out
    probes = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "check" in row]
    assert [("distance" in row, "change_percent" in row) for row in probes] == [
        (False, False),
        (True, False),
        (True, True),
    ]


@pytest.mark.slow
def test_two_devices_train_like_one(tmp_path):
    program = (
        "import sys, pathlib; from tests.training.runs import make_settings, train\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "print(train(make_settings(folder, model__dropout_rate=0.0), folder / 'run')"
        "['validation_loss'])"
    )
    losses = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        flags = f"--xla_force_host_platform_device_count={count}"
        result = subprocess.run(
            [sys.executable, "-c", program, str(folder)],
            cwd=_ROOT,
            env=os.environ | {"XLA_FLAGS": flags},
            capture_output=True,
            text=True,
            check=True,
        )
        losses.append(float(result.stdout.splitlines()[-1]))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
    assert jax.device_count() == 1
