"""
Kill a run at random moments, start it again, and compare with the run that nobody killed, bit for bit.

    python tests/kill_loop.py [--kills 25] [--seed 0]     # the world of data/pocket; pretrain and SFT, on 1 and 2 ranks

A third of the kills come while a run starts, a third after a random step, a third while a state or the checkpoint is
being written. A run that ends is compared, and a fresh one is begun, until the kills are used up. A start is a fork
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


def train_quietly(argv, output):
    """train.py in this process, what it prints appended to the file `output`"""
    import train
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    cfg = train.read_settings(argv)
    train.check(cfg)
    train.main(cfg)


def result(out):
    """What a run leaves: bytes of its weights, and its losses"""
    files = {os.path.relpath(os.path.join(folder, name), out) for folder, _, names in os.walk(out) for name in names
             if name.endswith(".safetensors") and "state" not in folder}
    weights = {name: open(f"{out}/{name}", "rb").read() for name in files}
    return weights, [json.loads(line)["loss"] for line in open(f"{out}/log.jsonl")]


def log_of(out):
    """(which file log.jsonl is, its lines): a start that gets as far as the first step puts another file in its place"""
    path = f"{out}/log.jsonl"
    return (os.stat(path).st_ino, len(open(path).readlines())) if os.path.isfile(path) else (0, 0)


def wait_and_kill(jobs, out, seconds, steps, dice):
    """Wait for a random moment and kill one process. -> which kind of moment, or None if the run had ended before"""
    before, step, kind = log_of(out)[0], dice.randrange(steps), dice.choice(["starting", "training", "writing"])

    def reached():
        file, lines = log_of(out)
        return file != before and lines >= step and (
            kind != "writing" or os.path.isdir(f"{out}/state/tmp") or os.path.isdir(f"{out}/llm"))
    if kind == "starting":
        time.sleep(dice.uniform(0, seconds / 2))
    else:
        while any(job.is_alive() for job in jobs) and not reached():
            time.sleep(0.002)
        time.sleep(dice.uniform(0, seconds / steps / (20 if kind == "writing" else 4)))
    victim = dice.choice(jobs)
    if not victim.is_alive():
        return None
    os.kill(victim.pid, signal.SIGKILL)
    return kind


def kill_loop(argv, out, count, kills, seed=0):
    """Runs train.py with `argv` on `count` ranks until `kills` of them were killed. -> {"kills", ..., "differences"}"""
    os.makedirs(out)
    dice, began = random.Random(seed), time.time()
    assert end(start(count, train_quietly, [*argv, f"--out={out}/whole"], f"{out}/text")) == [0] * count
    seconds, expected = time.time() - began, result(f"{out}/whole")
    report = {"ranks": count, "kills": 0, "starting": 0, "training": 0, "writing": 0, "starts": 0,
              "resumed from a state": 0, "runs ended": 0, "differences": 0}
    run = f"{out}/killed"
    while report["kills"] < kills or os.path.isdir(run):
        report["starts"] += 1
        report["resumed from a state"] += any(n.startswith("step-") for n in listdir(f"{run}/state"))
        jobs = start(count, train_quietly, [*argv, f"--out={run}"], f"{out}/text")
        where = wait_and_kill(jobs, run, seconds, len(expected[1]), dice) if report["kills"] < kills else None
        codes = end(jobs, 5 if where else 300)
        if where:
            report["kills"] += 1
            report[where] += 1
        if os.path.isfile(f"{run}/config.json"):                    # killed after the end is an end, too
            report["runs ended"] += 1
            report["differences"] += result(run) != expected
            shutil.rmtree(run)
        elif not where:
            raise SystemExit(f"a run that was not killed ended with {codes}:\n{open(f'{out}/text').read()[-3000:]}")
    shutil.rmtree(out)
    return report


def listdir(folder):
    return os.listdir(folder) if os.path.isdir(folder) else []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import train                                                    # once, before the forks
    argv = ["config/pocket/pretrain.py", "--max_steps=6", "--save_every=2", "--global_batch=4", "--batch_size=1",
            "--workers=1", "--device=cpu", "--probe_every=4", "--warmup=0.1"]
    sft = [*argv, "--stage=sft", "--data=data/pocket/sft.json", "--template=chat", "--group=True", "--llm_lr=1e-3"]
    with tempfile.TemporaryDirectory() as out:
        for stage, count, more in (("pretrain", 1, argv), ("sft", 1, sft), ("pretrain", 2, [*argv, "--shard"]),
                                   ("sft", 2, sft), ("sft", 2, [*sft, "--shard"])):
            print(json.dumps({"stage": stage, "shard": "--shard" in more,
                              **kill_loop(more, f"{out}/x", count, args.kills, args.seed)}), flush=True)


if __name__ == "__main__":
    main()
