"""
Move a trained LangBridge to another LLM, without training.

    python transfer.py SRC TGT [--out DIR] [--eval DATA.json]

SRC is a checkpoint folder of any stage. The paper calls a move after stage pretrain "Pretrain-LB",
and one after sft "SFT-LB". TGT is a causal LLM, a hub name or a folder. The tensors of the
connector and the list of words move. The LLM, its tokenizer and E are replaced: E becomes the new
LLM's own input embeddings of the same words. The new checkpoint works as it is.
`train.py config/pocket/sft.py --init=DIR --out=...` trains it on. --eval measures source and target
on captioned images, --tasks on benchmarks. Nothing is trained.

An MLP has no words. --map words.json can still move it, as a baseline, see tools/map_mlp.py.
"""
import os
import subprocess
import sys
from dataclasses import replace

import common


def read_arguments():
    parser = common.argument_parser(__doc__)
    add = parser.add_argument
    add("source", help="checkpoint folder with a LangBridge")
    add("target", help="LLM to move to: hub name or folder")
    add("--out", help="folder to write (default: SRC-to-TGT)")
    add("--eval", metavar="DATA.json", help="LLaVA-format captions to measure both LLMs on")
    add("--vision_tower", help="where the same tower is, if not under the name in SRC/config.json")
    add("--map", metavar="words.json", help="move an MLP by a linear map, fitted on these words")
    add("--images", help="folder of the images of --eval (default: images/ beside it)")
    add("--tasks", help="benchmarks of eval.py to run on SRC and on the result, such as pope,gqa")
    add("--data", help="the folder of the benchmarks, as for eval.py")
    add("--limit", type=int, default=128, help="images of --eval, in batches of 16 (default 128)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--attention", help=common.ATTENTION)
    add("--device", help="default: cuda if there is one, else cpu; auto spreads the LLM over GPUs")
    add("--overwrite", action="store_true", help="replace a checkpoint at --out")
    add("--offline", action="store_true", help=common.OFFLINE)
    args = parser.parse_args()
    if bool(args.tasks) != bool(args.data):
        parser.error("--tasks and --data go together")
    if args.tasks and args.vision_tower:
        parser.error("eval.py needs the vision tower under the name in config.json, so --tasks "
                     "does not go with --vision_tower")
    return args


if __name__ == "__main__":                   # before the slow imports, so that --help is quick
    ARGS = read_arguments()
    if ARGS.offline:
        common.go_offline()
    print(f"moving {ARGS.source} to {ARGS.target}", flush=True)

import torch

import checkpoint
from support import fingerprint
from support.checks import refuse_existing, refuse_inside
from support.device import own_device
from support.report import caption_batches, measure, print_report, single_tokens


def refuse_mlp(config, source):
    """Raise ValueError if a checkpoint cannot move because it has an MLP."""
    if config.connector == "mlp":
        raise ValueError(f"{source} has an MLP connector, which cannot move: its output is in the "
                         f"embedding space of {config.llm}. With --map words.json transfer.py fits "
                         "a linear map to another LLM, a baseline.")


def move(source, target, device, dtype, attention=None, vision_tower=None):
    """Return the VLM of checkpoint folder `source`, but with the LLM `target`.

    vision_tower: where the same tower is, if not under the name in config.json.
    """
    config, metadata = checkpoint.read_config(source)
    refuse_mlp(config, source)
    config = replace(config, llm=target, vision_tower=vision_tower or config.vision_tower)
    words = checkpoint.read_words(source, config, metadata)
    # A tower that was trained belongs to the connector and moves with it.
    tower_folder = checkpoint.own_folder(source, "vision_tower")
    vlm = checkpoint.build(config, words, device, dtype, attention=attention,
                           tower_folder=tower_folder)               # makes the target's E
    checkpoint.check_patches(vlm, metadata, source)
    fingerprint.check(vlm, source, metadata, ("vision_tower",))
    checkpoint.load_connector(vlm.connector, source)
    return vlm


def run_benchmarks(folder, args):
    """Run eval.py on a checkpoint. Its answers and scores go to the folder eval/ in it."""
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "eval.py")
    command = [sys.executable, script, folder, "--tasks", args.tasks, "--data", args.data]
    for flag in ("device", "attention", "dtype"):
        if getattr(args, flag):
            command += [f"--{flag}", getattr(args, flag)]
    command += ["--offline"] * args.offline
    command += ["--overwrite"] * (args.overwrite and folder != args.source)
    if subprocess.run(command).returncode:
        raise ValueError(f"the benchmarks could not be run on {folder}")


def main(args):
    config, metadata = checkpoint.read_config(args.source)
    if not args.map:
        refuse_mlp(config, args.source)
    if config.connector == "langbridge" and args.map:
        raise ValueError(f"--map is for an MLP, and {args.source} has a LangBridge, which moves "
                         "without it")
    target = os.path.basename(os.path.normpath(args.target))
    out = args.out or f"{os.path.normpath(args.source)}-to-{target}"
    refuse_existing(out, args.overwrite)
    refuse_inside(out, source=args.source, target=args.target, vision_tower=args.vision_tower)
    device = own_device(args.device, most=None)
    dtype = getattr(torch, args.dtype)
    images = args.images or os.path.join(os.path.dirname(args.eval or ""), "images")

    if args.tasks:
        run_benchmarks(args.source, args)           # first, so that a missing file is found now
    report = {"words": config.num_words, "connector_from": metadata["stage"]}
    torch.manual_seed(0)                            # of a new image_newline
    if args.eval:
        vlm = checkpoint.load(args.source, device, dtype, args.attention,
                              vision_tower=args.vision_tower)
        batches = caption_batches(vlm, args.eval, images, metadata, args.limit)
        report["source"] = measure(vlm, *batches)
        del vlm                                     # two LLMs need not fit into memory together
    if args.map:
        from tools.map_mlp import move_mlp          # imported late: needed for the baseline only
        vlm = move_mlp(args.source, args.target, args.map, device, dtype, args.attention,
                       args.vision_tower)
    else:
        vlm = move(args.source, args.target, device, dtype, args.attention, args.vision_tower)
        report["single_tokens"] = int(single_tokens(vlm).sum())
    if vlm.image_newline is not None:
        report["image_newline"] = "new, random, for SFT to train: the source's belongs to its LLM"
    if args.eval:
        batches = caption_batches(vlm, args.eval, images, metadata, args.limit)
        report["target"] = measure(vlm, *batches)

    kept = {key: metadata[key] for key in ("template", "image_mode") if key in metadata}
    source = {key: metadata[key] for key in ("stage", "llm")}
    checkpoint.save(vlm, out, "transfer", trained_parts=(), **kept, source=source)
    common.write_json(report, f"{out}/transfer.json")
    print_report(report)
    print(f"wrote {out}")
    if args.tasks:
        run_benchmarks(out, args)


if __name__ == "__main__":
    common.run_script(main, ARGS)
