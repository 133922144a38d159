#!/usr/bin/env bash
# Accuracy over SFT steps on pocket-llama: a transferred connector, a fresh one, and an MLP pretrained on that very LLM.
# After results/pocket.sh, or SEED=1 bash speedrun.sh and then SEEDS=1 here  -> results/curve.json, curve.png
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
W=data/pocket
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
run() {                                             # run SEED NAME [--key=value ...]
    local out=out/pocket/seed$1/curve-$2 seed=$1; shift 2
    [ -f "$out/config.json" ] || "$PYTHON" train.py config/pocket/sft.py --out="$out" --seed="$seed" --snapshots=20,40,80,160 "$@"
    for folder in "$out"/steps/* "$out"; do
        [ -f "$folder/eval/results.json" ] || "$PYTHON" eval.py "$folder" --tasks pope,gqa --data $W/eval --batch_size 64
    done
}
for SEED in ${SEEDS:-1 2 3}; do
    S=out/pocket/seed$SEED
    { run "$SEED" transferred --init="$S/llama-from-qwen-LB-untrained"; } & one=$!
    { run "$SEED" mlp --init="$S/llama-MLP-pretrain" --connector_lr=7e-4; } & two=$!
    wait $one
    run "$SEED" fresh --init= --connector_lr=7e-4 --llm=$W/pocket-llama --vision_tower=$W/vision-tower --words=$W/words.json --hidden=256
    wait $two
done
"$PYTHON" results/curve.py
