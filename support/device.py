"""The device of a process and how it computes: its number, dtypes, rounding, torch.compile."""
import functools
import os
import shutil

import torch

from common import print_rank0


def choose_dtype(name, device):
    """Return the name of a dtype: for "auto" bfloat16 if the hardware has it, else float32."""
    if name != "auto":
        return name
    device_type = torch.device(device).type
    has_bfloat16 = device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        has_bfloat16 = torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if has_bfloat16 else "float32"


def own_device(name, most=1):
    """Return the torch.device of this process, or "auto". CUDA uses the device from now on.

    name: of --device; without a name CUDA if there is one, else the CPU. "auto" spreads an LLM over
    all GPUs, if there are any, unless most=1. Under torchrun each process has a GPU of its own.
    """
    if name == "auto" and most != 1:
        return name if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"there is no device {name!r}") from None
    if device.type == "cuda":
        count, local_rank = torch.cuda.device_count(), os.environ.get("LOCAL_RANK")
        if local_rank and device.index is not None:
            raise ValueError(f"--device={name} would put all ranks of torchrun on one GPU: leave "
                             "the number out, or choose GPUs with CUDA_VISIBLE_DEVICES")
        device = torch.device("cuda", int(local_rank or device.index or 0))
        if device.index >= count:
            raise ValueError(f"there is no device {device}: torch sees {count} GPUs (under "
                             "torchrun lower --nproc_per_node)")
        torch.cuda.set_device(device)
    return device


def set_precision(dtype):
    """Let CUDA's matrix products round no more than `dtype` does. Other devices ignore this."""
    # TF32 rounds float32 factors to 10 bits. A user who asks for float32 does not want that.
    torch.backends.cuda.matmul.allow_tf32 = dtype == torch.bfloat16
    torch.backends.cudnn.allow_tf32 = dtype == torch.bfloat16       # the tower's first layer
    # cuBLAS splits long sums. It would add the parts in the factors' dtype.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def be_deterministic():
    """Let CUDA add in the same order in each run. Call it before CUDA computes."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")     # transformers reads it
    # With warn_only=True torch's attention would add in any order in the backward pass.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False     # only costs time


def check_compiler(device):
    """Raise ValueError if torch.compile cannot work, because there is no compiler."""
    names = [os.environ.get("CC", ""), "gcc", "clang"]              # Triton's, for its launchers
    if device.type == "cpu":
        names = [os.environ.get("CXX", ""), "g++", "clang++"]
    if not any(map(shutil.which, names)):
        raise ValueError(f"--compile needs a compiler such as {names[1]}, and there is none")


print_once = functools.cache(print_rank0)


@functools.cache
def compiled(function):
    """Return `function` compiled, or as it is where torch.compile fails, which is said once."""
    best = torch.compile(function, dynamic=True)

    def run(*args):
        nonlocal best
        try:
            return best(*args)
        except Exception as error:          # no C++ compiler and no Triton raise many types
            if best is function or isinstance(error, torch.OutOfMemoryError):
                raise
            best = function
            print_once(f"torch.compile fails here ({type(error).__name__}): the vocabulary "
                       "combination runs uncompiled and slower")
            return function(*args)

    return run


@functools.cache
def has_wide_addmm(device, dtype):
    """Return whether addmm can add products of `dtype` to a float32 sum: on CUDA, it is tried."""
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    total = ones.float()
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):       # of the CPU, and of some versions of torch
        return False
    return total.eq(17).all().item()


def add_product(total, a, b):
    """Add a @ b to `total` in place. `total` may be float32 where a and b are bfloat16."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif has_wide_addmm(total.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)      # products are not rounded
    else:
        for total_rows, a_rows in zip(total.chunk(4), a.chunk(4)):
            total_rows.add_(a_rows @ b)
