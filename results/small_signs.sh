#!/usr/bin/env bash
# Small signs with and without tiles, after `SEED=1 bash speedrun.sh` (all SEEDS)
# -> results/pocket/small-signs.json
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
SMALL=data/pocket-small-signs
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
[ -d $SMALL/eval ] || "$PYTHON" results/small_signs.py draw data/pocket $SMALL
run() {                                             # run SEED NAME [--key=value ...]
    local out=out/pocket/seed$1/small-signs-$2
    [ -f "$out/config.json" ] || "$PYTHON" train.py config/pocket/sft.py --seed="$1" "${@:3}" \
        --init="out/pocket/seed$1/qwen-LB-pretrain" --images=$SMALL/images --connector_lr=7e-4 \
        --out="$out"
    [ -f "$out/eval/results.json" ] || "$PYTHON" eval.py "$out" --tasks textvqa,gqa,pope \
        --data $SMALL/eval --batch_size 32
}
for SEED in ${SEEDS:-1 2 3}; do
    run "$SEED" one-square
    run "$SEED" tiles "--tiles=((192,192),)"
done
"$PYTHON" results/small_signs.py table
