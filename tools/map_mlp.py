"""
Move an MLP connector to another LLM by the linear map between the two LLMs' embeddings.

    python transfer.py SRC TGT --map words.json

This is a baseline for the LangBridge. An MLP writes into the embedding space of its own LLM, so it
is followed by a map from there to the other LLM's space, fitted on words that both LLMs have.
Letters as in model.py; Ds and Dt are the widths of source and target.
"""
from dataclasses import replace

import torch

import checkpoint
import vocab
from model import embed_words


def move_mlp(source, target, words_file, device, dtype, attention=None, vision_tower=None):
    """Return the VLM of checkpoint folder `source`, an MLP, mapped to the LLM `target`.

    The last layer of the MLP is followed by the map, so the result is an MLP again.
    """
    words = vocab.load_words(words_file)
    if len(words) < 2:
        raise ValueError(f"{words_file} has one word, and a map is fitted on many")
    old = checkpoint.load(source, device, dtype, attention, vision_tower=vision_tower)
    first, _, last = old.connector.mlp
    source_E = embed_words(old.llm, old.tokenizer, words)
    config = replace(old.config, llm=target, hidden=first.out_features)
    del old.llm                                     # two LLMs need not fit into memory together
    vlm = checkpoint.build(config, None, device, dtype, attention=attention,
                           tower_folder=checkpoint.own_folder(source, "vision_tower"))
    vlm.connector.mlp[0].load_state_dict(first.state_dict())
    target_E = embed_words(vlm.llm, vlm.tokenizer, words)
    weight, bias = map_layer(last.weight, last.bias, source_E, target_E)
    vlm.connector.mlp[2].weight.data.copy_(weight)
    vlm.connector.mlp[2].bias.data.copy_(bias)
    return vlm


@torch.no_grad()
def map_layer(weight, bias, source_E, target_E, ridge=0.01):
    """Return the weight [Dt, H] and bias [Dt] of a layer [Ds, H], [Ds] with a linear map behind it.

    The map is the ridge regression from the centred source_E [K, Ds] to the centred target_E
    [K, Dt], in closed form. ridge is a part of the mean variance of a dimension of source_E.
    Source of the idea: VPGTrans, arXiv 2305.01278.
    """
    mean_s, mean_t = source_E.mean(dim=0), target_E.mean(dim=0)
    S, T = source_E - mean_s, target_E - mean_t
    gram = S.T @ S                                                          # (Ds, Ds)
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    linear = torch.linalg.solve(gram, S.T @ T)                              # (Ds, Dt)
    return linear.T @ weight.float(), (bias.float() - mean_s) @ linear + mean_t
