"""
The seven benchmarks. To add one, write its file and put its name into NAMES.

Each file declares
    COLUMN          title of its column in the table
    HEADLINE        key of the summary that the table shows; SCALE multiplies it
    MAX_NEW_TOKENS  longest answer that the model may give
    ASK             the questions that the model gets, a file of LLaVA's eval.zip
    QUESTIONS       the official file that the score reads; may be the same file
    TRUTH           the folder of the labels, or None if they are in QUESTIONS
    SOURCE          where the official files come from
    questions(data) -> list of dicts, see reading.question
    score(questions, truth, predictions, partial=False) -> (summary, items)

All files are relative to the folder `data`. The arguments of `score` are paths, as in
`eval.py --score`. `predictions` are JSON lines in LLaVA's format. They are paired with the
questions by identity, so their order does not matter. partial=True scores only the questions that
have an answer. `summary` is what --score prints. It is not rounded, and a mean over no values is 0.
`items` is {question: score from 0 to 1}; a paired test compares these. ValueError, in one
sentence, for incomplete JSON, for an answer that is missing, double or unknown, and for labels
that do not fit the questions.

Two names are optional: TABLE_NOTE, a format string for more of the summary in the table, and
grades(questions, predictions, args, partial) -> path or None, which asks a judge for `truth`.
"""
from importlib import import_module

# The order of the columns in the paper.
NAMES = ("gqa", "textvqa", "mme", "mmbench", "mmvet", "pope", "scienceqa")
BENCHMARKS = {name: import_module(f"benchmarks.{name}") for name in NAMES}
