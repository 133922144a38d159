#!/usr/bin/env bash
# Downloads the paper's data. Another Python than that of .venv: PYTHON=python3 bash tools/get_data.sh
here="$(cd "$(dirname "$0")/.." && pwd)"
exec "${PYTHON:-$here/.venv/bin/python}" "$here/tools/get_data.py" "$@"
