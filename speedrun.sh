#!/usr/bin/env bash
# The whole story on two CPU cores: world, small LLMs, pretrain, SFT, transfer, benchmarks, one table, pictures of words.
#     bash speedrun.sh                      # a second run reuses what is there
#     SEED=2 bash speedrun.sh               # another seed
#     ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 bash speedrun.sh     # the README's left numbers, on a Zen 4, too
set -euo pipefail
cd "$(dirname "$0")"
SEED=${SEED:-1}
WORLD=data/pocket
OUT=out/pocket/seed$SEED
# Two jobs side by side, a core each: models this small do not gain from threads.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
unset PYTHONDONTWRITEBYTECODE                       # else each of 20 starts compiles torch's Python anew: 5 s

if [ -z "${PYTHON:-}" ]; then                       # PYTHON=... uses an environment that you have
    PYTHON=.venv/bin/python
    [ -x $PYTHON ] || python3 -m venv .venv
    if [ ! .venv/installed -nt requirements.txt ]; then
        $PYTHON -m pip install -q --no-compile -r requirements.txt # most of what torch brings is never imported
        touch .venv/installed
    fi
fi

train() {                                           # train NAME CONFIG [--key=value ...]
    local name=$1; shift
    [ -f "$OUT/$name/config.json" ] || "$PYTHON" train.py "$@" --out="$OUT/$name" --seed="$SEED" | sed -u "s/^/[$name] /"
}
evaluate() {                                        # evaluate NAME ...
    for name in "$@"; do
        [ -f "$OUT/$name/eval/results.json" ] || "$PYTHON" eval.py "$OUT/$name" --tasks gqa,textvqa,mme,mmbench,pope \
            --data $WORLD/eval --batch_size 64 | sed -u "s/^/[$name] /"
    done
}
mlp() {                                             # mlp NAME LLM: the baseline, both stages on its own LLM, its best rates
    train "$1-pretrain" config/pocket/pretrain.py --init= --llm="$WORLD/$2" --connector=mlp --words_loss=0 --connector_lr=2e-3
    train "$1" config/pocket/sft.py --init="$OUT/$1-pretrain" --connector_lr=7e-4
    evaluate "$1"
}
langbridge() {                                      # words, both stages on pocket-qwen, a picture of words, then the move
    train qwen-LB-words config/pocket/words.py
    train qwen-LB-pretrain config/pocket/pretrain.py --init="$OUT/qwen-LB-words"
    train qwen-LB config/pocket/sft.py --init="$OUT/qwen-LB-pretrain"
    evaluate qwen-LB
    [ -f "$OUT/words/words.png" ] || "$PYTHON" words.py "$OUT/qwen-LB-pretrain" $WORLD/images/test_000016.png --out "$OUT/words"
    evaluate qwen-LB-pretrain
    local moved=llama-from-qwen-LB
    [ -f "$OUT/$moved-untrained/config.json" ] || "$PYTHON" transfer.py "$OUT/qwen-LB" $WORLD/pocket-llama \
        --out "$OUT/$moved-untrained" --eval $WORLD/captions_test.json | sed -u "s/^/[$moved-untrained] /"
    train $moved config/pocket/sft.py --init="$OUT/$moved-untrained"
    evaluate $moved $moved-untrained
}

"$PYTHON" pocket.py --out $WORLD
[ -f $WORLD/words.json ] || "$PYTHON" vocab.py --tokenizers $WORLD/pocket-qwen $WORLD/pocket-llama \
    --corpus $WORLD/pretrain.json $WORLD/sft.json --count answers --size 512 --out $WORLD/words.json

# Two lanes, about as long as each other. Neither waits for the other.
set -m                                              # each lane is a process group, to be stopped with what it runs
langbridge & left=$!
{ mlp qwen-MLP pocket-qwen; mlp llama-MLP pocket-llama; } & right=$!
set +m
trap 'kill -- -$left -$right 2>/dev/null || true' EXIT
wait -n                                             # if one lane fails, the other stops, too
wait -n

"$PYTHON" eval.py --table "$OUT"/{qwen-MLP,qwen-LB,llama-MLP}/eval/results.json \
    "$OUT"/{llama-from-qwen-LB,qwen-LB-pretrain,llama-from-qwen-LB-untrained}/eval/results.json | tee "$OUT/table.md"
echo "table: $OUT/table.md   words of a picture: $OUT/words/words.png and words.html   losses: $OUT/*/loss.png"
