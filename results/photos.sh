#!/usr/bin/env bash
# Photographs: the words without an LLM, then SmolLM2 and Gemma with nothing trained, all measured
# -> results/photos/report.json. A finished training is kept, and a stopped one continues. Measuring
# runs again. data/photos holds captions_train.json, captions_val.json, boxes_val.json and images/.
#     bash results/photos.sh
#     MODELS=/folder DATA=/folder bash results/photos.sh      # models in folders, not from the hub
# On two cores: patches of the tower 45 minutes, words 18 minutes a seed, measuring 20 minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
DATA=${DATA:-data/photos}
OUT=${OUT:-out/photos}
TOWER=facebook/dinov2-small SMOL=HuggingFaceTB/SmolLM2-135M-Instruct GEMMA=google/gemma-3-270m
if [ -n "${MODELS:-}" ]; then
    TOWER=$MODELS/dinov2-small SMOL=$MODELS/smollm2-135m-instruct GEMMA=$MODELS/gemma-3-270m
fi
WORDS=${WORDS:-$DATA/words.json}
# Checked now, because it is used after hours.
[ -z "${MORE:-}" ] || : "${QUESTIONS:?MORE=1 needs QUESTIONS, see below}"
for file in captions_train captions_val boxes_val; do
    [ -f "$DATA/$file.json" ] || { echo "photos.sh: there is no $DATA/$file.json" >&2; exit 1; }
done
mkdir -p results/photos "$OUT"
[ -f "$WORDS" ] || "$PYTHON" vocab.py --tokenizers "$SMOL" "$GEMMA" ${MORE_TOKENIZERS:-} \
    --corpus ${CORPUS:-$DATA/captions_train.json} --count answers --size 3072 --out "$WORDS"

HERE="--data=$DATA/captions_train.json --images=$DATA/images --features=$OUT/features"
BASE="$HERE --vision_tower=$TOWER --llm=$SMOL"
train() {                                           # train NAME CONFIG [--key=value ...]
    local name=$1; shift
    [ -f "$OUT/$name/config.json" ] || "$PYTHON" train.py "$@" --out="$OUT/$name"
}
transfer() {                                        # transfer NAME NEW_NAME [--map WORDS]
    [ -f "$OUT/$2/config.json" ] ||
        "$PYTHON" transfer.py "$OUT/$1" "$GEMMA" --out "$OUT/$2" "${@:3}"
}
VAL="--captions $DATA/captions_val.json --boxes $DATA/boxes_val.json --images $DATA/images"
REPORT=results/photos/report.json
measure() { "$PYTHON" results/photos.py "$@" $VAL --out "$REPORT"; }    # NAME=CHECKPOINT [...]
words_alone() {                                     # words_alone PREFIX SEED [--key=value ...]
    local words=$1words-$2 gemma=$1gemma-$2 smollm2=$1smollm2-$2
    train "$words" config/photos/words.py $BASE --words="$WORDS" --seed="$2" "${@:3}"
    transfer "$words" "$gemma"
    measure "$words=$OUT/$words" --number 1000 --words_only
    measure "$smollm2=$OUT/$words" "$gemma=$OUT/$gemma" --number 96 --prompt
}
for seed in 42 43; do words_alone "" $seed; done

# MORE=1: captions on SmolLM2, the baselines, fewer steps and photographs, and questions. It takes
# some hours of two cores. QUESTIONS is a folder with images/ and the files that
# `results/questions.py split` has written.
[ -n "${MORE:-}" ] || exit 0
REPORT=results/photos/report-more.json
# All rows below but two were trained with words_patch_weight=0. Step 2 is 160 steps of captions on
# SmolLM2, after a words stage at the paper's temperature, 1.
WORDS_STAGE="config/photos/words.py $BASE --words=$WORDS"
for seed in 42 43; do
    words_alone no-patches- $seed --words_patch_weight=0
    train step1-$seed $WORDS_STAGE --words_patch_weight=0 --temperature=1 --seed=$seed
    train step2-$seed config/photos/pretrain.py $HERE --init="$OUT/step1-$seed" --seed=$seed
    transfer step2-$seed step2-gemma-$seed
    measure step2-$seed="$OUT/step2-$seed" --number 1000 --words_only
    measure step2-smollm2-$seed="$OUT/step2-$seed" step2-gemma-$seed="$OUT/step2-gemma-$seed" \
        --number 96
done
measure step1-smollm2-42="$OUT/step1-42" --number 64

for seed in 42 43; do
    s=; [ $seed = 42 ] || s=-$seed
    FRESH="$BASE --init= --image_size=224 --pool=2 --words_loss=0 --seed=$seed"
    train mlp$s config/photos/pretrain.py $FRESH --connector=mlp --connector_lr=1e-3
    transfer mlp$s mlp-gemma$s --map "$WORDS"
    train plain$s config/photos/pretrain.py $FRESH --words="$WORDS" --hidden=512
    transfer plain$s plain-gemma$s
    measure mlp$s="$OUT/mlp$s" mlp-mapped-gemma$s="$OUT/mlp-gemma$s" \
        no-words-loss$s="$OUT/plain$s" no-words-loss-gemma$s="$OUT/plain-gemma$s" --number 96
    measure mlp-mapped-gemma-text-norm$s="$OUT/mlp-gemma$s" --number 96 --match_norm
done

"$PYTHON" -c "
import json
records = json.load(open('$DATA/captions_train.json'))
kept = set(sorted({record['image'] for record in records})[::4])
quarter = [record for record in records if record['image'] in kept]
json.dump(quarter, open('$OUT/quarter.json', 'w'))"
fewer() {                                           # fewer NAME [--key=value ...]
    train "words-$1" $WORDS_STAGE "${@:2}"
    measure "words-$1=$OUT/words-$1" --number 1000 --words_only
}
fewer 4-epochs --words_patch_weight=0 --epochs=4
fewer patches-all-476-steps --words_patch_weight=0.3 --max_steps=476
fewer patches-quarter-476-steps --words_patch_weight=0.3 --data="$OUT/quarter.json"
# The last three were measured at temperature 1, which changes their entropy alone.
fewer all-476-steps --words_patch_weight=0 --temperature=1 --max_steps=476
fewer quarter-476-steps --words_patch_weight=0 --temperature=1 --data="$OUT/quarter.json"
fewer 112-pixels-476-steps --words_patch_weight=0 --temperature=1 --image_size=112 --pool=1 \
    --max_steps=476 --features="$OUT/features112"
measure smollm2-4-epochs="$OUT/words-4-epochs" --number 96 --prompt

# The other way round: the words stage with Gemma's tokenizer and E, moved to SmolLM2.
train words-of-gemma config/photos/words.py $HERE --vision_tower=$TOWER --llm=$GEMMA \
    --words="$WORDS"
[ -f "$OUT/moved-to-smollm2/config.json" ] ||
    "$PYTHON" transfer.py "$OUT/words-of-gemma" "$SMOL" --out "$OUT/moved-to-smollm2"
measure gemma-source="$OUT/words-of-gemma" smollm2-target="$OUT/moved-to-smollm2" \
    --number 96 --prompt

# Stage 2 on captions: one caption of each of 2,560 photographs, 160 steps.
"$PYTHON" -c "
import json, random
records = {}
for record in json.load(open('$DATA/captions_train.json')):
    records.setdefault(record['image'], []).append(record)
random.seed(0)
names = sorted(records)
random.shuffle(names)
one_each = [random.choice(records[name]) for name in names[:2560]]
json.dump(one_each, open('$OUT/one-each.json', 'w'))"
for name in words-42 words-43 mlp mlp-43; do
    seed=42; [ ${name%43} = $name ] || seed=43
    train "captions-$name" config/photos/questions.py --init="$OUT/$name" $HERE --seed=$seed \
        --data="$OUT/one-each.json" --image_mode=crop --global_batch=16 --batch_size=16
    measure captions-$name="$OUT/captions-$name" --number 96
done

ROOMS="--images=$QUESTIONS/images --features=$OUT/questions-features"
for seed in 42 43; do
    s=; [ $seed = 42 ] || s=-$seed
    train question-words$s config/photos/words.py --init="$OUT/words-$seed" $ROOMS --seed=$seed \
        --data="$QUESTIONS/answers.json" --image_mode=pad --epochs=8 --connector_lr=1e-3
    for name in words-$seed question-words$s mlp$s; do
        train "questions-$name" config/photos/questions.py --init="$OUT/$name" $ROOMS \
            --seed=$seed --data="$QUESTIONS/train.json"
        "$PYTHON" results/questions.py measure $name="$OUT/questions-$name" \
            --data "$QUESTIONS/val.json" --images "$QUESTIONS/images" \
            --out results/photos/questions.json
    done
done
