#!/usr/bin/env bash
# The README's table: three seeds of speedrun.sh on one world -> results/pocket/seed*/NAME.json, results/pocket/table.md
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
ROWS=(qwen-MLP qwen-LB wide-MLP wide-from-qwen-LB llama-MLP llama-from-qwen-LB
      qwen-LB-pretrain wide-from-qwen-LB-untrained llama-from-qwen-LB-untrained)
for SEED in 1 2 3; do
    BASELINES=1 SEED=$SEED bash speedrun.sh
    mkdir -p results/pocket/seed$SEED
    for name in wide llama; do
        cp "out/pocket/seed$SEED/$name-from-qwen-LB-untrained/transfer.json" "results/pocket/seed$SEED/transfer-to-$name.json"
    done
    for name in "${ROWS[@]}"; do cp "out/pocket/seed$SEED/$name/eval/results.json" "results/pocket/seed$SEED/$name.json"; done
done
FILES=()
for name in "${ROWS[@]}"; do FILES+=(results/pocket/seed*/"$name.json"); done
"$PYTHON" eval.py --mean --table "${FILES[@]}" | tee results/pocket/table.md
