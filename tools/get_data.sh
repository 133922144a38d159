#!/usr/bin/env bash
# Downloads the paper's data. PYTHON=/path/to/python takes another Python than that of .venv.
here="$(cd "$(dirname "$0")/.." && pwd)"
exec "${PYTHON:-$here/.venv/bin/python}" "$here/tools/get_data.py" "$@"
