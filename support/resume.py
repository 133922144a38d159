"""
States that a run can go on from: out/state/step-00000100, of which the last two are kept.

A state is a folder of safetensors and JSON with the trained weights, AdamW's moments, the settings
and the fingerprint of all inputs. Every rank writes and reads its own pieces of sharded tensors.
"""
import fcntl
import json
import os
import shutil
import warnings
from dataclasses import asdict, fields
from glob import escape, glob

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import (CheckpointException, HuggingFaceStorageReader,
                                          HuggingFaceStorageWriter)

import common
from support import fingerprint, ranks
from support.checks import FOLDERS
from support.ranks import on_rank0

# torch.distributed.checkpoint says this in every run of one process.
warnings.filterwarnings("ignore", "torch.distributed is disabled")
FILE_TENSORS = 8            # of a state, in one of its files
LOCKS = []                  # open files; to close one would end its lock


def lock(out):
    """Make the folder of a run and lock it until this process ends. ValueError if a run has it."""
    os.makedirs(out, exist_ok=True)
    file = open(f"{out}/.lock", "w")
    try:
        # flock would not do: a loader's process that outlives a killed run would keep the lock.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"another process is training in {out}") from None
    except OSError:
        print(f"note: the file system of {out} has no locks; start one run only", flush=True)
    LOCKS.append(file)


def remove_old_run(cfg, first):
    """Remove a finished run from the folder. Raises the `first` sample of this one if it is bad."""
    if os.path.isfile(f"{cfg.out}/config.json"):    # check has made sure of --overwrite
        if isinstance(first, common.BadSample) and cfg.on_bad == "stop":
            raise first
        for old in FOLDERS:
            shutil.rmtree(f"{cfg.out}/{old}", ignore_errors=True)
        os.remove(f"{cfg.out}/config.json")         # the last one: it says that there is a run


def state_tensors(vlm, optimizer, step):
    """Return {name: tensor} of all that a step changes: weights and AdamW's moments."""
    tensors = {}
    for name, p in vlm.named_parameters():
        if not p.requires_grad:
            continue
        if p not in optimizer.state:                # before the first step of a resumed run
            optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device),
                                  "exp_avg": torch.zeros_like(p),
                                  "exp_avg_sq": torch.zeros_like(p)}
        moments = optimizer.state[p]
        tensors[name] = p.detach()
        tensors[f"{name}.exp_avg"] = moments["exp_avg"]
        tensors[f"{name}.exp_avg_sq"] = moments["exp_avg_sq"]
    return tensors


def save_state(vlm, optimizer, progress, cfg):
    """Write all that a resume needs. Each rank writes its pieces.

    progress: {"step", "skipped", "fingerprint"}. OSError on every rank if one rank cannot write.
    """
    folder = f"{cfg.out}/state/step-{progress['step']:08d}"
    temporary = f"{cfg.out}/state/tmp"

    def complete():
        sizes = {name: os.path.getsize(f"{temporary}/{name}") for name in os.listdir(temporary)}
        state = {**progress, "world": ranks.world, "settings": asdict(cfg), "sizes": sizes}
        common.write_json(state, f"{temporary}/state.json")
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
        for old in states(cfg.out)[:-2]:
            shutil.rmtree(old)

    on_rank0(lambda: shutil.rmtree(temporary, ignore_errors=True))
    tensors = state_tensors(vlm, optimizer, progress["step"])
    # A file is in memory as a whole while it is written, so a file gets only a few tensors.
    file_of = {name: 1 + i // FILE_TENSORS for i, name in enumerate(tensors)}
    writer = HuggingFaceStorageWriter(temporary, file_of, save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=ranks.waiting)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise OSError(f"{temporary} cannot be written: {reason}") from None
    on_rank0(complete)


def states(out):
    """Return the folders of a run's states, the oldest first. A user's own files do not count."""
    return sorted(glob(f"{escape(out)}/state/step-{'[0-9]' * 8}"))


def newest_state(cfg):
    """Return (folder, state.json) of the newest state without a missing or short file, or None."""
    for path in reversed(states(cfg.out)):
        try:
            state = common.read_json(f"{path}/state.json")
            sizes = state.get("sizes", {})          # a state of an older version has none
            if all(os.path.getsize(f"{path}/{name}") == size for name, size in sizes.items()):
                return path, state
        except (OSError, ValueError):
            pass
        print(f"{path} is not whole; trying the one before", flush=True)


def resume(vlm, optimizer, inputs, cfg):
    """Load the newest state if there is one. Return (next step, number of samples skipped).

    inputs: the fingerprint of all that the run depends on. ValueError names the settings and inputs
    that differ from those of the run's start. If the run stopped at its first sample, nothing has
    been trained, and nothing is compared.
    """
    found = on_rank0(lambda: newest_state(cfg))
    if not found or found[1]["step"] == 0:
        return 0, 0
    folder, state = found
    for f in fields(cfg):
        now = getattr(cfg, f.name)
        old = state["settings"].get(f.name, f.default)      # a setting that was not there then
        is_other = json.dumps(old) != json.dumps(now)       # a tuple comes back as a list
        if is_other and not f.metadata["free"]:
            raise ValueError(f"{f.name} is {now!r}, and the run in {cfg.out} began with {old!r}: "
                             "use that, or another out")
    # A state of an older version has no fingerprint, and nothing is compared.
    changed = [f"{getattr(cfg, source) or cfg.init}: {part}"
               for source, part in fingerprint.changes(state.get("fingerprint", {}), inputs)]
    if changed:
        raise ValueError(f"{' and '.join(changed)} changed since {folder} was written: a run goes "
                         "on with what it began with")
    tensors = state_tensors(vlm, optimizer, state["step"])
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(folder),
             process_group=ranks.waiting)
    return state["step"], state["skipped"]
