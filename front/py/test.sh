#!/usr/bin/env bash
# Builds the Python package, installs it into a virtual environment of its own, and tests it there: lints of the types,
# the tests, and the examples in the documents. Arguments go to pytest. Needs python3 with venv, and PyPI for maturin and
# what tests use; PINFOLD_PYTHON names another interpreter, PINFOLD_VENV a place to keep the environment.
set -euo pipefail
cd "$(dirname "$0")"

python=${PINFOLD_PYTHON:-python3}
venv=${PINFOLD_VENV:-}
if [ -z "$venv" ]; then
    venv=$(mktemp -d)/venv
    trap 'rm -rf "$(dirname "$venv")"' EXIT
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
# Built where the rest of the project is built, so that the library is compiled once.
"$venv/bin/pip" install --quiet '.[test]'
"$venv/bin/python" -m mypy --strict python/pinfold
"$venv/bin/python" -m mypy.stubtest pinfold
"$venv/bin/python" -m pytest "$@"
