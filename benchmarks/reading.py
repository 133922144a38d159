"""What the benchmarks share: reading files, pairing answers with questions, averages."""
import math
import os
from collections import defaultdict

from common import read_json
from support.records import read_dicts

# The sentences that LLaVA appends to a question.
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."

# Types of the fields that the scores read. A field that is not listed may hold any value.
TYPES = dict.fromkeys(("text", "prompt", "question", "image", "category", "label", "value",
                       "structural"), str)
TYPES |= dict.fromkeys(("data", "answers", "capability", "score", "test", "conversations",
                        "choices"), list)
TYPES |= {"types": dict}


def require(record, fields, where):
    """Return `record`. ValueError if it is no object, lacks a field or has one of a wrong type."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: not a JSON object")
    for field in fields:
        expected = TYPES.get(field, object)
        if field not in record:
            raise ValueError(f"{where}: no field '{field}'")
        if not isinstance(record[field], expected):
            kind = "text" if expected is str else expected.__name__
            raise ValueError(f"{where}: no {kind} in '{field}'")
    return record


def read_objects(path, *fields):
    """Return a JSON file {key: object}. ValueError names an object that lacks one of the fields."""
    objects = require(read_json(path), (), path)
    return {k: require(value, fields, f"{path}: question {k}") for k, value in objects.items()}


def read_lines(path, *fields):
    """Return the objects of a file of JSON lines or of a JSON list.

    ValueError names the line that is not complete: half a file must not become a score.
    """
    return [require(record, fields, place) for place, record in read_dicts(path)]


def unique(records, key, path):
    """Return {key(record): record} in order. ValueError if two records have the same key."""
    found = {}
    for record in records:
        if key(record) in found:
            raise ValueError(f"{path}: question {key(record)} is there twice")
        found[key(record)] = record
    return found


def question_id(record):
    return str(record["question_id"])


def read_answers(path, questions, partial, key=question_id, fields=("question_id", "text")):
    """Return {key: answer} of a file in LLaVA's format, in the order of the dict `questions`.

    key: function of an answer. fields: what each answer must have. ValueError if an answer is
    double or unknown, or if one is missing and `partial` is False.
    """
    found = unique(read_lines(path, *fields), key, path)
    for k in found:
        if k not in questions:
            raise ValueError(f"{path}: question {k} is unknown: it is not in the question file")
    for k in questions:
        if k not in found and not partial:
            raise ValueError(f"{path}: question {k} has no answer")
    return {k: found[k] for k in questions if k in found}


def question(record_id, text, image=None, prompt=None, **extra):
    """Return a question for the model.

    text: what is sent, without <image>. image: a path, the bytes of an image file, or None.
    prompt: what the answer file stores, by default the text. extra: more fields of the answer file.
    """
    prompt = text if prompt is None else prompt
    return dict(question_id=record_id, prompt=prompt, text=text, image=image, extra=extra)


def image_file(folder, name, where):
    """Return the path of an image. ValueError if the name leads out of the folder."""
    from support.pictures import inside
    if not isinstance(name, str):
        raise ValueError(f"{where} has an image that is no file name")
    inside(folder, name)
    return os.path.join(folder, name)


def questions_from_lines(data, lines, images):
    """Return the questions of a file of JSON lines in LLaVA's format.

    data: the folder of all benchmarks. lines, images: this file and its images' folder, below data.
    """
    path, images = os.path.join(data, lines), os.path.join(data, images)
    return [question(record["question_id"], record["text"],
                     image_file(images, record["image"], f"{path}: {record['question_id']}"))
            for record in read_lines(path, "question_id", "text", "image")]


def mean(values, scale=1):
    """Return scale * mean, and 0 for no values."""
    values = list(values)
    return scale * sum(values) / len(values) if values else 0.0


def stderr(values, scale=100):
    """Return one standard error of the mean, in points."""
    values = list(values)
    center = mean(values)
    return scale * math.sqrt(sum((v - center) ** 2 for v in values)) / max(len(values), 1)


def group(values, key):
    """Return {key(value): list of the values with this key}."""
    groups = defaultdict(list)
    for value in values:
        groups[key(value)].append(value)
    return groups


def by_group(scores, key):
    """Return {key(question): {"accuracy": percent, "count": n}} of {question: score}."""
    return {name: {"accuracy": mean((scores[k] for k in members), 100), "count": len(members)}
            for name, members in sorted(group(scores, key).items())}
