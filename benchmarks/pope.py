"""POPE: "Is there a ... in the image?" The score is the mean F1 of three splits."""
import math
import os
from collections import defaultdict

from benchmarks.reading import add_labels, group, mean, question_id, read_lines, unique

HEADLINE, SCALE = "mean_f1", 100
MAX_NEW_TOKENS = 128
ASK = "pope/llava_pope_test.jsonl"
IMAGES = "pope/val2014"
TRUTH = "pope/coco"                         # coco_pope_<split>.json
SOURCE = "AoiDragon/POPE at e3e3926, output/coco; COCO val2014"

SPLITS = ("random", "popular", "adversarial")


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


def read(questions, truth):
    """Return {question_id: record with "label"} of llava_pope_test.jsonl.

    truth: a folder with a label file for each split. The ids in it do not count: some files have
    other ids. POPE's later random file does not fit; paired by position, as the official tool does,
    it would give 50 % without a warning.
    """
    official = unique(read_lines(questions), question_id)
    for split, members in group(official.values(), lambda q: q["category"]).items():
        path = os.path.join(truth, f"coco_pope_{split}.json")
        labels = [(asked(record), record["label"]) for record in read_lines(path)]
        add_labels({asked(q): q for q in members}, labels, path)
    return official


def split_figures(outcomes):
    """Return the figures of one split, from 0 to 1, and 0 where the definition divides by 0.

    outcomes: list of "TP", "FP", "TN" and "FN"; yes is the positive class.
    """
    TP, FP, TN, FN = (outcomes.count(kind) for kind in ("TP", "FP", "TN", "FN"))
    return {
        "accuracy": (TP + TN) / len(outcomes),
        "precision": TP / max(TP + FP, 1),
        "recall": TP / max(TP + FN, 1),
        "f1": 2 * TP / max(2 * TP + FP + FN, 1),
        "yes_ratio": (TP + FP) / len(outcomes),
        "TP": TP, "FP": FP, "TN": TN, "FN": FN,
    }


def score(official, answers):
    said = {k: parse(answer["text"]) for k, answer in answers.items()}
    by_split = group(answers, lambda k: official[k]["category"])
    splits, items = {}, {}
    # The splits share images, so the standard error sums over images how much the answers about
    # an image move the mean F1, to first order.
    influence = defaultdict(float)
    for split in sorted(by_split, key=SPLITS.index):
        outcomes = {}
        for k in by_split[split]:
            items[k] = int((official[k]["label"] != "no") == (said[k] == "yes"))
            outcomes[k] = ("T" if items[k] else "F") + ("P" if said[k] == "yes" else "N")
        figures = splits[split] = split_figures(list(outcomes.values()))
        weight = max(2 * figures["TP"] + figures["FP"] + figures["FN"], 1)
        change = {"TP": 2 - 2 * figures["f1"], "TN": 0, "FP": -figures["f1"], "FN": -figures["f1"]}
        for k, kind in outcomes.items():
            influence[official[k]["image"]] += change[kind] / weight / len(by_split)
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
