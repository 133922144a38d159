#!/usr/bin/env bash
# Photographs: the words without an LLM, then SmolLM2 and Gemma with nothing trained, all measured
# -> results/photos/report.json. A finished training is kept and a stopped one continues; measuring runs again.
#     bash results/photos.sh      # data/photos: captions_train.json, captions_val.json, boxes_val.json, images/
#     MODELS=/folder DATA=/folder bash results/photos.sh      # models in folders instead of from the hub
# On two cores: patches of the tower 45 minutes, words 18 minutes a seed, measuring 20 minutes.
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
measure() { "$PYTHON" results/photos.py "$@"; }
BASE="$HERE --vision_tower=$TOWER --llm=$SMOL"
words_alone() {                                     # words_alone PREFIX SEED "where to measure" [--key=value ...]
    local prefix=$1 seed=$2 where=$3; shift 3
    local words=${prefix}words-$seed gemma=${prefix}gemma-$seed
    train $words config/photos/words.py $BASE --words="$WORDS" --seed=$seed "$@"
    transfer $words $gemma
    measure $words="$OUT/$words" $where --number 1000 --words_only
    measure ${prefix}smollm2-$seed="$OUT/$words" $gemma="$OUT/$gemma" $where --number 96 --prompt
}
for seed in 42 43; do words_alone "" $seed "$VAL"; done

# MORE=1: captions on SmolLM2, the baselines, fewer steps and photographs, and questions. Some hours of two cores.
# QUESTIONS: a folder with images/ and two files that `results/questions.py split` has written.
[ -n "${MORE:-}" ] || exit 0
REST="${VAL/report.json/report-more.json}"
# All rows below but two were trained with words_patch_weight=0. Step 2: 160 steps of captions on SmolLM2, after a words stage at the
# paper's temperature, 1.
for seed in 42 43; do
    words_alone no-patches- $seed "$REST" --words_patch_weight=0
    train step1-$seed config/photos/words.py $BASE --words="$WORDS" --words_patch_weight=0 --temperature=1 --seed=$seed
    train step2-$seed config/photos/pretrain.py $HERE --init="$OUT/step1-$seed" --seed=$seed
    transfer step2-$seed step2-gemma-$seed
    measure step2-$seed="$OUT/step2-$seed" $REST --number 1000 --words_only
    measure step2-smollm2-$seed="$OUT/step2-$seed" step2-gemma-$seed="$OUT/step2-gemma-$seed" $REST --number 96
done
measure step1-smollm2-42="$OUT/step1-42" $REST --number 64
FRESH="$BASE --init= --image_size=224 --pool=2 --words_loss=0"
train mlp config/photos/pretrain.py $FRESH --connector=mlp --connector_lr=1e-3
transfer mlp mlp-gemma --map "$WORDS"
train plain config/photos/pretrain.py $FRESH --words="$WORDS" --hidden=512
transfer plain plain-gemma
measure mlp="$OUT/mlp" mlp-mapped-gemma="$OUT/mlp-gemma" no-words-loss="$OUT/plain" no-words-loss-gemma="$OUT/plain-gemma" $REST --number 48
measure mlp-mapped-gemma-text-norm="$OUT/mlp-gemma" $REST --number 48 --match_norm
"$PYTHON" -c "
import json
records = json.load(open('$DATA/captions_train.json'))
kept = set(sorted({record['image'] for record in records})[::4])
json.dump([record for record in records if record['image'] in kept], open('$OUT/quarter.json', 'w'))"
WORDS_STAGE="config/photos/words.py $BASE --words=$WORDS --words_patch_weight=0"
train words-4-epochs $WORDS_STAGE --epochs=4
# With the patches' part again:
train words-patches-all-476-steps $WORDS_STAGE --words_patch_weight=0.3 --max_steps=476
train words-patches-quarter-476-steps $WORDS_STAGE --words_patch_weight=0.3 --data="$OUT/quarter.json"
# These three were measured at temperature 1, which changes their entropy alone.
train words-all-476-steps $WORDS_STAGE --temperature=1 --max_steps=476
train words-quarter-476-steps $WORDS_STAGE --temperature=1 --data="$OUT/quarter.json"
train words-112-pixels-476-steps $WORDS_STAGE --temperature=1 --image_size=112 --pool=1 --max_steps=476 --features="$OUT/features112"
for name in 4-epochs patches-all-476-steps patches-quarter-476-steps all-476-steps quarter-476-steps 112-pixels-476-steps; do measure words-$name="$OUT/words-$name" $REST --number 1000 --words_only; done
measure smollm2-4-epochs="$OUT/words-4-epochs" $REST --number 96 --prompt
HERE_Q="--images=$QUESTIONS/images --features=$OUT/questions-features"
train question-words config/photos/words.py --init="$OUT/words-42" --data="$QUESTIONS/answers.json" $HERE_Q --image_mode=pad --epochs=8 \
    --connector_lr=1e-3
for name in words-42 question-words mlp; do
    train "questions-$name" config/photos/questions.py --init="$OUT/$name" --data="$QUESTIONS/train.json" $HERE_Q
    "$PYTHON" results/questions.py measure $name="$OUT/questions-$name" --data "$QUESTIONS/val.json" \
        --images "$QUESTIONS/images" --out results/photos/questions.json
done
