"""
The memory estimate of `python train.py CONFIG --dry_run`: sizes from configs, no weights.

It takes the sizes of the paper's models from config/paper/sizes.json, so it works before anything
is downloaded.
"""
import os
from dataclasses import asdict, fields

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import checkpoint
import fused
import model
import vocab
from common import read_json
from support import pretrained, sharding
from support.checks import check_init, needs_words
from support.log import parts_table
from support.tiles import check_tiles, most_squares, num_tokens
from support.tower import pooled_side, side_of

FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SIZES = read_json(f"{FOLDER}/config/paper/sizes.json")      # {name: entries of the config}
RANKS = (1, 2, 4, 8, 64)
# What the sum leaves out: CUDA's context and NCCL's buffers, 2 to 3 GiB; the connector's own
# activations, 1 to 2 GiB; and memory between tensors that no tensor fits into.
LEFT_OUT = 5 << 30                  # an assumption, not measured
ASSUMED_MEMORY = 80 << 30           # bytes of a GPU, for the choice that fused.plain_limit makes


def print_estimate(cfg):
    """Print which parts a run would train and what it would hold in memory on each GPU.

    cfg: train.Settings.
    """
    if os.path.isfile(f"{cfg.init}/config.json"):
        config = checkpoint.read_config(cfg.init)[0]
        check_init(cfg, config)
        for key, value in asdict(config).items():
            if not (key == "tiles" and "tiles" in cfg.given):
                setattr(cfg, key, value)
    elif cfg.init:
        print(f"{cfg.init} is not there yet: the sizes are those of the settings")
    if cfg.dtype == "auto":
        cfg.dtype = "bfloat16"                      # as on the GPUs that the estimate is for
    vlm, config = meta_model(cfg, cfg.trained_parts())
    print(parts_table(vlm, cfg))
    P = pooled_side(vlm.vision_tower.config, vlm.image_size, cfg.pool) ** 2
    encoded = P * most_squares(cfg.tiles, vlm.image_size)       # what the tower sees of a picture
    if cfg.tiles:                                   # the most that a picture can take
        P = max(num_tokens(tile, P, cfg.tiles, vlm.image_size) for tile in cfg.tiles)
    # A caption has about 64 tokens, a conversation of LLaVA's SFT data about 448. Batches of
    # similar length (--group) have the longest conversations together, of up to 1,472 tokens.
    text = 64 if cfg.stage in ("words", "pretrain") else 1472 if cfg.group else 448
    T = min(cfg.max_length, P + text)
    tables = {ranks: memory(vlm, cfg, config, P, T, encoded, ranks)
              for ranks in RANKS if cfg.global_batch % ranks == 0}
    heads = "".join(f"{ranks:5} GPU{'s' * (ranks > 1)}".rjust(10) for ranks in tables)
    print(f"{'GiB on each GPU':44}{heads}")
    for name in tables[1]:
        print(f"{name:44}" + "".join(f"{t[name] / 2**30:10.2f}" for t in tables.values()))
    whole = "cut into pieces" if cfg.shard else "whole on each (--shard cuts it)"
    largest = f"at most {P} of them of a picture" if cfg.tiles else f"{P} of them patches"
    print(f"{T} tokens a sample ({largest}), {cfg.global_batch} samples a step, at most "
          f"{cfg.batch_size} at a time; from 2 GPUs on the LLM is {whole}")


def meta_model(cfg, trained_parts):
    """Return (a module with the VLM's three parts on the meta device, the model.Config).

    ValueError, as checkpoint.build would raise it, for models whose shapes do not fit.
    """
    def find_config(name, read):
        return AutoConfig.for_model(**SIZES[name]) if name in SIZES else read(name)

    with torch.device("meta"):
        tower = AutoModel.from_config(find_config(cfg.vision_tower, pretrained.vision_config))
        # Whether other kinds of attention work here says nothing of the machine of the run.
        attention = cfg.attention if cfg.attention in ("sdpa", "eager") else None
        llm = AutoModelForCausalLM.from_config(find_config(cfg.llm, pretrained.llm_config),
                                               attn_implementation=attention)
        pretrained.check_length(cfg.max_length, llm.config, cfg.llm)
        Dv = pretrained.probe_tower(tower, cfg.vision_tower, cfg.vision_layer, cfg.image_size)
        if cfg.vision_tower not in SIZES:
            pretrained.image_settings(cfg.vision_tower, tower.config, cfg.image_size)
        config = model.Config(**{f.name: getattr(cfg, f.name) for f in fields(model.Config)})
        if not config.num_words:
            has_words = os.path.isfile(cfg.words)
            config.num_words = len(vocab.load_words(cfg.words)) if has_words else 19200
        D = llm.get_input_embeddings().embedding_dim
        vlm = torch.nn.Module()
        vlm.vision_tower = tower
        vlm.image_size = cfg.image_size or side_of(tower.config, "image_size")
        check_tiles(cfg.tiles, vlm.image_size)
        vlm.image_newline = torch.nn.Parameter(torch.empty(D)) if cfg.tiles else None
        vlm.connector = model.make_connector(config, Dv, D)
        vlm.llm = llm
    vlm.to(getattr(torch, cfg.dtype)).requires_grad_(False)
    for part in trained_parts:
        getattr(vlm, part).float().requires_grad_(True)
    return vlm, config


def block_bytes(config, D, tokens, width):
    """Return what a block of the width D keeps for its backward pass.

    These are norms in float32; q, k, v and the attention's output; and three tensors of the inner
    width. width: bytes of a number.
    """
    inner = getattr(config, "intermediate_size", None) or 4 * D     # GPT-2 and DINOv2 name none
    return tokens * (2 * 4 * D + width * 6 * D + width * 3 * inner)


def memory(vlm, cfg, config, P, T, encoded, ranks):
    """Return {kind: bytes} on one of `ranks` ranks, for samples of T tokens, P of them patches.

    encoded: the patches that go through the tower and the connector for a sample.
    """
    embedding = vlm.llm.get_input_embeddings()
    blocks = sharding.transformer_blocks(vlm.llm)
    shards = ranks if cfg.shard else 1
    width = 2 if cfg.dtype == "bfloat16" else 4                     # bytes of a number
    samples = min(cfg.batch_size, cfg.global_batch // ranks)
    tokens, patches = samples * T, samples * encoded
    D, layers = embedding.embedding_dim, len(blocks)
    weights = state = 0
    for part in ("vision_tower", "connector", "llm"):
        pieces = shards if part == "llm" else 1
        for p in getattr(vlm, part).parameters():
            weights += p.numel() * p.element_size() / pieces
            state += 12 * p.numel() * p.requires_grad / pieces      # gradient and two moments
    # What lies outside the blocks is gathered all the time, and two blocks, of which one is fetched
    # ahead. If the LLM trains, its gradients come in this dtype and again in float32 for the sum.
    block_size = sum(p.numel() for p in blocks[0].parameters())
    rest = sum(p.numel() for p in vlm.llm.parameters()) - layers * block_size
    trains = next(vlm.llm.parameters()).requires_grad
    gathered = 0
    if shards > 1:
        gathered = (rest + 2 * block_size) * width + (rest + block_size) * (width + 4) * trains
    block = block_bytes(vlm.llm.config, D, tokens, width)
    activations = layers * block
    if cfg.checkpointing:
        # Between the blocks lies the sum of all earlier ones. In unsharded training of the LLM it
        # has the dtype of the weights, float32.
        is_wide = trains and shards == 1
        activations = layers * tokens * D * (4 if is_wide else width) + block
    scores = E = 0
    if config.connector == "langbridge":
        K = config.num_words
        E = K * D * width
        is_small = 4 * patches * K <= (cfg.plain_bytes or ASSUMED_MEMORY // 32)
        if cfg.stage == "words":                    # no words are combined
            kept = 0
        elif config.normalize == "none":
            kept = 2 * width * K
            if fused.without_scores(patches, K, config.hidden, D, True):
                kept = 0
        elif config.normalize == "softmax" and not is_small:
            kept = 8 * min(K, fused.CUDA_BLOCK)
        else:
            kept = 16 * K                           # the plain formula keeps about four tensors
        if needs_words(cfg):                        # its scores and their log_softmax, in float32
            kept += 8 * K
        scores = patches * kept
    logits = min(model.LOSS_ROWS, tokens - samples * P) * embedding.num_embeddings * 12
    if cfg.stage == "words":                        # the LLM does not run
        activations = logits = 0
    table = {"weights": weights + E, "gradients and AdamW's moments (float32)": state,
             "gathered from the other ranks": gathered, "activations of the LLM": activations}
    if next(vlm.vision_tower.parameters()).requires_grad:           # without checkpointing
        tower = vlm.vision_tower.config
        block = block_bytes(tower, tower.hidden_size, patches * cfg.pool ** 2, width)
        table["activations of the vision tower"] = (
            block * len(sharding.transformer_blocks(vlm.vision_tower)))
    table |= {"scores and weights of the words": scores, "logits": logits}
    total = sum(table.values())
    return table | {"sum": total, "with what is not counted (5 GiB assumed)": total + LEFT_OUT}
