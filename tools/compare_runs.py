"""
Train the pocket's two stages for 20 steps at two commits and say whether the losses are the same.

    python tools/compare_runs.py main .                     # a commit, and the working tree
    python tools/compare_runs.py --log results/compare.json         # the working tree and the log
    python tools/compare_runs.py --log results/compare.json --write     # write the log anew

Both sides train in one small world, which the working tree's pocket.py makes, with the configs of
their own commit. Losses and gradient norms are compared. It takes less than a minute on two CPU
cores, in which the working tree must not change. The exit status is 0 if all are the same to the
bit, or within --tolerance.

A commit that changes a sum writes the log anew and says why in its message. An x86 processor
computes with AVX2 here, so that a log of a Zen 3 holds to the bit on a Zen 4. Elsewhere (Intel was
not tried), and where torch is another version, only --tolerance may hold.
"""
import itertools
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from multiprocessing.pool import ThreadPool
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common import argument_parser, read_json, run_script, write_json  # noqa: E402

STEPS = 20
STAGES = ("pretrain", "sft")
NUMBERS = ("loss", "grad_norm")             # of log.jsonl
# One thread, because the number of threads changes the order of sums, and so does the width of the
# processor's vectors. With AVX2 the pocket's LLM is trained in float32 everywhere, too.
ENVIRONMENT = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
               "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": "",
               "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def read_arguments():
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("refs", nargs="*", metavar="REF", help='a commit, or "." for the working tree')
    add("--log", help="compare one REF (default .) with this file")
    add("--write", action="store_true", help="write --log instead of comparing")
    add("--tolerance", type=float, default=0.0, help="accepted relative difference (default 0)")
    args = parser.parse_args()
    if args.log and not args.refs:
        args.refs = ["."]
    if len(args.refs) != (1 if args.log else 2) or (args.write and not args.log):
        parser.error("give two REFs, or --log FILE and at most one REF; --write needs --log")
    return args


def main():
    args = read_arguments()
    old = [read_json(args.log)] if args.log and not args.write else []
    os.environ |= ENVIRONMENT
    with tempfile.TemporaryDirectory() as folder, ThreadPool(2) as pool:
        world = Path(folder) / "world"
        outs = [Path(folder) / name for name in ("first", "second")]
        trees = [check_out(ref, out) for ref, out in zip(args.refs, outs)]
        make_world(world, pool)
        sides = old + pool.starmap(measure, zip(args.refs, trees, outs, itertools.repeat(world)))
    if args.write:
        write_json(sides[0], args.log)
        print(f"wrote {args.log}")
        return 0
    for side in sides:
        print(f"commit {side['commit']}, {side['cpu']}, torch {side['torch']}")
    largest = 0
    for stage, number in itertools.product(STAGES, NUMBERS):
        sentence, difference = compare(*(side["stages"][stage][number] for side in sides))
        print(f"{stage:9} {number:10} {sentence}")
        largest = max(largest, difference)
    if largest > args.tolerance:
        print(f"The largest relative difference is {largest:.1e}, more than {args.tolerance:g}. If "
              "a sum was to change, write the log anew and say why in the commit.")
    return int(largest > args.tolerance)


def compare(before, after):
    """Return (a sentence about two lists of numbers, the largest relative difference).

    The difference is infinite if a number is missing or not finite.
    """
    if len(before) != len(after):
        return f"{len(before)} steps and {len(after)} steps", math.inf
    differences = [0.0 if a == b else abs(a - b) / max(abs(a), abs(b))
                   for a, b in zip(before, after)]
    differences = [math.inf if math.isnan(d) else d for d in differences]
    largest = max(differences)
    if not largest:
        return f"the same to the bit in {len(before)} steps", largest
    first = next(i for i, d in enumerate(differences) if d)
    return (f"differs from step {first} on: there by {differences[first]:.1e}, at most by "
            f"{largest:.1e} at step {differences.index(largest)} (relative)"), largest


def output_of(command, folder=ROOT):
    """Return what a command prints. ValueError if it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command[:3])} fails in {folder}: "
                         f"{done.stderr.strip()[-600:]!r}")
    return done.stdout.strip()


def check_out(ref, folder):
    """Return the folder of a ref's files: "." is the working tree, and git writes others."""
    if ref == ".":
        return ROOT
    output_of(["git", "archive", f"--output={folder}.tar", ref])
    shutil.unpack_archive(f"{folder}.tar", folder, filter="data")
    return folder


def make_world(out, pool):
    """Make what the two stages need of a pocket world: pictures, records, one LLM, the tower."""
    import pocket
    import vocab
    from support import pocket_models
    from support.pocket_world import CELLS, COLORS, SHAPES, SIZES, WORDS
    settings = {"seed": 0, "corpus": 100, "effort": 0, "out": str(out)}
    pocket.make_world(out, 40, 20, settings["seed"], pool)
    for name in ("pocket-qwen", "vision-tower"):
        pocket_models.make_model(name, settings)
    words = [*COLORS, *SHAPES, *SIZES, *WORDS, *CELLS]
    vocab.save_words([vocab.to_word(f" {word}".encode()) for word in words], out / "words.json")


def measure(ref, tree, out, world):
    """Run both stages of a tree. Return a log: "stages" has {stage: {number: STEPS floats}}."""
    import torch                                    # after ENVIRONMENT, which it reads once
    options = [f"--images={world}/images", "--epochs=20", f"--max_steps={STEPS}", "--seed=1",
               "--global_batch=4", "--batch_size=2", "--dtype=float32", "--device=cpu"]
    start = {"pretrain": ["--init=", f"--llm={world}/pocket-qwen",
                          f"--vision_tower={world}/vision-tower", f"--words={world}/words.json"],
             "sft": [f"--init={out}/pretrain", "--connector_lr=7e-4"]}
    stages = {}
    for stage in STAGES:
        output_of([sys.executable, "train.py", f"config/pocket/{stage}.py", *start[stage], *options,
                   f"--data={world}/{stage}.json", f"--out={out}/{stage}"], tree)
        rows = [json.loads(line) for line in open(out / stage / "log.jsonl")]
        stages[stage] = {number: [row[number] for row in rows] for number in NUMBERS}
    version = "--dirty" if ref == "." else ref      # HEAD, with "-dirty" if the tree has changed
    return {"commit": output_of(["git", "describe", "--always", "--exclude=*", version]),
            "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            "torch": torch.__version__, "stages": stages}


if __name__ == "__main__":
    run_script(main)
