#!/usr/bin/env bash
# Photographs: the words without an LLM, captions on SmolLM2, Gemma with nothing trained, all measured
# -> results/photos/report.json. What is there is not made again, and a kill goes on.
#     bash results/photos.sh      # data/photos: captions_train.json, captions_val.json, boxes_val.json, images/
#     MODELS=/folder DATA=/folder bash results/photos.sh      # models in folders instead of from the hub
# On two cores: patches of the tower 45 minutes, words 18 minutes, 160 steps of captions 20 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
DATA=${DATA:-data/photos}
OUT=${OUT:-out/photos}
TOWER=${MODELS:+$MODELS/dinov2-small} SMOL=${MODELS:+$MODELS/smollm2-135m-instruct} GEMMA=${MODELS:+$MODELS/gemma-3-270m}
TOWER=${TOWER:-facebook/dinov2-small} SMOL=${SMOL:-HuggingFaceTB/SmolLM2-135M-Instruct} GEMMA=${GEMMA:-google/gemma-3-270m}
WORDS=${WORDS:-$DATA/words.json}
HERE="--data=$DATA/captions_train.json --images=$DATA/images --features=$OUT/features"
VAL="--captions $DATA/captions_val.json --boxes $DATA/boxes_val.json --images $DATA/images --out results/photos/report.json"
mkdir -p results/photos "$OUT"
[ -f "$WORDS" ] || "$PYTHON" vocab.py --tokenizers "$SMOL" "$GEMMA" ${MORE_TOKENIZERS:-} \
    --corpus ${CORPUS:-$DATA/captions_train.json} --count answers --size 3072 --out "$WORDS"
[ -f "$OUT/words/config.json" ] || "$PYTHON" train.py config/photos/words.py $HERE --out="$OUT/words" \
    --vision_tower="$TOWER" --llm="$SMOL" --words="$WORDS"
[ -f "$OUT/pretrain/config.json" ] || "$PYTHON" train.py config/photos/pretrain.py $HERE --out="$OUT/pretrain" --init="$OUT/words"
[ -f "$OUT/gemma/config.json" ] || "$PYTHON" transfer.py "$OUT/pretrain" "$GEMMA" --out "$OUT/gemma"
"$PYTHON" results/photos.py words-all-val="$OUT/words" pretrain-all-val="$OUT/pretrain" $VAL --number 1000 --words_only
"$PYTHON" results/photos.py words="$OUT/words" --number 64 $VAL
"$PYTHON" results/photos.py smollm2="$OUT/pretrain" gemma-untrained="$OUT/gemma" --number 96 $VAL
