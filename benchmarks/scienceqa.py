"""ScienceQA, test split: single choice. The headline is the accuracy on questions with an image."""
import os
import re

from benchmarks.reading import (LETTER, image_file, mean, question, read_answers, read_lines,
                                require, stderr, unique)
from common import read_json

COLUMN = "SciQA"
HEADLINE, SCALE = "img_accuracy", 1
MAX_NEW_TOKENS = 1024
ASK = "scienceqa/llava_test_CQM-A.json"
QUESTIONS = ASK
TRUTH = "scienceqa"                         # problems.json and pid_splits.json
SOURCE = "lupantech/ScienceQA: data/scienceqa, test.zip"


def read_records(path):
    """Return {id: record} of llava_test_CQM-A.json; each has a first turn that has a text."""
    records = read_lines(path, "id", "conversations")
    for i, record in enumerate(records):
        turns = record["conversations"]
        require(turns[0] if turns else None, ("value",), f"{path}: record {i}, first turn")
    return unique(records, lambda record: str(record["id"]), path)


def text_of(record):
    return record["conversations"][0]["value"].replace("<image>", "").strip()


def questions(data):
    path = os.path.join(data, ASK)
    return [to_question(record, data, path) for record in read_records(path).values()]


def to_question(record, data, path):
    text = f"{text_of(record)}\n{LETTER}"
    if not record.get("image"):
        return question(record["id"], text)
    where = f"{path}: question {record['id']}"
    image = image_file(os.path.join(data, "scienceqa/test"), record["image"], where)
    # The stored prompt has the <image> line: the score looks for it there.
    return question(record["id"], text, image, f"<image>\n{text}")


def parse(text):
    """Return a letter or "FAILED". Only "A", "A. ..." and "The answer is A." are understood.

    "A." fails, and "The answer is Apple" is A, as in the official tool.
    """
    if re.match(r"[A-E](\. |\Z)", text):
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else "FAILED"


def score(questions, truth, predictions, partial=False):
    """questions: llava_test_CQM-A.json. truth: a folder with problems.json and pid_splits.json."""
    official = read_records(questions)
    splits_path = os.path.join(truth, "pid_splits.json")
    problems_path = os.path.join(truth, "problems.json")
    test_ids = require(read_json(splits_path), ("test",), splits_path)["test"]
    if sorted(map(str, test_ids)) != sorted(official):
        raise ValueError(f"{splits_path}: its test ids are not those of the questions")
    problems = require(read_json(problems_path), official, problems_path)
    answers = read_answers(predictions, official, partial, fields=("question_id", "prompt", "text"))

    letters, right, with_image = {}, {}, {}
    for k, answer in answers.items():
        has_image = "<image>" in answer["prompt"]
        same_text = text_of(official[k]) in answer["prompt"]
        if has_image != bool(official[k].get("image")) or not same_text:
            raise ValueError(f"{predictions}: the prompt of question {k} is not that of the "
                             "question file")
        require(problems[k], ("choices", "answer"), f"{problems_path}: question {k}")
        letters[k] = parse(answer["text"])
        # A letter beyond the choices counts as parsed, and as wrong.
        choices = "ABCDE"[:len(problems[k]["choices"])]
        right[k] = int(choices.find(letters[k]) == problems[k]["answer"])
        if has_image:
            with_image[k] = right[k]
    return {
        "accuracy": mean(right.values(), 100),
        "correct": sum(right.values()), "total": len(right),
        "img_accuracy": mean(with_image.values(), 100),
        "img_correct": sum(with_image.values()), "img_total": len(with_image),
        "stderr": stderr(with_image.values()),
        "unparsed": sum(letter == "FAILED" for letter in letters.values()),
    }, with_image or right
