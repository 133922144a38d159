#!/usr/bin/env bash
# Photographs: the words without an LLM, then SmolLM2 and Gemma with nothing trained, all measured
# -> results/photos/report.json. A finished training is kept, and a stopped one continues. Measuring
# runs again. data/photos holds captions_train.json, captions_val.json, boxes_val.json and images/.
#     bash results/photos.sh
#     MODELS=/folder DATA=/folder bash results/photos.sh      # models in folders, not from the hub
# The words of weights/photos and of docs/results.md were shared with two more tokenizers, and the
# questions were counted, too: MORE_TOKENIZERS="Qwen/Qwen3-0.6B meta-llama/Meta-Llama-3-8B"
# CORPUS="$DATA/captions_train.json questions_train.json".
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
WORDS_STAGE="config/photos/words.py $BASE --words=$WORDS"
VAL="--captions $DATA/captions_val.json --boxes $DATA/boxes_val.json --images $DATA/images"
REPORT=results/photos/report.json
measure() { "$PYTHON" results/photos.py "$@" $VAL --out "$REPORT"; }    # [NAME=]CHECKPOINT [...]
train() {                                           # train NAME CONFIG [--key=value ...]
    [ -f "$OUT/$1/config.json" ] || "$PYTHON" train.py "${@:2}" --out="$OUT/$1"
}
transfer() {                                        # transfer NAME NEW_NAME LLM [--map WORDS]
    [ -f "$OUT/$2/config.json" ] || "$PYTHON" transfer.py "$OUT/$1" "$3" --out "$OUT/$2" "${@:4}"
}
patch_words() {                                     # train NAME and measure the words of patches
    train "$@"
    measure "$OUT/$1" --number 1000 --words_only
}
words_alone() {                                     # words_alone PREFIX SEED [--key=value ...]
    local words=$1words-$2 gemma=$1gemma-$2
    patch_words "$words" $WORDS_STAGE --seed="$2" "${@:3}"
    transfer "$words" "$gemma" "$GEMMA"
    measure "$1smollm2-$2=$OUT/$words" "$OUT/$gemma" --number 96 --prompt
}
for seed in 42 43; do words_alone "" $seed; done

# MORE=1: captions on SmolLM2, the baselines, questions, and fewer steps and photographs. It takes
# some hours of two cores. QUESTIONS is a folder with images/ and the files that
# `results/questions.py split` has written.
[ -n "${MORE:-}" ] || exit 0
REPORT=results/photos/report-more.json
PAPER_WORDS="$WORDS_STAGE --words_patch_weight=0 --temperature=1"       # the paper's temperature
ROOMS="--images=$QUESTIONS/images --features=$OUT/questions-features"
# quarter.json: every fourth photograph. one-each.json: one caption of each of 2,560 photographs.
"$PYTHON" - "$DATA/captions_train.json" "$OUT" <<'END'
import json, random, sys
records, out = json.load(open(sys.argv[1])), sys.argv[2]
of_image = {}
for record in records:
    of_image.setdefault(record["image"], []).append(record)
names = sorted(of_image)
kept = set(names[::4])
quarter = [record for record in records if record["image"] in kept]
random.seed(0)
random.shuffle(names)
one_each = [random.choice(of_image[name]) for name in names[:2560]]
json.dump(quarter, open(f"{out}/quarter.json", "w"))
json.dump(one_each, open(f"{out}/one-each.json", "w"))
END

for seed in 42 43; do
    s=; [ $seed = 42 ] || s=-$seed
    words_alone no-patches- $seed --words_patch_weight=0
    # 160 steps of captions on SmolLM2, after a words stage at the paper's temperature.
    train step1-$seed $PAPER_WORDS --seed=$seed
    patch_words step2-$seed config/photos/pretrain.py $HERE --init="$OUT/step1-$seed" --seed=$seed
    transfer step2-$seed step2-gemma-$seed "$GEMMA"
    measure step2-smollm2-$seed="$OUT/step2-$seed" "$OUT/step2-gemma-$seed" --number 96

    # The baselines: the MLP, and the LangBridge without the words loss.
    FRESH="$BASE --init= --image_size=224 --pool=2 --words_loss=0 --seed=$seed"
    train mlp$s config/photos/pretrain.py $FRESH --connector=mlp --connector_lr=1e-3
    transfer mlp$s mlp-mapped-gemma$s "$GEMMA" --map "$WORDS"
    train no-words-loss$s config/photos/pretrain.py $FRESH --words="$WORDS" --hidden=512
    transfer no-words-loss$s no-words-loss-gemma$s "$GEMMA"
    measure "$OUT"/{mlp,mlp-mapped-gemma,no-words-loss,no-words-loss-gemma}$s --number 96
    measure mlp-mapped-gemma-text-norm$s="$OUT/mlp-mapped-gemma$s" --number 96 --match_norm

    # Stage 2 on captions, 160 steps, and on questions.
    for name in words-$seed mlp$s; do
        train "captions-$name" config/photos/questions.py --init="$OUT/$name" $HERE --seed=$seed \
            --data="$OUT/one-each.json" --image_mode=crop --global_batch=16 --batch_size=16
        measure "$OUT/captions-$name" --number 96
    done
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
measure step1-smollm2-42="$OUT/step1-42" --number 64
# The MLP with LLaVA's hidden width, that of the LLM, in place of the default 5,120.
train mlp-576 config/photos/pretrain.py $BASE --init= --image_size=224 --pool=2 --words_loss=0 \
    --connector=mlp --connector_lr=1e-3 --hidden=0
train captions-mlp-576 config/photos/questions.py --init="$OUT/mlp-576" $HERE \
    --data="$OUT/one-each.json" --image_mode=crop --global_batch=16 --batch_size=16
measure "$OUT"/{mlp-576,captions-mlp-576} --number 96

# More epochs, and fewer steps, photographs or pixels.
patch_words words-4-epochs $WORDS_STAGE --words_patch_weight=0 --epochs=4
measure smollm2-4-epochs="$OUT/words-4-epochs" --number 96 --prompt
patch_words words-patches-all-476-steps $WORDS_STAGE --max_steps=476
patch_words words-patches-quarter-476-steps $WORDS_STAGE --data="$OUT/quarter.json"
# The last three were measured at temperature 1, which changes their entropy alone.
patch_words words-all-476-steps $PAPER_WORDS --max_steps=476
patch_words words-quarter-476-steps $PAPER_WORDS --data="$OUT/quarter.json"
patch_words words-112-pixels-476-steps $PAPER_WORDS --image_size=112 --pool=1 --max_steps=476 \
    --features="$OUT/features112"

# The other way round: the words stage with Gemma's tokenizer and E, moved to SmolLM2.
train gemma-source $WORDS_STAGE --llm=$GEMMA
transfer gemma-source smollm2-target "$SMOL"
measure "$OUT"/{gemma-source,smollm2-target} --number 96 --prompt
