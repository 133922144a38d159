"""Batched answers."""
import inspect
import zlib

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from data import IMAGE_ID


@torch.no_grad()
def generate(vlm, ids, pixel_values=None, max_new_tokens=128, temperature=0.0, seed=0, image_index=None):
    """Continue each prompt, greedily (temperature 0) or by sampling. An answer does not depend on its batch.

    ids: prompts as lists of ids with runs of IMAGE_ID; pixel_values float32[N, 3, S, S], or None; image_index: the row of
    pixel_values for each image of the prompts in reading order, None for 0, 1, 2, ...
    -> lists of new ids, without the eos.
    """
    device = vlm.llm.device
    T = max(map(len, ids))
    # Left padding: the last column is the newest token of every row.
    input_ids = torch.tensor([[vlm.pad_id] * (T - len(row)) + row for row in ids], device=device)             # (B, T)
    mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in ids], device=device)         # (B, T)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    # A row draws from a generator of its own, seeded by its prompt, so that its neighbours do not matter.
    dice = [torch.Generator().manual_seed(seed + zlib.crc32(repr(row).encode())) for row in ids]
    image_index = range(len(pixel_values) if pixel_values is not None else 0) if image_index is None else image_index
    embeds = vlm.splice(input_ids, pixel_values, list(image_index))  # (B, T, D)
    cache = prefill(vlm, ids, embeds, mask, position, image_index)    # of the first columns
    start = cache.get_seq_length() if cache else 0
    decode = vlm.llm.get_decoder()
    name = cache_name(decode)
    out = decode(inputs_embeds=embeds[:, start:], attention_mask=mask, position_ids=position[:, start:],
                 use_cache=True, **{name: cache})
    answers, done = [[] for _ in ids], [False] * len(ids)
    for _ in range(max_new_tokens):
        tokens = pick(vlm.logits(out.last_hidden_state[:, -1]), temperature, dice)           # B ints
        for row, token in enumerate(tokens):
            done[row] = done[row] or token in vlm.eos_ids
            if not done[row]:
                answers[row].append(token)
        if all(done) or max(map(len, answers)) == max_new_tokens:
            break
        position = position[:, -1:] + 1
        mask = F.pad(mask, (0, 1), value=1)
        out = decode(input_ids=torch.tensor(tokens, device=device)[:, None], attention_mask=mask,
                     position_ids=position, use_cache=True, **{name: getattr(out, name)})
    return answers


def prefill(vlm, ids, embeds, mask, position, image_index):
    """Keys and values of what prompts begin with alike, the same ids and images up to the last patch, made once.

    As `generate` has them: ids, B prompts; embeds float[B, T, D]; mask and position int64[B, T]; image_index.
    -> a cache of the first T - S columns, S the most tokens that a prompt has after its last patch; None where no
    two prompts share an image, or where the LLM remembers otherwise than by attention.
    """
    T, images, begins, longest = mask.shape[1], iter(image_index), [], {}    # longest: beginning -> its longest prompt
    for b, row in enumerate(ids):
        end = len(row) - row[::-1].index(IMAGE_ID) if IMAGE_ID in row else 0
        begins.append((tuple(row[:end]), *(next(images) for _ in range(row.count(IMAGE_ID) // vlm.num_patches))))
        if len(row) > len(ids[longest.setdefault(begins[b], b)]):
            longest[begins[b]] = b
    shared = T - max(len(row) - len(begin[0]) for row, begin in zip(ids, begins))                # T - S
    kinds = getattr(vlm.llm.config.get_text_config(), "layer_types", None) or ()
    if shared == 0 or len(longest) == len(ids) or not {*kinds} <= {"full_attention", "sliding_attention"}:
        return None
    rows, cache = list(longest.values()), DynamicCache()        # given a config it forgets what leaves a window
    decode = vlm.llm.get_decoder()
    decode(inputs_embeds=embeds[rows, :shared], attention_mask=mask[rows, :shared],
           position_ids=position[rows, :shared], use_cache=True, **{cache_name(decode): cache})
    # A shorter prompt begins further right, and the last S columns hold some of its patches, which are made again.
    # The price of a few patches buys that no row has a gap between its tokens, which windows count by columns.
    source = torch.tensor([rows.index(longest[begin]) for begin in begins], device=mask.device)[:, None]  # (B, 1)
    shift = torch.tensor([[len(row) - len(ids[longest[begin]])] for row, begin in zip(ids, begins)], device=mask.device)
    column = (torch.arange(shared, device=mask.device) + shift).clamp(min=0)                            # (B, T-S)
    for layer in cache.layers:                                  # keys and values float[B, heads, T-S, d]
        b, t = (index.to(layer.keys.device) for index in (source, column))
        layer.keys = layer.keys[b, :, t].transpose(1, 2)
        layer.values = layer.values[b, :, t].transpose(1, 2)
    return cache


def cache_name(decoder):
    """The name that a decoder gives its cache of keys and values: transformers renames it, and drops the old name in 5.40."""
    return "cache" if "cache" in inspect.signature(type(decoder).forward).parameters else "past_key_values"


def pick(logits, temperature, dice):
    """The next token of each row: float32[B, V] -> list of B ints"""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    probs = (logits / temperature).softmax(-1).cpu()
    return [int(torch.multinomial(p, 1, generator=g)) for p, g in zip(probs, dice)]
