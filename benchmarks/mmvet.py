"""MM-Vet: open questions, graded by a judge: a server that speaks OpenAI's protocol.

OPENAI_BASE_URL names the server, OPENAI_API_KEY the key. The key is never printed or written.
"""
import http.client
import json
import math
import os
import sys
import time
import urllib.request
from collections import defaultdict

from benchmarks.reading import add_labels, mean, stderr
from common import read_json, write_json

HEADLINE, SCALE = "total", 1
MAX_NEW_TOKENS = 1024
ASK = "mmvet/llava-mm-vet.jsonl"
IMAGES = "mmvet/images"
QUESTIONS = "mmvet/mm-vet.json"
SOURCE = "yuweihao/MM-Vet, release v1: mm-vet.zip"

INSTRUCTION = """\
Grade how correct a prediction is, given the ground truth, from 0.0 (entirely wrong) to 1.0 \
(entirely right) in steps of 0.1. <AND> in the ground truth means that the prediction is right \
only with every element it joins; <OR> means that any one of the elements it joins will do. Fill \
in the last field of the last row.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
Which values of x solve the equation? | 2 <AND> -7 | x = 5 | 0.0
Which values of x solve the equation? | 2 <AND> -7 | x = 2 | 0.5
Which values of x solve the equation? | 2 <AND> -7 | x = -7 | 0.5
Which values of x solve the equation? | 2 <AND> -7 | x = 2 or x = 7 | 0.5
Which values of x solve the equation? | 2 <AND> -7 | x = -7 or x = 2 | 1.0
Why is this meme funny? | The sign says "quiet please" while the dog below it barks: text and \
picture contradict each other. | A dog stands under a sign, and dogs are funny. | 0.4
Why is this meme funny? | The sign says "quiet please" while the dog below it barks: text and \
picture contradict each other. | It plays on contradiction: the sign demands silence, yet the dog \
right under it is barking. | 1.0"""
RETRY = "\nPredict the correctness of the answer (digit): "
GRADE_FIELDS = ("model", "content", "score")
WAITS = (1, 2, 4, 8, 16)    # seconds between tries if the server is silent or busy


def key(answer):
    return f"v1_{answer['question_id']}"


def read(questions, truth):
    """Return {key: record} of mm-vet.json. A file `truth` gives "label", the list of its grades.

    truth: the official evaluator's grades, {"v1_0": {"score": [one per run], ...}, ...}.
    """
    official = read_json(questions)
    if truth:
        labels = [(k, entry["score"]) for k, entry in read_json(truth).items()]
        add_labels(official, labels, truth)
    return official


def ask_judge(prompt, temperature, args):
    """Return (model, content) of one reply of args.judge. ValueError if no reply comes."""
    base = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1").rstrip("/")
    body = {"model": args.judge, "messages": [{"role": "user", "content": prompt}],
            "temperature": temperature, "max_tokens": 3}
    request = urllib.request.Request(f"{base}/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    if os.environ.get("OPENAI_API_KEY"):
        # "unredirected": a redirect to another host must not carry the key along.
        request.add_unredirected_header("Authorization", f"Bearer {os.environ['OPENAI_API_KEY']}")
    problem = ""
    for wait in (0, *WAITS):
        if problem:
            print(f"judge: {problem}, again in {wait} s", file=sys.stderr)
            time.sleep(wait)
        try:
            with urllib.request.urlopen(request, timeout=args.timeout) as response:
                reply = json.loads(response.read())
            content = reply["choices"][0]["message"]["content"] or ""
            return str(reply.get("model", args.judge)), content
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError,
                AttributeError) as error:               # no connection, or no chat completion
            status = getattr(error, "code", "")
            problem = f"{type(error).__name__} {status}".strip()
            if status in (400, 401, 403, 404):          # another try will not help
                break
    # A URL may hold a password before the @.
    raise ValueError(f"the judge at {base.split('@')[-1]} gives no reply ({problem}); "
                     "the grades so far are kept")


def grade_answer(question, text, args):
    """Return one grade as (model, content, score) by the official rules.

    They ask up to six times, and they never read the sixth reply: the grade is then 0.
    """
    truth = question["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    prompt = f"{INSTRUCTION}\n{question['question']} | {truth} | {text} | "
    model, content = ask_judge(prompt, 0.0, args)
    for temperature in (0.0, 0.5, 1.0, 1.5, 2.0):
        try:
            score = float(content.split(" ")[0].strip())
            if 0 <= score <= 1:
                return model, content, score
        except ValueError:
            pass
        model, content = ask_judge(prompt + RETRY, temperature, args)
    return model, content, 0.0


def grade_all(official, answers, path, args):
    """Add "label" to the records of the answered questions: args.runs grades of each answer.

    answers: {key: text}. The grades are kept in `path`, in the official format, which is written
    after each grade and read by the next start. Its "text" and "judge" tell whether a grade belongs
    to this answer and this judge.
    """
    old = read_json(path) if os.path.exists(path) else {}
    grades = {}
    for k, text in answers.items():
        grades[k] = {"model": [], "content": [], "score": [], "text": text, "judge": args.judge}
        if k in old and (old[k].get("text"), old[k].get("judge")) == (text, args.judge):
            grades[k] = old[k]
    for run in range(args.runs):
        for number, (k, text) in enumerate(answers.items(), 1):
            if len(grades[k]["score"]) > run:
                continue
            reply = grade_answer(official[k], text, args)
            for field, value in zip(GRADE_FIELDS, reply):
                grades[k][field].append(value)
            write_json(grades, path)
            print(f"judge: run {run + 1}/{args.runs}, {number}/{len(answers)}", file=sys.stderr)
    for k, entry in grades.items():
        for field in GRADE_FIELDS:
            del entry[field][args.runs:]    # an earlier start may have made more runs
        official[k]["label"] = entry["score"]
    write_json(grades, path)


def grade(official, answers, predictions, args):
    """Add a judge's grades to `official`.

    Without --judge write the file {"v1_0": text, ...} that any judge takes, and return the summary
    that names it. ValueError if the file exists with other answers and --overwrite is not given.
    """
    texts = {k: answer["text"] for k, answer in answers.items()}
    stem = os.path.splitext(predictions)[0]
    if args.judge:
        return grade_all(official, texts, f"{stem}.mm-vet-grades.json", args)
    path = f"{stem}.mm-vet.json"
    if os.path.exists(path) and read_json(path) != texts and not args.overwrite:
        raise ValueError(f"{path} exists and differs; --overwrite replaces it")
    write_json(texts, path)
    return {"judge_file": path}


def score(official, answers):
    grades = {k: official[k]["label"] for k in answers}
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
