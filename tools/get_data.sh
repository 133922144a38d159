#!/usr/bin/env bash
# Downloads the paper's data into the layout of docs/paper.md. Start it again to go on:
#     bash tools/get_data.sh [--only ocr_vqa,coco] [--root DIR] [--dry-run]
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
python="${PYTHON:-$here/.venv/bin/python}"
command -v "$python" > /dev/null || { echo "get_data.sh: there is no $python; bash tests/run.sh makes it" >&2; exit 1; }
exec "$python" "$here/tools/get_data.py" "$@"
