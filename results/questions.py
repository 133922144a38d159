"""
Questions about photographs: hold some photographs out, and measure checkpoints on their questions.

    python results/questions.py split QUESTIONS.json DIR [--held_out 60]
    python results/questions.py measure NAME=CHECKPOINT [...] --data DIR/val.json --images DIR
        --out FILE.json

`split` writes DIR/train.json and val.json, and answers.json for the words stage: one text for each
photograph of train.json, which names its answers.

An answer is right if it is the expected text, apart from case and the order of several things.
Each question is asked alone, with its photograph, with the photograph of another record, and
without one. Intervals are 95 % bootstrap intervals over photographs.
"""
import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

import common
import conversation
import data
import pocket
from generate import generate
from results.photos import interval, write_reports
from support.pictures import image_path, open_image, transform


def split(path, folder, held_out):
    """Write train.json, val.json, answers.json; `held_out` records drawn by seed 0 are val."""
    records = [record for _, record in data.read_records(path)]
    random.Random(0).shuffle(records)
    common.write_json(records[held_out:], f"{folder}/train.json")
    common.write_json(records[:held_out], f"{folder}/val.json")
    answers_of = [answers_record(record) for record in records[held_out:] if "image" in record]
    common.write_json(answers_of, f"{folder}/answers.json")


def things(answer):
    """Return the set of things that an answer names."""
    return {part.strip().rstrip(".").lower() for part in answer.split(",")}


def pairs_of(record):
    """Return [(question without "<image>", answer), ...] of a record."""
    texts = [turn["content"].replace(conversation.IMAGE, "") for turn in data.turns_of(record)]
    return [(question.strip(), answer) for question, answer in zip(texts[::2], texts[1::2])]


def answers_record(record):
    """Return a record whose only answer is a sentence with all answers of `record`."""
    parts = [part.strip() for _, answer in pairs_of(record) for part in answer.lower().split(",")]
    sentence = "There is a " + ", a ".join(dict.fromkeys(parts)) + "."
    messages = [{"role": "user", "content": f"{conversation.IMAGE}\nWhat is in the room?"},
                {"role": "assistant", "content": sentence}]
    return pocket.record(record.get("id"), messages, record["image"])


def answers(vlm, questions, pixels):
    """Return the answers to questions about one picture: pixels float32[1, 3, S, S] or None."""
    image = f"{conversation.IMAGE}\n" if pixels is not None else ""
    prompts = [conversation.encode_prompt([{"role": "user", "content": image + question}],
                                          vlm.tokenizer, vlm.num_patches)
               for question in questions]
    index = [0] * len(prompts) if pixels is not None else None
    ids = generate(vlm, prompts, pixels, max_new_tokens=12, image_index=index)
    return [vlm.tokenizer.decode(row, skip_special_tokens=True) for row in ids]


@torch.no_grad()
def measure(vlm, args):
    """Return {"right"|"wrong"|"none": [mean, low, high]} and more of a checkpoint."""
    records = [record for _, record in data.read_records(args.data)]
    pixels = [transform(open_image(image_path(args.images, record["image"])),
                        **vlm.image_settings, mode="pad")[None] for record in records]
    rows = {"right": [], "wrong": [], "none": []}
    for n, record in enumerate(records):
        questions, expected = zip(*pairs_of(record))
        for name, picture in (("right", pixels[n]), ("wrong", pixels[n - 1]), ("none", None)):
            given = answers(vlm, questions, picture)
            hits = sum(things(a) == things(b) for a, b in zip(given, expected))
            rows[name].append((hits, len(expected)))
    report = {name: interval(row) for name, row in rows.items()}
    gain = [(right - none, count) for (right, count), (none, _) in zip(rows["right"], rows["none"])]
    return {**report, "right_minus_none": interval(gain), "photographs": len(records),
            "questions": sum(count for _, count in rows["right"])}


def main():
    parser = common.argument_parser(__doc__)
    add = parser.add_argument
    add("what", choices=("split", "measure"))
    add("names", nargs="+", help="QUESTIONS.json DIR, or NAME=CHECKPOINT [...]")
    add("--held_out", type=int, default=60, help="photographs of val.json (default 60)")
    add("--data", help="val.json")
    add("--images", help="the folder of the photographs")
    add("--out", metavar="FILE.json", help="reports by name; old names are kept")
    args = parser.parse_args()
    if args.what == "split":
        if len(args.names) != 2:
            parser.error("split needs QUESTIONS.json and a folder")
        return split(*args.names, args.held_out)
    if not (args.data and args.images and args.out):
        parser.error("measure needs --data, --images and --out")
    write_reports(args.names, args.out, lambda vlm, _: measure(vlm, args))


if __name__ == "__main__":
    common.run_script(main)
