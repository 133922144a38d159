"""The official files of the benchmarks: found, read and checked before a model is loaded."""
import os
import tempfile

import common
from benchmarks import BENCHMARKS
from benchmarks.answers import answer_record, question_key, write_lines
from benchmarks.reading import unique


def official_paths(benchmark, data):
    """Return the paths of the official questions and of the labels (None if there is no folder)."""
    truth = os.path.join(data, benchmark.TRUTH) if benchmark.TRUTH else None
    return os.path.join(data, benchmark.QUESTIONS), truth


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
    if benchmark.ASK not in missing:
        questions = benchmark.questions(data)
        # Two questions with one key would share one answer.
        unique(questions, question_key, os.path.join(data, benchmark.ASK))
        if not questions:
            raise ValueError(f"{os.path.join(data, benchmark.ASK)} has no question")
    if not missing:
        try:
            score_empty_answers(benchmark, data, questions)
        except FileNotFoundError as error:              # a file of labels
            missing.append(os.path.relpath(error.filename, data))
    # MMBench has its images as bytes in the question file; the others name files.
    images = {q["image"] for q in questions if isinstance(q["image"], str)}
    absent = sorted(image for image in images if not os.path.isfile(image))
    if absent:
        example = os.path.relpath(absent[0], data)
        missing.append(f"{len(absent)} of {len(images)} images, such as {example}")
    return questions, missing


def score_empty_answers(benchmark, data, questions):
    """Score an empty answer to each question. This reads all labels and pairs them."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, os.path.basename(benchmark.ASK))    # errors name this file
        write_lines([answer_record(q, "") for q in questions], path)
        benchmark.score(*official_paths(benchmark, data), path)


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
