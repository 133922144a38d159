"""
Build a VLM from a config, save it and load it. A checkpoint is a folder:

    config.json              what the VLM is made of, and what ties it to its LLM and words
    words.json               the K shared words as strings
    connector.safetensors    the connector; a LangBridge's tensors have no dimension of the LLM
    llm/                     if a stage trained the LLM: a Hugging Face folder, its tokenizer, E
    llm/image_newline.safetensors    with tiles; it has the LLM's dimension
    vision_tower/            if a stage trained the vision tower: a Hugging Face folder

support/pretrained.py reads the LLM and the vision tower that a config names.
"""
import os
import shutil
from dataclasses import asdict, fields
from glob import escape, glob

import torch
import torch.distributed as dist
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import is_accelerate_available

from common import read_json, write_json
from model import VLM, Config, embed_words, make_connector
from vocab import load_words, save_words, words_hash
from support import fingerprint, sharding
from support.device import set_precision
from support.hub import load_tokenizer
from support.pretrained import (attention_of_here, image_settings, load_llm, load_weights,
                                probe_llm, probe_tower, vision_config)
from support.tensors import read_tensors, write_safetensors

FORMAT = 1
OPTIONAL = {"template": str, "image_mode": str, "num_patches": int, "fingerprint": dict}
NEWLINE = "image_newline.safetensors"


# --------------------------------------------------------------------------------------------------
# build

def build(config, words, device="cpu", dtype=torch.float32, attention=None, frozen_dtype=None,
          tower_dtype=None, llm_folder=None, tower_folder=None, shard=False, sum_pieces=True):
    """Return a VLM with a new connector, in evaluation mode, no parameter of it trainable.

    words           list of K strings, None for an MLP
    device          one device, or "auto" for all GPUs
    dtype           of the LLM's weights
    attention       see load_llm
    frozen_dtype    of E, of the tower, and of training's autocast; default: dtype
    tower_dtype     of the vision tower's weights; default: frozen_dtype
    llm_folder      a checkpoint's own LLM, to use instead of config.llm
    tower_folder    a checkpoint's own tower, to use instead of config.vision_tower
    shard           each rank holds a piece of the LLM, and every rank must call
    sum_pieces      see embed_words
    ValueError where a model is not what the config needs.
    """
    frozen_dtype = frozen_dtype or dtype
    set_precision(frozen_dtype)
    tower_name = tower_folder or config.vision_tower
    tower = load_weights(AutoModel, tower_name, config=vision_config(tower_name),
                         dtype=tower_dtype or frozen_dtype)
    Dv = probe_tower(tower, tower_name, config.vision_layer, config.image_size)
    settings = image_settings(tower_name, tower.config, config.image_size)
    llm, tokenizer = load_llm(llm_folder or config.llm, dtype, device, attention, on_meta=shard)
    if device == "auto":
        device = llm.get_input_embeddings().weight.device
    D = llm.get_input_embeddings().embedding_dim
    connector = make_connector(config, Dv, D)
    hashes = {"llm": fingerprint.of_llm(llm.config.name_or_path or config.llm, tokenizer),
              "vision_tower": fingerprint.of_vision_tower(tower_name)}
    own_folders = {"llm": llm_folder, "vision_tower": tower_folder}
    own_parts = {part for part, folder in own_folders.items() if folder}
    vlm = VLM(config, tower.to(device), connector.to(device), llm, tokenizer, words, settings,
              hashes, own_parts, sum_pieces)
    vlm.requires_grad_(False).eval()

    def finish():
        """Do what needs the LLM's weights."""
        if words:
            E = embed_words(llm, tokenizer, words, sum_pieces)
            connector.vocab_embeds = E.to(device, frozen_dtype)
        probe_llm(vlm, frozen_dtype)

    if shard:
        sharding.shard_vlm(vlm, device, frozen_dtype)
        sharding.run_gathered(vlm, finish)
    else:
        finish()
    return vlm


# --------------------------------------------------------------------------------------------------
# save

def save(vlm, folder, stage, trained_parts, dtype=None, **extra):
    """Write a checkpoint into `folder`. config.json comes last and makes the checkpoint complete.

    trained_parts: names of the parts that this run has trained, such as ("connector", "llm"). The
    LLM and the tower are written if this run or an earlier one has trained them. dtype: in which
    they are written, default their own. extra: more entries of config.json. With a sharded LLM
    every rank must call; rank 0 writes.
    """
    is_writer = not dist.is_initialized() or dist.get_rank() == 0
    own_parts = vlm.own_parts | {*trained_parts} - {"connector"}
    if is_writer:
        # Without its config.json a mixture of the old and the new checkpoint cannot be loaded.
        if os.path.isfile(f"{folder}/config.json"):
            os.remove(f"{folder}/config.json")
        for part in ("llm", "vision_tower"):
            shutil.rmtree(f"{folder}/{part}", ignore_errors=True)
    for part in ("llm", "vision_tower"):
        if part in own_parts:
            model = getattr(vlm, part)
            sharding.save_model(model, f"{folder}/{part}", dtype or model.dtype, is_writer)
    if not is_writer:
        return
    os.makedirs(folder, exist_ok=True)
    connector = {name: t.float() for name, t in vlm.connector.state_dict().items()}
    write_safetensors(connector, f"{folder}/connector.safetensors")
    if vlm.words:
        save_words(vlm.words, f"{folder}/words.json")
    if "llm" in own_parts:
        vlm.tokenizer.save_pretrained(f"{folder}/llm")
        # Other programs stop at the same tokens then. The library refuses to save some generation
        # configs after a change, so the change is made in the file.
        path = f"{folder}/llm/generation_config.json"
        generation = read_json(path) if os.path.isfile(path) else {}
        write_json({**generation, "eos_token_id": sorted(vlm.eos_ids)}, path)
        if vlm.words:
            # The E of training. The trained LLM's embedding has moved away from it.
            E = {"vocab_embeds": vlm.connector.vocab_embeds}
            write_safetensors(E, f"{folder}/llm/vocab_embeds.safetensors")
    if vlm.image_newline is not None:
        os.makedirs(f"{folder}/llm", exist_ok=True)
        write_safetensors({"image_newline": vlm.image_newline}, f"{folder}/llm/{NEWLINE}")
    if "vision_tower" in own_parts:
        settings = vlm.image_settings
        write_json({"image_mean": settings["mean"], "image_std": settings["std"]},
                   f"{folder}/vision_tower/preprocessor_config.json")
    written = dict(vlm.fingerprint)
    if "llm" in own_parts:
        tokenizer = load_tokenizer(f"{folder}/llm")
        written["llm"] = fingerprint.of_llm(f"{folder}/llm", tokenizer)
    if "vision_tower" in own_parts:
        written["vision_tower"] = fingerprint.of_vision_tower(f"{folder}/vision_tower")
    config = {"format": FORMAT, "stage": stage, **asdict(vlm.config),
              "vision_tower": portable(vlm.config.vision_tower, folder),
              "llm": portable(vlm.config.llm, folder), "num_patches": vlm.num_patches,
              "attention": vlm.llm.config._attn_implementation,
              "words_hash": words_hash(vlm.words) if vlm.words else None,
              "sum_pieces": vlm.sum_pieces,
              "fingerprint": written, "git_commit": fingerprint.git_commit(), **extra}
    check_saved(vlm, folder)
    write_json(config, f"{folder}/config.json")


def check_saved(vlm, folder):
    """Raise a ValueError if the parts that were just written to `folder` cannot be loaded.

    With accelerate only the names and sizes of the weights of LLM and tower are read: quick.
    """
    read_tensors(f"{folder}/connector.safetensors", vlm.connector.state_dict())
    if vlm.words:
        load_words(f"{folder}/words.json")
    options = {"device_map": "meta"} if is_accelerate_available() else {}
    for part, model_class in (("llm", AutoModelForCausalLM), ("vision_tower", AutoModel)):
        if own_folder(folder, part):
            load_weights(model_class, f"{folder}/{part}", **options)
    if own_folder(folder, "llm"):
        load_tokenizer(f"{folder}/llm")


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


# --------------------------------------------------------------------------------------------------
# load

def load(folder, device="cpu", dtype=torch.float32, attention=None, frozen_dtype=None,
         tower_dtype=None, shard=False, vision_tower=None, tiles=None):
    """Return the VLM of a checkpoint, in evaluation mode. The arguments are those of `build`.

    attention: default is the one of the training, if this machine has it. vision_tower: where the
    same tower is, if it is not under the name in config.json. tiles: to use instead of the
    checkpoint's own. If the checkpoint has no image_newline, a new one is drawn.
    ValueError where its parts do not belong together: another word list, another LLM than the one
    of the training, or a vision tower that gives another number of patches.
    """
    config, metadata = read_config(folder)
    config.vision_tower = vision_tower or config.vision_tower
    config.tiles = config.tiles if tiles is None else tiles
    llm_folder = own_folder(folder, "llm")
    if not attention:
        attention = attention_of_here(metadata.get("attention"), device, frozen_dtype or dtype)
    words = read_words(folder, config, metadata)
    vlm = build(config, words, device, dtype, attention, frozen_dtype, tower_dtype,
                llm_folder=llm_folder, tower_folder=own_folder(folder, "vision_tower"),
                shard=shard, sum_pieces=metadata["sum_pieces"])
    check_patches(vlm, metadata, folder)
    load_connector(vlm.connector, folder)
    if vlm.image_newline is not None and metadata["tiles"]:
        newline = read_tensors(f"{folder}/llm/{NEWLINE}", {"image_newline": vlm.image_newline})
        vlm.image_newline.data.copy_(newline["image_newline"])
    if llm_folder and words:
        # The E of the training. `build` has made another one, from the trained LLM.
        E = vlm.connector.vocab_embeds
        found = read_tensors(f"{llm_folder}/vocab_embeds.safetensors", {"vocab_embeds": E})
        vlm.connector.vocab_embeds = found["vocab_embeds"].to(E)
    fingerprint.check(vlm, folder, metadata)
    return vlm


def read_words(folder, config, metadata):
    """Return the words of a checkpoint, None of an MLP. ValueError if they are other words."""
    if config.connector != "langbridge":
        return None
    words = load_words(f"{folder}/words.json")
    if words_hash(words) != metadata.get("words_hash") or len(words) != config.num_words:
        raise ValueError(f"{folder}/words.json is not the word list of this connector")
    return words


def check_patches(vlm, metadata, folder):
    """Raise a ValueError if the tower gives another number of patches than in the training."""
    expected = metadata.get("num_patches", vlm.num_patches)
    if vlm.num_patches != expected:
        raise ValueError(f"{folder} was trained on {expected} patches of an image, "
                         f"{vlm.config.vision_tower} gives {vlm.num_patches}")


def own_folder(folder, part):
    """Return the folder in which a checkpoint holds its own `part`, or None."""
    path = f"{folder}/{part}"
    if not os.path.isdir(path) or os.listdir(path) == [NEWLINE]:    # transfer.py writes only this
        return None
    if not glob(f"{escape(path)}/model*.safetensors"):
        raise ValueError(f"{path} has no model*.safetensors; only such files are read from it")
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
        raise ValueError(f"{path} is no checkpoint's: its format is {found!r:.60}, not {FORMAT}")
    # Checkpoints from before these entries lack them.
    metadata = {"pool": 1, "tiles": [], "temperature": 1.0, "sum_pieces": False, **metadata}
    if isinstance(metadata["tiles"], list):         # JSON has no tuples
        metadata["tiles"] = tuple(tuple(t) if isinstance(t, list) else t for t in metadata["tiles"])
    types = {field.name: field.type for field in fields(Config)}
    optional = {name: kind for name, kind in OPTIONAL.items() if name in metadata}
    for name, kind in (types | optional | {"stage": str, "sum_pieces": bool}).items():
        if type(metadata.get(name)) is not kind:
            value = str(metadata.get(name))[:60]
            raise ValueError(f"{path}: {name} is {value!r}, it must be of type {kind.__name__}")
    config = Config(**{name: metadata[name] for name in types})
    if min(config.hidden, config.image_size, config.pool - 1) < 0 or not config.temperature > 0:
        raise ValueError(f"{path}: hidden, image_size, pool or temperature has no possible value")
    config.vision_tower = resolve(config.vision_tower, folder)
    config.llm = resolve(config.llm, folder)
    return config, metadata


def load_connector(connector, folder):
    """Read connector.safetensors of a checkpoint into a connector."""
    path = f"{folder}/connector.safetensors"
    connector.load_state_dict(read_tensors(path, connector.state_dict()))
