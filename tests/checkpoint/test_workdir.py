"""Who may go on in the folder of a run."""

import dataclasses

import pytest

from configs import base
from sparsejax.checkpoint.workdir import check_same_run, describe_run
from sparsejax.config.parse import ConfigError, parse_config
from sparsejax.data import DataSpec
from sparsejax.strict_json import dump_json

_SPEC = DataSpec("language_model", vocab_size=256, num_classes=0)


def test_settings_recorded_with_the_sections_of_all_recipes_still_resume(tmp_path):
    settings = base.get_config().to_dict()
    config = parse_config(settings)
    now = describe_run(config, {"tokens": 3}, _SPEC)
    before = now | {"config": settings}
    assert set(before["config"]["recipe"]) > {"name", "fst", "spion"}
    (tmp_path / "run.json").write_text(dump_json(before))
    assert check_same_run(tmp_path, now) == []
    other = dataclasses.replace(config, num_steps=700)
    with pytest.raises(ConfigError, match=r"other settings.*\n  num_steps: 1000 -> 700$"):
        check_same_run(tmp_path, describe_run(other, {"tokens": 3}, _SPEC))
    with pytest.raises(ConfigError, match=r"other data.*\n  tokens: 3 -> 4$"):
        check_same_run(tmp_path, describe_run(config, {"tokens": 4}, _SPEC))
