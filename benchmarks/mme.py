"""MME: two yes/no questions about each image, in 14 tasks. The score is perception + cognition."""
import math
import os
from collections import defaultdict

from benchmarks.reading import (SHORT, key_text, mean, pair, questions_from_lines, read_lines,
                                stderr, unique)

COLUMN = "MME"
HEADLINE, SCALE = "total", 1
TABLE_NOTE = " (P {perception:.1f} + C {cognition:.1f})"    # papers report either sum
MAX_NEW_TOKENS = 128
ASK = "mme/llava_mme.jsonl"
QUESTIONS = ASK
TRUTH = "mme/ground_truth"                                  # <task>.txt
SOURCE = "MME's authors: images; labels from the templates in eval_tool.zip"

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene",
              "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation",
             "code_reasoning")


def questions(data):
    return questions_from_lines(os.path.join(data, ASK),
                                os.path.join(data, "mme/MME_Benchmark_release_version"))


def parse(text):
    """Return "yes", "no" or "other" by the first four characters, which are not stripped.

    So "Nothing" is no, and "**Yes**" and "1. No" are other.
    """
    start = text.lower()[:4]
    if "yes" in start:
        return "yes"
    return "no" if "no" in start else "other"


def bare(question):
    """Return the question without instructions.

    Seven official questions have two spaces before the instruction, so spaces are stripped.
    """
    question = question.replace(SHORT, "").strip()
    return question.removesuffix("Please answer yes or no.").strip()


def label_key(question_id, question):
    """Return (task, image file up to its first dot, bare question): it ties label and question."""
    parts = question_id.split("/")
    return parts[0], parts[-1].split(".")[0], bare(question)


def read_labels(folder, tasks):
    """Return {label_key: "yes" or "no"} of <task>.txt: image, official question, Yes or No."""
    labels = {}
    for task in tasks:
        path = os.path.join(folder, f"{task}.txt")
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                parts = line.strip("\r\n").split("\t")
                if len(parts) != 3 or parts[2].strip().lower() not in ("yes", "no"):
                    raise ValueError(f"{path}, line {number}: not image, question, Yes or No with "
                                     "tabs between")
                key = label_key(f"{task}/{parts[0]}", parts[1])
                if key in labels:
                    raise ValueError(f"{path}, line {number}: {key_text(key)} is labelled twice")
                labels[key] = parts[2].strip().lower()
    return labels


def score(questions, truth, predictions, partial=False):
    """questions: llava_mme.jsonl. truth: a folder with <task>.txt for each task in it."""
    official = read_lines(questions, "question_id", "text")
    official = unique(official, lambda q: (str(q["question_id"]), bare(q["text"])), questions)
    by_image = defaultdict(list)            # the two questions of an image share its question_id
    for k in official:
        by_image[k[0]].append(k)
    for image, keys in by_image.items():
        if len(keys) != 2:
            raise ValueError(f"{questions}: {image} has {len(keys)} questions instead of two")

    label_keys = unique(official, lambda k: label_key(*k), questions)
    labels = read_labels(truth, sorted({k[0] for k in label_keys}))
    for k in sorted(labels.keys() ^ label_keys.keys()):
        problem = "has no question" if k in labels else "has no label"
        raise ValueError(f"{os.path.join(truth, k[0] + '.txt')}: labels and questions differ: "
                         f"{key_text(k)} {problem}")

    answers = read_lines(predictions, "question_id", "prompt", "text")
    answers = pair(official, answers, predictions, partial,
                   lambda a: (str(a["question_id"]), bare(a["prompt"])))
    parsed = {k: parse(answer["text"]) for k, answer in answers.items()}
    right = {k: int(parsed[k] == labels[label_key(*k)]) for k in parsed}

    per_task, variance = {}, 0
    for task in sorted({label_key(*k)[0] for k in parsed}):
        keys = [k for k in parsed if label_key(*k)[0] == task]
        images = dict.fromkeys(k[0] for k in keys)
        pairs = [[right[k] for k in by_image[image] if k in right] for image in images]
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
    }, {key_text(k): r for k, r in right.items()}
