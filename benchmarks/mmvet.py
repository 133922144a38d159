"""MM-Vet: open questions, graded by a judge (see judge.py)."""
import math
import os
from collections import defaultdict

from benchmarks import judge
from benchmarks.reading import match_labels, mean, stderr
from common import read_json, write_json

COLUMN = "MM-Vet"
HEADLINE, SCALE = "total", 1
MAX_NEW_TOKENS = 1024
ASK = "mmvet/llava-mm-vet.jsonl"
IMAGES = "mmvet/images"
QUESTIONS = "mmvet/mm-vet.json"
TRUTH = None                                # the grades, which a judge writes after the answers
SOURCE = "yuweihao/MM-Vet, release v1: mm-vet.zip"


def key(answer):
    return f"v1_{answer['question_id']}"


def read(questions, truth):
    """Return {key: record} of mm-vet.json, with "grades" if there is a file `truth`.

    truth: the official evaluator's grades, {"v1_0": {"score": [one per run], ...}, ...}.
    """
    official = read_json(questions)
    if truth:
        for k, entry in match_labels(read_json(truth).items(), official, truth).items():
            official[k]["grades"] = entry["score"]
    return official


def grade(official, answers, predictions, args):
    """Add a judge's grades to `official`.

    Without --judge write the file {"v1_0": text, ...} that any judge takes, and return the summary
    that names it. ValueError if the file exists with other answers and --overwrite is not given.
    """
    texts = {k: answer["text"] for k, answer in answers.items()}
    stem = os.path.splitext(predictions)[0]
    if args.judge:
        grades = judge.grade_all(official, texts, f"{stem}.mm-vet-grades.json", args.judge,
                                 args.runs, args.timeout)
        for k in grades:
            official[k]["grades"] = grades[k]["score"]
        return None
    path = f"{stem}.mm-vet.json"
    if os.path.exists(path) and read_json(path) != texts and not args.overwrite:
        raise ValueError(f"{path} exists and differs; --overwrite replaces it")
    write_json(texts, path)
    return {"judge_file": path}


def score(official, answers):
    grades = {k: official[k]["grades"] for k in answers}
    runs = max([1, *map(len, grades.values())])
    for k, values in grades.items():
        numbers = [v for v in values if type(v) in (int, float) and 0 <= v <= 1]
        if not len(values) == len(numbers) == runs:
            raise ValueError(f"question {k} has not {runs} grades, each a number from 0 to 1")

    totals = [mean((values[run] for values in grades.values()), 100) for run in range(runs)]
    items = {k: mean(values) for k, values in grades.items()}
    # A question counts in each of its capabilities, and in exactly one set of them. All runs have
    # the same questions, so the mean of all grades is the mean over runs.
    capabilities, integrations = defaultdict(list), defaultdict(list)
    for k, values in grades.items():
        names = sorted(set(official[k]["capability"]))
        integrations["_".join(names)] += values
        for name in names:
            capabilities[name] += values
    return {
        "total": mean(totals),
        "totals": totals,
        "runs": runs,
        "questions": len(items),
        "std": math.sqrt(mean((t - mean(totals)) ** 2 for t in totals)),    # between the runs
        "stderr": stderr(items.values()),
        "capabilities": {name: mean(s, 100) for name, s in sorted(capabilities.items())},
        "integrations": {name: mean(s, 100) for name, s in sorted(integrations.items())},
    }, items
