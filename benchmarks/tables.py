"""Summaries as text and as markdown tables, and paired tests of two models."""
import math
import os
import statistics

from benchmarks import BENCHMARKS
from benchmarks.reading import group, mean
from common import read_json, write_json


def summary_text(title, summary, indent=""):
    """Return all of a summary as indented lines: counts, splits, unparsed answers."""
    values = [f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}"
              for key, value in summary.items() if not isinstance(value, dict)]
    lines = [f"{indent}{title}: {', '.join(values)}"]
    for key, value in summary.items():
        if isinstance(value, dict):
            lines.append(summary_text(key, value, indent + "  "))
    return "\n".join(lines)


def results_table(rows, over_seeds=False):
    """Return a markdown table with one column for each benchmark that has a score.

    rows: [(name, {task: summary}), ...]. over_seeds: rows of one name are seeds of one experiment
    and become one row with mean and standard deviation. Otherwise ± is one standard error.
    """
    tasks = [task for task in BENCHMARKS if any(task in results for _, results in rows)]
    runs = [(name, [results]) for name, results in rows]
    if over_seeds:
        runs = []
        for name, seeds in group(rows, lambda row: row[0]).items():
            label = name if len(seeds) > 1 else f"{name} (one seed, ± standard error)"
            runs.append((label, [results for _, results in seeds]))
    title = "mean ± standard deviation over seeds" if over_seeds else ""
    columns = [BENCHMARKS[task].COLUMN for task in tasks]
    lines = [f"| {' | '.join([title, *columns])} |", "|---" * (len(tasks) + 1) + "|"]
    for name, seeds in runs:
        cells = [table_cell(BENCHMARKS[task], [seed[task] for seed in seeds if task in seed])
                 for task in tasks]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def table_cell(benchmark, summaries):
    """Return one field of the table, for one run or for several seeds."""
    # A summary has no headline as long as a judge has not graded the answers.
    summaries = [s for s in summaries if benchmark.HEADLINE in s]
    if not summaries:
        return "–"
    first = summaries[0]
    values = [s[benchmark.HEADLINE] * benchmark.SCALE for s in summaries]
    spread = first["stderr"] * benchmark.SCALE if len(values) == 1 else statistics.stdev(values)
    text = f"{statistics.fmean(values):.1f} ± {spread:.1f}"
    if len(values) == 1:
        text += getattr(benchmark, "TABLE_NOTE", "").format(**first)
    return f"PARTIAL ({first['partial']}): {text}" if "partial" in first else text


def results_folder(path):
    """Return the folder of results: that of a checkpoint, or `path` itself."""
    return f"{path}/eval" if os.path.isdir(f"{path}/eval") else path


def table_of_files(paths, over_seeds):
    """Return the table of several results.json files, their folders or their checkpoints."""
    rows = []
    for path in paths:
        path = f"{results_folder(path)}/results.json" if os.path.isdir(path) else path
        results = read_json(path)
        if "tasks" not in results:
            raise ValueError(f"{path}: --table takes results.json files of eval.py")
        rows.append((results["name"], results["tasks"]))
    return results_table(rows, over_seeds)


def write_results(name, path, made_by, summaries):
    """Add the summaries {task: summary} to a results.json and return the table of all in it.

    Summaries of earlier runs stay if the same checkpoint and settings made them.
    """
    old = read_json(path) if os.path.exists(path) else {}
    kept = old["tasks"] if old.get("made_by") == made_by else {}
    tasks = {**kept, **summaries}
    write_json({"name": name, "made_by": made_by, "tasks": tasks}, path)
    return results_table([(name, tasks)])


def mcnemar(only_a, only_b):
    """Return the exact two-sided p of McNemar's test.

    only_a, only_b: numbers of questions that one model alone gets right. If the models are
    equally good, each of these falls to either side like a fair coin.
    """
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2 ** n)


def sign_flip(differences):
    """Return a two-sided p for soft scores: how often a sum with random signs is as far from 0.

    The 10,000 draws come from a seeded generator, so the same data give the same p.
    """
    import numpy as np
    differences = np.array([d for d in differences if d])
    generator = np.random.default_rng(0)
    # In pieces of 100, because the signs of all draws would need much memory.
    sums = np.concatenate([generator.choice([-1, 1], (100, len(differences))) @ differences
                           for _ in range(100)])
    extreme = np.count_nonzero(abs(sums) >= abs(differences.sum()) - 1e-9)
    return float((extreme + 1) / (len(sums) + 1))


def comparison_table(a, b):
    """Return a markdown table with a paired test for each benchmark that both folders have.

    a, b: result folders, or checkpoints that have one.
    """
    folders = [results_folder(a), results_folder(b)]
    lines = ["| task | questions | A | B | B - A | only A right | only B right | p | test |",
             "|---" * 9 + "|"]
    for name, benchmark in BENCHMARKS.items():
        paths = [os.path.join(folder, f"{name}.scores.json") for folder in folders]
        if all(os.path.exists(path) for path in paths):
            A, B = (read_json(path) for path in paths)
            if A.keys() != B.keys():
                raise ValueError(f"{paths[0]} and {paths[1]} are not about the same questions")
            lines.append(comparison_row(benchmark.COLUMN, A, B))
    if len(lines) == 2:
        raise ValueError(f"{folders[0]} and {folders[1]} have no task in common: "
                         "no <task>.scores.json is in both")
    lines += ["", f"A is {a}, B is {b}: mean score of a question in percent "
              "(MMBench: a group; SciQA: with image)."]
    return "\n".join(lines)


def comparison_row(column, A, B):
    """Return one row of the table. A, B: {question: score} with the same keys."""
    if {*A.values(), *B.values()} <= {0, 1}:
        only_a = sum(A[k] > B[k] for k in A)
        only_b = sum(B[k] > A[k] for k in A)
        p = mcnemar(only_a, only_b)
        test = "McNemar, exact"
    else:
        only_a = only_b = "–"
        p = sign_flip([B[k] - A[k] for k in A])
        test = "random signs"
    mean_a = mean(A.values(), 100)
    mean_b = mean(B.values(), 100)
    return (f"| {column} | {len(A)} | {mean_a:.2f} | {mean_b:.2f} | {mean_b - mean_a:+.2f} | "
            f"{only_a} | {only_b} | {p:.2g} | {test} |")
