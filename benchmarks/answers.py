"""
The files of answers in a result folder, so that a run that was stopped continues where it stopped.

Each rank appends to <task>.rank<rank>.jsonl. At the end rank 0 joins these files to <task>.jsonl.
<task>.settings.json says which checkpoint and which settings made them. `stem` is such a path
without its ending.
"""
import hashlib
import json
import os
from glob import escape, glob

import common
from benchmarks.reading import read_lines


def question_key(question):
    """Return what identifies a question. Several questions of TextVQA and MME share their id."""
    return str(question["question_id"]), question["prompt"]


def answer_record(question, text, task, model_id):
    """Return a line of the answer file in LLaVA's format."""
    # LLaVA's answer_id is random. A hash lets the same run write the same file.
    identity = json.dumps([model_id, task, *question_key(question)])
    return {"question_id": question["question_id"], "prompt": question["prompt"], "text": text,
            "answer_id": hashlib.sha256(identity.encode()).hexdigest()[:22],
            "model_id": model_id, "metadata": {}, **question.get("extra", {})}


def answer_files(stem):
    """Return the files of answers that exist: one for each rank, and that of a finished run."""
    return sorted(glob(f"{escape(stem)}.rank*.jsonl")) + glob(f"{escape(stem)}.jsonl")


def saved_answers(stem):
    """Return {question_key: record} of all answers so far. The number of ranks may have changed."""
    return {question_key(record): record
            for path in answer_files(stem) for record in read_lines(path)}


def write_lines(records, path):
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    common.write_text(text, path)


def join_answers(questions, stem):
    """Write the answers of all ranks to <stem>.jsonl in question order, and return its path."""
    answers = saved_answers(stem)
    path = f"{stem}.jsonl"
    write_lines([answers[question_key(q)] for q in questions], path)
    for file in answer_files(stem):
        if file != path:
            os.remove(file)
    return path


def refuse_other_run(path, old, new):
    """Raise ValueError if the file `path` was made by `old` and not by the settings `new`."""
    if old != new:
        differing = ", ".join(key for key in new if old.get(key) != new[key])
        raise ValueError(f"{path} is of another run (other {differing}): give another --out, or "
                         "--overwrite")


def prepare_files(stem, settings, overwrite):
    """Make the files of an earlier run ready to be continued.

    ValueError if they are of another checkpoint or other settings, unless `overwrite`.
    """
    path = f"{stem}.settings.json"
    old = common.read_json(path) if os.path.exists(path) else {}
    files = answer_files(stem)
    if files and not overwrite:
        refuse_other_run(f"{stem}.jsonl", old, settings)
    for name in files:
        if old != settings:
            os.remove(name)
        else:
            with open(name, "r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)     # half a line at the end
    common.write_json(settings, path)
