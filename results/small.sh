#!/usr/bin/env bash
# Real models: DINOv2-small and SmolLM2-135M-Instruct, stage 1; moved to Gemma-3-270M; a short stage 2 there; held-out
# captions and words of all three -> results/small/. About an hour on two cores; what is there is not made again, a kill goes on.
#     bash results/small.sh           # data/small: captions_train.json, captions_test.json, images/ (config/small says how)
#     MODELS=/folder DATA=/folder bash results/small.sh               # models in folders instead of from the hub
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
DATA=${DATA:-data/small}
OUT=${OUT:-out/small}
TOWER=${MODELS:+$MODELS/dinov2-small} SMOL=${MODELS:+$MODELS/smollm2-135m-instruct} GEMMA=${MODELS:+$MODELS/gemma-3-270m}
TOWER=${TOWER:-facebook/dinov2-small} SMOL=${SMOL:-HuggingFaceTB/SmolLM2-135M-Instruct} GEMMA=${GEMMA:-google/gemma-3-270m}
HERE="--data=$DATA/captions_train.json --images=$DATA/images"
[ -f "$DATA/words.json" ] || "$PYTHON" vocab.py --tokenizers "$SMOL" "$GEMMA" --size 8192 --out "$DATA/words.json" \
    --corpus "$DATA/captions_train.json"
[ -f "$OUT/pretrain/config.json" ] || "$PYTHON" train.py config/small/pretrain.py $HERE --out="$OUT/pretrain" \
    --vision_tower="$TOWER" --llm="$SMOL" --words="$DATA/words.json"
[ -f "$OUT/gemma/config.json" ] || "$PYTHON" transfer.py "$OUT/pretrain" "$GEMMA" --out "$OUT/gemma"
[ -f "$OUT/gemma-sft/config.json" ] || "$PYTHON" train.py config/small/sft.py $HERE --init="$OUT/gemma" --out="$OUT/gemma-sft"
"$PYTHON" results/captions.py SmolLM2="$OUT/pretrain" "Gemma, moved"="$OUT/gemma" "Gemma, SFT"="$OUT/gemma-sft" \
    --data "$DATA/captions_test.json" --images "$DATA/images" --out results/small/captions
cp "$OUT/pretrain/loss.png" results/small/loss.png
cp "$OUT/pretrain/log.jsonl" results/small/log.jsonl
FIRST=$(grep -o '"image": "[^"]*"' "$DATA/captions_test.json" | sed -n '1s/.*: "\(.*\)"/\1/p')
"$PYTHON" words.py "$OUT/pretrain" "$OUT/gemma" "${IMAGE:-$DATA/images/$FIRST}" --out results/small --overwrite
"$PYTHON" results/study.py "$OUT"/{pretrain,gemma,gemma-sft} --data "$DATA/captions_test.json" --images "$DATA/images" --number 60 \
    --out results/small --overwrite
