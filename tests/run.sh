#!/usr/bin/env bash
# Makes .venv if there is none, installs requirements.txt, runs the tests on the CPU, whatever the machine has:
#     bash tests/run.sh [pytest's arguments]          DEVICE=cuda bash tests/run.sh uses the GPUs
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
[ .venv/installed -nt requirements.txt ] || { .venv/bin/pip install -q --no-compile -r requirements.txt; touch .venv/installed; }
unset PYTHONDONTWRITEBYTECODE                   # else each process that a test starts compiles torch's Python anew
export OMP_WAIT_POLICY=PASSIVE                  # two ranks on two cores must not spin
parallel=(-n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder)     # a file's tests share what they make
if [ "${DEVICE:-cpu}" = cpu ]; then export CUDA_VISIBLE_DEVICES=; else parallel=(); fi
exec .venv/bin/python -m pytest -q tests "${parallel[@]}" "$@"
