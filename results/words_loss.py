"""
Compare words losses in the pocket world: stage 1 with each, and the move without any training.

    python results/words_loss.py [NAME ...]     # after speedrun.sh

Each row trains a connector on pocket-qwen, moves it to pocket-llama, and scores both on the
validation pictures. A row takes about four minutes of one core, and what is there is not made
again. The rows are written to results/pocket/words-loss.json. --table prints this file as markdown
and runs nothing.
"""
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import read_json, run_script, write_json

WORLD, OUT, REPORT = "data/pocket", "out/pocket/words-loss", "results/pocket/words-loss.json"
FRESH = ["--init=", "--words_init=embeds"]
# name: (settings of the words stage or None for a run without it, settings of stage 1)
ROWS = {
    "nothing of this": (None, ["--init=", "--words_loss=0"]),
    "W from E": (None, [*FRESH, "--words_loss=0"]),
    "W from E, words loss 0.1": (None, [*FRESH, "--words_loss=0.1"]),
    "W from E, words loss 0.3": (None, [*FRESH, "--words_loss=0.3"]),
    "words stage, then 0.05": ([], []),
    "words stage, then 0.05, background 0.9": (["--words_background=0.9"],
                                               ["--words_background=0.9"]),
    "words stage of 400 steps, then 0.05": (["--max_steps=0", "--epochs=2"], []),
    "words stage with patch weight 0.3, then 0.05": (["--words_patch_weight=0.3"], []),
    "words stage, then 0.05, patch weight 0.3 in both": (["--words_patch_weight=0.3"],
                                                         ["--words_patch_weight=0.3"]),
}
SCORES = ("gqa", "textvqa", "pope")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1",
               "TOKENIZERS_PARALLELISM": "false"}


def call(*command):
    """Run a script of this project."""
    command = [str(part) for part in command]
    if subprocess.run([sys.executable, *command]).returncode:
        raise ValueError(f"{' '.join(command)} has failed")


def measure(name):
    """Train, move and score one row. Return its entry of the report."""
    folder = f"{OUT}/{name.replace(' ', '-').replace(',', '')}"
    words, pretrain = ROWS[name]
    if words is not None:
        if not os.path.isfile(f"{folder}-words/config.json"):
            call("train.py", "config/pocket/words.py", f"--out={folder}-words", "--seed=1", *words)
        pretrain = [f"--init={folder}-words", *pretrain]
    if not os.path.isfile(f"{folder}/config.json"):
        call("train.py", "config/pocket/pretrain.py", f"--out={folder}", "--seed=1", *pretrain)
    if not os.path.isfile(f"{folder}-llama/config.json"):
        call("transfer.py", folder, f"{WORLD}/pocket-llama", "--out", f"{folder}-llama")
    row = {}
    for end, place in (("source", folder), ("llama untrained", f"{folder}-llama")):
        call("eval.py", place, "--tasks", ",".join(SCORES), "--data", f"{WORLD}/val",
             "--batch_size", 64)
        tasks = read_json(f"{place}/eval/results.json")["tasks"]
        row[end] = [round(100 * tasks["pope"]["mean_f1"], 1) if task == "pope" else
                    round(tasks[task]["accuracy"], 1) for task in SCORES]
    call("results/study.py", folder, "--data", f"{WORLD}/captions_val.json", "--images",
         f"{WORLD}/images", "--truth", f"{WORLD}/truth.json", "--out", f"{folder}-study",
         "--overwrite")
    values = read_json(f"{folder}-study/study.json")["rows"][0]["values"]
    for key, label in (("right", "strongest word"), ("another", "with another picture")):
        row[label] = round(100 * values[f"object, by weights: {key} picture"][0], 1)
    row["entropy"] = round(values["entropy"][0], 1)
    return row


def table(report):
    """Return the report as markdown."""
    lines = ["| stage 1 with | pocket-qwen | pocket-llama, untrained | names the object | entropy |",
             "|---|---:|---:|---:|---:|"]
    for name, row in report.items():
        scores = [" / ".join(f"{x:.1f}" for x in row[end]) for end in ("source", "llama untrained")]
        lines.append(f"| {name} | {scores[0]} | {scores[1]} | {row['strongest word']:.0f} % "
                     f"({row['with another picture']:.0f}) | {row['entropy']:.1f} |")
    return "\n".join(lines)


def main():
    report = read_json(REPORT) if os.path.isfile(REPORT) else {}
    if sys.argv[1:] != ["--table"]:
        os.environ |= ENVIRONMENT
        for name in sys.argv[1:]:
            if name not in ROWS:
                raise ValueError(f"there is no row {name!r}; there are {'; '.join(ROWS)}")
        for name in sys.argv[1:] or ROWS:
            report[name] = measure(name)
            write_json(report, REPORT)
    print(table(report))


if __name__ == "__main__":
    run_script(main)
