"""
Train a connector on the boxes themselves: what its words could name at this size of picture.

    python results/ceiling.py WORDS_CHECKPOINT --boxes boxes_train.json --images DIR
        --features DIR --out DIR [--steps 1500]

The connector of a run never sees a box. This one has the same sizes, vision tower and words, and
learns for each patch the words of its label. results/photos.py --words_only measures both in the
same way, so the second number says how much of the distance is due to the captions.
"""
import argparse
import math
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from safetensors.torch import load_file

import checkpoint
import common
from results.photos import labels_of_patches, plain
from support.pictures import features_path, image_path


def targets_of(objects, side, index, K):
    """Return the words that each patch should say: float32[P, K] with rows of sum 1 or 0."""
    targets = torch.zeros(side * side, K)
    for i, label in enumerate(labels_of_patches(objects, side)):
        known = [index[word] for word in label if word in index]
        targets[i, known] = 1 / max(1, len(known))
    return targets


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    add = parser.add_argument
    add("checkpoint", help="a LangBridge after stage words; only its sizes and words are used")
    add("--boxes", required=True, help="boxes of the training pictures")
    add("--images", required=True)
    add("--features", required=True, help="the folder that train.py --features has filled")
    add("--out", required=True)
    add("--steps", type=int, default=1500)
    add("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    vlm = checkpoint.load(args.checkpoint)
    metadata = checkpoint.read_config(args.checkpoint)[1]
    for module in vlm.connector.modules():
        if isinstance(module, torch.nn.Linear):
            module.reset_parameters()
    vlm.connector.requires_grad_(True).train()
    # Of "Ġdog", "Dog" and "dog" the most frequent one counts. It stands first in the list.
    index = {plain(word): k for k, word in sorted(enumerate(vlm.words), reverse=True)}
    side = math.isqrt(vlm.num_patches)
    boxes = list(common.read_json(args.boxes).items())
    optimizer = torch.optim.AdamW(vlm.connector.parameters(), lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.05)
    for step in range(args.steps):
        chosen = [boxes[i] for i in torch.randint(len(boxes), (32,)).tolist()]
        files = [features_path(args.features, image_path(args.images, name)) for name, _ in chosen]
        patches = torch.stack([load_file(file)["patches"] for file in files]).float()
        targets = torch.stack([targets_of(entry["objects"], side, index, len(vlm.words))
                               for _, entry in chosen])
        log_p = vlm.connector.scores(patches).log_softmax(dim=-1)               # (32, P, K)
        loss = -(targets * log_p).sum() / targets.sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vlm.connector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == args.steps - 1:
            print(f"step {step:5}/{args.steps}  loss {loss.item():.3f}", flush=True)
    checkpoint.save(vlm, args.out, "boxes", ("connector",), template=metadata["template"],
                    image_mode=metadata["image_mode"])
    print(f"wrote {args.out}")


if __name__ == "__main__":
    common.run_script(main)
