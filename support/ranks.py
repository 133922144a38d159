"""Several processes that train or evaluate together. torchrun starts them."""
import math
import os
import shutil
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from support.device import be_deterministic, choose_dtype, own_device
from support.tiles import most_squares

NCCL_TIMEOUT = timedelta(minutes=15)    # of a sum; a rank that hangs is noticed then
WAITING_TIMEOUT = timedelta(hours=6)    # of gloo: rank 0 may write a checkpoint for long

# join and setup_ranks set these.
rank, world = 0, 1      # number of this process, and how many there are
waiting = None          # the group to wait in; None is the default group


def setup_ranks(cfg):
    """Set rank and world of this process, alone or one of torchrun's, and return its device."""
    global waiting
    device = own_device(cfg.device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"training adds its sums up in float64, and {device.type} may not have "
                         "it: use --device=cpu or --device=cuda")
    cfg.dtype = choose_dtype(cfg.dtype, device)     # a state names the dtype, so not "auto"
    if cfg.deterministic:
        be_deterministic()
    if device.type == "cuda":
        join("nccl", NCCL_TIMEOUT, device_id=device)
        if dist.is_initialized():
            waiting = dist.new_group(backend="gloo", timeout=WAITING_TIMEOUT)
    else:
        join("gloo", WAITING_TIMEOUT)
    return device


def join(backend, timeout, **options):
    """Join the other processes of torchrun, if it started this one, and set rank and world."""
    global rank, world
    if "RANK" not in os.environ:
        return
    # A restarted rank would read the address of a dead rank in torchrun's store and wait for hours.
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS") != "0"
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError("torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in "
                         "its environment and --rdzv_backend=c10d (pytorch issue 135712)")
    dist.init_process_group(backend, timeout=timeout, **options)
    rank, world = dist.get_rank(), dist.get_world_size()


def check_shared_memory(workers, batch_size, side, tiles=()):
    """Raise ValueError if /dev/shm cannot hold the loader's pictures: a worker would die later."""
    processes = workers * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    of_picture = most_squares(tiles, side) * 3 * side ** 2 * 4
    needed = 2 * processes * batch_size * of_picture                # a worker is two batches ahead
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else math.inf
    if free < needed:
        raise ValueError(f"/dev/shm has {free / 1e6:.0f} MB free and the loader needs "
                         f"{needed / 1e6:.0f} MB: start Docker with --ipc=host or --shm-size=16g, "
                         "or use --workers=0")


def length_multiple(pad_to, device, max_positions):
    """Return the number of which every batch's length T is a multiple. pad_to 0 is the default."""
    # cuDNN's attention makes a new plan for each T, which takes longer than a step.
    pad_to = pad_to or (64 if device.type == "cuda" else 1)
    return math.gcd(pad_to, max_positions or pad_to)    # no T is rounded up above max_positions


def reduce_sum(tensor):
    """Add `tensor` up over all ranks, in place, and return it."""
    if world > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def wait_for_all():
    """Wait until all ranks are here, such as for rank 0, which writes a large checkpoint."""
    if world > 1:
        dist.barrier(group=waiting)


def leave():
    """Wait for all ranks, and end the communication with them."""
    wait_for_all()
    if world > 1:
        dist.destroy_process_group()


def on_rank0(work):
    """Return the result of work(), which runs on rank 0 alone. Its error is raised on all ranks."""
    result = [None]
    with sharing_errors():                          # or the other ranks would wait for ever
        if rank == 0:
            result = [work()]
    if world > 1:
        dist.broadcast_object_list(result, group=waiting)
    return result[0]


@contextmanager
def sharing_errors():
    """Wait for all ranks at the end of the block. An error of one rank is raised on all of them."""
    errors = [None]
    try:
        yield
    except (OSError, ValueError) as error:
        errors = [error]
    if world > 1:
        own, errors = errors[0], [None] * world
        dist.all_gather_object(errors, own, group=waiting)
    for error in errors:
        if error:
            raise error


def local(tensor):
    """Return this rank's piece of a sharded tensor, and any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sum_up(sums, trainable):
    """Return ({name: sum over all ranks}, for each parameter how many ranks have a gradient)."""
    # The CPU waits for the device here, once in a step.
    numbers = [*map(float, sums.values()), *[float(p.grad is not None) for _, p in trainable]]
    totals = torch.tensor(numbers, dtype=torch.float64, device=trainable[0][1].device)
    totals = reduce_sum(totals).tolist()
    return dict(zip(sums, totals)), totals[len(sums):]


def reduce_gradients(trainable, grad_counts, tokens, images):
    """Sum the gradients over all ranks and divide them by `tokens`. grad_counts: see sum_up."""
    for (name, p), count in zip(trainable, grad_counts):
        needs_images = not name.startswith("llm.")  # a step of text alone reaches only the LLM
        if not count and tokens and (images or not needs_images):
            raise ValueError(f"{name} trains, but the loss does not depend on it: it got no "
                             "gradient; nothing was updated")
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if isinstance(p, DTensor):
            local(p.grad).mul_(world / max(tokens, 1))              # FSDP has averaged over ranks
        else:
            reduce_sum(p.grad).div_(max(tokens, 1))


def clip_gradients(trainable, largest):
    """Scale all gradients to a norm of at most `largest` (0: no limit). Return the norm before."""
    sharded = [local(p.grad) for _, p in trainable if isinstance(p, DTensor)]
    replicated = [p.grad for _, p in trainable if not isinstance(p, DTensor)]
    square = torch.nn.utils.get_total_norm(replicated).square()
    if sharded:
        square = square + reduce_sum(torch.nn.utils.get_total_norm(sharded).square())
    norm = square.sqrt().item()
    if largest and norm > largest:
        torch._foreach_mul_(replicated + sharded, largest / norm)
    return norm
