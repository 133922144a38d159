"""Held-out pictures with the captions of several checkpoints, as they come out: a JSON file and a sheet of pictures; and
bits per byte of all held-out captions with the right image, a wrong one and none: OUT-bits.json.

    python results/captions.py NAME=CHECKPOINT [NAME=CHECKPOINT ...] --data captions_test.json --images DIR --out results/small
"""
import argparse
import json
import os
import sys
import textwrap

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoints", nargs="+", metavar="NAME=CHECKPOINT")
parser.add_argument("--data", required=True)
parser.add_argument("--images", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--number", type=int, default=20)
args = parser.parse_args()

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import checkpoint
from generate import generate
import conversation
import data
import pictures
import transfer

records = [data.messages_of(record) for _, record in data.read_records(args.data)[:args.number]]
bits = {}
rows = [{"image": images[0], "true": messages[1]["content"]} for messages, images in records]
for pair in args.checkpoints:
    name, _, folder = pair.partition("=")
    vlm = checkpoint.load(folder)
    _, whole = checkpoint.read_config(folder)
    prompts = [conversation.encode_prompt(messages[:1], vlm.tokenizer, vlm.num_patches, whole["template"])
               for messages, _ in records]
    pixels = torch.stack([pictures.transform(pictures.open_image(pictures.image_path(args.images, images[0])),
                                         **vlm.image_settings, mode=whole["image_mode"])
                          for _, images in records])
    for row, ids in zip(rows, generate(vlm, prompts, pixels, max_new_tokens=24)):
        row[name] = vlm.tokenizer.decode(ids, skip_special_tokens=True).split("\n")[0].strip()   # a caption is one line
    bits[name] = transfer.measure(vlm, *transfer.caption_batches(vlm, args.data, args.images, whole, limit=128))
    print(f"{name}: bits per byte", ", ".join(f"{which} {bits[name][f'bits_per_byte_{which}']:.3f}"
                                             for which in ("right", "wrong", "none")), flush=True)
with open(f"{args.out}.json", "w", encoding="utf-8") as f:
    json.dump(rows, f, indent=1, ensure_ascii=False)
with open(f"{args.out}-bits.json", "w", encoding="utf-8") as f:
    json.dump(bits, f, indent=1)

figure, axes = plt.subplots(-(-len(rows) // 5), 5, figsize=(16, 3.9 * -(-len(rows) // 5)))
for axis in axes.flat:
    axis.axis("off")
for axis, row in zip(axes.flat, rows):
    axis.imshow(pictures.open_image(os.path.join(args.images, row["image"])))
    text = "\n".join(textwrap.fill(f"{k}: {v}", 40) for k, v in row.items() if k != "image")
    axis.set_title(text.replace("$", r"\$"), fontsize=8, loc="left")
figure.tight_layout()
figure.savefig(f"{args.out}.jpg", dpi=80, bbox_inches="tight")
