"""MM-Vet: open questions, graded by a judge (see judge.py)."""
import math
import os
from collections import defaultdict

from benchmarks import judge
from benchmarks.reading import mean, questions_from_lines, read_answers, read_objects, stderr
from common import read_json, write_json

COLUMN = "MM-Vet"
HEADLINE, SCALE = "total", 1
MAX_NEW_TOKENS = 1024
ASK = "mmvet/llava-mm-vet.jsonl"
QUESTIONS = "mmvet/mm-vet.json"
TRUTH = None                                # the grades, which a judge writes after the answers
SOURCE = "yuweihao/MM-Vet, release v1: mm-vet.zip"


def questions(data):
    return questions_from_lines(data, ASK, "mmvet/images")


def read_both(questions, predictions, partial=False):
    """Return the content of mm-vet.json, and {"v1_0": text, ...}, which any judge takes."""
    official = read_objects(questions, "question", "answer", "capability")
    for k, q in official.items():
        if not all(isinstance(text, str) for text in [q["answer"], *q["capability"]]):
            raise ValueError(f"{questions}: question {k} has an answer or a capability that is "
                             "no text")
    answers = read_answers(predictions, official, partial, lambda a: f"v1_{a['question_id']}")
    return official, {k: answer["text"] for k, answer in answers.items()}


def grades(questions, predictions, args, partial=False):
    """Return the path of the judge's grades. Without --judge write the file for a judge, and None.

    ValueError if that file exists with other answers and --overwrite is not given.
    """
    official, answers = read_both(questions, predictions, partial)
    if args.judge:
        path = f"{os.path.splitext(predictions)[0]}.mm-vet-grades.json"
        judge.grade_all(official, answers, path, args.judge, args.runs, args.timeout)
        return path
    path = judge_file(predictions)
    if os.path.exists(path) and read_json(path) != answers and not args.overwrite:
        raise ValueError(f"{path} exists and differs; --overwrite replaces it")
    write_json(answers, path)
    return None


def judge_file(predictions):
    return f"{os.path.splitext(predictions)[0]}.mm-vet.json"


def score(questions, truth, predictions, partial=False):
    """questions: mm-vet.json. truth: the official evaluator's grades, or None before there are any.

    The grades are {"v1_0": {"score": [one per run], ...}, ...}.
    """
    official, answers = read_both(questions, predictions, partial)
    if truth is None:
        return {"judge_file": judge_file(predictions)}, {}
    scores = {k: entry["score"] for k, entry in read_objects(truth, "score").items()}
    for k in scores:
        if k not in official:
            raise ValueError(f"{truth}: question {k} is unknown: it is not in the question file")
    runs = max(map(len, scores.values()), default=0)
    for k in answers:
        count = len(scores.get(k, ()))
        if not runs or count != runs:
            raise ValueError(f"{truth}: question {k} has {count} grades, another has {runs}")
        if not all(type(s) in (int, float) and 0 <= s <= 1 for s in scores[k]):
            raise ValueError(f"{truth}: question {k} has a grade that is no number from 0 to 1")

    totals = [mean((scores[k][run] for k in answers), 100) for run in range(runs)]
    items = {k: mean(scores[k]) for k in answers}
    # A question counts in each of its capabilities, and in exactly one set of them. All runs have
    # the same questions, so the mean of all grades is the mean over runs.
    capabilities, integrations = defaultdict(list), defaultdict(list)
    for k in answers:
        names = sorted(set(official[k]["capability"]))
        integrations["_".join(names)] += scores[k]
        for name in names:
            capabilities[name] += scores[k]
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
