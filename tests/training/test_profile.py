"""Steps that are profiled, and programs that are kept."""

import jax
import pytest

from sparsejax.config.parse import ConfigError, parse_config
from sparsejax.training import profile
from sparsejax.training.compilation_cache import use_compilation_cache
from sparsejax.training.loop import train_and_evaluate
from sparsejax.training.profile import StepProfiler, StepRange
from tests.training.runs import make_settings


@pytest.fixture(name="traces")
def _traces(monkeypatch):
    """What JAX's profiler is told."""
    told = []
    monkeypatch.setattr(profile.jax.profiler, "start_trace", told.append)
    monkeypatch.setattr(profile.jax.profiler, "stop_trace", lambda: told.append("stop"))
    return told


def _train(profiler, steps, traces):
    for step in steps:
        profiler.begin_step(step)
        traces.append(step)
        profiler.end_step(step, jax.numpy.zeros(()))


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (range(1, 6), [1, "start", 2, 3, "stop", 4, 5]),
        # A run that resumes within the stretch, and one that ends there.
        (range(3, 5), ["start", 3, "stop", 4]),
        (range(1, 3), [1, "start", 2, "stop"]),
    ],
)
def test_the_steps_that_were_named_are_traced(steps, expected, traces, tmp_path):
    with StepProfiler(tmp_path, StepRange(2, 3), warn=print) as profiler:
        _train(profiler, steps, traces)
    start = str(tmp_path / "profile")
    assert traces == [start if x == "start" else x for x in expected]


def test_without_steps_nothing_is_traced(traces, tmp_path):
    with StepProfiler(tmp_path, None, warn=print) as profiler:
        _train(profiler, range(1, 4), traces)
    assert traces == [1, 2, 3]


def test_a_trace_that_cannot_be_written_costs_the_trace_and_not_the_run(monkeypatch, tmp_path):
    def fail(_):
        raise RuntimeError("FAILED_PRECONDITION: profile\nis not a directory")

    monkeypatch.setattr(profile.jax.profiler, "start_trace", fail)
    said, steps = [], []
    with StepProfiler(tmp_path, StepRange(2, 3), warn=said.append) as profiler:
        _train(profiler, range(1, 5), steps)
    assert steps == [1, 2, 3, 4]
    (line,) = said
    assert "training goes on without it: FAILED_PRECONDITION: profile is not a directory" in line


@pytest.mark.parametrize("text", ["3", "0:2", "5:4", "a:b", "1:2:3", "-1:2"])
def test_other_steps_are_refused(text):
    with pytest.raises(ConfigError, match="^--profile_steps must be FIRST:LAST with 1 <= FIRST"):
        StepRange.parse(text)


@pytest.mark.ci
def test_a_run_leaves_the_trace_of_its_steps(tmp_path, capsys):
    config = parse_config(make_settings(tmp_path, num_steps=3, recipe__name="dense"))
    options = {"resume_command": "the same command"}
    beyond = StepRange(4, 5)
    with pytest.raises(ConfigError, match="some of the steps 1 to 3 that are trained, got 4:5"):
        train_and_evaluate(config, tmp_path / "run", **options, profile_steps=beyond)
    train_and_evaluate(config, tmp_path / "run", **options, profile_steps=StepRange(2, 3))
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    # A finished run is told, whatever it names.
    for steps in (StepRange(2, 3), beyond):
        capsys.readouterr()
        train_and_evaluate(config, tmp_path / "run", **options, profile_steps=steps)
        assert "warning: no trace of steps: a finished run trains none\n" in capsys.readouterr().out


@pytest.fixture(name="cache_config")
def _cache_config():
    """JAX's settings of its cache, set back after the test."""
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    before = {name: jax.config.values[name] for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("cache_config")
def test_compiled_programs_are_kept_unless_the_user_says_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_enable_compilation_cache", False)
    use_compilation_cache()
    assert jax.config.values["jax_compilation_cache_dir"] is None
    jax.config.update("jax_enable_compilation_cache", True)
    (tmp_path / "sparsejax").write_text("in the way")
    use_compilation_cache()
    assert jax.config.values["jax_compilation_cache_dir"] is None
    (tmp_path / "sparsejax").unlink()
    use_compilation_cache()
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "sparsejax" / "xla")
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    use_compilation_cache()
    assert jax.config.values["jax_compilation_cache_dir"] == "/elsewhere"
