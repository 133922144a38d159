"""An LLM that is larger than one device: FSDP2. Every rank holds a piece of each tensor."""
import copy

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor

from support import ranks
from support.pretrained import weights_folder
from support.tensors import errors_name


def shard_vlm(vlm, device, dtype):
    """Cut the LLM into a piece for each rank, and read this rank's piece."""
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                     cast_forward_inputs=False)
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    # A block is gathered for its computation and freed after it. Embedding and head are gathered
    # once for a step: they may be one tensor, and the loss calls the head several times.
    for block in transformer_blocks(vlm.llm):
        fully_shard(block, mesh=mesh, mp_policy=precision)
    ignored = {p for name, p in vlm.named_parameters() if not name.startswith("llm.")}
    fully_shard(vlm, mesh=mesh, mp_policy=precision, ignored_params=ignored)
    vlm.sharded = True

    llm = vlm.llm
    llm.to_empty(device=device)
    llm.tie_weights()                               # to_empty separates a tied head and embedding
    for parameter in llm.parameters():
        parameter._is_hf_initialized = True         # so that _init_weights leaves it alone
    for module in llm.modules():
        if any(True for _ in module.buffers(recurse=False)):
            llm._init_weights(module)               # rotary frequencies and such are in no file
    folder = weights_folder(llm.config.name_or_path)
    reader = HuggingFaceStorageReader(folder)
    tensors = stored_tensors(llm)
    missing = sorted(tensors.keys() - reader.read_metadata().state_dict_metadata.keys())
    if missing:
        raise ValueError(f"{folder}: no safetensors file holds {missing[0]}; a sharded LLM is read "
                         "from safetensors files with the names of the model only")
    dcp.load({name: t.detach() for name, t in tensors.items()}, storage_reader=reader,
             process_group=ranks.waiting)


def run_gathered(vlm, function):
    """Call a function that uses the parts of a sharded VLM. It runs as FSDP runs vlm.forward."""
    vlm.gathered = function
    register_fsdp_forward_method(vlm, "gathered")
    # FSDP chooses the dtype of its gradient sums once, in the first call, from the parameters that
    # require a gradient. So all parameters require one here.
    vlm.requires_grad_(True)
    vlm.gathered()
    vlm.reshard()                                   # from here on the parameters are pieces again
    vlm.requires_grad_(False)
    del vlm.gathered


def transformer_blocks(part):
    """Return the list of a transformer's blocks: its ModuleList with the most parameters."""
    lists = [module for module in part.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def stored_tensors(model):
    """Return {name in a file: parameter or persistent buffer}, tied tensors once."""
    by_id = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        by_id.setdefault(id(tensor), (name, tensor))
    return dict(by_id.values())


def save_model(model, folder, dtype, is_writer):
    """Write a model in Hugging Face layout, in `dtype`. Sharded tensors are gathered one by one."""
    if hasattr(model, "merge_and_unload"):          # peft's LoRA: a plain model is written
        model = copy.deepcopy(model).merge_and_unload()
    state = {}
    for name, tensor in stored_tensors(model).items():
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()           # every rank takes part
        if is_writer:
            # contiguous() copies a piece of a larger tensor, which safetensors refuses.
            to_dtype = dtype if tensor.is_floating_point() else tensor.dtype
            state[name] = tensor.to("cpu", to_dtype).contiguous()
    if is_writer:
        with errors_name(folder):
            model.save_pretrained(folder, state_dict=state)
        model.config.dtype = dtype                  # save_pretrained stores the dtype in memory
        model.config.save_pretrained(folder)
