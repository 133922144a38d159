"""
Write a checkpoint's connector for others: half precision, hub names, tied to no LLM.

    python results/release.py CHECKPOINT DIR --vision_tower facebook/dinov2-small
        --llm HuggingFaceTB/SmolLM2-135M-Instruct

DIR gets config.json, words.json and connector.safetensors. `python transfer.py DIR LLM` and
`python words.py DIR photo.jpg` read it. The model card, DIR/README.md, is written by hand.
"""
import os
import shutil
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import checkpoint
import common
from support.tensors import read_safetensors, write_safetensors


def main():
    parser = common.argument_parser(__doc__)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT")
    add("out", metavar="DIR")
    add("--vision_tower", required=True, help="hub name of the tower")
    add("--llm", required=True, help="hub name of the LLM of the training")
    args = parser.parse_args()
    metadata = checkpoint.read_config(args.checkpoint)[1]
    if any(checkpoint.own_folder(args.checkpoint, part) for part in ("llm", "vision_tower")):
        raise ValueError(f"{args.checkpoint} holds an LLM or tower of its own, which would be lost")
    tensors = read_safetensors(f"{args.checkpoint}/connector.safetensors")
    half = {name: tensor.half() for name, tensor in tensors.items()}
    os.makedirs(args.out, exist_ok=True)
    write_safetensors(half, f"{args.out}/connector.safetensors")
    shutil.copy(f"{args.checkpoint}/words.json", args.out)
    # Without hashes the connector is for any LLM, also for another copy of the one of the training.
    metadata |= {"vision_tower": args.vision_tower, "llm": args.llm}
    metadata.pop("fingerprint", None)
    common.write_json(metadata, f"{args.out}/config.json")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    common.run_script(main)
