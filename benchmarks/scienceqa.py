"""ScienceQA, test split: single choice. The headline is the accuracy on questions with an image."""
import os
import re

from benchmarks.reading import LETTER, add_labels, image_file, mean, read_lines, stderr, unique
from common import read_json

HEADLINE, SCALE = "img_accuracy", 1
MAX_NEW_TOKENS = 1024
ASK = "scienceqa/llava_test_CQM-A.json"
IMAGES = "scienceqa/test"
TRUTH = "scienceqa"                         # problems.json and pid_splits.json
SOURCE = "lupantech/ScienceQA: data/scienceqa, test.zip"


def text_of(record):
    return record["conversations"][0]["value"].replace("<image>", "").strip()


def questions(path, images):
    found = []
    for record in read_lines(path):
        image = None
        text = prompt = f"{text_of(record)}\n{LETTER}"
        if record.get("image"):
            image = image_file(images, record["image"])
            prompt = f"<image>\n{text}"     # the score looks for this line in the stored prompt
        found.append({"question_id": record["id"], "text": text, "prompt": prompt, "image": image})
    return found


def read(questions, truth):
    """Return {id: record with "label": a letter} of llava_test_CQM-A.json.

    truth: the folder of problems.json and of pid_splits.json, which names the test questions.
    """
    official = unique(read_lines(questions), lambda record: str(record["id"]))
    path = os.path.join(truth, "pid_splits.json")
    problems = read_json(os.path.join(truth, "problems.json"))
    labels = [(str(k), "ABCDE"[problems[str(k)]["answer"]]) for k in read_json(path)["test"]]
    add_labels(official, labels, path)
    return official


def parse(text):
    """Return a letter or "FAILED". Only "A", "A. ..." and "The answer is A." are understood.

    "A." fails, and "The answer is Apple" is A, as in the official tool.
    """
    if re.match(r"[A-E](\. |\Z)", text):
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else "FAILED"


def score(official, answers):
    letters, right, with_image = {}, {}, {}
    for k, answer in answers.items():
        record = official[k]
        has_image = "<image>" in answer["prompt"]
        if has_image != bool(record.get("image")) or text_of(record) not in answer["prompt"]:
            raise ValueError(f"the prompt of question {k} is not that of the question file")
        letters[k] = parse(answer["text"])
        right[k] = int(letters[k] == record["label"])
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
