#!/usr/bin/env bash
# The README's table: three seeds of speedrun.sh on one world
# -> results/pocket/seed*/NAME.json, results/pocket/table.md
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
PYTHON=${PYTHON:-.venv/bin/python}
ROWS=(qwen-MLP qwen-LB llama-MLP llama-from-qwen-LB qwen-LB-pretrain llama-from-pretrain
      llama-from-qwen-LB-untrained)
move() {                # move NAME NEW_NAME [--map WORDS]: to pocket-llama, with nothing trained
    [ -f "$S/$2/config.json" ] ||
        "$PYTHON" transfer.py "$S/$1" data/pocket/pocket-llama --out "$S/$2" "${@:3}"
    [ -f "$S/$2/eval/results.json" ] || "$PYTHON" eval.py "$S/$2" \
        --tasks gqa,textvqa,mme,mmbench,pope --data data/pocket/eval --batch_size 64
}
for SEED in 1 2 3; do
    SEED=$SEED bash speedrun.sh
    S=out/pocket/seed$SEED T=results/pocket/seed$SEED
    move qwen-LB-pretrain llama-from-pretrain
    # The baseline: the MLP behind a linear map between the two LLMs' embeddings.
    for name in qwen-MLP{,-pretrain}; do
        move $name llama-from-$name-mapped --map data/pocket/words.json
    done
    mkdir -p "$T"
    cp "$S/llama-from-qwen-LB-untrained/transfer.json" "$T/transfer-to-llama.json"
    for name in "${ROWS[@]}" llama-from-qwen-MLP{,-pretrain}-mapped; do
        cp "$S/$name/eval/results.json" "$T/$name.json"
    done
done
FILES=()
for name in "${ROWS[@]}"; do FILES+=(results/pocket/seed*/"$name.json"); done
"$PYTHON" eval.py --mean --table "${FILES[@]}" | tee results/pocket/table.md
