"""
Kill a run at random moments, start it again, and compare it, bit for bit, with a run without kills.

test_ranks.py calls kill_loop. KILLS=25 pytest -s tests/test_ranks.py -k kills kills each of five
configurations 25 times. A kill comes a random time after the begin of one of these: loading, a
step, the writing of a state, the writing of the checkpoint. On two ranks one of them is killed, as
when a machine fails. A complete run is compared, and a new one is begun, until there were enough
kills. The processes are forks of one that has imported torch, which makes a start quick.
"""
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

# function: (calls of it in a run, seconds of a call). None: a call for each step.
MOMENTS = {"train.make_model": (1, 0.3), "train.accumulate": (None, 0.05),
           "train.save_state": (4, 0.05), "checkpoint.save": (1, 0.05)}


def start(count, work, *args):
    """Call work(*args) in `count` forked processes, which find each other as torchrun's do.

    -> the processes. Their exit status is what `work` returns.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def one(rank):
        import torch
        torch.set_num_threads(1)
        if count > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        raise SystemExit(work(*args))

    fork = multiprocessing.get_context("fork")
    jobs = [fork.Process(target=one, args=(rank,)) for rank in range(count)]
    for job in jobs:
        job.start()
    return jobs


def end(jobs, seconds=300):
    """Wait for the processes, and kill those that remain after `seconds`. -> exit statuses"""
    until = time.time() + seconds
    for job in jobs:
        job.join(max(0, until - time.time()))
        job.kill()                                  # does nothing to a process that has ended
        job.join()
    return [job.exitcode for job in jobs]


def train_quietly(argv, output, kill=None):
    """Run train.py in this process; what it prints is appended to the file `output`.

    kill: send SIGKILL to rank kill["rank"], kill["delay"] seconds after the begin of call number
    kill["call"] of kill["function"].
    """
    import train
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if kill and kill["rank"] == int(os.environ.get("RANK", 0)):
        module, name = kill["function"].split(".")
        module = importlib.import_module(module)
        original, calls = getattr(module, name), []

        def call(*args, **kwargs):
            calls.append(1)
            if len(calls) == kill["call"]:
                threading.Timer(kill["delay"], os.kill, (os.getpid(), signal.SIGKILL)).start()
            return original(*args, **kwargs)

        setattr(module, name, call)
    cfg = train.read_settings(argv)
    train.check(cfg)
    train.main(cfg)


def result(out):
    """Return what a run leaves: the bytes of its weights, and its losses."""
    weights = {path.relative_to(out): path.read_bytes() for path in out.rglob("*.safetensors")
               if "state" not in path.relative_to(out).parts}
    return weights, [json.loads(line)["loss"] for line in open(out / "log.jsonl")]


def kill_loop(argv, out, count, kills):
    """Run train.py with `argv` on `count` ranks until `kills` of them were killed. -> the counts"""
    generator, out = random.Random(0), Path(out)
    run, text = out / "killed", out / "text"
    out.mkdir()
    assert end(start(count, train_quietly, [*argv, f"--out={out}/calm"], text)) == [0] * count
    expected = result(out / "calm")
    counts = ["kills", *MOMENTS, "starts", "resumed from a state", "runs ended", "differences"]
    report = dict.fromkeys(counts, 0)
    while report["kills"] < kills or run.is_dir():
        report["starts"] += 1
        report["resumed from a state"] += any(run.glob("state/step-*"))
        rank, function = generator.randrange(count), generator.choice(list(MOMENTS))
        calls, seconds = MOMENTS[function]
        kill = {"rank": rank, "function": function, "delay": generator.uniform(0, seconds),
                "call": generator.randint(1, calls or len(expected[1]))}
        if report["kills"] == kills:
            kill = None                             # the last run comes to its end
        jobs = start(count, train_quietly, [*argv, f"--out={run}"], text, kill)
        jobs[rank].join(300)
        # The other rank may wait for the killed one for ever.
        statuses = end(jobs, 5 if jobs[rank].exitcode else 300)
        if kill and statuses[rank] == -signal.SIGKILL:
            report["kills"] += 1
            report[function] += 1
        else:
            assert not any(statuses), f"{statuses} without a kill:\n{text.read_text()[-3000:]}"
        if (run / "config.json").is_file():         # also if the kill came after the end
            report["runs ended"] += 1
            report["differences"] += result(run) != expected
            shutil.rmtree(run)
    return report
