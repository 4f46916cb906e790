"""Train, evaluate or use a model, or find out what to train it with.

  python train.py --config=configs/quickstart.py --workdir=runs/quickstart
  python train.py --mode=eval --workdir=runs/quickstart
  python train.py --mode=generate --workdir=runs/quickstart --prompt="def "
  python train.py --config=configs/quickstart.py --mode=plan --target=h200
  python train.py --config=configs/fst_small.py --mode=find_decay --workdir=runs/decay

Any setting can be changed with --config.KEY=VALUE; `python -m configs.base` lists them all. The
same workdir resumes. Exit code 2: a setting has to be changed; the message says which.
"""

import shlex
import sys

from absl import flags

from sparsejax import command

if __name__ == "__main__":
    flags.adopt_module_key_flags(command)  # --help lists them
    command.run(sys.argv, resume_command=shlex.join([sys.executable, *sys.argv]))
