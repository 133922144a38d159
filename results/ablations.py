"""Collect the scores under FOLDER/seed*/NAME/eval/results.json into OUT.json, OUT.md and OUT.png.

    python results/ablations.py out/pocket/ablations results/ablations

results/ablations.sh of commit db31a74 made these runs.
"""
import fnmatch
import glob
import os
import statistics
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common import read_json, write_json, write_text  # noqa: E402

TASKS = {"gqa": ("GQA", lambda tasks: tasks["gqa"]["accuracy"]),
         "textvqa": ("TextVQA", lambda tasks: tasks["textvqa"]["accuracy"]),
         "pope": ("POPE", lambda tasks: 100 * tasks["pope"]["mean_f1"])}
# Title of a group of rows -> names of its configurations; * stands for any text.
GROUPS = {
    "how many words": ["words-32", "words-64", "words-128", "words-256", "base", "words-all"],
    "which words": ["words-64", "random-words-64", "words-128", "random-words-128"],
    "whose embeddings": ["base", "random-E"],
    "the same after stage 1, the LLM never trained": ["base-pretrain", "random-E-pretrain"],
    "what the weights are": ["base", "softmax-*", "none-*"],
    "how sharp the weights are at the start": ["base", "gain-*"],
    "how wide": ["width-64", "base", "width-1024*"],
    "an MLP instead": ["base", "mlp-64", "mlp-256", "mlp-1024", "mlp-0"],
    "moved to pocket-llama, from stage": ["moved-pretrain", "moved-sft"]}
MEANING = {
    "base": "unit, 512 words, 256 wide", "words-all": "all shared words",
    "random-E": "random E, as long", "width-1024-1e-3": "1024 wide, rate 1e-3 in stage 1",
    "base-pretrain": "unit, 512 words, 256 wide", "random-E-pretrain": "random E, as long",
    "mlp-0": "MLP, as wide as the LLM", "moved-pretrain": "1 (Pretrain-LB)",
    "moved-sft": "2 (SFT-LB)"}
PREFIX = {
    "random-words-": "{} words by lot", "words-": "{} words", "width-": "{} wide",
    "mlp-": "MLP, {} wide", "gain-": "gain {}", "softmax-": "softmax, rate {} in stage 1",
    "none-": "raw scores, rate {} in stage 1"}


def meaning(name):
    """Return a configuration's name for people."""
    if name in MEANING:
        return MEANING[name]
    for prefix, text in PREFIX.items():
        if name.startswith(prefix):
            return text.format(name[len(prefix):])
    return name


def collect(folder):
    """Return [{"name", "seed", "gqa", "textvqa", "pope"}], one for each run that was scored."""
    rows = []
    for path in sorted(glob.glob(f"{folder}/seed*/*/eval/results.json")):
        seed, name = path.split(os.sep)[-4:-2]
        tasks = read_json(path)["tasks"]
        scores = {task: score(tasks) for task, (_, score) in TASKS.items()}
        rows.append({"name": name, "seed": int(seed.removeprefix("seed")), **scores})
    return rows


def table(rows):
    """Return a markdown table with a line for each configuration of each group that has a score."""
    titles = " | ".join(title for title, _ in TASKS.values())
    lines = [f"| | | {titles} | seeds |", "|---" * (len(TASKS) + 3) + "|"]
    for group, names in groups(rows).items():
        for i, name in enumerate(names):
            runs = [r for r in rows if r["name"] == name]
            cells = []
            for task in TASKS:
                values = [r[task] for r in runs]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.fmean(values):.1f}{spread}")
            title = "" if i else group
            lines.append(f"| {title} | {meaning(name)} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines) + "\n"


def groups(rows):
    """Return GROUPS without configurations that have no score, and without groups of one."""
    scored = {r["name"] for r in rows}
    found = {group: [name for pattern in patterns
                     for name in sorted(fnmatch.filter(scored, pattern))]
             for group, patterns in GROUPS.items()}
    return {group: names for group, names in found.items() if len(names) > 1}


def draw(rows, path):
    """Draw every run as a point and every configuration's mean as a line."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = [(group, name) for group, names in groups(rows).items() for name in names]
    figure, axes = plt.subplots(1, len(TASKS), figsize=(11, 0.9 + 0.24 * len(lines)), sharey=True)
    for axis, (task, (title, _)) in zip(axes, TASKS.items()):
        for y, (_, name) in enumerate(lines):
            values = [r[task] for r in rows if r["name"] == name]
            axis.plot(values, [y] * len(values), "o", ms=3, color="C0", alpha=0.5)
            axis.plot([statistics.fmean(values)], [y], "|", ms=12, color="C0")
        for y in range(1, len(lines)):
            if lines[y][0] != lines[y - 1][0]:
                axis.axhline(y - 0.5, color="0.7", lw=0.8)
        axis.set_title(f"{title}, validation set", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(lines)), [meaning(name) for _, name in lines], fontsize=8)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=130, bbox_inches="tight")


def main(folder, out):
    rows = collect(folder)
    if not rows:
        sys.exit(f"{folder} holds no seed*/NAME/eval/results.json")
    write_json(rows, f"{out}.json")
    write_text(table(rows), f"{out}.md")
    draw(rows, f"{out}.png")
    print(table(rows))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
