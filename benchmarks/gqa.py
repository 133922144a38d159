"""GQA, testdev balanced: questions about real photographs, exact match."""
from benchmarks.reading import (by_group, mean, questions_from_lines, read_answers, read_objects,
                                require, stderr)

COLUMN = "GQA"
HEADLINE, SCALE = "accuracy", 1
MAX_NEW_TOKENS = 128
ASK = "gqa/llava_gqa_testdev_balanced.jsonl"
QUESTIONS = "gqa/testdev_balanced_questions.json"
TRUTH = None
SOURCE = "GQA's site: questions v1.2, images"


def questions(data):
    return questions_from_lines(data, ASK, "gqa/images")


def normalize(text):
    """Return the prediction in a text. Only case and periods at the very end are forgiven.

    "yes. " keeps its period, because a space follows it.
    """
    return text.rstrip(".").lower()


def score(questions, truth, predictions, partial=False):
    """questions: testdev_balanced_questions.json, which holds the answers."""
    official = read_objects(questions, "answer", "types")
    for k, q in official.items():
        require(q["types"], ("structural",), f"{questions}: question {k}")
    # Only balanced questions count and need an answer.
    balanced = {k: q for k, q in official.items() if q.get("isBalanced", True)}
    answers = read_answers(predictions, official, partial=True)
    right = {}
    for k, q in balanced.items():
        if k in answers:
            right[k] = int(normalize(answers[k]["text"]) == q["answer"])
        elif not partial:
            raise ValueError(f"{predictions}: question {k} has no answer")
    structural = {k: balanced[k]["types"]["structural"] for k in right}
    semantic = {k: str(balanced[k]["types"].get("semantic")) for k in right}
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
        "by_semantic_type": by_group(right, semantic.get),
    }, right
