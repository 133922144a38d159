"""Train the models of the pocket world: two tokenizers, two LLMs that can read, a vision tower.

pocket.py calls `make_model`. Letters: B rows of a batch, T tokens, P patches, N phrases, Dv width
of the tower, V tokens of a tokenizer, D width of an LLM, S side of a picture for the tower.
"""
import json
import os
import random
import shutil
import time
from pathlib import Path

import tokenizers
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from common import read_json, write_json
from conversation import IGNORE
from conversation import encode as encode_chat
from support.device import choose_dtype
from support.pictures import open_image, transform
from support.pocket_world import (CELLS, COLORS, EASY_KINDS, REAL_SHAPES, SIZES, TRAIN_KINDS, WORDS,
                                  corpus, describe, document, sign_of)

# What each model's config in transformers takes.
LLMS = {"pocket-llama": {"model_type": "llama", "hidden_size": 144, "intermediate_size": 320,
                         "attention_bias": True, "tie_word_embeddings": False},
        "pocket-qwen": {"model_type": "qwen2", "hidden_size": 128, "intermediate_size": 288,
                        "tie_word_embeddings": True}}
TOWER = {"image_size": 96, "patch_size": 16, "hidden_size": 128, "num_hidden_layers": 4,
         "num_attention_heads": 4, "intermediate_size": 384}
LLM_STEPS = 620
TOWER_STEPS = 140
LLM_BATCH = 16                              # rows of text a step
TOWER_BATCH = 96                            # pictures a step
LEARNING_RATE = 5e-3
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def make_model(name, settings):
    """Make one model in a temporary folder and rename it when it is complete.

    name: of an LLM, or "vision-tower". pocket.py calls this in a process of its own.
    """
    torch.set_num_threads(1)                # models this small do not gain from a second thread
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    start = time.time()
    folder = Path(settings["out"]) / name
    unfinished = folder.with_name(name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    train = train_tower if name == "vision-tower" else train_llm
    train(name, unfinished, settings)
    os.replace(unfinished, folder)
    print(f"{name:17} done in {time.time() - start:.0f} s", flush=True)


def train_model(name, model, steps, batch_loss):
    """Train any of the models. batch_loss: function that returns the loss of the next batch.

    The learning rate warms up, stays, and falls to zero over the second half. Muon for the matrices
    inside the layers needs half as many steps here as AdamW for all.
    """
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "layers." not in n]
    dtype = getattr(torch, choose_dtype("auto", "cpu"))
    means = [torch.zeros_like(p) for p in matrices]
    adamw = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
    start = last = time.time()
    for step in range(steps):
        lr = LEARNING_RATE * min(1, (step + 1) / 20, 2 * (steps - step) / steps)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = batch_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon_step(matrices, means, lr, dtype)
        adamw.param_groups[0]["lr"] = lr
        adamw.step()
        model.zero_grad()
        if time.time() - last > 5 or step == steps - 1:
            last = time.time()
            eta = (last - start) / (step + 1) * (steps - step - 1)
            print(f"{name:17} {step + 1:>4}/{steps}  loss {loss.item():.3f}  eta {eta:.0f} s",
                  flush=True)


@torch.no_grad()
def muon_step(matrices, means, lr, dtype):
    """Change the matrices by a step of torch.optim.Muon with adjust_lr_fn="match_rms_adamw".

    means: of the gradients, zeros at first. dtype: of the matrix products. torch's own Muon knows
    only bfloat16, which takes ten times as long as float32 on a CPU without such instructions.
    """
    for p, mean in zip(matrices, means):
        mean.lerp_(p.grad, 1 - 0.95)
        update = orthogonal(p.grad.lerp(mean, 0.95).to(dtype))
        p.mul_(1 - lr * 0.01)               # weight decay
        p.add_(update, alpha=-lr * 0.2 * max(p.shape) ** 0.5)


def orthogonal(matrix):
    """Return about the nearest orthogonal matrix, by five Newton-Schulz iterations.

    Source: Keller Jordan's Muon, whose three numbers make the singular values 0.7 to 1.2.
    """
    X = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    X = X / X.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = X @ X.T
        X = torch.addmm(X, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), X, beta=3.4445)
    return X.T if matrix.shape[0] > matrix.shape[1] else X


# --------------------------------------------------------------------------------------------------
# tokenizers: two that share most words and nothing else

TOKENIZERS = {
    "pocket-qwen": {
        "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>"],
        "chat_template": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
                         "<|im_end|>\n{% endfor %}"
                         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"},
    "pocket-llama": {
        "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|pad|>",
        "additional_special_tokens": ["<|end_of_text|>", "<|start_header_id|>",
                                      "<|end_header_id|>"],
        "chat_template": "<|begin_of_text|>{% for m in messages %}<|start_header_id|>"
                         "{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>"
                         "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant"
                         "<|end_header_id|>\n\n{% endif %}"}}
# Words that a tokenizer has only in pieces, because it never saw them.
SPLIT = {"pocket-qwen": ("jazz",), "pocket-llama": ("pizza", "zoo")}


def make_tokenizer(name, lines):
    """Return the tokenizer of one LLM, trained on lines of text."""
    lines = [" ".join(word for word in line.split(" ")
                      if not any(rare in word.lower() for rare in SPLIT[name])) for line in lines]
    train = {"pocket-qwen": train_byte_level, "pocket-llama": train_byte_fallback}[name]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=train(lines), model_max_length=2048, padding_side="right",
        clean_up_tokenization_spaces=False, **TOKENIZERS[name])


def train_byte_level(lines):
    """Return a byte-level BPE, as Qwen's."""
    tokenizer = tokenizers.Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(lines, BpeTrainer(
        vocab_size=1100, min_frequency=2, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def train_byte_fallback(lines):
    """Return a BPE that writes a space as "▁" and has tokens for single bytes, as Llama-2's."""
    tokenizer = tokenizers.Tokenizer(BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(r"\n+|[0-9]|[^\w\s]"), "isolated"),
        pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.train_from_iterator(lines, BpeTrainer(
        vocab_size=1000, min_frequency=12, show_progress=False))
    # The trainer does not make tokens for bytes, so put these 256 in front of what it has learnt.
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    learnt = sorted(vocabulary, key=vocabulary.get)
    pieces = ["<unk>"] + [f"<0x{i:02X}>" for i in range(256)] + learnt
    state["model"]["vocab"] = {piece: i for i, piece in enumerate(pieces)}
    return tokenizers.Tokenizer.from_str(json.dumps(state))


# --------------------------------------------------------------------------------------------------
# LLMs

def train_llm(name, folder, settings):
    """Write one LLM and its tokenizer into `folder`."""
    tokenizer = make_tokenizer(name, corpus(settings["seed"], settings["corpus"]))
    torch.manual_seed(settings["seed"])
    model = make_llm(name, tokenizer)
    steps = int(LLM_STEPS * settings["effort"]) + 1
    batches = text_batches(tokenizer, steps, random.Random(f"text {settings['seed']}"))

    def batch_loss():
        ids, labels = pad_batch(next(batches), tokenizer.pad_token_id)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        targets = labels[:, 1:]                                     # (B, T-1)
        is_trained = targets != IGNORE
        logits = model.lm_head(hidden[is_trained]).float()
        return F.cross_entropy(logits, targets[is_trained])

    train_model(name, model, steps, batch_loss)
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def text_batches(tokenizer, steps, rng):
    """Yield one batch for each step: a list of rows (ids, labels) of about the same length.

    The first third of the steps has easy questions about at most two objects. Chats come mostly
    near the end.
    """
    batches = []
    for step in range(steps):
        if not batches:
            is_easy = step < 0.35 * steps
            chats = 0.15 if is_easy else 0.2 if step < 0.6 * steps else 0.7
            most, kinds = (2, EASY_KINDS) if is_easy else (3, TRAIN_KINDS)
            rows = [encode(document(rng, most, chats, kinds), tokenizer)
                    for _ in range(8 * LLM_BATCH)]
            rows.sort(key=lambda row: len(row[0]))
            batches = [rows[i:i + LLM_BATCH] for i in range(0, len(rows), LLM_BATCH)]
            rng.shuffle(batches)
        yield batches.pop()


def encode(text, tokenizer):
    """Return (ids, labels) of what `document` makes: two lists of equal length."""
    if isinstance(text[0], dict):
        return encode_chat(text, tokenizer, num_patches=0)
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    labels = [IGNORE] * len(ids)
    for piece, is_trained in text:
        new = tokenizer.encode(piece, add_special_tokens=False)
        ids += new
        labels += new if is_trained else [IGNORE] * len(new)
    return ids, labels


def pad_batch(rows, pad_id):
    """Return rows (ids, labels), padded on the right: ids int64[B, T], labels int64[B, T]."""
    longest = max(len(ids) for ids, _ in rows)
    T = -(-longest // 16) * 16              # few different lengths, so that torch keeps less memory
    ids = [ids + [pad_id] * (T - len(ids)) for ids, _ in rows]
    labels = [labels + [IGNORE] * (T - len(labels)) for _, labels in rows]
    return torch.tensor(ids), torch.tensor(labels)


def make_llm(name, tokenizer):
    """Return an untrained LLM: a Qwen2 with tied embeddings, or a Llama with untied ones."""
    config = transformers.AutoConfig.for_model(
        **LLMS[name], num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=len(tokenizer), max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    # "eager" is twice as fast as "sdpa" for short rows on a CPU.
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        initialize_embeddings(model, tokenizer)
        for index, layer in enumerate(model.model.layers):
            initialize_attention(layer.self_attn, index)
    return model


def initialize_embeddings(model, tokenizer):
    """Start "red", " red" and "Red" with similar embeddings, as training would make them."""
    embeddings = model.model.embed_tokens.weight                    # (V, D)
    stems = {}
    for i in range(len(tokenizer)):
        stems.setdefault(tokenizer.decode([i]).strip().lower(), []).append(i)
    # A word must not drown in what attention adds to it, so these are larger than usual.
    embeddings.normal_(0, 0.3)
    for ids in stems.values():
        embeddings[ids] += 0.4 * torch.randn(embeddings.shape[1])
    model.lm_head.weight.copy_(embeddings)
    model.model.norm.weight.fill_(0.2)      # without this the first logits would be too large


def initialize_attention(attention, layer_index):
    """Start attention where training would lead only after minutes: find an equal word and copy it.

    Queries equal keys, so that equal words attend to each other. The output projection is the
    transpose of the values, so that what is found is copied (after Trockman and Kolter, "Mimetic
    initialization of self-attention layers", 2023). In every second layer three heads look one, two
    and three tokens back: the rotary embedding turns the constant queries and keys in their biases.
    """
    head_size = attention.head_dim
    half = head_size // 2
    turn = 10000.0 ** (-torch.arange(half) / half)      # the rotary embedding's radians a token
    strength = 4.0 * (turn > 0.05)                      # slow turns do not separate neighbours
    query, key = attention.q_proj, attention.k_proj
    query.weight.copy_(key.weight.mul_(4))
    nn.init.orthogonal_(attention.v_proj.weight)
    attention.o_proj.weight.copy_(0.4 * attention.v_proj.weight.T)
    if layer_index % 2 == 1:
        return
    for back in (1, 2, 3):
        head = slice((back - 1) * head_size, back * head_size)
        query.weight[head] *= 0.1
        key.weight[head] *= 0.1
        angle = back * turn
        query.bias[head] = torch.cat([strength * angle.cos(), -strength * angle.sin()])
        key.bias[head] = torch.cat([strength, 0 * strength])


# --------------------------------------------------------------------------------------------------
# vision tower

def train_tower(name, folder, settings):
    """Write the vision tower into `folder`. It is trained to match pictures and captions.

    Beside the other captions of the batch, a picture must reject captions with one fact changed
    (after NegCLIP, Yuksekgonul et al., 2022). Without these, colour and shape would be enough, and
    the tower would never learn to see written words. The text side is not kept.
    """
    out = Path(settings["out"])
    truth = read_json(out / "truth.json")
    names = [name for name in truth if name.startswith("train")]
    pixels = load_pixels(out, names)                                # (pictures, 3, S, S)
    torch.manual_seed(settings["seed"])
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER))
    initialize_positions(tower)
    dim = 128                               # of the space in which pictures and captions meet
    model = nn.ModuleDict({"tower": tower, "text": nn.EmbeddingBag(6000, dim, mode="sum"),
                           "patches": nn.Linear(TOWER["hidden_size"], dim),
                           "image": nn.Linear(TOWER["hidden_size"], dim)})
    model.register_parameter("scale", nn.Parameter(torch.tensor(2.5)))
    rng = random.Random(f"tower {settings['seed']}")
    size = min(TOWER_BATCH, len(names))
    order, word_ids = [], {}

    def batch_loss():
        if len(order) < size:
            order[:] = rng.sample(range(len(names)), len(names))
        picked = [order.pop() for _ in range(size)]
        scenes = [truth[names[i]] for i in picked]
        scenes += [altered(scene, rng) for scene in scenes]
        captions = [phrases_of(describe(scene, rng, "keys"), word_ids) for scene in scenes]
        return contrastive_loss(model, pixels[picked], captions)

    train_model(name, model, int(TOWER_STEPS * settings["effort"]) + 1, batch_loss)
    tower.eval()
    tower.save_pretrained(folder)
    S = TOWER["image_size"]
    write_json({"image_processor_type": "CLIPImageProcessor", "do_resize": True,
                "size": {"shortest_edge": S}, "resample": 3, "do_center_crop": True,
                "crop_size": {"height": S, "width": S}, "do_rescale": True,
                "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": CLIP_MEAN,
                "image_std": CLIP_STD, "do_convert_rgb": True},
               folder / "preprocessor_config.json")


def contrastive_loss(model, pixels, captions):
    """Return the loss of B pictures against 2 B captions, of which the first B are the right ones.

    pixels float32[B, 3, S, S]; captions: 2 B lists of phrases, which are lists of ids, N phrases in
    all. The similarity of a picture and a caption is a mean over the caption's phrases of the most
    similar patch (after FILIP, Yao et al., 2021), plus that of CLS and the caption's mean phrase.
    """
    B = len(pixels)
    phrases = [torch.tensor(phrase) for caption in captions for phrase in caption]
    owner = torch.tensor([n for n, caption in enumerate(captions) for _ in caption])        # (N,)
    offsets = torch.tensor([0] + [len(phrase) for phrase in phrases[:-1]]).cumsum(0)
    # phrases (N, dim), patches (B, P, dim), image (B, dim), all of length 1
    phrases = F.normalize(model["text"](torch.cat(phrases), offsets).float(), dim=-1)
    seen = model["tower"](pixel_values=pixels)
    patches = F.normalize(model["patches"](seen.last_hidden_state[:, 1:]).float(), dim=-1)
    image = F.normalize(model["image"](seen.pooler_output).float(), dim=-1)
    best = (patches @ phrases.T).amax(1)                                    # (B, P, N) -> (B, N)
    mean = F.one_hot(owner, 2 * B).float()
    mean = mean / mean.sum(0)                                               # (N, 2B)
    captions = F.normalize(mean.T @ phrases, dim=-1)                        # (2B, dim)
    similarity = best @ mean + image @ captions.T                           # (B, 2B)
    logits = model.scale.exp() * similarity / 2
    target = torch.arange(B)
    # Each picture chooses among all captions, each right caption among the pictures.
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :B].T, target)) / 2


def load_pixels(out, names):
    """Return pictures as the tower takes them: float32[N, 3, S, S]."""
    S = TOWER["image_size"]
    pixels = [transform(open_image(out / "images" / name), S, CLIP_MEAN, CLIP_STD)
              for name in names]
    # With another memory format the tower's first layer adds in another order.
    return torch.stack(pixels).to(memory_format=torch.channels_last)


def altered(scene, rng):
    """Return the scene with one fact of one object changed, often the word of a sign."""
    things = [dict(t) for t in scene["objects"]]
    sign = sign_of({"objects": things})
    thing = sign if sign and rng.random() < 0.5 else rng.choice(things)
    facts = ("color", "shape", "shape", "cell", "cell", "size")
    fact = "word" if thing is sign else rng.choice(facts)
    values = {"word": WORDS, "color": COLORS, "shape": REAL_SHAPES, "size": SIZES,
              "cell": range(len(CELLS))}[fact]
    thing[fact] = rng.choice([value for value in values if value != thing[fact]])
    return {"objects": things}


def phrases_of(caption, word_ids):
    """Return the phrases of a caption in style "keys": each a list of ids of words and word pairs.

    word_ids: {word or pair: id}. New ones are added.
    """
    caption = caption.replace("top left", "topleft").replace("top right", "topright")
    phrases = []
    for phrase in caption.split(", "):
        words = [word for word in phrase.split() if word not in ("at", "saying")]
        words += [f"{a} {b}" for i, a in enumerate(words) for b in words[i + 1:]]
        phrases.append([word_ids.setdefault(word, len(word_ids)) for word in words])
    return phrases


def initialize_positions(tower):
    """Start the position embeddings at sines and cosines of row and column.

    MAE (He et al., 2022) fixes them so. From the library's small noise the tower would take long to
    tell left from right.
    """
    across = TOWER["image_size"] // TOWER["patch_size"]
    width = TOWER["hidden_size"] // 4
    angles = torch.arange(across)[:, None] * 10 ** (-torch.arange(width) / width)
    waves = torch.cat([angles.sin(), angles.cos()], 1)              # (across, Dv/2)
    rows = waves.repeat_interleave(across, 0)                       # (P, Dv/2)
    columns = waves.repeat(across, 1)                               # (P, Dv/2)
    positions = next(p for name, p in tower.named_parameters()
                     if name.endswith("position_embedding.weight"))
    with torch.no_grad():
        positions[1:] = 0.3 * torch.cat([rows, columns], 1)         # row 0 belongs to CLS
