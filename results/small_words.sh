#!/usr/bin/env bash
# How many words, on real models: one epoch of config/small's stage 1 with the 2,307, 8,192 and all 46,136 words that SmolLM2
# and Gemma-3 share, by how often the captions have them; each moved to Gemma-3. Some 20 minutes on two cores.
#     MODELS=/folder DATA=/folder bash results/small_words.sh     # as small.sh  -> results/small/words/transfer-N.json, study.*
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
DATA=${DATA:-data/small}
OUT=${OUT:-out/small/words}
TOWER=${MODELS:+$MODELS/dinov2-small} SMOL=${MODELS:+$MODELS/smollm2-135m-instruct} GEMMA=${MODELS:+$MODELS/gemma-3-270m}
TOWER=${TOWER:-facebook/dinov2-small} SMOL=${SMOL:-HuggingFaceTB/SmolLM2-135M-Instruct} GEMMA=${GEMMA:-google/gemma-3-270m}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT" results/small/words
[ -f "$OUT/words.json" ] || "$PYTHON" vocab.py --tokenizers "$SMOL" "$GEMMA" --size 1000000 --count answers \
    --corpus "$DATA/captions_train.json" --out "$OUT/words.json"
one() {                                             # one N: the first N words; a smaller list is a prefix of a larger one
    [ -f "$OUT/words-$1/config.json" ] || "$PYTHON" train.py config/small/pretrain.py --epochs=1 \
        --data="$DATA/captions_train.json" --images="$DATA/images" --vision_tower="$TOWER" --llm="$SMOL" \
        --words="$OUT/words.json" --num_words="$1" --out="$OUT/words-$1"
    [ -f "$OUT/words-$1-gemma/transfer.json" ] || "$PYTHON" transfer.py "$OUT/words-$1" "$GEMMA" --out "$OUT/words-$1-gemma" \
        --eval "$DATA/captions_test.json" --images "$DATA/images" --limit 112
    cp "$OUT/words-$1-gemma/transfer.json" "results/small/words/transfer-$1.json"
}
one 46136 & pid=$!                                  # takes as long as the other two
one 2307
one 8192
wait $pid
"$PYTHON" results/study.py "$OUT"/words-{2307,8192,46136} --data "$DATA/captions_test.json" --images "$DATA/images" --number 60 \
    --out results/small/words --overwrite
