"""MM-Vet's judge: grades from a server that speaks OpenAI's protocol.

OPENAI_BASE_URL names the server, OPENAI_API_KEY the key. The key is never printed or written.
"""
import http.client
import json
import os
import sys
import time
import urllib.request

from common import read_json, write_json

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
WAITS = (1, 2, 4, 8, 16)    # seconds between tries if the server is silent or busy


def ask_judge(prompt, judge, temperature, timeout):
    """Return (model, content) of one reply. ValueError if no reply comes."""
    base = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1").rstrip("/")
    body = {"model": judge, "messages": [{"role": "user", "content": prompt}],
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
            with urllib.request.urlopen(request, timeout=timeout) as response:
                reply = json.loads(response.read())
            return str(reply.get("model", judge)), reply["choices"][0]["message"]["content"] or ""
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError,
                AttributeError) as error:               # no connection, or no chat completion
            status = getattr(error, "code", "")
            problem = f"{type(error).__name__} {status}".strip()
            if status in (400, 401, 403, 404):          # another try will not help
                break
    # A URL may hold a password before the @.
    raise ValueError(f"the judge at {base.split('@')[-1]} gives no reply ({problem}); "
                     "the grades so far are kept")


def grade(question, text, judge, timeout):
    """Return one grade as (model, content, score) by the official rules.

    They ask up to six times, and they never read the sixth reply: the grade is then 0.
    """
    truth = question["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    prompt = f"{INSTRUCTION}\n{question['question']} | {truth} | {text} | "
    model, content = ask_judge(prompt, judge, 0.0, timeout)
    for temperature in (0.0, 0.5, 1.0, 1.5, 2.0):
        try:
            score = float(content.split(" ")[0].strip())
            if 0 <= score <= 1:
                return model, content, score
        except ValueError:
            pass
        model, content = ask_judge(prompt + RETRY, judge, temperature, timeout)
    return model, content, 0.0


def grade_all(questions, answers, path, judge, runs, timeout):
    """Write `runs` grades of each answer to `path`, in the official format, and return them.

    The file is written after each grade, and the next start reads it. Its "text" and "judge" tell
    whether a grade belongs to this answer and this judge.
    """
    old = read_json(path) if os.path.exists(path) else {}
    grades = {}
    for k, text in answers.items():
        grades[k] = {"model": [], "content": [], "score": [], "text": text, "judge": judge}
        if k in old and (old[k].get("text"), old[k].get("judge")) == (text, judge):
            grades[k] = old[k]
    for run in range(runs):
        for number, (k, text) in enumerate(answers.items(), 1):
            if len(grades[k]["score"]) > run:
                continue
            reply = grade(questions[k], text, judge, timeout)
            for field, value in zip(("model", "content", "score"), reply):
                grades[k][field].append(value)
            write_json(grades, path)
            print(f"judge: run {run + 1}/{runs}, {number}/{len(answers)}", file=sys.stderr)
    for entry in grades.values():           # an earlier start may have made more runs
        for field in ("model", "content", "score"):
            del entry[field][runs:]
    write_json(grades, path)
    return grades
