"""Files of a run are whole or as they were, and links are never written through."""

import pytest

from sparsejax.durable import write_durably
from tests.checkpoint.saves import fill_disk_for


@pytest.mark.parametrize("name", ["run.json", "run.json.new"])
def test_what_a_link_points_to_stays_as_it_is(tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / name).symlink_to(victim)
    write_durably(tmp_path / "run.json", "ours")
    assert victim.read_text() == "precious"
    assert (tmp_path / "run.json").read_text() == "ours"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "victim"]


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_durably(path, b"before")

    fill_disk_for(path.name, monkeypatch)
    with pytest.raises(OSError, match=r"No space .*run.json'$"):
        write_durably(path, "after")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("run.json", "before")]
