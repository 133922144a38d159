"""The official files of the benchmarks: found, read and checked before a model is loaded."""
import os

import common
from benchmarks import BENCHMARKS
from benchmarks.answers import answer_record, question_key
from benchmarks.reading import (naming, pair_answers, question_id, questions_from_lines, read_lines,
                                unique)


def official_paths(benchmark, data):
    """Return the paths of the official questions and of the labels (None if there is no folder)."""
    truth = os.path.join(data, benchmark.TRUTH) if benchmark.TRUTH else None
    return os.path.join(data, benchmark.QUESTIONS), truth


def read_and_pair(benchmark, questions, truth, answers, predictions, partial=False):
    """Return the official records and the answers, see benchmarks/__init__.py.

    ValueError in one sentence if they do not fit. predictions: the file of the answers.
    """
    with naming(questions, truth):
        official = benchmark.read(questions, truth)
    key = getattr(benchmark, "key", question_id)
    return official, pair_answers(answers, official, key, predictions, partial)


def score_files(task, questions, truth, predictions, args, partial=False):
    """Return (summary, items) of a file of answers. A judge may have to grade them first.

    partial: score only the questions that have an answer.
    """
    benchmark = BENCHMARKS[task]
    answers = read_lines(predictions, "question_id", "text")
    official, answers = read_and_pair(benchmark, questions, truth, answers, predictions, partial)
    with naming(questions, truth, predictions):
        # If --truth gives the grades, no judge is asked.
        if truth is None and hasattr(benchmark, "grade"):
            ungraded = benchmark.grade(official, answers, predictions, args)
            if ungraded:
                return ungraded, {}
        return benchmark.score(official, answers)


def load_questions(task, data):
    """Return (questions, missing): the questions of a benchmark, and what the folder lacks for it.

    questions: dicts as benchmarks/reading.py makes them. missing: sentences. ValueError if the
    labels do not fit the questions: this must be known before the model runs, not after.
    """
    benchmark = BENCHMARKS[task]
    # ASK is what the model gets, QUESTIONS what the score reads. They may be the same file.
    files = sorted({benchmark.ASK, benchmark.QUESTIONS})
    missing = [file for file in files if not os.path.isfile(os.path.join(data, file))]
    questions = []
    path = os.path.join(data, benchmark.ASK)
    if benchmark.ASK not in missing:
        with naming(path):
            if hasattr(benchmark, "IMAGES"):
                questions = questions_from_lines(path, os.path.join(data, benchmark.IMAGES))
            else:
                questions = benchmark.questions(data)
        # Two questions with one key would share one answer.
        unique(questions, question_key, path)
        if not questions:
            raise ValueError(f"{path} has no question")
    if not missing:
        empty = [answer_record(q, "") for q in questions]
        try:
            read_and_pair(benchmark, *official_paths(benchmark, data), empty, path)
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
        if not missing:
            common.print_rank0(f"{task}: {len(questions[task])} questions, all files are there")
            continue
        incomplete.append(task)
        for sentence in missing:
            common.print_rank0(f"{task}: MISSING {sentence}")
        source = BENCHMARKS[task].SOURCE
        common.print_rank0(f"{task}: the official files come from {source}; LLaVA's eval.zip")
    if incomplete:
        raise ValueError(f"files are missing under {data} for {', '.join(incomplete)}")
    return questions
