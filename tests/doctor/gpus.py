"""A machine with a GPU, as far as the driver's tool and JAX's children are asked."""

import os
import stat
import sys


def install_nvidia_smi(
    folder, monkeypatch, lines=("0, GPU-aa, NVIDIA H200, 580.65.06, 9.0",), code=0
):
    """Put an `nvidia-smi` on the path that prints lines and exits with a code."""
    program = folder / "nvidia-smi"
    text = "\n".join(lines)
    program.write_text(f"#!{sys.executable}\nprint({text!r})\nraise SystemExit({code})\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def write_child(folder, body):
    """Write a child of the doctor; `body` is called with (task, place, trial, write) for each."""
    program = folder / "child.py"
    program.write_text(
        "import ctypes, json, os, signal, sys, time\n"
        "task, seconds, kind, trials, results = sys.argv[1:]\n"
        "signal.signal(signal.SIGALRM, signal.SIG_DFL)\n"
        "file = open(results, 'a')\n"
        # As the alarm would find it, without the wait for it.
        "def hang():\n"
        "    signal.raise_signal(signal.SIGALRM)\n"
        "def write(**values):\n"
        "    print(json.dumps(values), file=file, flush=True)\n"
        "def right(place, task, directions=('forward', 'gradient')):\n"
        "    found = dict(off='y', mask='random', error=0.1, allowed=0.2, differs='')\n"
        "    seconds = {'xla': 2.0, 'mosaic_sm90': 1.0}\n"
        "    timing = dict(sizes=[1, 1, 1], density=0.1, seconds=seconds)\n"
        "    answer = {'findings': {d: found for d in directions}}\n"
        "    write(index=place, **(answer if task == 'prove' else {'timings': [timing]}))\n"
        "for place, trial in enumerate(json.load(open(trials))):\n"
        "    signal.alarm(int(seconds))\n"
        "    write(began=place, tile='t', processors=132)\n"
        + "".join(f"    {line}\n" for line in body.splitlines())
    )
    return [sys.executable, str(program)]
