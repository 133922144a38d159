"""
The seven benchmarks. To add one, write its file and put its name into COLUMNS.

Each file declares
    HEADLINE        key of the summary that the table shows; SCALE multiplies it
    MAX_NEW_TOKENS  longest answer that the model may give
    ASK             the questions that the model gets, a file of LLaVA's eval.zip
    IMAGES          folder of the images
    SOURCE          where the official files come from
    read(questions, truth) -> {key: what is known about the question, with its label}
    score(official, answers) -> (summary, items)
and, if it needs them,
    QUESTIONS       the official file that `read` reads, if it is not ASK
    TRUTH           the folder of the labels, if they are not in that file
    TABLE_NOTE      a format string for more of the summary in the table
    key(answer)     key of an answer, if it is not the question_id
    counts(record)  whether a question of `read` counts, if not all do
    questions(path, images)     reads ASK, if it is no file of JSON lines: a list of dicts with a
                    question_id; text, which is sent; prompt, which the answer file stores; image: a
                    path, the bytes of an image file, or None; extra, more fields of the answer file
    grade(official, answers, predictions, args)     adds a judge's labels to `official` and returns
                    None, or returns a summary without a score

The names of files are relative to the folder `data`, but the arguments of `read` are paths.
`official` is what `read` returns; `answers` is {key: record of the answer file} in its order.
`summary` is what --score prints. It is not rounded, and a mean over no values is 0. `items` is
{question: score from 0 to 1}; a paired test compares these. A ValueError needs no name of a file:
the caller adds it.
"""
from importlib import import_module

# {file: title of its column in the table}, in the order of the paper.
COLUMNS = {"gqa": "GQA", "textvqa": "TextVQA", "mme": "MME", "mmbench": "MMBench",
           "mmvet": "MM-Vet", "pope": "POPE", "scienceqa": "SciQA"}
BENCHMARKS = {name: import_module(f"benchmarks.{name}") for name in COLUMNS}
