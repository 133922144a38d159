#!/usr/bin/env bash
# The README's table: three seeds of speedrun.sh on one world -> results/pocket/seed*/NAME.json, results/pocket/table.md
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
ROWS=(qwen-MLP qwen-LB llama-MLP llama-from-qwen-LB qwen-LB-pretrain llama-from-qwen-LB-untrained)
for SEED in 1 2 3; do
    SEED=$SEED bash speedrun.sh
    mkdir -p results/pocket/seed$SEED
    cp "out/pocket/seed$SEED/llama-from-qwen-LB-untrained/transfer.json" "results/pocket/seed$SEED/transfer-to-llama.json"
    for name in "${ROWS[@]}"; do cp "out/pocket/seed$SEED/$name/eval/results.json" "results/pocket/seed$SEED/$name.json"; done
done
FILES=()
for name in "${ROWS[@]}"; do FILES+=(results/pocket/seed*/"$name.json"); done
"$PYTHON" eval.py --mean --table "${FILES[@]}" | tee results/pocket/table.md
