"""Batches: every example once per epoch, bit-identical after a restart, shared by processes."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from sparsejax.data.pipeline import make_evaluation, make_train_iterator

NUM_EXAMPLES = 23
ONE_PROCESS = {"process_index": 0, "process_count": 1}


class Numbers:
    """Example i is the number i."""

    def __len__(self):
        return NUM_EXAMPLES

    def __getitem__(self, index):
        return {"inputs": np.full(3, index, np.int32), "loss_weights": np.float32(1)}


def make_iterator(seed=7, threads=0, batch_size=5, **process):
    return make_train_iterator(
        Numbers(),
        batch_size=batch_size,
        seed=seed,
        num_reading_threads=threads,
        **ONE_PROCESS | process,
    )


def take_numbers(iterator, num_batches):
    return [next(iterator)["inputs"][:, 0].tolist() for _ in range(num_batches)]


def test_every_example_occurs_once_per_epoch_in_a_new_order():
    stream = list(itertools.chain(*take_numbers(make_iterator(batch_size=1), 3 * NUM_EXAMPLES)))
    epochs = [stream[i : i + NUM_EXAMPLES] for i in range(0, len(stream), NUM_EXAMPLES)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(NUM_EXAMPLES))] * 3
    assert len({tuple(epoch) for epoch in [*epochs, sorted(stream[:NUM_EXAMPLES])]}) == 4


def test_the_seed_fixes_the_order():
    assert take_numbers(make_iterator(seed=1), 9) == take_numbers(make_iterator(seed=1), 9)
    assert take_numbers(make_iterator(seed=1), 9) != take_numbers(make_iterator(seed=2), 9)


@pytest.mark.parametrize("threads", [pytest.param(0, marks=pytest.mark.ci), 1])
@pytest.mark.parametrize(
    "num_batches", [4, *(pytest.param(n, marks=pytest.mark.ci) for n in (0, 30))]
)
def test_a_restored_state_continues_bit_for_bit(threads, num_batches):
    iterator = make_iterator(threads=threads)
    take_numbers(iterator, num_batches)
    state = json.loads(json.dumps(iterator.get_state()))
    assert state == {"next_index": num_batches}
    expected = [next(iterator) for _ in range(12)]
    restored = make_iterator(threads=threads)
    take_numbers(restored, 3)
    restored.set_state(state)
    for batch in expected:
        np.testing.assert_equal(next(restored), batch, strict=True)


def test_a_reading_thread_changes_nothing():
    assert take_numbers(make_iterator(threads=1), 20) == take_numbers(make_iterator(), 20)


@pytest.mark.parametrize("process_count", [2, pytest.param(3, marks=pytest.mark.ci)])
def test_processes_share_each_global_batch(process_count):
    shares = [
        take_numbers(make_iterator(batch_size=2, process_index=i, process_count=process_count), 20)
        for i in range(process_count)
    ]
    whole = take_numbers(make_iterator(batch_size=2 * process_count), 20)
    assert [list(itertools.chain(*parts)) for parts in zip(*shares, strict=True)] == [
        list(batch) for batch in whole
    ]


def validate(max_batches=None, batch_size=5, **process):
    return list(
        make_evaluation(Numbers(), batch_size=batch_size, **ONE_PROCESS | process)(max_batches)
    )


def test_validation_covers_the_split_once_and_fills_up_with_weight_zero():
    batches = validate()
    assert [len(batch["inputs"]) for batch in batches] == [5] * 5
    numbers = np.concatenate([batch["inputs"][:, 0] for batch in batches])
    weights = np.concatenate([batch["loss_weights"] for batch in batches])
    assert weights.tolist() == [1.0] * NUM_EXAMPLES + [0.0] * 2
    assert sorted(numbers[weights > 0]) == list(range(NUM_EXAMPLES))
    assert weights.dtype == np.float32


def test_validation_is_the_same_at_every_pass_and_can_be_cut_short():
    open_validation = make_evaluation(Numbers(), batch_size=5, **ONE_PROCESS)
    first, second = list(open_validation(None)), list(open_validation(None))
    np.testing.assert_equal(first, second)
    np.testing.assert_equal(list(open_validation(2)), first[:2])
    assert len(list(open_validation(100))) == 5


def test_validation_processes_have_equal_shapes_and_disjoint_examples():
    shares = [validate(batch_size=4, process_index=i, process_count=3) for i in range(3)]
    assert [len(share) for share in shares] == [2, 2, 2]
    kept = [
        number
        for share in shares
        for batch in share
        for number in batch["inputs"][batch["loss_weights"] > 0, 0]
    ]
    assert sorted(kept) == list(range(NUM_EXAMPLES))
    for whole, *parts in zip(validate(batch_size=12), *shares, strict=True):
        for name in whole:
            np.testing.assert_equal(np.concatenate([part[name] for part in parts]), whole[name])


def test_the_package_is_cheap_to_import():
    heavy = "{'grain', 'tensorflow_datasets', 'tokenizers', 'array_record'}"
    code = f"import sys, sparsejax.data; print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("set()", "")
