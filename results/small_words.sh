#!/usr/bin/env bash
# How many words, on real models: stage 1 of config/small with the 2,307, 8,192 and all 46,136 words that SmolLM2 and Gemma-3
# share, by how often the captions have them; each moved to Gemma-3. After results/small.sh's data; 15 minutes each on two cores.
#     MODELS=/folder DATA=/folder bash results/small_words.sh     # -> results/small/words/transfer-N.json and study.*
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
DATA=${DATA:-data/small}
OUT=${OUT:-out/small/words}
TOWER=${MODELS:+$MODELS/dinov2-small} SMOL=${MODELS:+$MODELS/smollm2-135m-instruct} GEMMA=${MODELS:+$MODELS/gemma-3-270m}
TOWER=${TOWER:-facebook/dinov2-small} SMOL=${SMOL:-HuggingFaceTB/SmolLM2-135M-Instruct} GEMMA=${GEMMA:-google/gemma-3-270m}
mkdir -p "$OUT" results/small/words
[ -f "$OUT/words.json" ] || "$PYTHON" vocab.py --tokenizers "$SMOL" "$GEMMA" --size 1000000 --count answers \
    --corpus "$DATA/captions_train.json" --out "$OUT/words.json"
folders=()
for N in ${SIZES:-2307 8192 46136}; do              # a smaller list is a prefix of a larger one
    folders+=("$OUT/$N" "$OUT/$N-gemma")
    [ -f "$OUT/$N/config.json" ] || "$PYTHON" train.py config/small/pretrain.py --data="$DATA/captions_train.json" \
        --images="$DATA/images" --vision_tower="$TOWER" --llm="$SMOL" --words="$OUT/words.json" --num_words="$N" --out="$OUT/$N"
    [ -f "$OUT/$N-gemma/transfer.json" ] || "$PYTHON" transfer.py "$OUT/$N" "$GEMMA" --out "$OUT/$N-gemma" \
        --eval "$DATA/captions_test.json" --images "$DATA/images"
    cp "$OUT/$N-gemma/transfer.json" "results/small/words/transfer-$N.json"
done
"$PYTHON" words.py --study "${folders[@]}" --data "$DATA/captions_test.json" --images "$DATA/images" --number 60 \
    --out results/small/words --overwrite
