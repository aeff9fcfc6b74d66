#!/usr/bin/env bash
# Builds the Python package, installs it into a virtual environment of its own, and tests it there: its types, its
# promises, and the examples in the documents. Arguments go to pytest. Needs python3 with venv, and PyPI for maturin and
# what tests use; PINFOLD_PYTHON names another interpreter, PINFOLD_VENV a place to keep the environment.
set -euo pipefail
cd "$(dirname "$0")"

python=${PINFOLD_PYTHON:-python3}
venv=${PINFOLD_VENV:-}
if [ -z "$venv" ]; then
    scratch=$(mktemp -d)
    venv=$scratch/venv
    trap 'rm -rf "$scratch"' EXIT
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
if ! "$venv/bin/pip" install --quiet "maturin>=1.9,<2" "hypothesis>=6" "mypy>=1.11" "numpy>=1.26" "pytest>=8" "pytest-timeout>=2.3"; then
    echo "what the tests need cannot be had from PyPI: the package is not tested"
    # On a machine that is there to test, that is a failure.
    [ "${CI:-}" != true ]
    exit
fi
# As a user would, but with the maturin that is there; into the project's target directory, where the library is built.
PATH="$venv/bin:$PATH" pip install --quiet --no-build-isolation .
"$venv/bin/python" -m mypy --strict python/pinfold
# Before 3.12 the buffer protocol has no methods that show.
"$venv/bin/python" -m mypy.stubtest --ignore-unused-allowlist --allowlist <(printf 'pinfold._native.Mapping.__%s__\n' buffer release_buffer) pinfold
"$venv/bin/python" -m pytest "$@"
