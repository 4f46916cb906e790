"""The command of experiments: what is missing, and names that are not known."""

import pytest

from benchmarks.experiments import __main__ as command
from benchmarks.experiments.__main__ import main
from benchmarks.experiments.catalogue import EXPERIMENTS


def test_without_a_name_all_are_listed(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(EXPERIMENTS)
    assert all("runs, " in line and "missing" in line for line in lines)


def test_a_row_without_a_record_is_not_compared(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    # The first is tuned, the second is not.
    for name, row in (("hidden_permutation", "SAT, 0.1"), ("mst_small_patterns", "dense")):
        assert main([name, f"--again={row}"]) == 1
        assert capsys.readouterr().out == f"{name}: {row!r} is not recorded yet\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hidden"], "error: NAME must be one of hidden_permutation, .*, got 'hidden'$"),
        (
            ["hidden_permutation", "--again=SPOIN-C, 0.1"],
            "error: hidden_permutation must have the row 'SPOIN-C, 0.1'; "
            "did you mean 'SPION-C, 0.1'[?]$",
        ),
    ],
    ids=["name", "row"],
)
def test_unknown_names_are_refused_in_one_line(arguments, message):
    with pytest.raises(SystemExit, match=message):
        main(arguments)
