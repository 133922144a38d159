"""
LLMs and vision towers from a folder or the Hugging Face hub, tried before they are used.

Two pictures go through the tower, and a few tokens through the LLM. A model that does not fit is
refused in one sentence, before hours are spent. Letters as in model.py.
"""
import inspect
import os
import re
from glob import escape, glob

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, AutoConfig,
                          AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig)
from transformers.image_processing_base import ImageProcessingMixin
from transformers.utils import (find_adapter_config_file, is_accelerate_available,
                                is_flash_attn_2_available, logging)

from data import collate
from support.hub import from_hub, load_tokenizer
from support.tensors import errors_name
from support.tower import side_of, tower_hidden

logging.disable_progress_bar()      # of loading weights: it hides the tables that the scripts print


def load_config(name):
    """Return the config of a model. ValueError for an adapter, which transformers would load."""
    if from_hub(lambda name, **_: find_adapter_config_file(name), name):
        raise ValueError(f"{name} is an adapter, not a model: merge it into its base model with "
                         "peft's merge_and_unload, save that and give its folder")
    return from_hub(AutoConfig.from_pretrained, name)


def load_weights(model_class, name, **kwargs):
    """Return a model by hub name or folder. ValueError where weights are cut off or missing."""
    for path in sorted(glob(f"{escape(name)}/*.safetensors")):
        with errors_name(path):
            safe_open(path, "pt")       # reads the header, and fails where the file was cut off
    model, info = from_hub(model_class.from_pretrained, name, output_loading_info=True, **kwargs)
    # Only a pooler may be missing, because its output is not used. SigLIP's pooler is named "head".
    pooler = re.compile(r"pooler|(^|\.)head\.|^classifier")
    missing = [key for key in sorted(info["missing_keys"]) if not pooler.search(key)]
    if missing:                         # the library would draw them at random and only warn
        raise ValueError(f"{name} has no weights for {missing[0]} ({len(missing)} missing)")
    return model


def weights_folder(name):
    """Return the folder of a model's files; the files of a hub name are downloaded first."""
    if os.path.isdir(name):
        return name
    return snapshot_download(name, allow_patterns=["*.safetensors", "*.json"])


def vision_config(name):
    """Return the config of a vision tower, also where a checkpoint holds a text half (CLIP)."""
    config = load_config(name)
    config = getattr(config, "vision_config", config)
    if type(config) not in MODEL_MAPPING:
        raise ValueError(f"{name} is no vision tower but of the type {config.model_type!r}")
    return config


def image_settings(name, config, image_size):
    """Return {"size": pixels, "mean": 3 floats, "std": 3 floats} of a tower's pictures.

    pictures.py computes (pixels / 255 - mean) / std. If the tower's scale is another than 1 / 255,
    mean and std are changed instead. ValueError for a preprocessor that does more than this.
    """
    processor, _ = from_hub(ImageProcessingMixin.get_image_processor_dict, name)
    for flag in ("do_flip_channel_order", "rescale_offset", "do_grayscale"):
        if processor.get(flag):
            raise ValueError(f"{name}: preprocessor_config.json asks for {flag}, which is not done "
                             "here; take another vision tower")
    scale = processor.get("rescale_factor") or 1 / 255
    if processor.get("do_rescale") is False:
        scale = 1
    factor = round(255 * scale, 5)                  # 1 for the usual scale
    settings = {"size": image_size or side_of(config, "image_size")}
    for key, neutral in (("mean", 0.0), ("std", 1.0)):
        values = processor.get(f"image_{key}")
        if processor.get("do_normalize") is False:
            values = neutral
        values = values if isinstance(values, list) else [values] * 3
        if len(values) != 3 or None in values or key == "std" and min(values) <= 0:
            raise ValueError(f"{name}: image_{key} in preprocessor_config.json is {values[0]!r}; "
                             "three numbers are needed (a std above 0), or do_normalize false")
        settings[key] = [value / factor for value in values]
    return settings


@torch.no_grad()
def probe_tower(tower, name, layer, image_size):
    """Return the width Dv of a tower's patches. ValueError if it gives no P vectors a picture."""
    def refusal(reason):
        return ValueError(f"{name} gives no row of patch vectors ({reason}): take a CLIP, SigLIP, "
                          "DINO or ViT tower, whose output has the shape (images, patches, width)")

    patch_size = side_of(tower.config, "patch_size")
    size = image_size or side_of(tower.config, "image_size")
    layers = getattr(tower.config, "num_hidden_layers", None)
    if type(patch_size) is not int or type(size) is not int:
        raise refusal(f"its config has patch_size {patch_size} and image_size {size}")
    if size < patch_size:
        raise ValueError(f"image_size {size} is less than a patch of {patch_size} pixels")
    if layers and not -layers <= layer + 1 <= layers + 1:
        raise ValueError(f"{name} has {layers} layers, no layer {layer}")
    P = (size // patch_size) ** 2
    end = size // patch_size * patch_size
    images = torch.zeros(2, 3, size, size)
    images[1, :, end - patch_size:end, end - patch_size:end] = 1    # the last patch differs
    try:
        states = tower_hidden(tower, images)
        first, shape = states[0], states[layer].shape
    except Exception as error:          # models of other kinds raise errors of many types
        raise refusal(str(error).strip().partition("\n")[0]) from None
    # CLS and registers are more rows than P. They must come before the patches.
    if len(shape) != 3 or shape[0] != 2 or shape[1] < P:
        raise refusal(f"{tuple(shape)} for two images of {P} patches")
    if not first.is_meta and torch.equal(first[0, -1], first[1, -1]):
        raise refusal("its last row is not that of the last patch")
    return shape[2]


def llm_config(name):
    """Return the config of an LLM. Of a multimodal model it is the config of its text model."""
    config = load_config(name).get_text_config()
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{name} is no LLM: transformers has no causal LM of type "
                         f"{config.model_type!r}")
    config.name_or_path = name                      # a text model's config does not know it
    return config


def check_length(max_length, config, name):
    """Raise a ValueError if samples of max_length tokens may be longer than the LLM's context."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and max_length > positions:
        raise ValueError(f"max_length {max_length} is more than the {positions} positions of LLM "
                         f"{name}: set max_length to at most {positions}")


def cache_argument(decoder):
    """Return the decoder's argument for its cache. transformers renames it in version 5.40."""
    parameters = inspect.signature(type(decoder).forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def attention_of_here(stored, device, dtype):
    """Return a checkpoint's attn_implementation; None if it is flash_attn's and cannot run here."""
    can_run = is_flash_attn_2_available() and str(device) != "cpu" and dtype != torch.float32
    return None if stored == "flash_attention_2" and not can_run else stored


def load_llm(name, dtype, device, attention=None, on_meta=False):
    """Return (LLM, tokenizer) of a hub name or folder. Of a multimodal model only its text model.

    attention: transformers' attn_implementation, by default its choice. device "auto": accelerate
    spreads the LLM over all GPUs. on_meta: only shapes; sharding.shard_vlm reads the weights.
    """
    config = llm_config(name)
    options = {"dtype": dtype, "attn_implementation": attention or None}
    if on_meta:
        with torch.device("meta"):
            llm = AutoModelForCausalLM.from_config(config, **options)
        if os.path.isfile(f"{weights_folder(name)}/generation_config.json"):
            llm.generation_config = from_hub(GenerationConfig.from_pretrained, name)
    else:
        is_known = type(load_config(name)) in MODEL_FOR_CAUSAL_LM_MAPPING
        model_class = AutoModelForCausalLM if is_known else AutoModelForImageTextToText
        device_map = "auto" if device == "auto" else None
        if str(device).startswith("cuda") and is_accelerate_available():
            device_map = {"": device}               # from the file to the GPU, tensor by tensor
        llm = load_weights(model_class, name, device_map=device_map, **options)
        if llm.config.get_text_config() is not llm.config:
            llm = text_model(llm, config, options)
        llm = llm if device_map else llm.to(device)
    tokenizer = load_tokenizer(name)
    rows = llm.get_input_embeddings().num_embeddings
    last_id = max(tokenizer.get_vocab().values())
    if last_id >= rows:                             # fewer ids than rows are padding, as in Qwen
        raise ValueError(f"{name}: the tokenizer has ids up to {last_id}, the embedding has "
                         f"{rows} rows")
    return llm, tokenizer


def text_model(multimodal, config, options):
    """Return the causal LLM inside of a multimodal model, with the same weights."""
    embedding, head = multimodal.get_input_embeddings(), multimodal.get_output_embeddings()
    config.tie_word_embeddings = head.weight is embedding.weight
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config, **options)
    setattr(llm, llm.base_model_prefix, multimodal.get_decoder())
    llm.set_output_embeddings(head)
    llm.generation_config = multimodal.generation_config
    return llm


@torch.no_grad()
def check_packing(vlm, dtype):
    """Raise a ValueError if samples that follow each other in one row can see each other."""
    ids = torch.linspace(0, len(vlm.tokenizer) - 1, 32).long()
    samples = [{"id": str(i), "input_ids": part, "labels": part, "images": torch.zeros(0, 3, 0, 0)}
               for i, part in enumerate(ids.split(16))]
    device = vlm.llm.get_input_embeddings().weight.device
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        packed, apart = (vlm(collate(samples, vlm.pad_id, pack=pack))[0] for pack in (True, False))
    if vlm.sharded:
        vlm.reshard()                               # the optimizer updates pieces only
    if not (packed - apart).abs() <= (1e-4 if dtype == torch.float32 else 1e-2) * apart:
        raise ValueError(f"LLM {vlm.config.llm} lets a sample see the one before it in its row: "
                         "set pack to False")


@torch.no_grad()
def probe_llm(vlm, dtype):
    """Raise a ValueError if the LLM gives other logits here than by its own forward.

    model.py and generate.py call the decoder with embeddings and positions, and then the head. An
    LLM that scales embeddings or logits outside of these modules would be trained on wrong logits.
    """
    llm, decoder, name = vlm.llm, vlm.llm.get_decoder(), vlm.config.llm
    embed = llm.get_input_embeddings()
    device = embed.weight.device
    ids = torch.linspace(0, len(vlm.tokenizer) - 1, 8, device=device).long()            # (T,)
    rows = torch.stack([ids, ids.roll(1)])
    rows[1, :-1] = ids[:-1]                         # the second row differs in its last token only
    positions = torch.arange(8, device=device).repeat(2, 1)                             # (2, T)
    # As generate.py does: padding on the left, and the last token after a cache of the others.
    mask, padded_positions = F.pad(torch.ones_like(rows), (3, 0)), F.pad(positions, (3, 0))
    cache = cache_argument(decoder)
    try:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            own = llm(input_ids=rows, use_cache=False).logits.float()                   # (2, T, V)
            hidden = decoder(inputs_embeds=embed(rows), attention_mask=None, use_cache=False,
                             position_ids=positions).last_hidden_state
            # The padding is not the embedding of any word, as an image is not.
            embeds = F.pad(embed(rows[:, :-1]), (0, 0, 3, 0), value=0.5)
            start = decoder(inputs_embeds=embeds, attention_mask=mask[:, :-1],
                            position_ids=padded_positions[:, :-1], use_cache=True)
            end = decoder(input_ids=rows[:, -1:], attention_mask=mask, use_cache=True,
                          position_ids=padded_positions[:, -1:],
                          **{cache: getattr(start, cache)}).last_hidden_state
            logits, cached = vlm.logits(hidden), vlm.logits(end)        # (2, T, V), (2, 1, V)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(f"LLM {name} does not fit: its decoder must take inputs_embeds, "
                         f"position_ids and a cache ({error})") from None
    # Rounding in bfloat16 comes to about 0.003 of the logits' spread.
    limit = (1e-3 if dtype == torch.float32 else 0.05) * own.std()
    for found, wanted, fault in (
            (logits, own, "scales or caps embeddings or logits in a way not known here"),
            (logits[0, :-1], logits[1, :-1], "lets a token see later ones, so it is no causal LLM"),
            (cached, own[:, -1:], "gives other logits with padding and a cache than without")):
        error = (found - wanted).square().mean().sqrt()
        if not error <= limit:
            raise ValueError(f"LLM {name} {fault}: its logits are off by {error:.2g}, their spread "
                             f"is {own.std():.2g}")
