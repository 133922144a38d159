#!/usr/bin/env bash
# How words come about: a LangBridge and an MLP during stage 1, after stage 2, and moved. After speedrun.sh for each seed.
#     bash results/study.sh    (SEEDS=1: one alone)    -> results/study/study.{json,md,png}, results/study/words.{png,html}
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
SEEDS=${SEEDS:-1 2 3}
W=data/pocket
IMAGE=${IMAGE:-$W/images/test_000016.png}
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
train() {                                           # train FOLDER [--key=value ...]: stage 1 again, kept at these steps
    local folder=$1; shift
    [ -f "$folder/config.json" ] || "$PYTHON" train.py config/pocket/pretrain.py "$@" --snapshots=0,10,20,40,80,160 --out="$folder"
}
rows=()
for SEED in $SEEDS; do
    S=out/pocket/study/seed$SEED R=out/pocket/seed$SEED
    train "$S/qwen-LB-pretrain" --seed="$SEED" --init="$R/qwen-LB-words" & one=$!
    train "$S/qwen-MLP-pretrain" --seed="$SEED" --init= --connector=mlp --words_loss=0 --connector_lr=2e-3
    wait $one
    # The first is what the others' words are compared with: the connector that moves.
    rows+=("$R/qwen-LB" "$S"/qwen-LB-pretrain{/steps/*,} "$R"/llama-from-qwen-LB{-untrained,}
           "$S"/qwen-MLP-pretrain{/steps/*,} "$R/qwen-MLP")
done
"$PYTHON" results/study.py "${rows[@]}" --data $W/captions_test.json --images $W/images --truth $W/truth.json \
    --out results/study --overwrite
S=out/pocket/study/seed${SEEDS%% *}
"$PYTHON" words.py "$S"/qwen-LB-pretrain{/steps/*,} "$S"/qwen-MLP-pretrain{/steps/*,} "$IMAGE" --out results/study --overwrite
