#!/usr/bin/env bash
# Make $VENV/newest (.venv/newest): the newest versions that pyproject.toml allows, and the compiler
# for absent GPUs that fits that JAX.
set -eu
cd "$(dirname "$0")/.."
newest="${VENV:-.venv}/newest"
base=$(requirements/find-python.sh)
rm -rf "$newest"
"$base" -m venv "$newest"
install() { "$newest/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
echo "Installing the newest packages into $newest"
# What the project asks for and not the project: tests import the working tree.
"$newest/bin/python" - > "$newest/requirements.txt" <<'PYTHON'
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
print(*project["dependencies"], *extras["data"], *extras["pretrained"], *extras["docs"], *extras["dev"], sep="\n")
PYTHON
install --upgrade -r "$newest/requirements.txt"
jaxlib=$("$newest/bin/python" -c 'import jaxlib; print(jaxlib.__version__)')
sed -E "s/^(jax-cuda13-(plugin|pjrt))==.*/\1==$jaxlib/" requirements/compile.txt > "$newest/compile.txt"
# As requirements/install.sh does: beside the environment's packages.
install --no-deps --target "$newest/compile" -r "$newest/compile.txt"
"$newest/bin/python" -c 'import jax; print("JAX", jax.__version__)'
