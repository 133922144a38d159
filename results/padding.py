"""Print which part of stage 2's tokens is padding, for values of group_batches and pack.

    python results/padding.py [--out results/padding.json]

The records of mix665k are simulated. Their number by source is published, and the lengths of their
texts are this project's estimate: a log-normal distribution for each source. No model runs. A rank
computes as many tokens as its micro-batches have with padding, and all ranks wait for the slowest.
"""
import math
import random
import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
from data import global_batches, micro_batches

IMAGE_TOKENS, MAX_LENGTH, PAD_TO, GLOBAL_BATCH = 576, 2048, 64, 128
WORDS_PER_TOKEN = 0.75
# source: (records, has an image, median tokens of the text, sigma of its logarithm)
SOURCES = {
    "LLaVA conversation": (56_681, True, 330, 0.35), "LLaVA detail": (23_240, True, 150, 0.3),
    "LLaVA reasoning": (76_643, True, 170, 0.3), "VQAv2": (82_783, True, 130, 0.5),
    "GQA": (72_140, True, 190, 0.5), "OKVQA": (8_998, True, 40, 0.5),
    "OCR-VQA": (80_000, True, 130, 0.2), "A-OKVQA": (66_160, True, 90, 0.2),
    "TextCaps": (21_953, True, 70, 0.2), "RefCOCO": (48_447, True, 300, 0.6),
    "VG": (86_417, True, 420, 0.5), "ShareGPT": (40_688, False, 1100, 0.9)}


def simulate(part):
    """Return (tokens of each record, its length as data.py counts it), of 1 / part of all."""
    rng = random.Random(0)
    tokens, lengths = [], []
    for records, has_image, median, sigma in SOURCES.values():
        for _ in range(records // part):
            text = 20 + median * math.exp(sigma * rng.gauss(0, 1))
            tokens.append(int(min(MAX_LENGTH, text + IMAGE_TOKENS * has_image)))
            lengths.append(int(text * WORDS_PER_TOKEN) * (1 if has_image else -1))
    return tokens, lengths


def padding(steps, tokens, world, batch_size, pack):
    """Return the part of all computed tokens that is padding or waiting for the slowest rank."""
    real = computed = 0
    for step in steps:
        of_ranks = [0] * world
        for rank in range(world):
            for batch in micro_batches(step, rank, world, batch_size):
                sizes = [tokens[i] for i in batch]
                rows = [sum(sizes)] if pack else [max(sizes)] * len(sizes)
                of_ranks[rank] += sum(math.ceil(T / PAD_TO) * PAD_TO for T in rows)
        real += sum(tokens[i] for i in step)
        computed += world * max(of_ranks)
    return 1 - real / computed


def main():
    parser = common.argument_parser(__doc__)
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    tokens, lengths = simulate(part=8)
    dataset = types.SimpleNamespace(lengths=lengths)
    print(f"{len(tokens):,} records, mean {sum(tokens) / len(tokens):.0f} tokens")
    rows = []
    for world, batch_size in ((8, 16), (8, 4), (1, 8)):
        for group_batches in (1, 4, 16, 64):
            steps = global_batches(dataset, GLOBAL_BATCH, 0, 1, True, group_batches)
            steps = [step for step in steps if len(step) == GLOBAL_BATCH]
            row = {"ranks": world, "batch_size": batch_size, "group_batches": group_batches}
            for key, pack in (("padding", False), ("packed", True)):
                row[key] = round(padding(steps, tokens, world, batch_size, pack), 4)
            print(row)
            rows.append(row)
    if args.out:
        common.write_json(rows, args.out)


if __name__ == "__main__":
    common.run_script(main)
