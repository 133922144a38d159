#!/usr/bin/env bash
# The three ways to weight words, on the source and moved without training: results/normalize.md. After speedrun.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
SEED=${SEED:-1}
W=data/pocket
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
one() {                                             # one NORMALIZE
    local out=out/pocket/seed$SEED/normalize
    local pre=$out/$1-pretrain
    [ -f "$pre/config.json" ] || "$PYTHON" train.py config/pocket/pretrain.py --normalize="$1" --out="$pre" --seed="$SEED"
    for llm in pocket-qwen-wide pocket-llama; do
        [ -f "$out/$1-$llm/config.json" ] || "$PYTHON" transfer.py "$pre" $W/$llm --out "$out/$1-$llm" --eval $W/captions_test.json
    done
    [ -f "$out/$1/config.json" ] || "$PYTHON" train.py config/pocket/sft.py --init="$pre" --out="$out/$1" --seed="$SEED"
    [ -f "$out/$1/eval/results.json" ] || "$PYTHON" eval.py "$out/$1" --tasks pope,gqa --data $W/eval --batch_size 64
}
one none & one softmax & wait
one unit
"$PYTHON" - "out/pocket/seed$SEED/normalize" <<'PY' | tee results/normalize.md
import json, sys
root = sys.argv[1]
read = lambda path: json.load(open(f"{root}/{path}"))
print("| weights | where | trained there | right image | wrong image | difference | length of image embeds / of text's |\n"
      + "|---" * 7 + "|")
for kind in ("unit", "softmax", "none"):
    for llm in ("pocket-qwen-wide", "pocket-llama"):
        report = read(f"{kind}-{llm}/transfer.json")
        ends = [("source", "pocket-qwen", "stage 1")] if llm == "pocket-qwen-wide" else []
        for end, name, how in ends + [("target", llm, "nothing")]:
            right, wrong = (report[end][f"bits_per_byte_{x}"] for x in ("right", "wrong"))
            length = report[end]["rms_image_embeds"] / report[end]["rms_text_embeds"]
            print(f"| {kind} | {name} | {how} | {right:.3f} | {wrong:.3f} | {wrong - right:.3f} | {length:.1f} |")
print("\n| weights | GQA after SFT on pocket-qwen | POPE |\n|---|---|---|")
for kind in ("unit", "softmax", "none"):
    tasks = read(f"{kind}/eval/results.json")["tasks"]
    print(f"| {kind} | {tasks['gqa']['accuracy']:.1f} ± {tasks['gqa']['stderr']:.1f} | {100 * tasks['pope']['mean_f1']:.1f} |")
PY
