"""Processes that hang or die, and what is said of them."""

import os
import sys
import threading
import time

import pytest

from pallas_kernels.doctor.isolation import run_isolated


def _run(code, **options):
    return run_isolated([sys.executable, "-c", code], **{"limit_seconds": 30, **options})


FAULTS = {
    "crash, exit code 3: last": "print('first'); print('last\\n'); raise SystemExit(3)",
    "crash, SIGSEGV": "import ctypes; ctypes.string_at(0)",
    "crash, SIGABRT": "import os; os.abort()",
    "illegal address": "print('CUDA_ERROR_ILLEGAL_ADDRESS: an illegal'); raise SystemExit(1)",
    "hang": "import signal; signal.raise_signal(signal.SIGALRM)",
    "": "print('well')",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault or "none")
def test_how_it_ended_is_named(fault):
    assert _run(FAULTS[fault]).fault == fault


def test_a_process_that_hangs_is_killed_with_its_children(tmp_path):
    pids = tmp_path / "pids"
    code = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "os.fork()\n"
        f"open({str(pids)!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
        "signal.pause()\n"
    )
    stop = threading.Event()

    def stop_once_both_run():
        while not pids.exists() or pids.read_text().count("\n") < 2:
            time.sleep(0.01)
        stop.set()

    threading.Thread(target=stop_once_both_run, daemon=True).start()
    assert _run(code, stop=stop, limit_seconds=600).fault == "hang"
    for pid in map(int, pids.read_text().split()):
        # For ever if it lives on.
        while _runs(pid):
            time.sleep(0.01)


def test_a_process_can_be_stopped_before_its_time():
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    # It ends in no other way.
    assert _run("import signal; signal.pause()", stop=stop, limit_seconds=1e6).fault == "hang"


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_takes_no_memory_in_advance_and_gets_its_variables():
    code = "import os; print(os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'], os.environ['GIVEN'])"
    assert _run(code, environment={"GIVEN": "here"}).output == "false here\n"
    assert "GIVEN" not in os.environ
