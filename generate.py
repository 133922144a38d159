"""
Answers in batches: greedy or sampled, and a prefix that several prompts share is computed once.

`llm.generate(inputs_embeds=...)` of transformers would do for single prompts. This loop adds what
evaluation needs: one image with ten questions is encoded and prefilled once, not ten times.

Letters as in model.py. A prompt is a list of ids in which IMAGE_ID stands for each image embed.
"""
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from conversation import IMAGE_ID
from support.pretrained import cache_argument

# Layers of these types keep keys and values of all tokens, so a prefix can be copied between rows.
# Other layers (Mamba, for example) remember by a state that cannot be shifted.
SHAREABLE_LAYERS = {"full_attention", "sliding_attention"}
# cuDNN's attention makes a new plan for each length, and each new token makes a new length.
CUDNN_ATTENTION = False


@torch.no_grad()
def generate(vlm, prompts, pixel_values=None, max_new_tokens=128, image_index=None,
             temperature=0.0, picture_sizes=None):
    """Return the answer to each prompt: a list of B lists of new ids, without the end token.

    prompts: B lists of ids. pixel_values: float32[N, 3, S, S] or None. image_index: for each image
    in the prompts, in reading order, its number; default 0, 1, 2, ... picture_sizes: with tiles the
    (width, height) of each image; without them each row of pixel_values is an image.
    temperature 0 takes the most probable token; above 0 tokens are drawn with torch's generator.
    Greedy answers do not depend on the other prompts of the batch, up to rounding. An answer also
    ends where the LLM has no more positions.
    """
    torch.backends.cuda.enable_cudnn_sdp(CUDNN_ATTENTION)
    device = vlm.llm.device
    squares = [None] * (0 if pixel_values is None else len(pixel_values))
    image_tokens = [vlm.num_tokens(picture_size) for picture_size in picture_sizes or squares]
    if image_index is None:
        image_index = list(range(len(image_tokens)))
    # Pad on the left, so that the last column is the newest token of every row.
    T = max(len(prompt) for prompt in prompts)
    vlm.check_positions(T)
    padding = [T - len(prompt) for prompt in prompts]
    padded = [[vlm.pad_id] * n + prompt for n, prompt in zip(padding, prompts)]
    input_ids = torch.tensor(padded)                                                    # (B, T)
    mask = torch.tensor([[0] * n + [1] * (T - n) for n in padding], device=device)      # (B, T)
    position = (mask.cumsum(dim=1) - 1).clamp(min=0)                                    # (B, T)
    embeds = vlm.splice(input_ids, pixel_values, image_index, picture_sizes)            # (B, T, D)

    decoder = vlm.llm.get_decoder()
    cache_name = cache_argument(decoder)
    cache = shared_prefix(vlm, prompts, embeds, mask, position, image_index, image_tokens)
    start = cache.get_seq_length() if cache else 0
    output = decoder(inputs_embeds=embeds[:, start:], attention_mask=mask, use_cache=True,
                     position_ids=position[:, start:], **{cache_name: cache})
    max_positions = vlm.max_positions or T + max_new_tokens
    tokens_left = [min(max_new_tokens, max_positions - len(prompt) + 1) for prompt in prompts]
    answers = [[] for _ in prompts]
    while True:
        tokens = next_tokens(vlm.logits(output.last_hidden_state[:, -1]), temperature)  # (B,)
        for row, token in enumerate(tokens.tolist()):
            if token in vlm.eos_ids:
                tokens_left[row] = 0
            if tokens_left[row] > 0:
                answers[row].append(token)
                tokens_left[row] -= 1
        if not any(tokens_left):
            return answers
        position = (position[:, -1:] + 1).clamp(max=max_positions - 1)                  # (B, 1)
        mask = F.pad(mask, (0, 1), value=1)                                             # (B, T+1)
        cache = getattr(output, cache_name)
        output = decoder(input_ids=tokens.to(device)[:, None], attention_mask=mask,
                         position_ids=position, use_cache=True, **{cache_name: cache})


def next_tokens(logits, temperature):
    """Return the next token of each row: float32[B, V] -> int64[B]."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = (logits / temperature).softmax(dim=-1)
    return torch.multinomial(probabilities, 1)[:, 0]


def shared_prefix(vlm, prompts, embeds, mask, position, image_index, image_tokens):
    """Return a cache of the columns before the first question, or None.

    Each distinct prefix is computed once, and its keys and values are copied to all its prompts.
    The arguments are those of `generate`: embeds float[B, T, D], mask and position int64[B, T].
    image_tokens: see prefixes_of. Two prompts with one prefix (I) and other texts:

        . . I I I a a       C = 4 is the first column in which the question of some row begins.
        . I I I b b b       Columns 0 to C - 1 are cached, the others are computed for each row.

    The result is None if no two prompts share a prefix, if C is 0, or if the LLM has layers of a
    type that cannot be copied.
    """
    prefixes = prefixes_of(prompts, image_index, image_tokens)
    # The longest prompt of each prefix is computed for all prompts that share the prefix.
    longest = {}                                                    # {prefix: row of its prompt}
    for row in sorted(range(len(prompts)), key=lambda row: -len(prompts[row])):
        longest.setdefault(prefixes[row], row)
    C = mask.shape[1] - max(len(p) - len(prefix[0]) for p, prefix in zip(prompts, prefixes))
    layer_types = getattr(vlm.llm.config.get_text_config(), "layer_types", None) or ()
    if C == 0 or len(longest) == len(prompts) or not SHAREABLE_LAYERS.issuperset(layer_types):
        return None

    decoder = vlm.llm.get_decoder()
    # A cache that was made from the config would drop what leaves a sliding window.
    cache = DynamicCache()
    rows = list(longest.values())
    decoder(inputs_embeds=embeds[rows, :C], attention_mask=mask[rows, :C],
            position_ids=position[rows, :C], use_cache=True, **{cache_argument(decoder): cache})
    # A shorter prompt has more padding on the left, so its prefix must move to the right. Between
    # prefix and question there may be no padding, because the attention of a sliding window counts
    # columns and not positions.
    sources = [longest[prefix] for prefix in prefixes]              # for each prompt a row of it
    shift = torch.tensor([len(p) - len(prompts[s]) for p, s in zip(prompts, sources)])[:, None]
    columns = (torch.arange(C) + shift).clamp(min=0)                                    # (B, C)
    copy_cache(cache, torch.tensor([rows.index(s) for s in sources]), columns)
    return cache


def prefixes_of(prompts, image_index, image_tokens):
    """Return the prefix of each prompt: its ids up to the last image token, its images' numbers.

    image_tokens: the number of ids of each image.
    """
    remaining_images = iter(image_index)
    prefixes = []
    for prompt in prompts:
        end = len(prompt) - prompt[::-1].index(IMAGE_ID) if IMAGE_ID in prompt else 0
        images, number = [], prompt.count(IMAGE_ID)
        while number > 0:
            images.append(next(remaining_images))
            number -= image_tokens[images[-1]]
        prefixes.append((tuple(prompt[:end]), *images))
    return prefixes


def copy_cache(cache, rows, columns):
    """Fill a cache anew, in place: row i gets what row rows[i] has in columns[i].

    rows int64[B], columns int64[B, C].
    """
    for layer in cache.layers:
        row, column = rows[:, None].to(layer.keys.device), columns.to(layer.keys.device)
        # float[rows, heads, C, d] -> (B, C, heads, d) -> float[B, heads, C, d]
        layer.keys, layer.values = (tensor[row, :, column].transpose(1, 2)
                                    for tensor in (layer.keys, layer.values))
