"""
Kill a run at random moments, start it again, and compare with the run that nobody killed, bit for bit.

    python tests/kill_loop.py [--kills 25] [--seed 0]     # the world of data/pocket; pretrain and SFT, on 1 and 2 ranks

A kill comes a random time after the begin of a random one of these: loading, a step, the writing of a state, that of the
checkpoint. A run that ends is compared, and a fresh one is begun, until the kills are used up. A start is a fork
with torch imported, which makes the loop quick; on two ranks one of them, by lot, is killed, as a machine fails.
"""
import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def start(count, work, *args):
    """work(*args) in `count` forked processes, which find each other as torchrun's do. -> the processes"""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def one(rank):
        import torch
        torch.set_num_threads(1)
        if count > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1",
                              MASTER_PORT=str(port))
        sys.exit(work(*args))

    jobs = [multiprocessing.get_context("fork").Process(target=one, args=(rank,)) for rank in range(count)]
    for job in jobs:
        job.start()
    return jobs


def end(jobs, seconds=300):
    """Wait for the processes, kill what is left after `seconds`. -> their exit statuses"""
    until = time.time() + seconds
    for job in jobs:
        job.join(max(0, until - time.time()))
    for job in jobs:
        if job.is_alive():
            job.kill()
            job.join()
    return [job.exitcode for job in jobs]


def train_quietly(argv, output, doom=None):
    """train.py in this process, what it prints appended to the file `output`; SIGKILL as `doom` has it: on rank (rank),
    `delay` seconds into call number `call` of `function`, such as "train.save_state"."""
    import checkpoint
    import train
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if doom and doom["rank"] == int(os.environ.get("RANK", 0)):
        module, name = doom["function"].split(".")
        module, calls = {"train": train, "checkpoint": checkpoint}[module], []
        original = getattr(module, name)

        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) == doom["call"]:
                threading.Timer(doom["delay"], os.kill, (os.getpid(), signal.SIGKILL)).start()
            return original(*args, **kwargs)
        setattr(module, name, call)
    cfg = train.read_settings(argv)
    train.check(cfg)
    train.main(cfg)


def result(out):
    """What a run leaves: bytes of its weights, and its losses"""
    files = {os.path.relpath(os.path.join(folder, name), out) for folder, _, names in os.walk(out) for name in names
             if name.endswith(".safetensors") and "state" not in folder}
    weights = {name: open(f"{out}/{name}", "rb").read() for name in files}
    return weights, [json.loads(line)["loss"] for line in open(f"{out}/log.jsonl")]


def kill_loop(argv, out, count, kills, seed=0):
    """Runs train.py with `argv` on `count` ranks until `kills` of them were killed. -> {"kills", ..., "differences"}"""
    os.makedirs(out)
    dice, run = random.Random(seed), f"{out}/killed"
    assert end(start(count, train_quietly, [*argv, f"--out={out}/whole"], f"{out}/text")) == [0] * count
    expected = result(f"{out}/whole")
    moments = {"train.make_model": (1, 0.3), "train.accumulate": (len(expected[1]), 0.05), "train.save_state": (4, 0.05),
               "checkpoint.save": (1, 0.05)}                             # calls in a run, and seconds of one
    report = {"ranks": count, "kills": 0, **dict.fromkeys(moments, 0), "starts": 0, "resumed from a state": 0,
              "runs ended": 0, "differences": 0}
    while report["kills"] < kills or os.path.isdir(run):
        report["starts"] += 1
        report["resumed from a state"] += any(n.startswith("step-") for n in listdir(f"{run}/state"))
        function = dice.choice(list(moments))
        calls, seconds = moments[function]
        doom = {"rank": dice.randrange(count), "function": function, "call": dice.randint(1, calls),
                "delay": dice.uniform(0, seconds)} if report["kills"] < kills else None
        jobs = start(count, train_quietly, [*argv, f"--out={run}"], f"{out}/text", doom)
        if doom:
            jobs[doom["rank"]].join(300)
        codes = end(jobs, 5 if doom and jobs[doom["rank"]].exitcode else 300)
        if doom and codes[doom["rank"]] == -signal.SIGKILL:
            report["kills"] += 1
            report[function] += 1
        elif any(codes):
            raise SystemExit(f"a run that was not killed ended with {codes}:\n{open(f'{out}/text').read()[-3000:]}")
        if os.path.isfile(f"{run}/config.json"):                    # killed after the end is an end, too
            report["runs ended"] += 1
            report["differences"] += result(run) != expected
            shutil.rmtree(run)
    shutil.rmtree(out)
    return report


def listdir(folder):
    return os.listdir(folder) if os.path.isdir(folder) else []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import checkpoint, train                                                    # once, before the forks
    argv = ["config/pocket/pretrain.py", "--init=", "--max_steps=6", "--save_every=2", "--global_batch=4", "--batch_size=1",
            "--workers=1", "--device=cpu", "--probe_every=4", "--warmup=0.1"]
    sft = [*argv, "--stage=sft", "--data=data/pocket/sft.json", "--template=chat", "--group=True", "--llm_lr=1e-3"]
    with tempfile.TemporaryDirectory() as out:
        for stage, count, more in (("pretrain", 1, argv), ("sft", 1, sft), ("pretrain", 2, [*argv, "--shard"]),
                                   ("sft", 2, sft), ("sft", 2, [*sft, "--shard"])):
            print(json.dumps({"stage": stage, "shard": "--shard" in more,
                              **kill_loop(more, f"{out}/x", count, args.kills, args.seed)}), flush=True)


if __name__ == "__main__":
    main()
