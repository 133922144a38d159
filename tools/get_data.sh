#!/usr/bin/env bash
# Downloads the paper's data into the layout of docs/paper.md. Start it again to go on:
#     bash tools/get_data.sh [--only ocr_vqa,coco] [--root DIR] [--dry-run]
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
python="$here/.venv/bin/python"
[ -x "$python" ] || python=python3
exec "$python" "$here/tools/get_data.py" "$@"
