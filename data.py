"""
Conversations and pictures: one record of a LLaVA-format JSON file to ids, labels and image tensors.

    record --messages_of--> messages, image names --encode--> ids, labels (born together) --collate--> batch

Letters: T tokens, P patches of an image, B samples of a batch, N images of a batch, S side of a square image in pixels.
An image is P times IMAGE_ID, an id that no text can produce. Labels are IGNORE wherever nothing is learned.

    python data.py --check DATA.json --images DIR [--tokenizer NAME --num_patches P]     # missing, broken, untrainable
"""
import argparse
import functools
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps

import common
import vocab
# torch is imported where it is used, so that --help does not wait for it

IMAGE = "<image>"
IMAGE_ID = -200                              # LLaVA's image slot, here once for each patch
IGNORE = -100                                # what cross_entropy ignores
MAX_PIXELS = 2 * 89_478_485                  # where Pillow calls a picture a bomb, and the most that transform makes
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")     # not EPS: for that Pillow starts Ghostscript
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class BadSample(ValueError):
    """A record that cannot be used. kind, what --check counts: malformed, missing image, broken image, untrainable."""

    def __init__(self, kind, sentence):
        super().__init__(sentence)
        self.kind = kind


# ----------------------------------------------------------------------------------------------------------------------
# text

# What stands before and after the content of a turn where no chat template is used. "chat" is for a tokenizer without a
# chat template, EOS follows each answer; "plain" is LLaVA's stage 1, which throws the words of the human turn away.
OPEN_CLOSE = {
    "chat": {"system": ("", "\n"), "user": ("USER:\n", "\n"), "assistant": ("ASSISTANT:\n", "")},
    "prompted": {"system": ("", "\n"), "user": ("", "\n"), "assistant": ("", "\n")},
    "plain": {"system": ("", ""), "user": ("", ""), "assistant": ("", "\n")},
}


def encode(messages, tokenizer, num_patches, template="chat", mask="answers"):
    """
    One conversation -> (ids, labels), two lists of T ints, made together.

    messages: [{"role": "system"|"user"|"assistant", "content": str}, ...]. Each "<image>" in a user's content becomes
        P = num_patches times IMAGE_ID. Control tokens come from the template alone: "<|im_end|>" in a content is text.
    template: "chat" is the tokenizer's own, or USER:/ASSISTANT: lines where it has none; "plain" is image, caption,
        newline; "prompted" is the prompt in words with its image, newline, caption, newline.
    mask: "answers" trains each answer up to the token that ends its turn. "official" is what LangBridge's released code
        trains for Qwen: also the header of the assistant, and each <|im_start|>, <|im_end|> and lone newline anywhere.
    Raises ValueError for turns that the template refuses, and for an image in an answer.
    """
    ids, trained, starts = _build(messages, tokenizer, num_patches, template)
    if mask == "official":
        trained = _official(ids, trained, starts, tokenizer)
    elif mask != "answers":
        raise ValueError(f"mask is 'answers' or 'official', not {mask!r}")
    return ids, [i if t else IGNORE for i, t in zip(ids, trained)]


def encode_prompt(messages, tokenizer, num_patches, template="chat"):
    """Messages up to a user's turn -> ids up to where the model begins to speak: what encode has before that answer."""
    messages = messages + [{"role": "assistant", "content": ""}]
    return _build(messages, tokenizer, num_patches, template, prompt=True)[0]


def _build(messages, tokenizer, num_patches, template, prompt=False):
    """-> ids; trained, a bool for each id; starts, where in ids each answer begins. prompt: stop at the last answer."""
    gaps, trims = _skeleton(tokenizer, str(tokenizer.chat_template), template, tuple(m["role"] for m in messages))
    encoders, (_, eats_left, eats_right) = _encoders(tokenizer), _control(tokenizer)
    ids, trained, starts = [], [], []
    text, learn, before = "", False, "start"            # what is not yet tokenised; is it trained; what it follows

    def flush():
        nonlocal text, before
        text = text.lstrip() if before == "special" and ids[-1] in eats_right else text
        if text:
            where = "start" if learn and before == "image" else before  # plain: the caption is a text of its own
            new = encoders[where].encode(text, add_special_tokens=False).ids
            ids.extend(new)
            trained.extend([learn] * len(new))
            text, before = "", "text"

    for i, gap in enumerate(gaps):
        for part in gap:
            if isinstance(part, str):
                text += part
                continue
            text = text.rstrip() if part in eats_left else text
            flush()
            ids.append(part)
            trained.append(learn)
            learn, before = False, "special"            # the first control token after an answer ends the turn
        if i == len(messages):
            break
        role, content, (left, right) = messages[i]["role"], messages[i]["content"], trims[i]
        content = content if left == "" else content.lstrip(left)
        content = content if right == "" else content.rstrip(right)
        if role == "assistant" or learn:
            flush()                                     # as in generation, where the prompt is tokenised alone
        learn = role == "assistant"
        if learn:
            starts.append(len(ids))
            if prompt and i == len(messages) - 1:
                break
        if IMAGE in content and role != "user":
            raise ValueError(f"turn {i} is the {role}'s and holds '{IMAGE}'; only a user's turn can")
        pieces = content.split(IMAGE)
        if template == "plain" and role == "user":
            pieces = [""] * len(pieces)
        text += pieces[0]
        for piece in pieces[1:]:
            flush()
            ids.extend([IMAGE_ID] * num_patches)
            trained.extend([False] * num_patches)
            text, before = piece, "image"
    flush()
    return ids, trained, starts


@functools.lru_cache(maxsize=4096)                      # rendering takes a millisecond; many records share their roles
def _skeleton(tokenizer, chat_template, template, roles):
    """
    What is not content, for a sequence of n roles. chat_template is there for the cache.

    -> gaps, n + 1 lists of str (template text) and int (control tokens): gaps[i] before content i, gaps[n] at the end;
       trims, n pairs of the characters that the template strips off a content, left and right: "" none, None all space
    """
    if template not in OPEN_CLOSE:
        raise ValueError(f"template is one of {', '.join(OPEN_CLOSE)}, not {template!r}")
    if template == "plain" and roles != ("user", "assistant"):
        raise ValueError(f"template 'plain' needs one human turn and one answer, not {', '.join(roles)}")
    if template == "chat" and tokenizer.chat_template:
        texts, trims = _render(tokenizer, roles)
    else:
        bos = tokenizer.bos_token if tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else ""
        turns = [OPEN_CLOSE[template][role] for role in roles]
        texts = [close + open_ for close, open_ in zip([bos] + [c for _, c in turns], [o for o, _ in turns] + [""])]
        trims = [("", "")] * len(roles)
    by_name = _control(tokenizer)[0]
    pattern = "(" + "|".join(map(re.escape, sorted(by_name, key=len, reverse=True))) + ")"  # the longest name first
    pieces = [re.split(pattern, text) if by_name else [text] for text in texts]
    gaps = [[by_name.get(part, part) for part in piece if part] for piece in pieces]

    # An early Llama-3 template opens one more assistant turn after the last answer, asked or not. Cut that off.
    before, last = gaps[-2:] if roles[-1:] == ("assistant",) else ([], [])
    at, end = ([i for i, part in enumerate(parts) if isinstance(part, int)] for parts in (before, last))
    if at and len(end) > 1 and last[end[-1]] == before[at[-1]] and str(last[-1]).strip() == str(before[-1]).strip():
        gaps[-1] = last[:end[1]]

    # An answer that no control token ends gets EOS: without one the model would never learn to stop.
    for role, gap in zip(roles, gaps[1:]):
        if template == "chat" and role == "assistant" and not any(isinstance(part, int) for part in gap):
            if tokenizer.eos_token_id is None:
                raise ValueError("the tokenizer has no end-of-sequence token, so that no answer could end")
            gap.insert(0, tokenizer.eos_token_id)
    return gaps, trims


def _render(tokenizer, roles):
    """The chat template with a sentinel for each content -> the n + 1 texts around the sentinels, and the n trims."""
    names = [f"Zq{i}qZ" for i in range(len(roles))]

    def around(left, right):
        messages = [{"role": role, "content": left + name + right} for role, name in zip(roles, names)]
        try:
            rest = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        except Exception as error:                      # the template is somebody's program: it may raise anything
            raise ValueError(f"the chat template refuses the turns {', '.join(roles)}: {error}") from None
        texts = []
        for name in names:
            if rest.count(name) != 1:
                raise ValueError(f"the chat template drops, repeats, alters or moves a turn of {', '.join(roles)}")
            text, rest = rest.split(name)
            texts.append(text)
        return texts + [rest]

    # Once more with white space around each content: the template strips nothing, newlines, or everything.
    lefts, rights = {"\n\t": "", "\t": "\n", "": None}, {"\t\n": "", "\t": "\n", "": None}
    bare, padded = around("", ""), around("\n\t", "\t\n")
    fits = []                                           # for each text: what survives of the space before and after it
    for i, (text, seen) in enumerate(zip(bare, padded)):
        befores, afters = list(rights) if i > 0 else [""], list(lefts) if i < len(roles) else [""]
        fits += [(b, a) for b in befores for a in afters if b + text + a == seen][:1]
        if len(fits) != i + 1:
            raise ValueError(f"the chat template changes the space around a turn of {', '.join(roles)}")
    return bare, [(lefts[fits[i][1]], rights[fits[i + 1][0]]) for i in range(len(roles))]


@functools.lru_cache(maxsize=16)
def _control(tokenizer):
    """-> {name: id} of the control tokens, and the sets of those that swallow the space to their left and right."""
    control = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ({token.content: i for i, token in control.items()}, {i for i, token in control.items() if token.lstrip},
            {i for i, token in control.items() if token.rstrip})


@functools.lru_cache(maxsize=16)
def _encoders(tokenizer):
    """
    tokenizers.Tokenizer by what a text follows: "start" (nothing), "special" (a control token), "image", "text".

    None makes a control token out of text. They differ for SentencePiece, which puts a space ("▁") before each text
    or before the first one. In the middle of a text that would be a space that nobody wrote.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer; one with a tokenizer.json is needed")
    from tokenizers import Tokenizer

    def without_prefix(node):
        if isinstance(node, list):
            return [without_prefix(child) for child in node if child != prepend]
        if isinstance(node, dict):
            return {key: {"add_prefix_space": False, "prepend_scheme": "never"}.get(key, without_prefix(child))
                    for key, child in node.items()}
        return node

    def make(spec):
        encoder = Tokenizer.from_str(json.dumps(spec))
        encoder.encode_special_tokens = True            # <|im_end|> in a text stays text
        return encoder

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec |= {"post_processor": None, "truncation": None, "padding": None}
    parts, prepend = [spec["normalizer"], spec["pre_tokenizer"]], {"type": "Prepend", "prepend": "▁"}
    always = any(sign in json.dumps(parts) for sign in ('"Prepend"', '"add_prefix_space": true', '"always"'))
    natural = make(spec)
    spec["normalizer"], spec["pre_tokenizer"] = [None if p == prepend else without_prefix(p) for p in parts]
    bare = make(spec)
    return {"start": natural, "special": natural if always else bare, "image": bare, "text": bare}


def _official(ids, trained, starts, tokenizer):
    """The released code's mask for ChatML: answers with their headers, markers and lone newlines of every turn."""
    names, newline = _control(tokenizer)[0], _encoders(tokenizer)["text"].encode("\n", add_special_tokens=False).ids
    im_start, im_end = names.get("<|im_start|>"), names.get("<|im_end|>")
    if im_start is None or im_end is None or len(newline) != 1 or not all(im_start in ids[:s] for s in starts):
        raise ValueError("mask 'official' exists for ChatML templates (Qwen) alone; use mask 'answers'")
    trained = [t or i in (im_start, im_end, newline[0]) for i, t in zip(ids, trained)]
    for start in starts:
        header = max(i for i in range(start) if ids[i] == im_start)
        trained[header:start] = [True] * (start - header)
    return trained


def show(ids, labels, tokenizer):
    """One sample as text for a terminal: trained tokens green, the others dim, an image as [image x P]."""
    runs = []                                           # (colour, ids): a character can take several tokens
    for i, label in zip(map(int, ids), map(int, labels)):
        kind = "image" if i == IMAGE_ID else "2" if label == IGNORE else "32"
        if not runs or runs[-1][0] != kind:
            runs.append((kind, []))
        runs[-1][1].append(i)
    texts = [f"[image x {len(run)}]" if kind == "image" else tokenizer.decode(run, clean_up_tokenization_spaces=False)
             for kind, run in runs]
    return "".join(f"\033[{kind.replace('image', '2')}m" + text.replace("\033", "␛") + "\033[0m"
                   for (kind, _), text in zip(runs, texts))


# ----------------------------------------------------------------------------------------------------------------------
# pictures

def inside(folder, name):
    """The real path of a file name in the folder: no absolute path, no "..", no link that leads out. Raises BadSample."""
    try:
        path, root = os.path.realpath(os.path.join(folder, name)), os.path.realpath(folder)
    except (ValueError, OSError) as error:              # a null byte; a loop of links
        raise BadSample("malformed", f"image {name!r} is not a file name: {error}") from None
    if os.path.isabs(name) or os.path.commonpath([path, root]) != root:
        raise BadSample("malformed", f"image {name!r} is not inside the image folder {folder}")
    return path


def image_path(folder, name):
    """The file of an image name, inside the folder and there. Raises BadSample."""
    path = inside(folder, name)
    if not os.path.isfile(path):
        raise BadSample("missing image", f"image {os.path.join(folder, name)!r} does not exist")
    return path


def open_image(path):
    """
    A picture file -> PIL image, RGB, upright by its EXIF. Raises BadSample, naming the file, if it is not a whole picture.

    Of an animation the first frame. Transparency is dropped as in LLaVA (PIL's convert), not blended.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):              # 16-bit grey: PIL's convert makes all above 255 white
                image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:                          # on broken bytes PIL's readers raise nearly anything
        raise BadSample("broken image", f"image {str(path)!r} cannot be read: {error}") from None


def transform(image, size, mean, std, mode="pad"):
    """
    PIL RGB -> float32[3, S, S], S = size, normalised. Bicubic, the same numbers as transformers' CLIPImageProcessor.

    mode: "crop" takes the short edge to S and cuts out the middle (LLaVA's stage 1: wide pictures lose their sides);
        "pad" centres on a square of the mean colour first (LLaVA's stage 2, evaluation); "squash" changes the aspect.
    """
    import torch

    w, h = image.size
    short, long = min(w, h), max(w, h)
    needed = {"crop": size * size * long // short, "pad": long * long, "squash": size * size}
    if mode not in needed:
        raise ValueError(f"image mode is one of {', '.join(needed)}, not {mode!r}")
    if needed[mode] > MAX_PIXELS:
        raise BadSample("broken image", f"{w} x {h} is too thin for mode {mode!r}: it would need {needed[mode]:,} pixels")
    if mode == "pad":
        canvas = Image.new("RGB", (long, long), tuple(int(m * 255) for m in mean))
        canvas.paste(image, ((long - w) // 2, (long - h) // 2))
        image = canvas
    if mode == "crop":
        w, h = (size, int(size * long / short)) if w <= h else (int(size * long / short), size)
        left, top = (w - size) // 2, (h - size) // 2
        image = image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    else:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    x = np.asarray(image, dtype=np.float32) / 255                           # (S, S, 3)
    x = (x - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(x.transpose(2, 0, 1).copy())                    # (3, S, S)


# ----------------------------------------------------------------------------------------------------------------------
# records, samples, batches

def messages_of(record, image_first=True):
    """
    A LLaVA record -> (messages for encode, list of its image names). Raises BadSample.

    "image" is a name or a list of names, in the order of the "<image>" in the human turns. As many of these as images;
    where there is none they go before the first human turn. One image, and image_first: "<image>" moves to the front of
    its turn, newline after it, as LLaVA does. Several images stay where they stand.
    """
    turns, names = record.get("conversations"), record.get("image")
    names = [] if names is None else [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise BadSample("malformed", "'image' is neither a file name nor a list of file names")
    if not isinstance(turns, list) or not turns:
        raise BadSample("malformed", "'conversations' is missing or empty")
    messages, expected = [], ("user", "system")
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("from", "value")):
            raise BadSample("malformed", f"turn {i} lacks a text under 'from' or 'value'")
        role, content = ROLES.get(turn["from"]), turn["value"]
        if role not in expected:
            raise BadSample("malformed", f"turn {i} is from {turn['from'][:40]!r}; human and gpt must alternate, human first")
        expected = ("assistant",) if role == "user" else ("user",)
        if not content.strip():
            raise BadSample("malformed", f"turn {i} is empty")
        if vocab.HALF_CHARACTER.search(content):
            raise BadSample("malformed", f"turn {i} holds half a character (a lone surrogate)")
        if role != "user" and IMAGE in content:
            raise BadSample("malformed", f"turn {i} is from {turn['from']!r} and holds '{IMAGE}'; only a human turn can")
        messages.append({"role": role, "content": content})
    count = sum(m["content"].count(IMAGE) for m in messages)
    users = [m for m in messages if m["role"] == "user"]
    if names and users and count == 0:
        users[0]["content"] = (IMAGE + "\n") * len(names) + users[0]["content"]
    elif count != len(names):
        raise BadSample("malformed", f"{len(names)} image(s) but {count} '{IMAGE}' in the human turns")
    elif count == 1 and image_first:
        user = next(m for m in users if IMAGE in m["content"])
        user["content"] = (IMAGE + "\n" + user["content"].replace(IMAGE, "").strip()).strip()
    return messages, names


class Conversations:
    """
    Map-style dataset over LLaVA-format JSON files, several read as one.

    image: {"size", "mean", "std"[, "mode"]} for transform. max_length: T is cut to it, from the right; None keeps all.
    [i] -> {"id": str, "input_ids": int64[T], "labels": int64[T], "images": float32[n, 3, S, S]}, or the BadSample that names
    file, record and id: what to do about it is train.py's to say. Never another record in its place.
    """

    def __init__(self, paths, image_folder, tokenizer, num_patches, image, template="chat", mask="answers",
                 max_length=2048):
        self.image_folder, self.image, self.max_length = str(image_folder), image, max_length
        self.tokenizer, self.num_patches, self.template, self.mask = tokenizer, num_patches, template, mask
        self.records, self.names = [], []
        for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
            records = list(vocab.read_records(path))
            self.records += records
            self.names += [f"{path}: record {i} (id {str(r.get('id'))[:60]!r})" for i, r in enumerate(records)]
        self.lengths = [_words(r) * (1 if r.get("image") else -1) for r in self.records]
        if tokenizer:                                   # a template or mask that cannot work is no bad record: fail now
            encode([{"role": "user", "content": IMAGE}, {"role": "assistant", "content": "a"}],
                   tokenizer, num_patches, template, mask)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        try:
            return self.sample(i)
        except BadSample as error:        # returned: a loader's process would raise it with a traceback in its text
            return error

    def sample(self, i):
        """Sample i. Raises BadSample. Without a tokenizer its ids and labels are empty."""
        import torch

        try:
            messages, names = messages_of(self.records[i], image_first=self.template == "chat")
            ids, labels = self.encode(messages) if self.tokenizer else ([], [])
            images = [transform(open_image(image_path(self.image_folder, name)), **self.image) for name in names]
        except ValueError as error:
            raise BadSample(getattr(error, "kind", "untrainable"), f"{self.names[i]}: {error}") from None
        size = self.image["size"]
        return {"id": str(self.records[i].get("id", i)), "input_ids": torch.tensor(ids, dtype=torch.int64),
                "labels": torch.tensor(labels, dtype=torch.int64),
                "images": torch.stack(images) if images else torch.zeros(0, 3, size, size)}

    def encode(self, messages):
        """Messages -> (ids, labels), at most max_length of them. Raises ValueError if nothing is left to train."""
        ids, labels = encode(messages, self.tokenizer, self.num_patches, self.template, self.mask)
        T = self.max_length or len(ids)
        if IMAGE_ID in ids[T:]:
            raise ValueError(f"an image does not fit into the first {T} of {len(ids)} tokens")
        if all(label == IGNORE for label in labels[1:T]):               # nothing predicts the first token
            raise ValueError(f"no trained token among the first {T} of {len(ids)}")
        return ids[:T], labels[:T]


def _words(record):
    """Words in all turns, at least 1: group_by_modality_length's measure of a record."""
    try:
        return max(1, sum(len(turn["value"].split()) for turn in record["conversations"]))
    except (KeyError, TypeError, AttributeError):
        return 1                                        # malformed: said when it is used


def collate(samples, pad_id):
    """
    Samples -> batch, padded on the right. Padding is told by lengths, never by values ("!" is id 0 for Qwen).

    {"ids": [str], "input_ids", "labels", "attention_mask", "position_ids": int64[B, T],
     "pixel_values": float32[N, 3, S, S], "bad": [str]}
    Images are in the order of their places in input_ids. A BadSample among the samples is left out, its sentence is in "bad".
    """
    import torch

    kept = [s for s in samples if not isinstance(s, BadSample)]
    B, T = len(kept), max([len(s["input_ids"]) for s in kept], default=0)
    ids, labels = torch.full((B, T), pad_id), torch.full((B, T), IGNORE)                    # (B, T)
    attention = torch.zeros(B, T, dtype=torch.int64)                                        # (B, T)
    for b, s in enumerate(kept):
        n = len(s["input_ids"])
        ids[b, :n], labels[b, :n], attention[b, :n] = s["input_ids"], s["labels"], 1
    images = torch.cat([s["images"] for s in kept]) if kept else torch.zeros(0, 3, 0, 0)    # (N, 3, S, S)
    return {"ids": [s["id"] for s in kept], "input_ids": ids, "labels": labels, "attention_mask": attention,
            "position_ids": torch.arange(T).repeat(B, 1), "pixel_values": images,
            "bad": [str(s) for s in samples if isinstance(s, BadSample)]}


def without_images(batch):
    """
    The batch without its images: hidden from attention, positions closed up. As many tokens are trained as before.

    Where an image opens the row (plain without BOS) its last patch predicts the first word, so that patch stays. It
    shows nothing, for the pictures are grey.
    """
    hidden = batch["input_ids"] == IMAGE_ID                                                 # (B, T)
    front = hidden.cumprod(1).bool()
    seen = batch["attention_mask"] * (~hidden | front & ~front.roll(-1, 1))
    return batch | {"attention_mask": seen, "position_ids": (seen.cumsum(1) - 1).clamp(min=0),
                    "pixel_values": batch["pixel_values"] * 0}


def global_batches(dataset, batch_size, epoch, seed, group):
    """
    The order of an epoch -> lists of sample indices, one list for each optimizer step; a function of (seed, epoch).

    group: LLaVA's group_by_modality_length. A full batch is all image or all text, longest first, so that ranks taking
    batch[rank::world] do equal work. What is left of both kinds is one short batch at the end, or two.
    """
    import torch

    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)

    def batches(indices):
        order = [indices[j] for j in torch.randperm(len(indices), generator=generator).tolist()]
        return [order[j:j + batch_size] for j in range(0, len(order), batch_size)]

    if not group:
        return batches(range(len(dataset)))
    lengths = dataset.lengths
    both = [batches([i for i, n in enumerate(lengths) if (n > 0) == image]) for image in (True, False)]
    both = [sorted(batch, key=lambda i: -abs(lengths[i])) for batch in both[0] + both[1]]
    full, rest = [b for b in both if len(b) == batch_size], [b for b in both if len(b) < batch_size]
    full = [full[j] for j in torch.randperm(len(full), generator=generator).tolist()]
    return full + ([sum(rest, [])] if 0 < sum(map(len, rest)) < batch_size else rest)


# ----------------------------------------------------------------------------------------------------------------------
# python data.py --check

def check(dataset, workers):
    """Read and encode every sample -> {kind: [sentence, ...]} of those that cannot be used."""
    from tqdm import tqdm

    def problem(i):
        try:
            dataset.sample(i)
        except BadSample as error:
            return error

    problems = {}
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(dataset), unit=" records") as bar:
        for start in range(0, len(dataset), 1024):      # map() would hold a task for each record at once
            for error in pool.map(problem, range(start, min(start + 1024, len(dataset)))):
                bar.update()
                if error:
                    problems.setdefault(error.kind, []).append(str(error))
    return problems


def main(argv=None):
    """-> exit code: 1 if a sample cannot be used"""
    parser = argparse.ArgumentParser(description="List the missing, broken and untrainable samples of a dataset.")
    parser.add_argument("--check", nargs="+", required=True, metavar="DATA.json", help="LLaVA-format JSON files")
    parser.add_argument("--images", required=True, metavar="DIR", help="the folder that image paths start from")
    parser.add_argument("--tokenizer", help="hub name or folder; without one the texts are not encoded")
    parser.add_argument("--num_patches", type=int, default=576, help="ids that one image takes")
    parser.add_argument("--max_length", type=int, default=2048, help="tokens, image patches included")
    parser.add_argument("--template", default="chat", choices=OPEN_CLOSE)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads")
    parser.add_argument("--offline", action="store_true", help=common.OFFLINE)
    args = parser.parse_args(argv)
    if args.offline:
        common.go_offline()

    tokenizer = common.load_tokenizer(args.tokenizer) if args.tokenizer else None
    image = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}           # small: it is the reading that is checked
    dataset = Conversations(args.check, args.images, tokenizer, args.num_patches, image, args.template,
                            max_length=args.max_length)
    if tokenizer:
        good = (sample for sample in map(dataset.__getitem__, range(len(dataset))) if not isinstance(sample, BadSample))
        if first := next(good, None):
            print(show(first["input_ids"], first["labels"], tokenizer))
    problems = check(dataset, args.workers)
    for kind, sentences in problems.items():
        print(f"\n{kind}: {len(sentences)}", *sentences[:20], *["..."] * (len(sentences) > 20), sep="\n  ")
    names = [str(record["id"]) for record in dataset.records if "id" in record]
    print(f"\n{len(dataset):,} records, {sum(map(len, problems.values())):,} cannot be used; "
          f"{len(names) - len(set(names)):,} share an id with one before")
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"data.py: {error}")
