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
    IMAGES          folder of the images, if ASK has JSON lines in LLaVA's format
    read(questions, truth) -> {key: what is known about the question, with its label}
    score(official, answers) -> (summary, items)

All files are relative to the folder `data`. The arguments of `read` are paths, as in `eval.py
--score`. `official` is what `read` returns, and `answers` is {key: record of the answer file} in
its order. `summary` is what --score prints. It is not rounded, and a mean over no values is 0.
`items` is {question: score from 0 to 1}; a paired test compares these. An error in a function may
leave out the file's name: its caller adds it.

Some names are optional: key(answer) if the key is not the question_id; questions(data), a list of
dicts as reading.question returns them, if there is no IMAGES; TABLE_NOTE, a format string for more
of the summary in the table; grades(questions, predictions, args, partial), which asks a judge for
the file `truth`.
"""
from importlib import import_module

# The order of the columns in the paper.
NAMES = ("gqa", "textvqa", "mme", "mmbench", "mmvet", "pope", "scienceqa")
BENCHMARKS = {name: import_module(f"benchmarks.{name}") for name in NAMES}
