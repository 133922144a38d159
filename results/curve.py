"""Collect out/pocket/seed*/curve-*/ into results/curve.json and results/curve.png.

curve.sh makes these runs and calls this file.
"""
import glob
import os
import sys

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from common import read_json, write_json  # noqa: E402

LABELS = {"transferred": "LangBridge moved from pocket-qwen",
          "mlp": "MLP pretrained on pocket-llama", "fresh": "LangBridge, fresh"}

rows = []
for path in sorted(glob.glob("out/pocket/seed*/curve-*/**/eval/results.json", recursive=True)):
    parts = path.split(os.sep)              # out/pocket/seedN/curve-NAME/[steps/STEP/]eval/...
    tasks = read_json(path)["tasks"]
    if parts[4] == "steps":
        step = int(parts[5])
    else:
        step = read_json(os.path.join(*parts[:4], "config.json"))["steps"]
    rows.append({"seed": int(parts[2].removeprefix("seed")),
                 "connector": parts[3].removeprefix("curve-"), "step": step,
                 "pope": 100 * tasks["pope"]["mean_f1"], "gqa": tasks["gqa"]["accuracy"]})
if not rows:
    sys.exit("out/pocket/seed*/curve-*/ holds no eval/results.json: results/curve.sh makes them")
write_json(rows, f"{HERE}/curve.json")

figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True)
for axis, task, title in zip(axes, ("gqa", "pope"), ("GQA, accuracy in %", "POPE, mean F1 x 100")):
    for connector, label in LABELS.items():
        own = [row for row in rows if row["connector"] == connector]
        steps = sorted({row["step"] for row in own})
        runs = [[row[task] for row in own if row["step"] == step] for step in steps]
        line, = axis.plot(steps, [sum(v) / len(v) for v in runs], "o-", ms=3, label=label)
        axis.fill_between(steps, [min(v) for v in runs], [max(v) for v in runs],
                          color=line.get_color(), alpha=0.15)
    axis.set(title=title, xlabel="SFT steps on pocket-llama", xscale="log")
    axis.set_xticks(steps, steps)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=3, fontsize=8,
              bbox_to_anchor=(0.5, -0.1))
figure.savefig(f"{HERE}/curve.png", dpi=130, bbox_inches="tight")
