#!/bin/sh
# The environments of foreign clients, under .venvs: OpenAI's client in two major versions, schemathesis, lm-eval. They are kept.
# Used by tests/serve/test_clients.py, test_schema.py and benchmarks/serve_lm_eval.py, which say so where one is missing.
# Usage: sh benchmarks/prepare_clients.sh [PYTHON]
set -eu
cd "$(dirname "$0")/.."
python=${1:-python3}

prepare() { # name, then what pip installs, one call after the other
    name=$1
    shift
    [ -e ".venvs/$name/.ready" ] && return
    "$python" -m venv ".venvs/$name"
    for packages in "$@"; do
        # shellcheck disable=SC2086
        ".venvs/$name/bin/python" -m pip install --quiet --disable-pip-version-check $packages
    done
    touch ".venvs/$name/.ready"
}

prepare openai1 'openai>=1,<2'
prepare openai2 'openai>=2,<3'
prepare schemathesis 'schemathesis>=4.32'
# torch first, so that the choice of its build is the user's.
prepare lmeval "${TORCH:-torch==2.13.0}" 'lm_eval[api]==0.4.13 peft>=0.21 transformers>=5.17'
