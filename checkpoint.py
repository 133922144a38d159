"""Build a VLM from a config, load and save it: a checkpoint is a folder."""
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
from model import VLM, Config, LangBridge, MLPConnector
from vocab import load_words, save_words, word_ids, words_hash

logging.disable_progress_bar()      # of loading weights: it buries the tables that the scripts print

FORMAT = 1             # of the checkpoint folder


def vocab_embeds(llm, tokenizer, words):
    """E: the LLM's own input embedding of each word. -> float32[K, D]

    A word that is not one token of this tokenizer gets the mean of its pieces' embeddings. The module is called, its
    weight is not indexed: Gemma's scales by sqrt(D).
    """
    pieces = word_ids(words, tokenizer)                             # K lists of ids
    embed = llm.get_input_embeddings()
    flat = torch.tensor([i for ids in pieces for i in ids], device=embed.weight.device)
    word = torch.tensor([k for k, ids in enumerate(pieces) for _ in ids], device=embed.weight.device)
    with torch.no_grad():
        rows = embed(flat).float()                                  # (number of pieces, D)
        count = torch.bincount(word, minlength=len(words))          # (K,)
        E = torch.zeros(len(words), rows.shape[1], device=rows.device).index_add_(0, word, rows) / count[:, None]
    if not E.isfinite().all():
        raise ValueError(f"the embedding of {words[int((~E.isfinite()).any(1).nonzero()[0])]!r} is not finite")
    return E


def make_connector(config, Dv, D, gain=1.0):
    """The connector that `config` names, freshly initialised."""
    if config.connector == "langbridge":
        return LangBridge(Dv, config.hidden, config.num_words, config.normalize, gain)
    if config.connector == "mlp":
        return MLPConnector(Dv, D, config.hidden)
    raise ValueError(f'connector is "langbridge" or "mlp", not {config.connector!r}')


def vision_config(name):
    """The config of the vision half of whatever `name` is: CLIP and SigLIP checkpoints hold a text half, too."""
    config = from_hub(AutoConfig.from_pretrained, name)
    return getattr(config, "vision_config", config)


def image_settings(name, image_size):
    """{"size", "mean", "std"} of the tower's images: S in pixels and three numbers each for R, G, B"""
    processor, _ = from_hub(ImageProcessingMixin.get_image_processor_dict, name)
    size = image_size or vision_config(name).image_size
    if not {"image_mean", "image_std"} <= processor.keys():
        raise ValueError(f"{name}: its preprocessor_config.json lacks image_mean or image_std")
    return {"size": size, "mean": processor["image_mean"], "std": processor["image_std"]}


def load_weights(kind, name, **kwargs):
    """A model by hub name or folder, kind being one of transformers' Auto classes. ValueError where weights are torn,
    or lack a tensor: the library would draw it at random and say so in a warning."""
    for path in sorted(glob(f"{escape(name)}/*.safetensors")):      # names the shard; the library does not
        with named(path), safe_open(path, "pt"):
            pass
    model, info = from_hub(kind.from_pretrained, name, output_loading_info=True, **kwargs)
    lacks = [k for k in sorted(info["missing_keys"]) if re.search(r"\.\d+\.|embed|lm_head", k)]   # a pooler is not used
    if lacks:
        raise ValueError(f"{name} has no weights for {lacks[0]}" + (f" and {len(lacks) - 1} more" if lacks[1:] else ""))
    return model


def load_llm(name, dtype, device, attention="sdpa", meta=False):
    """-> (LLM, tokenizer), every model by its config and none by its name. device: one, or several with commas between
    (see `spread`). attention: the library's attn_implementation, such as "flash_attention_2" where it is installed, or
    "eager", which is faster for the pocket's models on a CPU. meta: the weights are shapes alone, for `shard_vlm`."""
    if meta:
        config = from_hub(AutoConfig.from_pretrained, name)
        with torch.device("meta"):
            llm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        if os.path.isfile(f"{weights_folder(name)}/generation_config.json"):
            llm.generation_config = from_hub(GenerationConfig.from_pretrained, name)
    else:
        llm = load_weights(AutoModelForCausalLM, name, dtype=dtype, attn_implementation=attention)
        spread(llm, str(device).split(","))
    tokenizer, rows = load_tokenizer(name), llm.get_input_embeddings().num_embeddings
    last = max(tokenizer.get_vocab().values())
    if last >= rows:                                                # fewer tokens than rows: padding, as Qwen has it
        raise ValueError(f"{name}: the tokenizer has ids up to {last}, the embedding {rows} rows")
    return llm, tokenizer


def spread(llm, devices):
    """Put the LLM's blocks on `devices`, the first ones on the first, and all else on the first as well. In place.

    One process then holds an LLM larger than a device, for eval.py and transfer.py. Devices take turns, which training
    cannot afford (there, see `shard_vlm`). What a block is given follows it to its device; the last one's output comes
    back to the first."""
    stack = transformer_blocks(llm)
    here = list(stack)
    for i in range(len(here)):                                      # take the blocks out, move the rest, put them back
        stack[i] = nn.Identity()
    llm.to(devices[0])
    for i, block in enumerate(here):
        stack[i] = block.to(device := devices[i * len(devices) // len(here)])
        if len(devices) > 1:
            block.register_forward_pre_hook(lambda _, args, kwargs, device=device: follow((args, kwargs), device),
                                            with_kwargs=True)
    if len(devices) > 1:
        stack[-1].register_forward_hook(lambda _, args, out: follow(out, devices[0]))


def follow(x, device):
    """x with every tensor in it on the device. A cache of keys and values is none of these: it stays where it was made"""
    if torch.is_tensor(x):
        return x.to(device)
    if isinstance(x, (tuple, list)):
        return type(x)(follow(y, device) for y in x)
    return {key: follow(y, device) for key, y in x.items()} if isinstance(x, dict) else x


def build(config, words, device="cpu", dtype=torch.float32, llm=None, gain=1.0, attention="sdpa", frozen_dtype=None,
          sharded_parts=()):
    """A VLM with a fresh connector from the parts that `config` names. `llm`: (LLM, tokenizer) if they are loaded.

    device: one, or several with commas between, each with a part of the LLM. dtype: of the LLM.
    frozen_dtype: of the tower, of E, and of a sharded LLM's computation; None means dtype.
    sharded_parts: the parts of which each rank holds a piece, ("llm",) or ("llm", "vision_tower"); then every rank calls.
    """
    frozen_dtype = frozen_dtype or dtype
    tower = vision_config(config.vision_tower)
    if not hasattr(tower, "patch_size"):
        raise ValueError(f"{config.vision_tower} is no vision transformer: its config has no patch_size")
    if not -tower.num_hidden_layers <= config.vision_layer + 1 <= tower.num_hidden_layers + 1:
        raise ValueError(f"{config.vision_tower} has {tower.num_hidden_layers} layers, no layer {config.vision_layer}")
    tower = load_weights(AutoModel, config.vision_tower, config=tower, dtype=frozen_dtype)
    llm, tokenizer = llm or load_llm(config.llm, dtype, device, attention, meta=bool(sharded_parts))
    device = str(device).split(",")[0]
    image = image_settings(config.vision_tower, config.image_size)
    connector = make_connector(config, tower.config.hidden_size, llm.get_input_embeddings().embedding_dim, gain)
    vlm = VLM(config, tower.to(device), connector.to(device), llm, tokenizer, words, image).requires_grad_(False).eval()
    if sharded_parts:
        shard_vlm(vlm, sharded_parts, device, frozen_dtype)
        vlm.unshard()                                               # what is outside of the blocks: the embedding
    if words:
        connector.vocab_embeds = vocab_embeds(llm, tokenizer, words).to(device, frozen_dtype)
    vlm.llm_fingerprint = llm_fingerprint(vlm)
    if sharded_parts:
        vlm.reshard()
    return vlm


def shard_vlm(vlm, parts, device, dtype):
    """Cut `parts` of the VLM into a piece for each rank (FSDP2), and read this rank's piece of the LLM, now on meta.

    A block is a group: gathered in `dtype` when it runs, freed after it, its gradients summed in float32. All else is
    one more group, which is whole from the forward to the backward pass: the embedding may be the head as well, and
    the loss calls the head in pieces. The connector and what is not in `parts` stay as they are.
    """
    half = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for part in parts:
        for block in transformer_blocks(getattr(vlm, part)):
            fully_shard(block, mesh=mesh, mp_policy=half)
    alone = {p for name, p in vlm.named_parameters() if name.split(".")[0] not in parts}
    fully_shard(vlm, mesh=mesh, mp_policy=half, ignored_params=alone)
    vlm.sharded = True

    vlm.llm.to_empty(device=device)
    vlm.llm.tie_weights()                                           # to_empty has made two of a tied head and embedding
    for p in vlm.llm.parameters():
        p._is_hf_initialized = True                                 # transformers' mark: _init_weights leaves it alone
    for module in vlm.llm.modules():
        if any(True for _ in module.buffers(recurse=False)):        # rotary frequencies, Gemma's scale: in no file
            vlm.llm._init_weights(module)
    folder = weights_folder(vlm.llm.config.name_or_path)
    reader = HuggingFaceStorageReader(folder)
    own = stored_tensors(vlm.llm)
    missing = sorted(own.keys() - reader.read_metadata().state_dict_metadata.keys())
    if missing:
        raise ValueError(f"{folder}: no safetensors file holds {missing[0]}; a sharded LLM is read from these alone")
    dcp.load({name: t.detach() for name, t in own.items()}, storage_reader=reader)


def transformer_blocks(part):
    """The list of a transformer's blocks: of all its lists the one with the most parameters."""
    lists = [m for m in part.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def weights_folder(name):
    """The folder of a model's files; those of a hub name are fetched first."""
    return name if os.path.isdir(name) else snapshot_download(name, allow_patterns=["*.safetensors", "*.json"])


def stored_tensors(llm):
    """Each parameter and persistent buffer by the name that a file has for it, tied ones once."""
    once = {}
    for name, tensor in llm.state_dict(keep_vars=True).items():
        once.setdefault(id(tensor), (name, tensor))
    return dict(once.values())


def embeddings_hash(llm):
    """SHA-256 over 1,000 rows of the input embedding, as bfloat16: tells Qwen2 from Qwen2.5, base from Instruct"""
    weight = llm.get_input_embeddings().weight.detach()
    rows = weight[torch.linspace(0, len(weight) - 1, 1000).long()].to("cpu", torch.bfloat16)
    return hashlib.sha256(rows.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def tokenizer_hash(tokenizer):
    """SHA-256 over every token and its id"""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def git_commit():
    """The commit of this code, or None outside of a checkout and where there is no git"""
    try:
        run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=os.path.dirname(os.path.abspath(__file__)),
                             capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return run.stdout.strip() or None


def portable(name, folder):
    """A model's name as a checkpoint in `folder` stores it: a hub name as it is, a local folder relative to `folder`"""
    return os.path.relpath(name, folder) if os.path.isdir(name) else name


def resolve(name, folder):
    """The other way round. ValueError for an absolute path: save never writes one."""
    if os.path.isabs(name):
        raise ValueError(f"{folder}/config.json names the absolute path {name}, which is nobody else's")
    local = os.path.normpath(os.path.join(folder, name))
    return local if name.startswith("..") or os.path.isdir(local) else name


def save(vlm, folder, stage, with_llm, dtype=None, **extra):
    """Write a checkpoint into `folder` (made if need be), config.json last: with it the checkpoint is complete.

    with_llm: after SFT the LLM goes along, in `dtype` or its own, with the frozen E that the connector was trained
    against. Where the LLM is sharded every rank calls this; rank 0 writes.
    """
    writes = not dist.is_initialized() or dist.get_rank() == 0
    if with_llm:
        save_llm(vlm.llm, f"{folder}/llm", dtype or vlm.llm.dtype, writes)
    if not writes:
        return
    os.makedirs(folder, exist_ok=True)
    if not with_llm and os.path.isfile(f"{folder}/config.json") and os.path.isdir(f"{folder}/llm"):
        shutil.rmtree(f"{folder}/llm")                              # of the checkpoint whose place this takes: load would
                                                                    # take it for ours
    write_safetensors({k: v.float() for k, v in vlm.connector.state_dict().items()}, f"{folder}/connector.safetensors")
    if vlm.words:
        save_words(vlm.words, f"{folder}/words.json")
    if with_llm:
        vlm.tokenizer.save_pretrained(f"{folder}/llm")
        if vlm.words:
            write_safetensors({"vocab_embeds": vlm.connector.vocab_embeds}, f"{folder}/llm/vocab_embeds.safetensors")
    names = {"vision_tower": portable(vlm.config.vision_tower, folder), "llm": portable(vlm.config.llm, folder)}
    write_json({"format": FORMAT, "stage": stage, **asdict(vlm.config), **names, **vlm.llm_fingerprint,
                "num_patches": vlm.num_patches,
                "words_hash": words_hash(vlm.words) if vlm.words else None, "git_commit": git_commit(), **extra},
               f"{folder}/config.json")


def save_llm(llm, folder, dtype, writes, limit=4 << 30):
    """The LLM as a Hugging Face folder, in `dtype`, in files of at most `limit` bytes and a tensor.

    Ranks put one tensor together at a time; the one that `writes` holds a file's worth of them on the CPU, never all.
    """
    tensors = stored_tensors(llm)
    files, size = [[]], 0
    for name, tensor in tensors.items():
        if size >= limit:
            files, size = files + [[]], 0
        files[-1].append(name)
        size += tensor.numel() * dtype.itemsize
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    names = names if len(files) > 1 else ["model.safetensors"]
    if writes:
        os.makedirs(folder, exist_ok=True)
    for path, group in zip(names, files):
        held = {}
        for name in group:
            whole = tensors[name].detach()
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            if writes:
                held[name] = whole.to("cpu", dtype)
        if writes:
            write_safetensors(held, f"{folder}/{path}", {"format": "pt"})
    if writes:
        llm.config.architectures, llm.config.dtype = [type(llm).__name__], dtype
        llm.config.save_pretrained(folder)
        llm.generation_config.save_pretrained(folder)
        if len(files) > 1:
            total = sum(t.numel() for t in tensors.values())
            write_json({"metadata": {"total_parameters": total, "total_size": total * dtype.itemsize},
                        "weight_map": {name: path for path, group in zip(names, files) for name in group}},
                       f"{folder}/model.safetensors.index.json")


def llm_fingerprint(vlm):
    """What ties a checkpoint to the LLM that it was trained on."""
    return {"tokenizer_hash": tokenizer_hash(vlm.tokenizer), "embeddings_hash": embeddings_hash(vlm.llm)}


@contextmanager
def named(path):
    """What safetensors has to say (torn, a header that lies, a full disk) as a ValueError that names the path"""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None


def write_safetensors(tensors, path, metadata=None):
    with named(path), replacing(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata)


def read_safetensors(path):
    """-> {name: tensor}"""
    with named(path):
        return load_file(path)


def read_config(folder):
    """A checkpoint's config.json. -> (Config with the names resolved, the whole dict)

    ValueError where `folder` is no checkpoint, or one of another format."""
    path = f"{folder}/config.json"
    if not os.path.isfile(path):
        raise ValueError(f"{folder} is no checkpoint: it has no config.json (a run writes it when it ends)")
    whole = read_json(path)
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        found = whole.get("format") if isinstance(whole, dict) else whole
        raise ValueError(f"{path}: format {str(found)[:60]!r}; this code reads format {FORMAT}")
    kinds = {f.name: f.type for f in fields(Config)} | {"stage": str, "tokenizer_hash": str, "embeddings_hash": str}
    for name, kind in kinds.items():
        if type(whole.get(name)) is not kind:
            raise ValueError(f"{path}: {name} is {str(whole.get(name))[:60]!r}, it must be of type {kind.__name__}")
    config = Config(**{f.name: whole[f.name] for f in fields(Config)})
    config.vision_tower, config.llm = resolve(config.vision_tower, folder), resolve(config.llm, folder)
    return config, whole


def load(folder, device="cpu", dtype=torch.float32, attention="sdpa", frozen_dtype=None, sharded_parts=()):
    """Read a checkpoint. -> VLM in evaluation mode, nothing of it trained; frozen_dtype, shard: see `build`

    ValueError where its parts do not belong together: another word list, another LLM than it was trained on, a vision
    tower that cuts an image into another number of patches."""
    config, whole = read_config(folder)
    own_llm = f"{folder}/llm"
    if os.path.isdir(own_llm) and not glob(f"{escape(own_llm)}/model*.safetensors"):    # a .bin is read where you name it
        raise ValueError(f"{own_llm} holds no model*.safetensors, which is all that a checkpoint of ours is read from")
    llm = load_llm(own_llm if os.path.isdir(own_llm) else config.llm, dtype, device, attention, meta=bool(sharded_parts))
    words = load_words(f"{folder}/words.json") if config.connector == "langbridge" else None
    if words and (words_hash(words) != whole.get("words_hash") or len(words) != config.num_words):
        raise ValueError(f"{folder}/words.json is not the word list that this connector was trained with")
    vlm = build(config, words, device, dtype, llm, frozen_dtype=frozen_dtype, sharded_parts=sharded_parts)
    if vlm.num_patches != whole.get("num_patches", vlm.num_patches):
        raise ValueError(f"{folder} was trained on {whole['num_patches']} patches of an image, "
                         f"{config.vision_tower} gives {vlm.num_patches}")
    load_connector(vlm.connector, folder)
    origin = {k: whole[k] for k in vlm.llm_fingerprint}
    if os.path.isdir(own_llm):
        if words:                                                   # the E of training, which the LLM has moved away from
            path = f"{own_llm}/vocab_embeds.safetensors"
            E = read_safetensors(path).get("vocab_embeds", torch.empty(0))
            if E.shape != vlm.connector.vocab_embeds.shape or not E.isfinite().all():
                raise ValueError(f"{path} is not E: {tuple(E.shape)} instead of "
                                 f"{tuple(vlm.connector.vocab_embeds.shape)}, {(~E.isfinite()).sum()} numbers not finite")
            vlm.connector.vocab_embeds = E.to(vlm.connector.vocab_embeds)
    elif vlm.llm_fingerprint != origin:
        raise ValueError(f"{folder} was trained on another LLM than what {config.llm} is now; transfer.py moves it")
    vlm.llm_fingerprint = origin                                             # E's LLM, also where SFT has changed the LLM since
    return vlm


def load_connector(connector, folder):
    """Read connector.safetensors into `connector`; ValueError names the first tensor that does not fit."""
    path = f"{folder}/connector.safetensors"
    state, own = read_safetensors(path), connector.state_dict()
    # Checkpoints of before the second edition call the scores' layer "words".
    state = {re.sub(r"^words\.", "to_scores.", name): tensor for name, tensor in state.items()}
    for name in own.keys() | state.keys():
        have, want = (tuple(d[name].shape) if name in d else None for d in (state, own))
        if have != want:
            raise ValueError(f"{path}: {name} is {have}, this connector wants {want}")
        if not state[name].isfinite().all():
            raise ValueError(f"{path}: {name} has numbers that are not finite")
    connector.load_state_dict(state)
