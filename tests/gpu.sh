#!/usr/bin/env bash
# Test the code on one GPU and measure its speed. We estimate 8 minutes; it has not run on a GPU.
#     bash tests/gpu.sh [--out FILE.json]        # without --out: results/gpu/<name of the GPU>.json
#     DEVICE=cpu SMALL=1 bash tests/gpu.sh       # the same code at tiny sizes, without a GPU
# It needs a Python with torch, transformers and accelerate, and no network: PYTHON, else that of
# .venv, else python3. WHEELS=FOLDER installs what else is missing from a folder of wheels. On a
# machine with a network, make that folder by
#     pip download -d wheels --python-version 3.12 --only-binary=:all: --no-deps pillow tqdm \
#         safetensors matplotlib contourpy cycler fonttools kiwisolver pyparsing python-dateutil \
#         six pytest iniconfig pluggy pygments
set -euo pipefail
cd "$(dirname "$0")/.."
[ -n "${PYTHON:-}" ] || { [ -x .venv/bin/python ] && PYTHON=.venv/bin/python || PYTHON=python3; }
if [ -n "${WHEELS:-}" ]; then                   # a package that is installed stays as it is
    PIP_BREAK_SYSTEM_PACKAGES=1 "$PYTHON" -m pip install -q --no-index --find-links "$WHEELS" \
        pillow tqdm safetensors matplotlib pytest
fi
export DEVICE=${DEVICE:-cuda} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
[ "$DEVICE" != cpu ] || export CUDA_VISIBLE_DEVICES=
exec "$PYTHON" tests/gpu.py "$@"
