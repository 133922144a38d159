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
from collections import defaultdict

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

import common
import conversation
import data
import pocket
from generate import generate
from results.photos import interval, write_reports
from support.pictures import image_path, open_image, transform


def things(answer):
    """Return the set of things that an answer names."""
    return {part.strip().rstrip(".").lower() for part in answer.split(",")}


def pairs_of(record):
    """Return [(question without "<image>", answer), ...] of a record."""
    texts = [turn["content"].replace(conversation.IMAGE, "").strip()
             for turn in data.turns_of(record)]
    return list(zip(texts[::2], texts[1::2]))


def split(path, folder, held_out):
    """Write train.json, val.json and answers.json. Seed 0 draws the `held_out` records of val.json.

    The only answer of a record of answers.json is a sentence with all answers of the photograph.
    """
    records = [record for _, record in data.read_records(path)]
    random.Random(0).shuffle(records)
    sentences = []
    for record in records[held_out:]:
        if "image" in record:
            parts = ",".join(answer for _, answer in pairs_of(record)).lower().split(",")
            names = dict.fromkeys(part.strip() for part in parts)
            messages = [{"role": "user", "content": f"{conversation.IMAGE}\nWhat is in the room?"},
                        {"role": "assistant", "content": f"There is a {', a '.join(names)}."}]
            sentences.append(pocket.record(record.get("id"), messages, record["image"]))
    common.write_json(records[held_out:], f"{folder}/train.json")
    common.write_json(records[:held_out], f"{folder}/val.json")
    common.write_json(sentences, f"{folder}/answers.json")


def answers(vlm, questions, pixels):
    """Return the answers to questions about one picture: pixels float32[1, 3, S, S] or None."""
    image = f"{conversation.IMAGE}\n" if pixels is not None else ""
    prompts = [conversation.encode_prompt([{"role": "user", "content": image + question}],
                                          vlm.tokenizer, vlm.num_patches)
               for question in questions]
    ids = generate(vlm, prompts, pixels, max_new_tokens=12, image_index=[0] * len(prompts))
    return vlm.tokenizer.batch_decode(ids, skip_special_tokens=True)


@torch.no_grad()
def measure(vlm, args):
    """Return {"right"|"wrong"|"none": [mean, low, high]} and more of a checkpoint."""
    records = [record for _, record in data.read_records(args.data)]
    pixels = [transform(open_image(image_path(args.images, record["image"])),
                        **vlm.image_settings, mode="pad")[None] for record in records]
    rows = defaultdict(list)
    for n, record in enumerate(records):
        questions, expected = zip(*pairs_of(record))
        hits = {}
        for name, picture in (("right", pixels[n]), ("wrong", pixels[n - 1]), ("none", None)):
            given = answers(vlm, questions, picture)
            hits[name] = sum(things(a) == things(b) for a, b in zip(given, expected))
        hits["right_minus_none"] = hits["right"] - hits["none"]
        for name, number in hits.items():
            rows[name].append((number, len(expected)))
    report = {name: interval(row) for name, row in rows.items()}
    return {**report, "photographs": len(records),
            "questions": sum(count for _, count in rows["right"])}


def main():
    parser = common.argument_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True,
                                     parser_class=common.argument_parser)
    add = commands.add_parser("split", description=__doc__).add_argument
    add("questions", metavar="QUESTIONS.json")
    add("folder", metavar="DIR")
    add("--held_out", type=int, default=60, help="photographs of val.json (default 60)")
    add = commands.add_parser("measure", description=__doc__).add_argument
    add("checkpoints", nargs="+", metavar="NAME=CHECKPOINT")
    add("--data", required=True, help="val.json")
    add("--images", required=True, help="the folder of the photographs")
    add("--out", required=True, metavar="FILE.json", help="reports by name; old names are kept")
    args = parser.parse_args()
    if args.command == "split":
        split(args.questions, args.folder, args.held_out)
    else:
        write_reports(args.checkpoints, args.out, lambda vlm, _: measure(vlm, args))


if __name__ == "__main__":
    common.run_script(main)
