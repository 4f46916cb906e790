"""The simulation deals lists as the kernels do, and its table is of the patterns it has now."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import list_rounds
from benchmarks.harness import RESULTS
from pallas_kernels.hopper.launch import for_each_tile


@pytest.mark.parametrize("num_lists", [1, 4, 5, 8, 11, 12, 14])
def test_lists_are_dealt_as_programs_take_tiles(num_lists):
    processors = min(4, num_lists)

    def list_taken(_):
        taken = jnp.zeros(num_lists, bool)
        return for_each_tile(
            lambda tile, taken: taken.at[tile].set(True),
            taken,
            num_tiles=num_lists,
            num_programs=processors,
        )

    taken = jax.vmap(list_taken, axis_name="program")(jnp.arange(processors))
    programs = list_rounds.deal(num_lists, processors)
    np.testing.assert_array_equal(taken, np.arange(processors)[:, None] == programs)


def test_whoever_is_free_takes_the_next_list(monkeypatch):
    monkeypatch.setattr(list_rounds, "_START", 1)
    monkeypatch.setattr(list_rounds, "_BETWEEN", 0)
    # The first takes 5, the other 2 and 2; a list is left for either of them at 6.
    assert list_rounds.deal_to_the_free([5, 2, 2, 2], 2) == 9
    # The first takes 5 and the last 2.
    assert list_rounds.deal_rounds([5, 2, 2, 2], 2) == 8


def test_the_table_has_every_pattern():
    records = json.loads((RESULTS / "list_rounds.json").read_text())["points"]
    names = [name for name, _ in list_rounds.list_patterns()]
    assert [x["key"]["pattern"] for x in records] == names
    # Rounds are not worse than what the hardware would do.
    assert all(x["values"]["rounds"] < x["values"]["to_the_free"] for x in records)
