"""
What an answer needs: how much less probable it is without a patch, and without a word.

words.py --ask calls `ask`. A model answers a question about a picture. Then the LLM reads the same
answer again for each patch and each strong word, with that patch or word removed. The words of a
patch show what the LLM receives, and this test shows what it uses. Letters as in model.py.
"""
import torch

import conversation
import model
from generate import generate

TESTED_WORDS = 16               # the strongest words of a picture
BATCH_TOKENS = 4096             # of one batch
CPU_OPERATIONS = 4e13           # of the whole test. A CPU needs minutes for so many


def ask(vlm, question, template, picture_size, pixels, patches, tile=0, mode=None):
    """Return the answer to a question as a string, and what it needs, None if that is not tested.

    picture_size: (width, height) in pixels. pixels float32[N, 3, S, S]: the picture, or its N
    tiles. patches float[1, P, Dv]: of the tile that is tested. mode: by weights, of an MLP None.
    What the answer needs: {"patches": float32[P], "words": [(word, nats)]}, see `lost_nats`.
    """
    messages = [{"role": "user", "content": f"<image>\n{question}"}]
    number = vlm.num_tokens(picture_size)
    prompt = conversation.encode_prompt(messages, vlm.tokenizer, [number], template)
    new_ids = generate(vlm, [prompt], pixels, max_new_tokens=64, picture_sizes=[picture_size])[0]
    answer = vlm.tokenizer.decode(new_ids, skip_special_tokens=True).strip()

    words = strongest_words(mode) if mode else []
    tokens = (len(prompt) + len(new_ids)) * (patches.shape[1] + len(words))
    operations = 2 * tokens * sum(parameter.numel() for parameter in vlm.llm.parameters())
    if not new_ids or vlm.llm.device.type == "cpu" and operations > CPU_OPERATIONS:
        print("note: what the answer needs is not tested:",
              "on a CPU it would take too long" if new_ids else "the answer is empty")
        return answer, None
    lost = lost_nats(vlm, prompt, new_ids, pixels, [picture_size], patches, tile, words)
    return answer, {"patches": lost[0], "words": list(zip(words, lost[1].tolist()))}


def strongest_words(mode):
    """Return the words whose weights have the largest sums over the patches that list them."""
    listed = torch.zeros_like(mode["values"]).scatter_(1, mode["top"], 1)           # (P, U)
    sums = (listed * mode["values"].abs()).sum(dim=0)
    return [mode["words"][i] for i in sums.argsort(descending=True)[:TESTED_WORDS].tolist()]


@torch.no_grad()
def lost_nats(vlm, prompt, answer, pixels, picture_sizes, patches, tile=0, words=()):
    """Return how much log-probability an answer loses without each patch, and without each word.

    prompt, answer: lists of ids; picture_sizes as for generate; the rest as for `ask`.
    -> float32[P] and float32[n] for n words, in nats; below 0 where the answer gains without it.
    A removed patch gets the mean image embed of the tile. If it lost its position, all later tokens
    would move. A removed word leaves the list of words for all patches of the tile.
    """
    ids = torch.tensor([prompt + answer[:-1]])
    embeds = vlm.splice(ids, pixels, picture_sizes=picture_sizes)       # (1, T, D)
    read, places = places_of_patches(vlm, ids, len(pixels), patches.shape[1], picture_sizes, tile)
    # A change is a pair: positions, and their new image embeds. The first one changes nothing.
    changes = [(places[:0], embeds[0, :0])]
    changes += [(place, embeds[0, places].mean(dim=0)) for place in places]
    changes += [(places, embeds_without(vlm, patches, word)[0, read]) for word in words]
    targets = torch.tensor(answer, device=embeds.device)
    at_once, logs = max(1, BATCH_TOKENS // ids.shape[1]), []
    for start in range(0, len(changes), at_once):
        chunk = changes[start:start + at_once]
        rows = embeds.repeat(len(chunk), 1, 1)                      # (R, T, D)
        for row, (place, new) in zip(rows, chunk):
            row[place] = new.to(row.dtype)
        hidden = vlm.llm.get_decoder()(inputs_embeds=rows, use_cache=False).last_hidden_state
        logs += [-vlm.token_loss(row, targets).item() for row in hidden[:, -len(answer):]]
    lost = logs[0] - torch.tensor(logs[1:])
    of_patches = torch.zeros(patches.shape[1]).index_copy(0, read, lost[:len(read)])
    return of_patches, lost[len(read):]


def places_of_patches(vlm, ids, num_tiles, P, picture_sizes, tile):
    """Return which patches of a tile the LLM reads, and their places in ids: two int64[n].

    The LLM does not read the patches that show only border. ids int64[1, T].
    """
    # arrange_images knows where image embeds go, so let it arrange numbers instead.
    first = 1e6                                 # newlines never hold such a number
    embed = vlm.llm.get_input_embeddings()
    numbers = torch.zeros(num_tiles, vlm.num_patches, embed.embedding_dim, device=vlm.llm.device)
    numbers[tile, -P:] = first + torch.arange(P, device=numbers.device)[:, None]
    numbers = torch.cat(vlm.arrange_images(numbers, picture_sizes))[:, 0].cpu()
    is_patch = numbers >= first                                     # (image positions,)
    places = (ids[0] == conversation.IMAGE_ID).nonzero()[:, 0]      # (image positions,)
    return (numbers[is_patch] - first).long(), places[is_patch]


def embeds_without(vlm, patches, word):
    """Return the image embeds if a word were not in the list: float[N, P, Dv] -> float[N, P, D]."""
    connector = vlm.connector
    kept = torch.arange(len(vlm.words), device=patches.device) != vlm.words.index(word)     # (K,)
    scores = connector.scores(patches)[..., kept] / connector.temperature       # (N, P, K - 1)
    return model.word_weights(scores, connector.normalize) @ connector.vocab_embeds[kept].float()
