"""The official files of the benchmarks: found, read and checked before a model is loaded."""
import os

import common
from benchmarks import BENCHMARKS
from benchmarks.reading import naming, question_id, questions_from_lines, read_lines, unique


def official_paths(benchmark, data):
    """Return the paths of the official questions and of the labels (None if there is no folder)."""
    truth = os.path.join(data, benchmark.TRUTH) if hasattr(benchmark, "TRUTH") else None
    return os.path.join(data, getattr(benchmark, "QUESTIONS", benchmark.ASK)), truth


def read_official(benchmark, questions, truth):
    """Return (what benchmark.read returns, the keys of the questions that count)."""
    with naming(questions, truth):
        official = benchmark.read(questions, truth)
        counts = getattr(benchmark, "counts", lambda record: True)
        return official, [k for k, record in official.items() if counts(record)]


def pair(benchmark, official, scored, answers, predictions, partial=False):
    """Return {key: answer} of the questions that count. answers: records of `predictions`.

    ValueError if an answer is double or unknown, or if one is missing and `partial` is False.
    """
    with naming(predictions):
        found = unique(answers, getattr(benchmark, "key", question_id))
        for k in found:
            if k not in official:
                raise ValueError(f"question {k} is unknown: it is not in the question file")
        for k in scored:
            if k not in found and not partial:
                raise ValueError(f"question {k} has no answer")
    return {k: found[k] for k in scored if k in found}


def score_files(task, questions, truth, predictions, args, partial=False):
    """Return (summary, items) of a file of answers. A judge may have to grade them first.

    partial: score only the questions that have an answer.
    """
    benchmark = BENCHMARKS[task]
    official, scored = read_official(benchmark, questions, truth)
    answers = read_lines(predictions, "question_id", "text")
    answers = pair(benchmark, official, scored, answers, predictions, partial)
    # If --truth gives the grades, no judge is asked.
    if truth is None and hasattr(benchmark, "grade"):
        ungraded = benchmark.grade(official, answers, predictions, args)
        if ungraded:
            return ungraded, {}
    with naming(questions, truth, predictions):
        return benchmark.score(official, answers)


def load_questions(task, data):
    """Return (questions, missing): the questions of a benchmark, and what the folder lacks for it.

    questions: dicts, see benchmarks/__init__.py. missing: sentences. ValueError if the labels do
    not fit the questions: this must be known before the model runs, not after.
    """
    benchmark = BENCHMARKS[task]
    asked = os.path.join(data, benchmark.ASK)
    official, truth = official_paths(benchmark, data)
    files = sorted({asked, official})                   # they may be the same file
    missing = [os.path.relpath(file, data) for file in files if not os.path.isfile(file)]
    questions = []
    if os.path.isfile(asked):
        make_questions = getattr(benchmark, "questions", questions_from_lines)
        with naming(asked):
            questions = make_questions(asked, os.path.join(data, benchmark.IMAGES))
            if not questions:
                raise ValueError("the file has no question")
    if not missing:
        try:                    # a question stands for its answer: it has the same id and prompt
            pair(benchmark, *read_official(benchmark, official, truth), questions, asked)
        except FileNotFoundError as error:              # a file of labels
            missing.append(os.path.relpath(error.filename, data))
    # MMBench has its images as bytes in the question file; the others name files.
    images = {q["image"] for q in questions if isinstance(q["image"], str)}
    absent = sorted(image for image in images if not os.path.isfile(image))
    if absent:
        example = os.path.relpath(absent[0], data)
        missing.append(f"{len(absent)} of {len(images)} images, such as {example}")
    return questions, missing


def load_all_questions(tasks, data):
    """Return {task: questions}. ValueError if a file of any task is missing."""
    questions = {}
    incomplete = []
    for task in tasks:
        questions[task], missing = load_questions(task, data)
        for sentence in missing:
            common.print_rank0(f"{task}: MISSING {sentence}")
        if missing:
            incomplete.append(task)
            source = BENCHMARKS[task].SOURCE
            common.print_rank0(f"{task}: the official files come from {source}; LLaVA's eval.zip")
        else:
            common.print_rank0(f"{task}: {len(questions[task])} questions, all files are there")
    if incomplete:
        raise ValueError(f"files are missing under {data} for {', '.join(incomplete)}")
    return questions
