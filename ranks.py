"""
Several processes that train or evaluate together. torchrun starts them.
"""
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import common


def setup_ranks(cfg):
    """Return (rank, number of ranks, device) of this process, alone or one of torchrun's.

    The dtype "auto" of the settings becomes the dtype that the device computes in.
    """
    device = torch.device(common.choose_device(cfg.device, most=1))
    cfg.dtype = common.choose_dtype(cfg.dtype, device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
        # TF32 rounds float32 factors to 10 bits. Who asks for float32 does not want that.
        torch.backends.cuda.matmul.allow_tf32 = cfg.dtype == "bfloat16"
    if "RANK" not in os.environ:
        return 0, 1, device
    check_restarts()
    # Ranks wait while rank 0 writes a checkpoint, which takes minutes for a large LLM.
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=6))
    return dist.get_rank(), dist.get_world_size(), device


def reduce_sum(tensor, world):
    """Add `tensor` up over all ranks, in place, and return it."""
    if world > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def on_rank0(work, rank, world):
    """Return the result of work(), which runs on rank 0 alone. Its error is raised on all ranks.

    Otherwise the other ranks would wait for ever for the rank that failed.
    """
    result = [None, None]
    if rank == 0:
        try:
            result[0] = work()
        except (OSError, ValueError) as error:
            result[1] = error
    if world > 1:
        dist.broadcast_object_list(result)
    if result[1]:
        raise result[1]
    return result[0]


def local(tensor):
    """Return this rank's piece of a sharded tensor, and any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def reduce_gradients(trained, tokens, images, world):
    """Turn the gradients of all ranks' sums into that of the mean over `tokens`, on every rank.

    A parameter that a rank's samples did not reach counts as 0 there. SystemExit names a parameter
    that no rank's loss reached.
    """
    has_gradient = [p.grad is not None for _, p in trained]
    reached = torch.tensor(has_gradient, dtype=torch.int32, device=trained[0][1].device)
    for (name, p), ranks in zip(trained, reduce_sum(reached, world).tolist()):
        needs_images = not name.startswith("llm.")  # a step of text alone reaches only the LLM
        if not ranks and tokens and (images or not needs_images):
            sys.exit(f"{name} trains, but the loss does not depend on it: it got no gradient; "
                     "nothing was updated")
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if isinstance(p, DTensor):
            local(p.grad).mul_(world / max(tokens, 1))              # FSDP has averaged over ranks
        else:
            reduce_sum(p.grad, world).div_(max(tokens, 1))


def clip_gradients(trained, largest, world):
    """Scale all gradients to a norm of at most `largest` (0: no limit). Return the norm before."""
    sharded = [local(p.grad) for _, p in trained if isinstance(p, DTensor)]
    replicated = [p.grad for _, p in trained if not isinstance(p, DTensor)]
    square = torch.nn.utils.get_total_norm(replicated).square()
    if sharded:
        square = square + reduce_sum(torch.nn.utils.get_total_norm(sharded).square(), world)
    norm = square.sqrt().item()
    if largest and norm > largest:
        torch._foreach_mul_(replicated + sharded, largest / norm)
    return norm


def check_restarts():
    """Raise ValueError where torchrun keeps one store over its restarts.

    A restarted rank would read the address of a dead rank there and wait for it for hours.
    """
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS") != "0"
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError("torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in "
                         "its environment and --rdzv_backend=c10d (pytorch issue 135712)")
