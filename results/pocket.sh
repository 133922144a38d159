#!/usr/bin/env bash
# The README's table: three seeds of speedrun.sh on one world
# -> $R/seed*/NAME.json, $R/table.md; R is results/pocket, with bfloat16 results/pocket/bfloat16
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
PYTHON=${PYTHON:-.venv/bin/python}
R=results/pocket
"$PYTHON" -c 'import sys; from support.device import choose_dtype as choose
sys.exit(choose("auto", "cpu") != "bfloat16")' && R=results/pocket/bfloat16
ROWS=(qwen-MLP qwen-LB llama-MLP llama-from-qwen-LB qwen-LB-pretrain llama-from-pretrain
      llama-from-qwen-LB-untrained)
MAPPED=(llama-from-qwen-MLP{,-pretrain}-mapped)     # of the first seed only
move() {                # move NAME NEW_NAME [--map WORDS]: to pocket-llama, with nothing trained
    [ -f "$S/$2/config.json" ] ||
        "$PYTHON" transfer.py "$S/$1" data/pocket/pocket-llama --out "$S/$2" "${@:3}"
    [ -f "$S/$2/eval/results.json" ] || "$PYTHON" eval.py "$S/$2" \
        --tasks gqa,textvqa,mme,mmbench,pope --data data/pocket/eval --batch_size 64
}
for SEED in 1 2 3; do
    SEED=$SEED bash speedrun.sh
    S=out/pocket/seed$SEED T=$R/seed$SEED
    mkdir -p "$T"
    move qwen-LB-pretrain llama-from-pretrain
    for name in "${ROWS[@]}"; do cp "$S/$name/eval/results.json" "$T/$name.json"; done
    cp "$S/llama-from-qwen-LB-untrained/transfer.json" "$T/transfer-to-llama.json"
done
# The baseline: the MLP behind a linear map between the two LLMs' embeddings.
S=out/pocket/seed1
for name in "${MAPPED[@]}"; do
    source=${name#llama-from-}
    move "${source%-mapped}" "$name" --map data/pocket/words.json
    cp "$S/$name/eval/results.json" "$R/seed1/$name.json"
done
FILES=()
for name in "${ROWS[@]}"; do FILES+=("$R"/seed*/"$name.json"); done
"$PYTHON" eval.py --mean --table "${FILES[@]}" | tee "$R/table.md"
