"""MME: two yes/no questions about each image, in 14 tasks. The score is perception + cognition."""
import math
import os

from benchmarks.reading import SHORT, add_labels, group, mean, read_lines, stderr, unique

HEADLINE, SCALE = "total", 1
TABLE_NOTE = " (P {perception:.1f} + C {cognition:.1f})"    # papers report either sum
MAX_NEW_TOKENS = 128
ASK = "mme/llava_mme.jsonl"
IMAGES = "mme/MME_Benchmark_release_version"
TRUTH = "mme/ground_truth"                                  # <task>.txt
SOURCE = "MME's authors: images; labels from the templates in eval_tool.zip"

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene",
              "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation",
             "code_reasoning")


def parse(text):
    """Return "yes", "no" or "other" by the first four characters, which are not stripped.

    So "Nothing" is no, and "**Yes**" and "1. No" are other.
    """
    start = text.lower()[:4]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else "other"


def key(answer):
    """Return what ties question, label and answer: "task/image / question" without instructions.

    An image's name counts up to its first dot. Seven official questions have two spaces before the
    instruction, so spaces are stripped.
    """
    task, *_, file = answer["question_id"].split("/")
    question = answer["prompt"].replace(SHORT, "").strip()
    question = question.removesuffix("Please answer yes or no.").strip()
    return f"{task}/{file.split('.')[0]} / {question}"


def task_of(key):
    return key.split("/")[0]


def read(questions, truth):
    """Return {key: record with "label": "yes" or "no"} of llava_mme.jsonl.

    truth: a folder with <task>.txt for each task: lines of image, official question, Yes or No.
    """
    records = [{**record, "prompt": record["text"]} for record in read_lines(questions)]
    official = unique(records, key)
    for task, keys in group(official, task_of).items():
        path = os.path.join(truth, f"{task}.txt")
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            rows = [line.strip().split("\t") for line in file]
        labels = [(key({"question_id": f"{task}/{row[0]}", "prompt": row[1]}), row[-1].lower())
                  for row in rows]
        add_labels({k: official[k] for k in keys}, labels, path)
    return official


def score(official, answers):
    parsed = {k: parse(answer["text"]) for k, answer in answers.items()}
    right = {k: int(parsed[k] == official[k]["label"]) for k in parsed}
    per_task, variance = {}, 0
    for task, keys in sorted(group(right, task_of).items()):
        images = group(keys, lambda k: k.split(" / ")[0])
        pairs = [[right[k] for k in both] for both in images.values()]
        acc = mean(right[k] for k in keys)
        acc_plus = mean(int(pair == [1, 1]) for pair in pairs)
        per_task[task] = {
            "acc": acc, "acc_plus": acc_plus, "score": acc * 100 + acc_plus * 100,
            "images": len(pairs), "questions": len(keys),
            "unparsed": sum(parsed[k] == "other" for k in keys),
        }
        variance += stderr(mean(pair) + (pair == [1, 1]) for pair in pairs) ** 2
    perception = sum(per_task[task]["score"] for task in PERCEPTION if task in per_task)
    cognition = sum(per_task[task]["score"] for task in COGNITION if task in per_task)
    return {
        "perception": perception,
        "cognition": cognition,
        "total": perception + cognition,
        "stderr": math.sqrt(variance),
        "questions": len(parsed),
        "unparsed": sum(task["unparsed"] for task in per_task.values()),
        "per_task": per_task,
    }, right
