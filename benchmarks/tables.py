"""Tables of results in markdown, and paired tests of two models."""
import math
import os
import statistics

from benchmarks import BENCHMARKS, COLUMNS
from benchmarks.reading import mean
from common import read_json, write_json


def write_results(name, path, made_by, summaries):
    """Add the summaries {task: summary} to a results.json.

    Summaries of earlier runs stay if the same checkpoint and settings made them.
    """
    old = read_json(path) if os.path.exists(path) else {}
    kept = old["tasks"] if old.get("made_by") == made_by else {}
    write_json({"name": name, "made_by": made_by, "tasks": {**kept, **summaries}}, path)


def results_folder(path):
    """Return the folder of results: that of a checkpoint, or `path` itself."""
    return f"{path}/eval" if os.path.isdir(f"{path}/eval") else path


def results_table(paths, over_seeds=False):
    """Return a markdown table with one column for each benchmark that has a score.

    paths: results.json files, their folders or their checkpoints. over_seeds: files of one name are
    seeds of one experiment and become one row with mean and standard deviation. Otherwise ± is one
    standard error.
    """
    rows = {}                               # lists of results; those of one list are one row
    for path in paths:
        path = f"{results_folder(path)}/results.json" if os.path.isdir(path) else path
        results = read_json(path)
        if not isinstance(results, dict) or "tasks" not in results:
            raise ValueError(f"{path}: --table takes results.json files of eval.py")
        rows.setdefault(results["name"] if over_seeds else len(rows), []).append(results)
    tasks = [task for task in BENCHMARKS
             if any(task in results["tasks"] for runs in rows.values() for results in runs)]
    title = "mean ± standard deviation over seeds" if over_seeds else ""
    columns = [title, *(COLUMNS[task] for task in tasks)]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for runs in rows.values():
        name = runs[0]["name"]
        if over_seeds and len(runs) == 1:
            name += " (one seed, ± standard error)"
        lines.append(f"| {' | '.join([name, *(table_cell(task, runs) for task in tasks)])} |")
    return "\n".join(lines)


def table_cell(task, runs):
    """Return one field of the table, for one run or for several seeds."""
    benchmark = BENCHMARKS[task]
    summaries = [results["tasks"].get(task, {}) for results in runs]
    # A summary has no headline as long as a judge has not graded the answers.
    summaries = [summary for summary in summaries if benchmark.HEADLINE in summary]
    if not summaries:
        return "–"
    first = summaries[0]
    values = [s[benchmark.HEADLINE] * benchmark.SCALE for s in summaries]
    spread = first["stderr"] * benchmark.SCALE if len(values) == 1 else statistics.stdev(values)
    text = f"{statistics.fmean(values):.1f} ± {spread:.1f}"
    if len(values) == 1:
        text += getattr(benchmark, "TABLE_NOTE", "").format(**first)
    return f"PARTIAL ({first['partial']}): {text}" if "partial" in first else text


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
    """Return a markdown table of paired tests. a, b: result folders, or checkpoints with one."""
    lines = ["| task | questions | A | B | B - A | only A right | only B right | p | test |",
             "|---" * 9 + "|"]
    for task, column in COLUMNS.items():
        paths = [os.path.join(results_folder(path), f"{task}.scores.json") for path in (a, b)]
        if all(os.path.exists(path) for path in paths):
            A, B = map(read_json, paths)        # {question: score}
            if A.keys() != B.keys():
                raise ValueError(f"{paths[0]} and {paths[1]} are not about the same questions")
            lines.append(comparison_row(column, A, B))
    if len(lines) == 2:
        raise ValueError(f"{a} and {b} have no task in common: no <task>.scores.json is in both")
    return "\n".join([*lines, "", f"A is {a}, B is {b}: mean score of a question in percent "
                      "(MMBench: a group; SciQA: with image)."])


def comparison_row(column, A, B):
    only_a, only_b, test = "–", "–", "random signs"
    if {*A.values(), *B.values()} <= {0, 1}:
        only_a = sum(A[k] > B[k] for k in A)
        only_b = sum(B[k] > A[k] for k in A)
        p, test = mcnemar(only_a, only_b), "McNemar, exact"
    else:
        p = sign_flip([B[k] - A[k] for k in A])
    mean_a, mean_b = mean(A.values(), 100), mean(B.values(), 100)
    return (f"| {column} | {len(A)} | {mean_a:.2f} | {mean_b:.2f} | {mean_b - mean_a:+.2f} | "
            f"{only_a} | {only_b} | {p:.2g} | {test} |")
