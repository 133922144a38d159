"""out/pocket/seed*/curve-*/ as results/curve.json and results/curve.png. Run by curve.sh."""
import glob
import json
import os
import sys

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = os.path.dirname(os.path.abspath(__file__))
LABELS = {"transferred": "LangBridge moved from pocket-qwen", "mlp": "MLP pretrained on pocket-llama",
          "fresh": "LangBridge, fresh"}
rows = []
for path in sorted(glob.glob("out/pocket/seed*/curve-*/**/eval/results.json", recursive=True)):
    parts = path.split(os.sep)
    with open(path) as f:
        tasks = json.load(f)["tasks"]
    run = os.sep.join(parts[:4])
    with open(f"{run}/config.json") as f:
        step = int(parts[5]) if parts[4] == "steps" else json.load(f)["steps"]
    rows.append({"seed": int(parts[2][4:]), "connector": parts[3][len("curve-"):], "step": step,
                 "pope": 100 * tasks["pope"]["mean_f1"], "gqa": tasks["gqa"]["accuracy"]})
if not rows:
    sys.exit("out/pocket/seed*/curve-*/ holds no eval/results.json: results/curve.sh makes them")
with open(f"{HERE}/curve.json", "w") as f:
    json.dump(rows, f, indent=1)

figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True)
for axis, task, title in zip(axes, ("gqa", "pope"), ("GQA, accuracy in %", "POPE, mean F1 x 100")):
    for connector, label in LABELS.items():
        steps = sorted({r["step"] for r in rows if r["connector"] == connector})
        runs = [[r[task] for r in rows if r["connector"] == connector and r["step"] == s] for s in steps]
        line, = axis.plot(steps, [sum(v) / len(v) for v in runs], "o-", ms=3, label=label)
        axis.fill_between(steps, [min(v) for v in runs], [max(v) for v in runs], color=line.get_color(), alpha=0.15)
    axis.set(title=title, xlabel="SFT steps on pocket-llama", xscale="log")
    axis.set_xticks(steps, steps)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=3, fontsize=8, bbox_to_anchor=(0.5, -0.1))
figure.savefig(f"{HERE}/curve.png", dpi=130, bbox_inches="tight")
