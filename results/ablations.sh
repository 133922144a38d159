#!/usr/bin/env bash
# What matters, in the pocket world: every configuration through both stages, scored on the validation set (the test set
# stays for the table of speedrun.sh). After `python pocket.py`; hours on two cores. What is there is not made again.
#     bash results/ablations.sh                        # -> results/ablations.json, ablations.md, ablations.png
#     SEEDS=1 ONLY="base random-E" bash results/ablations.sh          # some of it
#     STEPS=2 VAL= OUT=/tmp/try bash results/ablations.sh             # does every configuration run? no scores
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
W=data/pocket
VAL=${VAL-$W/val}
CAPTIONS=${CAPTIONS:-$W/captions_val.json}
OUT=${OUT:-out/pocket/ablations}
SEEDS=${SEEDS:-1 2 3}
ONLY=${ONLY:-}
SHORT=${STEPS:+--max_steps=$STEPS}
# Batches of 32: half as many steps in stage 1 as config/pocket takes and a quarter in stage 2, at rates that suit them.
STAGE1="--global_batch=32 --batch_size=32 --connector_lr=4e-3"
STAGE2="--global_batch=32 --batch_size=32 --connector_lr=2e-3 --llm_lr=1e-3"
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1

train() {                                           # train FOLDER CONFIG [--key=value ...]
    local folder=$1; shift
    [ -f "$folder/config.json" ] || "$PYTHON" train.py "$@" --out="$folder" $SHORT | sed -u "s|^|[${folder#"$OUT"/}] |"
}
evaluate() {                                        # evaluate FOLDER
    [ -z "$VAL" ] || [ -f "$1/eval/results.json" ] || "$PYTHON" eval.py "$1" --tasks pope,gqa,textvqa --data "$VAL" --batch_size 64
}
both() {                                            # both SEED NAME [--key=value ...]: stage 1, stage 2, scores
    local seed=$1 name=$2; shift 2
    local folder=$OUT/seed$seed/$name
    train "$folder-pretrain" config/pocket/pretrain.py $STAGE1 --seed="$seed" "$@"
    # A checkpoint with an E of its own hands it on with llm/; stage 1 does not write that.
    [ -z "${OWN_E:-}" ] || [ -d "$folder-pretrain/llm" ] || cp -r "$OWN_E/llm" "$folder-pretrain/llm"
    case $name in base|random-E) evaluate "$folder-pretrain" ;; esac
    train "$folder" config/pocket/sft.py $STAGE2 --seed="$seed" --init="$folder-pretrain"
    evaluate "$folder"
}
moved() {                                           # moved SEED NAME SOURCE: to pocket-llama, stage 2 there, scores
    local folder=$OUT/seed$1/$2
    [ -f "$folder-untrained/config.json" ] || "$PYTHON" transfer.py "$OUT/seed$1/$3" $W/pocket-llama --out "$folder-untrained"
    train "$folder" config/pocket/sft.py $STAGE2 --seed="$1" --init="$folder-untrained"
    evaluate "$folder"
}
random_E() {                                        # random_E SEED: a fresh connector whose E is noise as long as the words
    [ -f "$OUT/seed$1/noise/config.json" ] || "$PYTHON" - "$1" "$OUT/seed$1/noise" $W <<'PY'
import sys
sys.path.insert(0, ".")
import torch
import model, vocab
seed, folder, W = sys.argv[1:]
words = vocab.load_words(f"{W}/words.json")
torch.manual_seed(int(seed))
vlm = model.build(model.Config(f"{W}/vision-tower", f"{W}/pocket-qwen", hidden=256, num_words=len(words)), words)
E = vlm.connector.vocab_embeds
noise = torch.randn(E.shape, generator=torch.Generator().manual_seed(int(seed)))
vlm.connector.vocab_embeds = noise * E.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
model.save(vlm, folder, "init", with_llm=True)
PY
}
one() {                                             # one SEED NAME
    case $2 in
        base)                both "$1" "$2" ;;
        softmax-*|none-*)    both "$1" "$2" --normalize="${2%%-*}" --connector_lr="${2#*-}" ;;
        words-all)           both "$1" "$2" --words="$OUT/words-all.json" ;;
        words-*)             both "$1" "$2" --num_words="${2#words-}" ;;
        random-words-*)      both "$1" "$2" --words="$OUT/seed$1/words-random.json" --num_words="${2#random-words-}" ;;
        random-E)            random_E "$1"; OWN_E=$OUT/seed$1/noise both "$1" "$2" --init="$OUT/seed$1/noise" ;;
        gain-*)              both "$1" "$2" --gain="${2#gain-}" ;;
        width-*-?e-?)        local size=${2#width-}; both "$1" "$2" --hidden="${size%%-*}" --connector_lr="${size#*-}" ;;
        width-*)             both "$1" "$2" --hidden="${2#width-}" ;;
        mlp-*)               both "$1" "$2" --connector=mlp --connector_lr=2e-3 --hidden="${2#mlp-}" ;;
        moved-pretrain)      moved "$1" "$2" base-pretrain ;;
        moved-sft)           moved "$1" "$2" base ;;
        *)                   echo "there is no configuration $2" >&2; return 2 ;;
    esac
}

mkdir -p "$OUT"
[ -f "$OUT/words-all.json" ] || "$PYTHON" vocab.py --tokenizers $W/pocket-qwen $W/pocket-llama --size 1000000 \
    --corpus $W/pretrain.json $W/sft.json --count answers --out "$OUT/words-all.json"
# The base comes first: what is moved starts from it. mlp-0 is as wide as the LLM (LLaVA's), the others have a given width.
NAMES="base words-32 words-64 words-128 words-256 words-all random-words-64 random-words-128 random-E
       softmax-3e-4 softmax-1e-3 softmax-4e-3 softmax-1e-2 none-1e-3 none-4e-3 gain-0.3 gain-3 gain-10 width-64 width-1024 width-1024-1e-3
       mlp-64 mlp-256 mlp-1024 mlp-0 moved-pretrain moved-sft"
for SEED in $SEEDS; do
    mkdir -p "$OUT/seed$SEED"
    [ -f "$OUT/seed$SEED/words-random.json" ] || "$PYTHON" - "$SEED" "$OUT" <<'PY'
import random, sys
sys.path.insert(0, ".")
import vocab
seed, out = sys.argv[1:]
words = vocab.load_words(f"{out}/words-all.json")
vocab.save_words(random.Random(int(seed)).sample(words, len(words)), f"{out}/seed{seed}/words-random.json")
PY
    # Two at a time, a core each: models this small do not gain from threads.
    left="" right=""
    for NAME in ${ONLY:-$NAMES}; do
        [ "$NAME" = base ] && { one "$SEED" base; continue; }
        if [ ${#left} -le ${#right} ]; then left="$left $NAME"; else right="$right $NAME"; fi
    done
    set -m                                          # each lane is a process group, to be stopped with what it runs
    { for NAME in $left; do one "$SEED" "$NAME"; done; } & one=$!
    { for NAME in $right; do one "$SEED" "$NAME"; done; } & two=$!
    set +m
    trap 'kill -- -$one -$two 2>/dev/null || true' EXIT
    wait -n                                         # if one lane fails, the other stops, too
    wait -n
done
[ -z "$VAL" ] || "$PYTHON" results/ablations.py "$OUT" results/ablations
# How readable the words of each are after stage 1 and after stage 2: results/ablations/study.*
if [ -n "$VAL" ]; then
    folders=()
    for NAME in ${ONLY:-$NAMES}; do for END in -pretrain ""; do for SEED in $SEEDS; do
        [ -f "$OUT/seed$SEED/$NAME$END/config.json" ] && folders+=("$OUT/seed$SEED/$NAME$END")
    done; done; done
    "$PYTHON" results/study.py "${folders[@]}" --data "$CAPTIONS" --images $W/images --truth $W/truth.json \
        --number 60 --out results/ablations --overwrite
fi
