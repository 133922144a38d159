#!/usr/bin/env bash
# The README's table: three seeds of speedrun.sh on one world
# -> results/pocket/seed*/NAME.json, results/pocket/table.md
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
PYTHON=${PYTHON:-.venv/bin/python}
ROWS=(qwen-MLP qwen-LB llama-MLP llama-from-qwen-LB qwen-LB-pretrain llama-from-pretrain
      llama-from-qwen-LB-untrained)
for SEED in 1 2 3; do
    SEED=$SEED bash speedrun.sh
    S=out/pocket/seed$SEED
    # The connector after stage 1, moved, with nothing trained on pocket-llama.
    MOVED=$S/llama-from-pretrain
    [ -f "$MOVED/config.json" ] ||
        "$PYTHON" transfer.py "$S/qwen-LB-pretrain" data/pocket/pocket-llama --out "$MOVED"
    [ -f "$MOVED/eval/results.json" ] || "$PYTHON" eval.py "$MOVED" \
        --tasks gqa,textvqa,mme,mmbench,pope --data data/pocket/eval --batch_size 64
    # The baseline: the MLP behind a linear map between the two LLMs' embeddings, nothing trained.
    for name in qwen-MLP qwen-MLP-pretrain; do
        MAPPED=$S/llama-from-$name-mapped
        [ -f "$MAPPED/config.json" ] || "$PYTHON" transfer.py "$S/$name" data/pocket/pocket-llama \
            --map data/pocket/words.json --out "$MAPPED"
        [ -f "$MAPPED/eval/results.json" ] || "$PYTHON" eval.py "$MAPPED" \
            --tasks gqa,textvqa,mme,mmbench,pope --data data/pocket/eval --batch_size 64
    done
    T=results/pocket/seed$SEED
    mkdir -p "$T"
    cp "$S/llama-from-qwen-LB-untrained/transfer.json" "$T/transfer-to-llama.json"
    for name in "${ROWS[@]}" llama-from-qwen-MLP{,-pretrain}-mapped; do cp "$S/$name/eval/results.json" "$T/$name.json"; done
done
FILES=()
for name in "${ROWS[@]}"; do FILES+=(results/pocket/seed*/"$name.json"); done
"$PYTHON" eval.py --mean --table "${FILES[@]}" | tee results/pocket/table.md
