"""
Build a VLM from a config, save it and load it. A checkpoint is a folder:

    config.json              what the VLM is made of, and what ties it to its LLM and words
    words.json               the K shared words as strings
    connector.safetensors    the connector; a LangBridge's tensors have no dimension of the LLM
    llm/                     if a stage trained the LLM: a Hugging Face folder, its tokenizer, and E
    vision_tower/            if a stage trained the vision tower: a Hugging Face folder

Models and tokenizers come from a folder or from the Hugging Face hub. They are recognised by their
config and never by their name.
"""
import hashlib
import json
import os
import re
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import asdict, fields
from glob import escape, glob

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import logging

from common import from_hub, load_tokenizer, read_json, replacing, write_json
from model import VLM, Config, make_connector, vocab_embeds
from vocab import load_words, save_words, words_hash

logging.disable_progress_bar()      # of loading weights: it hides the tables that the scripts print
FORMAT = 1


# --------------------------------------------------------------------------------------------------
# build

def build(config, words, device="cpu", dtype=torch.float32, llm=None, gain=1.0, attention="sdpa",
          frozen_dtype=None, tower_dtype=None, tower_folder=None, sharded_parts=()):
    """Return a VLM with a new connector, in evaluation mode, no parameter of it trainable.

    words: list of K strings, None for an MLP. dtype: of the LLM. frozen_dtype: of E and of a
    sharded LLM's computation, default dtype. tower_dtype: default frozen_dtype. llm: (LLM,
    tokenizer) if they are loaded already. tower_folder: weights in place of config.vision_tower.
    device: one device, or "auto" for all GPUs. sharded_parts: the parts of which each rank holds a
    piece, ("llm",) or ("llm", "vision_tower"); then every rank must call.
    ValueError where a model is not what the config needs.
    """
    frozen_dtype = frozen_dtype or dtype
    tower_name = tower_folder or config.vision_tower
    tower_config = vision_config(tower_name)
    layers = tower_config.num_hidden_layers
    if not hasattr(tower_config, "patch_size"):
        raise ValueError(f"{tower_name} is not a vision transformer: it has no patch_size")
    if not -layers <= config.vision_layer + 1 <= layers + 1:
        raise ValueError(f"{tower_name} has {layers} layers, no layer {config.vision_layer}")
    tower = load_weights(AutoModel, tower_name, config=tower_config,
                         dtype=tower_dtype or frozen_dtype)
    if llm is None:
        llm = load_llm(config.llm, dtype, device, attention, on_meta=bool(sharded_parts))
    llm, tokenizer = llm
    if device == "auto":
        device = llm.get_input_embeddings().weight.device
    D = llm.get_input_embeddings().embedding_dim
    connector = make_connector(config, tower.config.hidden_size, D, gain)
    vlm = VLM(config, tower.to(device), connector.to(device), llm, tokenizer, words,
              image_settings(tower_name, config.image_size))
    vlm.requires_grad_(False).eval()
    if tower_folder:
        vlm.own_parts.add("vision_tower")
    if sharded_parts:
        shard_vlm(vlm, sharded_parts, device, frozen_dtype)
        vlm.unshard()                               # gathers the embedding
    if words:
        connector.vocab_embeds = vocab_embeds(llm, tokenizer, words).to(device, frozen_dtype)
    vlm.llm_fingerprint = {"tokenizer_hash": tokenizer_hash(tokenizer),
                           "embeddings_hash": embeddings_hash(llm)}
    if sharded_parts:
        vlm.reshard()
    return vlm


def load_llm(name, dtype, device, attention="sdpa", on_meta=False):
    """Return (LLM, tokenizer) of a hub name or folder.

    attention: transformers' attn_implementation. device "auto": accelerate spreads the LLM over all
    GPUs. on_meta: the weights are shapes only, and shard_vlm reads them. ValueError if the
    tokenizer has more ids than the embedding has rows.
    """
    if on_meta:
        config = from_hub(AutoConfig.from_pretrained, name)
        with torch.device("meta"):
            llm = AutoModelForCausalLM.from_config(config, dtype=dtype,
                                                   attn_implementation=attention)
        if os.path.isfile(f"{weights_folder(name)}/generation_config.json"):
            llm.generation_config = from_hub(GenerationConfig.from_pretrained, name)
    else:
        placement = {"device_map": "auto"} if device == "auto" else {}
        llm = load_weights(AutoModelForCausalLM, name, dtype=dtype,
                           attn_implementation=attention, **placement)
        llm = llm if placement else llm.to(device)
    tokenizer = load_tokenizer(name)
    rows = llm.get_input_embeddings().num_embeddings
    last_id = max(tokenizer.get_vocab().values())
    if last_id >= rows:                             # fewer ids than rows are padding, as in Qwen
        raise ValueError(f"{name}: the tokenizer has ids up to {last_id}, the embedding has "
                         f"{rows} rows")
    return llm, tokenizer


def load_weights(model_class, name, **kwargs):
    """Return a model by hub name or folder. ValueError where weights are torn or missing.

    The library would draw a missing tensor at random and only warn.
    """
    for path in sorted(glob(f"{escape(name)}/*.safetensors")):
        with errors_name(path), safe_open(path, "pt"):
            pass                                    # reads the header, and a torn file has none
    model, info = from_hub(model_class.from_pretrained, name, output_loading_info=True, **kwargs)
    # Only a pooler may be missing, because its output is not used.
    used = re.compile(r"\.\d+\.|embed|lm_head")
    missing = [key for key in sorted(info["missing_keys"]) if used.search(key)]
    if missing:
        raise ValueError(f"{name} has no weights for {missing[0]} ({len(missing)} missing)")
    return model


def vision_config(name):
    """Return the config of a vision tower, also where a checkpoint holds a text half (CLIP)."""
    config = from_hub(AutoConfig.from_pretrained, name)
    return getattr(config, "vision_config", config)


def image_settings(name, image_size):
    """Return {"size": pixels, "mean": 3 floats, "std": 3 floats} of a tower's pictures."""
    processor, _ = from_hub(ImageProcessingMixin.get_image_processor_dict, name)
    if not {"image_mean", "image_std"} <= processor.keys():
        raise ValueError(f"{name}: preprocessor_config.json lacks image_mean or image_std")
    return {"size": image_size or vision_config(name).image_size,
            "mean": processor["image_mean"], "std": processor["image_std"]}


# --------------------------------------------------------------------------------------------------
# an LLM that is larger than one device: FSDP2

def shard_vlm(vlm, parts, device, dtype):
    """Cut `parts` of the VLM into a piece for each rank, and read this rank's piece of the LLM.

    A block of a transformer is gathered in `dtype` for its computation and freed after it. All
    other parameters of `parts` stay gathered from forward to backward, because the embedding may
    be the head as well and the loss calls the head in chunks. The connector stays whole.
    """
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                     cast_forward_inputs=False)
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for part in parts:
        for block in transformer_blocks(getattr(vlm, part)):
            fully_shard(block, mesh=mesh, mp_policy=precision)
    ignored = {p for name, p in vlm.named_parameters() if name.split(".")[0] not in parts}
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
                         "from safetensors files only")
    dcp.load({name: t.detach() for name, t in tensors.items()}, storage_reader=reader)


def transformer_blocks(part):
    """Return the list of a transformer's blocks: its ModuleList with the most parameters."""
    lists = [module for module in part.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def weights_folder(name):
    """Return the folder of a model's files; the files of a hub name are downloaded first."""
    if os.path.isdir(name):
        return name
    return snapshot_download(name, allow_patterns=["*.safetensors", "*.json"])


def stored_tensors(model):
    """Return {name in a file: parameter or persistent buffer}, tied tensors once."""
    by_id = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        by_id.setdefault(id(tensor), (name, tensor))
    return dict(by_id.values())


# --------------------------------------------------------------------------------------------------
# save

def save(vlm, folder, stage, trained_parts, dtype=None, **extra):
    """Write a checkpoint into `folder`. config.json comes last and makes the checkpoint complete.

    trained_parts: names of the parts that this run has trained, such as ("connector", "llm"). The
    LLM and the tower are written if they are among these or if the checkpoint that the run started
    from held them. dtype: of the written LLM and tower, default their own. extra: more entries of
    config.json. With sharded parts every rank must call; rank 0 writes.
    """
    is_writer = not dist.is_initialized() or dist.get_rank() == 0
    own_parts = vlm.own_parts | {*trained_parts} - {"connector"}
    for part in ("llm", "vision_tower"):
        if part in own_parts:
            model = getattr(vlm, part)
            save_model(model, f"{folder}/{part}", dtype or model.dtype, is_writer)
        elif is_writer and os.path.isfile(f"{folder}/config.json"):
            # A part of the checkpoint that is overwritten. `load` would take it for ours.
            shutil.rmtree(f"{folder}/{part}", ignore_errors=True)
    if not is_writer:
        return
    os.makedirs(folder, exist_ok=True)
    connector = {name: t.float() for name, t in vlm.connector.state_dict().items()}
    write_safetensors(connector, f"{folder}/connector.safetensors")
    if vlm.words:
        save_words(vlm.words, f"{folder}/words.json")
    if "llm" in own_parts:
        vlm.tokenizer.save_pretrained(f"{folder}/llm")
        if vlm.words:
            # The E of training. The trained LLM's embedding has moved away from it.
            E = {"vocab_embeds": vlm.connector.vocab_embeds}
            write_safetensors(E, f"{folder}/llm/vocab_embeds.safetensors")
    if "vision_tower" in own_parts:
        settings = vlm.image_settings
        write_json({"image_mean": settings["mean"], "image_std": settings["std"]},
                   f"{folder}/vision_tower/preprocessor_config.json")
    config = {"format": FORMAT, "stage": stage, **asdict(vlm.config), **vlm.llm_fingerprint,
              "vision_tower": portable(vlm.config.vision_tower, folder),
              "llm": portable(vlm.config.llm, folder), "num_patches": vlm.num_patches,
              "words_hash": words_hash(vlm.words) if vlm.words else None,
              "git_commit": git_commit(), **extra}
    write_json(config, f"{folder}/config.json")


def save_model(model, folder, dtype, is_writer):
    """Write a model in Hugging Face layout, in `dtype`. Sharded tensors are gathered one by one."""
    state = {}
    for name, tensor in stored_tensors(model).items():
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()           # every rank takes part
        if is_writer:
            # contiguous() copies a piece of a larger tensor, which safetensors refuses.
            state[name] = tensor.to("cpu", dtype).contiguous()
    if is_writer:
        with errors_name(folder):
            model.save_pretrained(folder, state_dict=state)
        model.config.dtype = dtype                  # save_pretrained stores the dtype in memory
        model.config.save_pretrained(folder)


def portable(name, folder):
    """Return a model's name for config.json: a local folder becomes relative to `folder`."""
    return os.path.relpath(name, folder) if os.path.isdir(name) else name


def resolve(name, folder):
    """Return the model that config.json of `folder` means. ValueError for an absolute path."""
    if os.path.isabs(name):
        raise ValueError(f"{folder}/config.json names the absolute path {name}, which exists on "
                         "one machine only")
    local = os.path.normpath(os.path.join(folder, name))
    return local if name.startswith("..") or os.path.isdir(local) else name


def git_commit():
    """Return the commit of this code; None outside of a git checkout."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return run.stdout.strip() or None


# --------------------------------------------------------------------------------------------------
# load

def load(folder, device="cpu", dtype=torch.float32, attention="sdpa", frozen_dtype=None,
         tower_dtype=None, sharded_parts=()):
    """Return the VLM of a checkpoint, in evaluation mode. The arguments are those of `build`.

    ValueError where its parts do not belong together: another word list, another LLM than the one
    of the training, or a vision tower that gives another number of patches.
    """
    config, metadata = read_config(folder)
    llm_folder = own_folder(folder, "llm")
    llm = load_llm(llm_folder or config.llm, dtype, device, attention, bool(sharded_parts))
    words = None
    if config.connector == "langbridge":
        words = load_words(f"{folder}/words.json")
        if words_hash(words) != metadata.get("words_hash") or len(words) != config.num_words:
            raise ValueError(f"{folder}/words.json is not the word list of this connector")
    vlm = build(config, words, device, dtype, llm, frozen_dtype=frozen_dtype,
                tower_dtype=tower_dtype, tower_folder=own_folder(folder, "vision_tower"),
                sharded_parts=sharded_parts)
    expected = metadata.get("num_patches", vlm.num_patches)
    if vlm.num_patches != expected:
        raise ValueError(f"{folder} was trained on {expected} patches of an image, "
                         f"{config.vision_tower} gives {vlm.num_patches}")
    load_connector(vlm.connector, folder)
    fingerprint = {key: metadata[key] for key in vlm.llm_fingerprint}
    if llm_folder:
        vlm.own_parts.add("llm")
        if words:
            load_vocab_embeds(vlm.connector, f"{llm_folder}/vocab_embeds.safetensors")
    elif vlm.llm_fingerprint != fingerprint:
        raise ValueError(f"{folder} was trained on another LLM than what {config.llm} is now; "
                         "transfer.py moves it")
    vlm.llm_fingerprint = fingerprint               # of E's LLM, also where training changed it
    return vlm


def own_folder(folder, part):
    """Return the folder in which a checkpoint holds its own `part`, or None."""
    path = f"{folder}/{part}"
    if not os.path.isdir(path):
        return None
    if not glob(f"{escape(path)}/model*.safetensors"):
        raise ValueError(f"{path} holds no model*.safetensors, and no other file is read there")
    return path


def read_config(folder):
    """Return (Config, metadata) of a checkpoint: the config with names resolved, and config.json.

    ValueError if `folder` is not a checkpoint or has another format.
    """
    path = f"{folder}/config.json"
    if not os.path.isfile(path):
        raise ValueError(f"{folder} is no checkpoint: it has no config.json (a run writes it last)")
    metadata = read_json(path)
    found = metadata.get("format") if isinstance(metadata, dict) else metadata
    if not isinstance(metadata, dict) or found != FORMAT:
        raise ValueError(f"{path}: format {str(found)[:60]!r}; this code reads format {FORMAT}")
    metadata = {"pool": 1, **metadata}              # checkpoints from before `pool`
    types = {field.name: field.type for field in fields(Config)}
    required = types | {"stage": str, "tokenizer_hash": str, "embeddings_hash": str}
    for name, kind in required.items():
        if type(metadata.get(name)) is not kind:
            value = str(metadata.get(name))[:60]
            raise ValueError(f"{path}: {name} is {value!r}, it must be of type {kind.__name__}")
    config = Config(**{name: metadata[name] for name in types})
    config.vision_tower = resolve(config.vision_tower, folder)
    config.llm = resolve(config.llm, folder)
    return config, metadata


def load_connector(connector, folder):
    """Read connector.safetensors into `connector`. ValueError names the first wrong tensor."""
    path = f"{folder}/connector.safetensors"
    # Older checkpoints call the layer of the scores "words".
    found = {re.sub(r"^words\.", "to_scores.", name): tensor
             for name, tensor in read_safetensors(path).items()}
    check_tensors(found, connector.state_dict(), path)
    connector.load_state_dict(found)


def load_vocab_embeds(connector, path):
    """Read E, as the connector was trained with it, in place of the one that `build` made."""
    found = read_safetensors(path)
    check_tensors(found, {"vocab_embeds": connector.vocab_embeds}, path)
    connector.vocab_embeds = found["vocab_embeds"].to(connector.vocab_embeds)


def check_tensors(found, expected, path):
    """Raise a ValueError that names the first tensor of wrong shape or with wrong numbers."""
    for name in sorted(expected.keys() | found.keys()):
        shape, want = (tuple(d[name].shape) if name in d else None for d in (found, expected))
        if shape != want:
            raise ValueError(f"{path}: {name} is {shape}, this connector wants {want}")
        if not found[name].isfinite().all():
            raise ValueError(f"{path}: {name} has numbers that are not finite")


def embeddings_hash(llm):
    """Return a SHA-256 over 1,000 rows of the input embedding in bfloat16."""
    weight = llm.get_input_embeddings().weight.detach()
    rows = torch.linspace(0, len(weight) - 1, 1000).long()
    sample = weight[rows].to("cpu", torch.bfloat16).contiguous()
    return hashlib.sha256(sample.view(torch.uint8).numpy().tobytes()).hexdigest()


def tokenizer_hash(tokenizer):
    """Return a SHA-256 over every token and its id."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


@contextmanager
def errors_name(path):
    """Turn errors of safetensors (torn file, full disk) into a ValueError that names the path."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None


def write_safetensors(tensors, path):
    """Write {name: tensor} to a temporary name and rename it."""
    with errors_name(path), replacing(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary)


def read_safetensors(path):
    """Return {name: tensor}. ValueError names a torn file."""
    with errors_name(path):
        return load_file(path)
