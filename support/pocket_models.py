"""Train the models of the pocket world: two tokenizers, two LLMs that can read, a vision tower.

pocket.py calls `make_model`. Letters: B rows of a batch, T tokens, P patches, N phrases, Dv width
of the tower, V tokens of a tokenizer, D width of an LLM, S side of a picture for the tower.
"""
import itertools
import json
import os
import random
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
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import conversation
from common import read_json, write_json
from support.device import choose_dtype
from support.pictures import open_image, transform
from support.pocket_world import (COLORS, EASY_KINDS, REAL_SHAPES, SIZES, TRAIN_KINDS, WORDS,
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
        if (step + 1) % 20 == 0 or step + 1 == steps:
            print(f"{name:17} {step + 1:>4}/{steps}  loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def muon_step(matrices, means, lr, dtype):
    """Change the matrices by a step of torch.optim.Muon with adjust_lr_fn="match_rms_adamw".

    means: of the gradients, zeros at first. dtype: of the matrix products. torch's own Muon knows
    only bfloat16, which takes ten times as long as float32 on a CPU without such instructions.
    """
    for p, mean in zip(matrices, means):
        mean.lerp_(p.grad, 1 - 0.95)
        X = p.grad.lerp(mean, 0.95).to(dtype)
        is_tall = p.shape[0] > p.shape[1]
        X = X.T if is_tall else X
        X = X / X.norm().clamp(min=1e-7)
        # Newton-Schulz iterations lead to about the nearest orthogonal matrix. With these numbers,
        # those of Keller Jordan's Muon, five make the singular values 0.7 to 1.2.
        for _ in range(5):
            gram = X @ X.T
            polynomial = torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
            X = torch.addmm(X, polynomial, X, beta=3.4445)
        p.mul_(1 - lr * 0.01)               # weight decay
        p.add_(X.T if is_tall else X, alpha=-lr * 0.2 * max(p.shape) ** 0.5)


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
    """Return the tokenizer of one LLM, trained on lines of text.

    That of pocket-qwen is a byte-level BPE, as Qwen's. That of pocket-llama writes a space as "▁"
    and has tokens for single bytes, as Llama-2's.
    """
    lines = [" ".join(word for word in line.split(" ")
                      if not any(rare in word.lower() for rare in SPLIT[name])) for line in lines]
    if name == "pocket-qwen":
        tokenizer = tokenizers.Tokenizer(BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.train_from_iterator(lines, BpeTrainer(
            vocab_size=1100, min_frequency=2, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    else:
        tokenizer = tokenizers.Tokenizer(BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(tokenizers.Regex(r"\n+|[0-9]|[^\w\s]"), "isolated"),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")])
        tokenizer.decoder = decoders.Sequence([
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        tokenizer.train_from_iterator(lines, BpeTrainer(
            vocab_size=1000, min_frequency=12, show_progress=False))
        # The trainer makes no tokens for bytes, so put these 256 in front of what it has learnt.
        state = json.loads(tokenizer.to_str())
        learnt = state["model"]["vocab"]
        pieces = ["<unk>"] + [f"<0x{i:02X}>" for i in range(256)]
        pieces += sorted(learnt, key=learnt.get)
        state["model"]["vocab"] = {piece: i for i, piece in enumerate(pieces)}
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=2048, padding_side="right",
        clean_up_tokenization_spaces=False, **TOKENIZERS[name])


# --------------------------------------------------------------------------------------------------
# LLMs

def train_llm(name, folder, settings):
    """Write one LLM and its tokenizer into `folder`."""
    tokenizer = make_tokenizer(name, corpus(settings["seed"], settings["corpus"]))
    torch.manual_seed(settings["seed"])
    model = make_llm(name, tokenizer)
    steps = int(LLM_STEPS * settings["effort"]) + 1
    batches = text_batches(tokenizer, steps, random.Random(f"text {settings['seed']}"))
    # There are few different lengths, so that torch keeps less memory.
    pad = transformers.DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=16)

    def batch_loss():
        batch = pad(next(batches))                                      # ids and labels (B, T)
        output = model.model(input_ids=batch["input_ids"], use_cache=False)
        hidden, targets = output.last_hidden_state[:, :-1], batch["labels"][:, 1:]
        is_trained = targets != conversation.IGNORE                     # (B, T-1)
        logits = model.lm_head(hidden[is_trained]).float()
        return F.cross_entropy(logits, targets[is_trained])

    train_model(name, model, steps, batch_loss)
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def text_batches(tokenizer, steps, rng):
    """Yield one batch for each step: a list of rows of about the same length, see `encode`.

    The first third of the steps has easy questions about at most two objects. Chats come mostly
    near the end.
    """
    batches = []
    for step in range(steps):
        if not batches:
            most, chats, kinds = 3, 0.2 if step < 0.6 * steps else 0.7, TRAIN_KINDS
            if step < 0.35 * steps:
                most, chats, kinds = 2, 0.15, EASY_KINDS
            rows = [encode(*document(rng, most, chats, kinds), tokenizer)
                    for _ in range(8 * LLM_BATCH)]
            rows.sort(key=lambda row: len(row["input_ids"]))
            batches = [rows[i:i + LLM_BATCH] for i in range(0, len(rows), LLM_BATCH)]
            rng.shuffle(batches)
        yield batches.pop()


def encode(messages, template, tokenizer):
    """Return what `document` makes as a row: {"input_ids", "labels"}, two lists of equal length."""
    ids, labels = conversation.encode(messages, tokenizer, 0, template)
    if template == "prompted" and tokenizer.bos_token:      # chat templates write it themselves
        ids, labels = [tokenizer.bos_token_id, *ids], [conversation.IGNORE, *labels]
    return {"input_ids": ids, "labels": labels}


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
        # "red", " red" and "Red" start with similar embeddings, as training would make them.
        embeddings = model.model.embed_tokens.weight                # (V, D)
        stems = {}
        for i in range(len(tokenizer)):
            stems.setdefault(tokenizer.decode([i]).strip().lower(), []).append(i)
        # A word must not drown in what attention adds to it, so these are larger than usual.
        embeddings.normal_(0, 0.3)
        for ids in stems.values():
            embeddings[ids] += 0.4 * torch.randn(embeddings.shape[1])
        model.lm_head.weight.copy_(embeddings)
        model.model.norm.weight.fill_(0.2)  # without this the first logits would be too large
        for index, layer in enumerate(model.model.layers):
            initialize_attention(layer.self_attn, looks_back=index % 2 == 0)
    return model


def initialize_attention(attention, looks_back):
    """Start attention where training would lead only after minutes: find an equal word and copy it.

    Queries equal keys, so that equal words attend to each other. The output projection is the
    transpose of the values, so that what is found is copied (after Trockman and Kolter, "Mimetic
    initialization of self-attention layers", 2023). With `looks_back` three heads look one, two and
    three tokens back: the rotary embedding turns the constant queries and keys in their biases.
    """
    query, key = attention.q_proj, attention.k_proj
    query.weight.copy_(key.weight.mul_(4))
    nn.init.orthogonal_(attention.v_proj.weight)
    attention.o_proj.weight.copy_(0.4 * attention.v_proj.weight.T)
    half = attention.head_dim // 2
    turn = 10000.0 ** (-torch.arange(half) / half)      # the rotary embedding's radians a token
    strength = 4.0 * (turn > 0.05)                      # slow turns do not separate neighbours
    for back in (1, 2, 3) if looks_back else ():
        head = slice((back - 1) * attention.head_dim, back * attention.head_dim)
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
    out, S = Path(settings["out"]), TOWER["image_size"]
    truth = read_json(out / "truth.json")
    names = [name for name in truth if name.startswith("train")]
    images = (open_image(out / "images" / name) for name in names)
    pixels = torch.stack([transform(image, S, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
                          for image in images])
    # With another memory format the tower's first layer adds in another order.
    pixels = pixels.to(memory_format=torch.channels_last)           # (pictures, 3, S, S)
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
    write_json({"image_processor_type": "CLIPImageProcessor", "do_resize": True,
                "size": {"shortest_edge": S}, "resample": 3, "do_center_crop": True,
                "crop_size": {"height": S, "width": S}, "do_rescale": True,
                "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": OPENAI_CLIP_MEAN,
                "image_std": OPENAI_CLIP_STD, "do_convert_rgb": True},
               folder / "preprocessor_config.json")


def initialize_positions(tower):
    """Start the position embeddings at sines and cosines of row and column.

    MAE (He et al., 2022) fixes them so. From the library's small noise the tower would take long to
    tell left from right.
    """
    across = TOWER["image_size"] // TOWER["patch_size"]
    width = TOWER["hidden_size"] // 4
    angles = torch.arange(across)[:, None] * 10 ** (-torch.arange(width) / width)
    waves = torch.cat([angles.sin(), angles.cos()], 1)              # (across, Dv/2)
    rows, columns = waves.repeat_interleave(across, 0), waves.repeat(across, 1)     # (P, Dv/2)
    positions = next(p for name, p in tower.named_parameters()
                     if name.endswith("position_embedding.weight"))
    positions.data[1:] = 0.3 * torch.cat([rows, columns], 1)        # row 0 belongs to CLS


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


def altered(scene, rng):
    """Return the scene with one fact of one object changed, often the word of a sign."""
    things = [dict(t) for t in scene["objects"]]
    sign = sign_of({"objects": things})
    thing = sign if sign and rng.random() < 0.5 else rng.choice(things)
    facts = ("color", "shape", "shape", "cell", "cell", "size")
    fact = "word" if thing is sign else rng.choice(facts)
    values = {"word": WORDS, "color": COLORS, "shape": REAL_SHAPES, "size": SIZES, "cell": range(9)}
    thing[fact] = rng.choice([value for value in values[fact] if value != thing[fact]])
    return {"objects": things}


def phrases_of(caption, word_ids):
    """Return the phrases of a caption in style "keys": each a list of ids of words and word pairs.

    word_ids: {word or pair: id}. New ones are added.
    """
    caption = caption.replace("top left", "topleft").replace("top right", "topright")
    phrases = []
    for phrase in caption.split(", "):
        words = [word for word in phrase.split() if word not in ("at", "saying")]
        words += [f"{a} {b}" for a, b in itertools.combinations(words, 2)]
        phrases.append([word_ids.setdefault(word, len(word_ids)) for word in words])
    return phrases
