#!/usr/bin/env bash
# Print the path of a Python that the locked packages exist for (3.12 to 3.14) and that has the
# modules named as arguments. `PYTHON=...` in the environment is asked first.
set -u

candidates() {
  [ -n "${PYTHON:-}" ] && command -v "$PYTHON"
  for name in python3.12 python3.13 python3.14 python3 python; do
    type -ap "$name"
  done
  # A shim of pyenv fails where .python-version asks for a version that pyenv lacks.
  ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-4]*/bin/python 2>/dev/null
}

suits='
import importlib.util, sys
ok = (3, 12) <= sys.version_info < (3, 15) and all(map(importlib.util.find_spec, sys.argv[1:]))
print(sys.executable) if ok else sys.exit(1)
'
while read -r candidate; do
  "$candidate" -c "$suits" "$@" 2>/dev/null && exit 0
done < <(candidates | awk '!seen[$0]++')
exit 1
