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
[ -z "${MORE:-}" ] || : "${QUESTIONS:?MORE=1 needs QUESTIONS, see below}"         # said now, not after hours
mkdir -p results/photos "$OUT"
[ -f "$WORDS" ] || "$PYTHON" vocab.py --tokenizers "$SMOL" "$GEMMA" ${MORE_TOKENIZERS:-} \
    --corpus ${CORPUS:-$DATA/captions_train.json} --count answers --size 3072 --out "$WORDS"
train() {                                           # train NAME CONFIG [--key=value ...]
    local name=$1; shift
    [ -f "$OUT/$name/config.json" ] || "$PYTHON" train.py "$@" --out="$OUT/$name"
}
transfer() { [ -f "$OUT/$2/config.json" ] || "$PYTHON" transfer.py "$OUT/$1" "$GEMMA" --out "$OUT/$2" "${@:3}"; }
BASE="$HERE --vision_tower=$TOWER --llm=$SMOL"
train words config/photos/words.py $BASE --words="$WORDS"
train pretrain config/photos/pretrain.py $HERE --init="$OUT/words"
transfer pretrain gemma
"$PYTHON" results/photos.py words-all-val="$OUT/words" pretrain-all-val="$OUT/pretrain" $VAL --number 1000 --words_only
"$PYTHON" results/photos.py words="$OUT/words" --number 64 $VAL
"$PYTHON" results/photos.py smollm2="$OUT/pretrain" gemma-untrained="$OUT/gemma" --number 96 $VAL

# MORE=1: the baselines, a second seed, fewer steps and photographs, and questions. Some hours of two cores.
# QUESTIONS: a folder with images/ and two files that `results/questions.py split` has written.
[ -n "${MORE:-}" ] || exit 0
FRESH="$BASE --init= --image_size=224 --pool=2 --words_loss=0"
train mlp config/photos/pretrain.py $FRESH --connector=mlp --connector_lr=1e-3
transfer mlp mlp-mapped-gemma --map "$WORDS"
train plain config/photos/pretrain.py $FRESH --words="$WORDS" --hidden=512
transfer plain plain-gemma
train words-43 config/photos/words.py $BASE --words="$WORDS" --seed=43
train pretrain-43 config/photos/pretrain.py $HERE --init="$OUT/words-43" --seed=43
transfer pretrain-43 gemma-43
train words-all-476-steps config/photos/words.py $BASE --words="$WORDS" --max_steps=476
"$PYTHON" -c "
import json
records = json.load(open('$DATA/captions_train.json'))
kept = set(sorted({record['image'] for record in records})[::4])
json.dump([record for record in records if record['image'] in kept], open('$OUT/quarter.json', 'w'))"
train words-quarter-476-steps config/photos/words.py $BASE --words="$WORDS" --data="$OUT/quarter.json"
train words-112-pixels-476-steps config/photos/words.py $BASE --words="$WORDS" --image_size=112 --pool=1 --max_steps=476 \
    --features="$OUT/features112"
REST="${VAL/report.json/report-more.json}"
"$PYTHON" results/photos.py words-43="$OUT/words-43" pretrain-43="$OUT/pretrain-43" $REST --number 1000 --words_only
"$PYTHON" results/photos.py words-all-476-steps="$OUT/words-all-476-steps" \
    words-quarter-476-steps="$OUT/words-quarter-476-steps" words-112-pixels-476-steps="$OUT/words-112-pixels-476-steps" $REST --number 1000 --words_only
"$PYTHON" results/photos.py smollm2-43="$OUT/pretrain-43" gemma-43-untrained="$OUT/gemma-43" $REST --number 96
"$PYTHON" results/photos.py mlp="$OUT/mlp" mlp-mapped-gemma="$OUT/mlp-mapped-gemma" no-words-loss="$OUT/plain" \
    no-words-loss-gemma="$OUT/plain-gemma" $REST --number 48
for name in pretrain mlp; do
    train "questions-$name" config/photos/questions.py --init="$OUT/$name" --data="$QUESTIONS/train.json" \
        --images="$QUESTIONS/images" --features="$OUT/questions-features"
    "$PYTHON" results/questions.py measure $name="$OUT/questions-$name" --data "$QUESTIONS/val.json" \
        --images "$QUESTIONS/images" --out results/photos/questions.json
done
