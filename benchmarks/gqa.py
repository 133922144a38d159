"""GQA, testdev balanced: questions about real photographs, exact match."""
from benchmarks.reading import by_group, mean, stderr
from common import read_json

HEADLINE, SCALE = "accuracy", 1
MAX_NEW_TOKENS = 128
ASK = "gqa/llava_gqa_testdev_balanced.jsonl"
IMAGES = "gqa/images"
QUESTIONS = "gqa/testdev_balanced_questions.json"
SOURCE = "GQA's site: questions v1.2, images"


def read(questions, truth):
    """Return {id: record} of testdev_balanced_questions.json."""
    return read_json(questions)


def counts(record):
    """Return whether a question counts and needs an answer: only balanced ones do."""
    return record.get("isBalanced", True)


def normalize(text):
    """Return the prediction in a text. Only case and periods at the very end are forgiven.

    "yes. " keeps its period, because a space follows it.
    """
    return text.rstrip(".").lower()


def score(official, answers):
    right = {k: int(normalize(a["text"]) == official[k]["answer"]) for k, a in answers.items()}
    structural = {k: official[k]["types"]["structural"] for k in right}
    # The type "query" is open; all other types are binary.
    open_questions = [right[k] for k in right if structural[k] == "query"]
    binary = [right[k] for k in right if structural[k] != "query"]
    return {
        "accuracy": mean(right.values(), 100),
        "binary": mean(binary, 100),
        "open": mean(open_questions, 100),
        "correct": sum(right.values()),
        "total": len(right),
        "stderr": stderr(right.values()),
        "by_structural_type": by_group(right, structural.get),
        "by_semantic_type": by_group(right, lambda k: str(official[k]["types"].get("semantic"))),
    }, right
