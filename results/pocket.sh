#!/usr/bin/env bash
# The README's table: three seeds of speedrun.sh on one world -> results/pocket/seed*/NAME.json, results/pocket/table.md
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
PYTHON=${PYTHON:-.venv/bin/python}
ROWS=(qwen-MLP qwen-LB llama-MLP llama-from-qwen-LB qwen-LB-pretrain llama-from-pretrain llama-from-qwen-LB-untrained)
for SEED in 1 2 3; do
    SEED=$SEED bash speedrun.sh
    S=out/pocket/seed$SEED
    # llama-from-pretrain: the connector after stage 1, moved, with nothing trained there.
    [ -f "$S/llama-from-pretrain/config.json" ] || "$PYTHON" transfer.py "$S/qwen-LB-pretrain" data/pocket/pocket-llama \
        --out "$S/llama-from-pretrain"
    [ -f "$S/llama-from-pretrain/eval/results.json" ] || "$PYTHON" eval.py "$S/llama-from-pretrain" \
        --tasks gqa,textvqa,mme,mmbench,pope --data data/pocket/eval --batch_size 64
    mkdir -p results/pocket/seed$SEED
    cp "$S/llama-from-qwen-LB-untrained/transfer.json" "results/pocket/seed$SEED/transfer-to-llama.json"
    for name in "${ROWS[@]}"; do cp "$S/$name/eval/results.json" "results/pocket/seed$SEED/$name.json"; done
done
FILES=()
for name in "${ROWS[@]}"; do FILES+=(results/pocket/seed*/"$name.json"); done
"$PYTHON" eval.py --mean --table "${FILES[@]}" | tee results/pocket/table.md
