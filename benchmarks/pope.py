"""POPE: "Is there a ... in the image?" The score is the mean F1 of three splits."""
import math
import os
from collections import defaultdict

from benchmarks.reading import (mean, question_id, questions_from_lines, read_answers, read_lines,
                                unique)

COLUMN = "POPE"
HEADLINE, SCALE = "mean_f1", 100
MAX_NEW_TOKENS = 128
ASK = "pope/llava_pope_test.jsonl"
QUESTIONS = ASK
TRUTH = "pope/coco"                         # coco_pope_<split>.json
SOURCE = "AoiDragon/POPE at e3e3926, output/coco; COCO val2014"

SPLITS = ("random", "popular", "adversarial")


def questions(data):
    return questions_from_lines(data, ASK, "pope/val2014")


def parse(text):
    """Return "no" if No, no or not is a word before the first period, else "yes".

    So the empty text, "NO" and "Nope" are yes. Only spaces part words: "no\\n" is not "no".
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def asked(record):
    """Return what ties a question and its label: the image, and the question's first line."""
    question = record["text"].split("\n")[0]
    return f"{record['image']}: {question}"


def read_labels(path, split, official):
    """Return {question_id: label} of one split. The ids do not count: some files have other ids.

    ValueError if labels and questions are not the same. POPE's later random file does not fit;
    paired by position, as the official tool does, it would give 50 % without a warning.
    """
    labels = unique(read_lines(path, "image", "text", "label"), asked, path)
    if sorted(labels) != sorted(asked(q) for q in official.values()):
        raise ValueError(f"{path}: its {len(labels)} labels do not match the {len(official)} "
                         f"'{split}' questions one to one")
    return {k: labels[asked(q)]["label"] for k, q in official.items()}


def split_figures(outcomes):
    """Return the figures of one split, from 0 to 1, and 0 where the definition divides by 0.

    outcomes: list of "TP", "FP", "TN" and "FN"; yes is the positive class.
    """
    TP, FP, TN, FN = (outcomes.count(kind) for kind in ("TP", "FP", "TN", "FN"))
    total = max(len(outcomes), 1)
    return {
        "accuracy": (TP + TN) / total,
        "precision": TP / max(TP + FP, 1),
        "recall": TP / max(TP + FN, 1),
        "f1": 2 * TP / max(2 * TP + FP + FN, 1),
        "yes_ratio": (TP + FP) / total,
        "TP": TP, "FP": FP, "TN": TN, "FN": FN,
    }


def score(questions, truth, predictions, partial=False):
    """questions: llava_pope_test.jsonl. truth: a folder with a label file for each split in it."""
    official = unique(read_lines(questions, "question_id", "image", "text", "category"),
                      question_id, questions)
    for k, q in official.items():
        if q["category"] not in SPLITS:
            raise ValueError(f"{questions}: question {k} has the unknown category "
                             f"{q['category']!r}")
    answers = read_answers(predictions, official, partial)
    said = {k: parse(answer["text"]) for k, answer in answers.items()}
    answered_splits = {official[k]["category"] for k in answers}
    splits, items = {}, {}
    # The splits share images, so the standard error sums over images how much the answers about
    # an image move the mean F1, to first order.
    influence = defaultdict(float)
    for split in (name for name in SPLITS if name in answered_splits):
        members = {k: q for k, q in official.items() if q["category"] == split}
        labels = read_labels(os.path.join(truth, f"coco_pope_{split}.json"), split, members)
        outcomes = {}
        for k in (k for k in members if k in said):
            items[k] = int((labels[k] != "no") == (said[k] == "yes"))
            outcomes[k] = ("T" if items[k] else "F") + ("P" if said[k] == "yes" else "N")
        figures = splits[split] = split_figures(list(outcomes.values()))
        weight = max(2 * figures["TP"] + figures["FP"] + figures["FN"], 1)
        change = {"TP": 2 - 2 * figures["f1"], "TN": 0, "FP": -figures["f1"], "FN": -figures["f1"]}
        for k, kind in outcomes.items():
            image = members[k]["image"]
            influence[image] += change[kind] / weight / len(answered_splits)
    # Texts that are parsed as yes although they do not contain the word.
    unparsed = sum(said[k] == "yes" and "yes" not in answers[k]["text"].lower() for k in said)
    return {
        "mean_f1": mean(figures["f1"] for figures in splits.values()),
        "mean_accuracy": mean(figures["accuracy"] for figures in splits.values()),
        "stderr": math.sqrt(sum(change * change for change in influence.values())),
        "questions": len(items),
        "unparsed": unparsed,
        **splits,
    }, items
