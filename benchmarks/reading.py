"""What the benchmarks share: reading files, adding labels to questions, averages."""
import math
import os
from collections import Counter, defaultdict
from contextlib import contextmanager

from support.records import read_dicts

# The sentences that LLaVA appends to a question.
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


@contextmanager
def naming(*paths):
    """Turn an error that a record of these files causes into a ValueError that names the files."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = str(error)
        if isinstance(error, KeyError):
            reason = f"no field {error}"
        elif not isinstance(error, ValueError):
            reason = f"a record of another form: {error}"
        paths = [path for path in paths if path]
        if not any(path in reason for path in paths):
            reason = f"{' or '.join(paths)}: {reason}"
        raise ValueError(reason) from error


def read_lines(path, *fields):
    """Return the objects of a file of JSON lines or of a JSON list.

    ValueError names the line that is not complete, or that lacks one of the fields: half a file
    must not become a score.
    """
    records = read_dicts(path)
    for place, record in records:
        for field in fields:
            if field not in record:
                raise ValueError(f"{place}: no field '{field}'")
    return [record for _, record in records]


def unique(records, key):
    """Return {key(record): record} in order. ValueError if two records have the same key."""
    found = {}
    for record in records:
        if key(record) in found:
            raise ValueError(f"question {key(record)} is there twice")
        found[key(record)] = record
    return found


def question_id(record):
    return str(record["question_id"])


def add_labels(records, labels, path):
    """Add its "label" to each of the records {key: record}. labels: pairs (key, label) of `path`.

    ValueError if there is not exactly one label for each record: labels of another version of the
    questions would give a wrong score without a warning.
    """
    found, expected = Counter(key for key, _ in labels), Counter(list(records))
    for key in (found - expected) + (expected - found):
        raise ValueError(f"{path}: labels and questions do not match one to one, see {key}")
    for key, label in labels:
        records[key]["label"] = label


def image_file(folder, name):
    """Return the path of an image. ValueError if the name leads out of the folder."""
    from support.pictures import inside
    inside(folder, name)
    return os.path.join(folder, name)


def questions_from_lines(path, images):
    """Return the questions of a file of JSON lines in LLaVA's format. images: a folder."""
    return [{"question_id": q["question_id"], "text": q["text"], "prompt": q["text"],
             "image": image_file(images, q["image"])} for q in read_lines(path)]


def mean(values, scale=1):
    """Return scale * mean, and 0 for no values."""
    values = list(values)
    return scale * sum(values) / len(values) if values else 0.0


def stderr(values):
    """Return one standard error of the mean, in points."""
    values = list(values)
    center = mean(values)
    return 100 * math.sqrt(sum((v - center) ** 2 for v in values)) / max(len(values), 1)


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
