"""
Conversations and pictures: a record of a LLaVA-format JSON file becomes ids, labels and pixels.

    record --messages_of--> messages, image names --encode--> ids, labels --collate--> batch

Letters: T tokens, P patches of an image, B samples of a batch, N images of a batch,
S side of a square image in pixels. An image takes P places in the ids, each with IMAGE_ID, an id
that no text can produce. A label is IGNORE wherever the model does not learn.

    python data.py --check DATA.json --images DIR [--tokenizer NAME --num_patches P]
"""
import argparse
import functools
import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps

import common
# torch is imported where it is used, so that --help does not wait for it.

IMAGE = "<image>"                       # the placeholder of an image in a text
IMAGE_ID = -200                         # LLaVA's id of an image, here once for each patch
IGNORE = -100                           # the label that cross_entropy ignores
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "system": "system"}

# Above this many pixels Pillow refuses a picture as a decompression bomb. transform does so, too.
MAX_PIXELS = 2 * 89_478_485
# EPS is not among the formats, because Pillow would start Ghostscript to read it.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")


class BadSample(ValueError):
    """A record that cannot be used.

    kind: "malformed", "missing image", "broken image" or "untrainable". --check counts by kind.
    """

    def __init__(self, kind, sentence):
        super().__init__(sentence)
        self.kind = kind


# --------------------------------------------------------------------------------------------------
# a conversation to ids and labels

# The text before and after a turn where no chat template is used. "chat" is for a tokenizer without
# a chat template. "plain" is LLaVA's stage 1, which drops the text of the human turn.
TEMPLATES = {
    "chat": {"system": ("", "\n"), "user": ("USER:\n", "\n"), "assistant": ("ASSISTANT:\n", "")},
    "prompted": {"system": ("", "\n"), "user": ("", "\n"), "assistant": ("", "\n")},
    "plain": {"system": ("", ""), "user": ("", ""), "assistant": ("", "\n")},
}

# Llama-3.2's template writes today's date unless it is given one. With a fixed date the same data
# has the same ids tomorrow. Other templates ignore it.
DATE = "26 Jul 2024"


def image_token_ids(num_patches):
    """Return the ids of one image. This is the one place that knows how an image is laid out."""
    return [IMAGE_ID] * num_patches


def encode(messages, tokenizer, num_patches, template="chat"):
    """Return (ids, labels) of one conversation: two lists of T ints, made together.

    messages: [{"role": "system"|"user"|"assistant", "content": str}, ...]. Each "<image>" in a
        user's content becomes the ids of an image. Control tokens come from the template only:
        "<|im_end|>" in a content stays text.
    template: "chat" is the tokenizer's own chat template, or USER:/ASSISTANT: lines if it has none;
        "plain" is image, caption, newline; "prompted" is prompt, image, newline, caption, newline.
    Each answer is trained, up to and including the token that ends its turn.
    Raises ValueError if the template cannot write these turns, or if an answer holds an image.
    """
    ids, labels = [], []
    for new, is_trained, _ in _pieces(messages, tokenizer, num_patches, template):
        ids += new
        labels += new if is_trained else [IGNORE] * len(new)
    return ids, labels


def encode_prompt(messages, tokenizer, num_patches, template="chat"):
    """Return the ids of messages that end with a user's turn, up to where the answer begins.

    They are the ids that encode puts before that answer.
    """
    messages = messages + [{"role": "assistant", "content": "a"}]
    ids = []
    for new, _, turn in _pieces(messages, tokenizer, num_patches, template):
        if turn == len(messages) - 1:
            break
        ids += new
    return ids


def _pieces(messages, tokenizer, num_patches, template):
    """Return the conversation in pieces: a list of (ids, is_trained, index of the turn).

    The template's text before a turn belongs to the turn before it (-1 at the very start), because
    the first control token after an answer is the one that ends it and is trained.
    """
    gaps, contents = _split(messages, tokenizer, template)
    control = {token.content: (i, token) for i, token in _control_tokens(tokenizer).items()}
    names = sorted(control, key=len, reverse=True)              # the longest name first
    pattern = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else None

    # First as strings: (text or name of a control token or IMAGE, kind, is_trained, turn).
    parts = []

    def add(text, kind, is_trained, turn):
        same = parts and parts[-1][1] == kind == "text" and parts[-1][2] == is_trained
        if same:                # joined, so that text across a border is tokenized as one
            parts[-1] = (parts[-1][0] + text, kind, is_trained, parts[-1][3])
        elif text:
            parts.append((text, kind, is_trained, turn))

    is_trained = False
    for turn, gap in enumerate(gaps, start=-1):
        for text in (pattern.split(gap) if pattern else [gap]):
            kind = "control" if text in control else "text"
            add(text, kind, is_trained, turn)
            if kind == "control":
                is_trained = False
        if turn + 1 == len(messages):
            break
        is_trained = messages[turn + 1]["role"] == "assistant"
        for j, text in enumerate(contents[turn + 1].split(IMAGE)):
            if j > 0:
                add(IMAGE, "image", False, turn + 1)
            add(text, "text", is_trained, turn + 1)

    # Then as ids.
    pieces, before = [], "start"
    for i, (text, kind, is_trained, turn) in enumerate(parts):
        if kind == "control":
            new = [control[text][0]]
        elif kind == "image":
            new = image_token_ids(num_patches)
        else:
            # Some control tokens (Phi-3's) swallow the white space beside them.
            if before == "control" and control[parts[i - 1][0]][1].rstrip:
                text = text.lstrip()
            follows_control = i + 1 < len(parts) and parts[i + 1][1] == "control"
            if follows_control and control[parts[i + 1][0]][1].lstrip:
                text = text.rstrip()
            # An answer right after an image (template "plain") starts as a text of its own.
            where = "start" if before == "image" and is_trained else before
            new = _encoders(tokenizer)[where].encode(text, add_special_tokens=False).ids
            if not text:
                continue        # swallowed: what comes next still follows the control token
        pieces.append((new, is_trained, turn))
        before = kind
    return pieces


def _split(messages, tokenizer, template):
    """Return (gaps, contents): n + 1 texts of the template and the n contents between them."""
    roles = [message["role"] for message in messages]
    contents = [message["content"] for message in messages]
    if template not in TEMPLATES:
        raise ValueError(f"template is one of {', '.join(TEMPLATES)}, not {template!r}")
    if template == "plain" and roles != ["user", "assistant"]:
        raise ValueError("template 'plain' needs one human turn and one answer, "
                         f"not {', '.join(roles)}")
    for i, (role, content) in enumerate(zip(roles, contents)):
        if role != "user" and IMAGE in content:
            raise ValueError(f"turn {i} is the {role}'s and holds '{IMAGE}'; only a user's turn can")

    if template == "chat" and tokenizer.chat_template:
        gaps, contents = _split_chat_template(roles, contents, tokenizer)
    else:
        starts_with_bos = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
        gaps = [tokenizer.bos_token if starts_with_bos else ""]
        for role in roles:
            before, after = TEMPLATES[template][role]
            gaps[-1] += before
            gaps.append(after)
    if template == "plain":
        contents = [IMAGE * contents[0].count(IMAGE), contents[1]]

    names = [token.content for token in _control_tokens(tokenizer).values()]
    for i, role in enumerate(roles):
        if template != "chat" or role != "assistant":
            continue
        # An answer that no control token ends gets EOS, or the model would never learn to stop.
        if not any(name in gaps[i + 1] for name in names):
            if tokenizer.eos_token_id is None:
                raise ValueError("the tokenizer has no end-of-sequence token, "
                                 "so that no answer could end")
            gaps[i + 1] = tokenizer.eos_token + gaps[i + 1]
        # A space before an answer (Mistral's) is part of the answer's first token.
        stripped = gaps[i].rstrip(" ")
        contents[i] = gaps[i][len(stripped):] + contents[i]
        gaps[i] = stripped
    # The first template of Llama-3 opens one more answer at the end, asked or not. Only the token
    # that ends the turn is kept of it.
    if roles[-2:] == ["user", "assistant"] and gaps[-1].strip() == gaps[-2].strip():
        ends = [name for name in names if gaps[-1].startswith(name)]
        gaps[-1] = max(ends, key=len, default=gaps[-1])
    return gaps, contents


def _split_chat_template(roles, contents, tokenizer):
    """Return (gaps, contents) as the tokenizer's chat template writes them.

    The template is rendered twice: with the contents, and with a sentinel for each content to find
    the texts around them. Both must agree, so a template that changes a content is refused.
    """
    def render(texts):
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, date_string=DATE)
        except Exception as error:      # a template is a program: it may raise anything
            raise ValueError(f"the chat template refuses the turns {', '.join(roles)}: "
                             f"{error}") from None

    sentinels = [f"Zq{i}qZ" for i in range(len(roles))]
    gaps, rest = [], render(sentinels)
    for sentinel in sentinels:
        if rest.count(sentinel) != 1:
            raise ValueError("the chat template drops, repeats, alters or moves a turn of "
                             f"{', '.join(roles)}")
        gap, rest = rest.split(sentinel)
        gaps.append(gap)
    gaps.append(rest)

    written, rest = [], render(contents)
    rest = rest.removeprefix(gaps[0])
    for i, content in enumerate(contents):
        # Llama-3 and Gemma strip a content, Qwen3 strips newlines in front of its last answer.
        forms = [content, content.strip(), content.lstrip("\n")]
        fitting = [form for form in forms if rest.startswith(form + gaps[i + 1])]
        if not fitting:
            raise ValueError(f"the chat template changes the content of turn {i}")
        written.append(fitting[0])
        rest = rest[len(fitting[0] + gaps[i + 1]):]
    if rest:
        raise ValueError(f"the chat template changes the content of turn {len(roles) - 1}")
    return gaps, written


@functools.lru_cache(maxsize=16)
def _control_tokens(tokenizer):
    """Return {id: AddedToken} of the tokens that only a template may write."""
    return {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special}


@functools.lru_cache(maxsize=16)
def _encoders(tokenizer):
    """Return a tokenizers.Tokenizer for each thing that a text can follow.

    The keys are "start" (of the ids), "control", "image" and "text". No encoder makes a control
    token out of text. They differ for SentencePiece tokenizers, which put a space ("▁") in front of
    a text: in the middle of a conversation that would be a space that nobody wrote.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is a slow tokenizer; "
                         "one with a tokenizer.json is needed")
    from tokenizers import Tokenizer

    def make(spec):
        encoder = Tokenizer.from_str(json.dumps(spec))
        encoder.encode_special_tokens = True            # <|im_end|> in a text stays text
        return encoder

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec |= {"post_processor": None, "truncation": None, "padding": None}
    natural = make(spec)
    parts = json.dumps([spec["normalizer"], spec["pre_tokenizer"]])
    bare_parts = re.sub(r'"prepend": "[^"]+"', '"prepend": ""', parts)
    bare_parts = bare_parts.replace('"add_prefix_space": true', '"add_prefix_space": false')
    after_control = bare_parts.replace('"always"', '"never"') != parts      # every text gets a space
    bare_parts = re.sub('"(first|always)"', '"never"', bare_parts)
    if bare_parts == parts:
        bare = natural
    else:
        spec["normalizer"], spec["pre_tokenizer"] = json.loads(bare_parts)
        bare = make(spec)
    return {"start": natural, "control": natural if after_control else bare,
            "image": bare, "text": bare}


def show_sample(ids, labels, tokenizer):
    """Return a sample as text for a terminal: trained tokens green, others dim, images as [image x P]."""
    runs = []                           # (kind, ids): one character can take several tokens
    for i, label in zip(map(int, ids), map(int, labels)):
        kind = "image" if i == IMAGE_ID else "other" if label == IGNORE else "trained"
        if not runs or runs[-1][0] != kind:
            runs.append((kind, []))
        runs[-1][1].append(i)
    shown = ""
    for kind, run in runs:
        text = tokenizer.decode(run, clean_up_tokenization_spaces=False) if kind != "image" else ""
        text = f"[image x {len(run)}]" if kind == "image" else text.replace("\033", "␛")
        shown += f"\033[{32 if kind == 'trained' else 2}m{text}\033[0m"
    return shown


# --------------------------------------------------------------------------------------------------
# pictures

def inside(folder, name):
    """Return the real path of a file name in the folder.

    Raises BadSample for an absolute path, and for ".." or a link that leads out of the folder.
    """
    try:
        path = os.path.realpath(os.path.join(folder, name))
        root = os.path.realpath(folder)
    except (ValueError, OSError) as error:              # a null byte, or a loop of links
        raise BadSample("malformed", f"image {name!r} is not a file name: {error}") from None
    if os.path.isabs(name) or os.path.commonpath([path, root]) != root:
        raise BadSample("malformed", f"image {name!r} is not inside the image folder {folder}")
    return path


def image_path(folder, name):
    """Return the path of an image in the folder. Raises BadSample if there is no such file."""
    path = inside(folder, name)
    if not os.path.isfile(path):
        raise BadSample("missing image", f"image {os.path.join(folder, name)!r} does not exist")
    return path


def open_image(path):
    """Return a picture file as a PIL image: RGB, upright by its EXIF, an animation's first frame.

    Transparency is dropped as in LLaVA, not blended. Raises BadSample if the file is not a complete
    picture.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):      # 16-bit grey: convert would make all above 255 white
                grey = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
                image = Image.fromarray(grey.astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:                          # Pillow's readers raise nearly anything
        raise BadSample("broken image", f"image {str(path)!r} cannot be read: {error}") from None


def transform(image, size, mean, std, mode="pad"):
    """Return a PIL RGB image as float32[3, S, S], S = size, normalised.

    mode: "crop" scales the short edge to S and cuts out the middle (LLaVA's stage 1); "pad" first
        centres the image on a square of the mean colour (LLaVA's stage 2 and evaluation);
        "squash" changes the aspect ratio.
    The numbers are those of transformers' CLIPImageProcessor (bicubic).
    """
    import torch

    w, h = image.size
    short, long = min(w, h), max(w, h)
    needed = {"crop": size * size * long // short, "pad": long * long, "squash": size * size}
    if mode not in needed:
        raise ValueError(f"image mode is one of {', '.join(needed)}, not {mode!r}")
    if needed[mode] > MAX_PIXELS:
        raise BadSample("broken image", f"{w} x {h} is too thin for mode {mode!r}: "
                                        f"it would need {needed[mode]:,} pixels")
    if mode == "pad":
        canvas = Image.new("RGB", (long, long), tuple(int(m * 255) for m in mean))
        canvas.paste(image, ((long - w) // 2, (long - h) // 2))
        image = canvas
    if mode == "crop":
        scaled = int(size * long / short)
        w, h = (size, scaled) if w <= h else (scaled, size)
        left, top = (w - size) // 2, (h - size) // 2
        image = image.resize((w, h), Image.Resampling.BICUBIC)
        image = image.crop((left, top, left + size, top + size))
    else:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    x = np.asarray(image, dtype=np.float32) / 255                       # (S, S, 3)
    x = (x - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(x.transpose(2, 0, 1).copy())                # (3, S, S)


# --------------------------------------------------------------------------------------------------
# records and the dataset

def read_records(path):
    """Return the records of a LLaVA-format file: a list of dicts.

    Raises ValueError, which names the file and, where there is one, the record.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            records = json.load(file)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:       # cut short, nested too deeply
        raise ValueError(f"{path} is not a whole JSON file: {error}") from None
    if not isinstance(records, list):
        raise ValueError(f"{path} is not a LLaVA-format file: it is not a JSON list of records")
    if not records:
        raise ValueError(f"{path} holds no records")
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{path}: record {i} is not an object but {str(record)[:60]!r}")
    return records


def turns_of(record):
    """Return the turns of a LLaVA record as they stand: messages for encode. Raises BadSample."""
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadSample("malformed", "'conversations' is missing or empty")
    messages = []
    for i, turn in enumerate(turns):
        keys = ("from", "value")
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in keys):
            raise BadSample("malformed", f"turn {i} lacks a text under 'from' or 'value'")
        if turn["from"] not in ROLES:
            raise BadSample("malformed", f"turn {i} is from {turn['from'][:40]!r}, "
                                         "which is not human, gpt or system")
        # JSON can spell half a character ("\ud800"). UTF-8 and tokenizers cannot.
        if re.search("[\ud800-\udfff]", turn["value"]):
            raise BadSample("malformed", f"turn {i} holds half a character (a lone surrogate)")
        messages.append({"role": ROLES[turn["from"]], "content": turn["value"]})
    return messages


def messages_of(record, image_first=True):
    """Return (messages for encode, list of image names) of a LLaVA record. Raises BadSample.

    "image" is a name or a list of names, in the order of the "<image>" in the human turns. If no
    turn has an "<image>", they go before the first human turn. If there is one image and
    image_first is true, its "<image>" moves to the front of its turn, as in LLaVA.
    """
    names = record.get("image")
    names = [] if names is None else [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise BadSample("malformed", "'image' is neither a file name nor a list of file names")
    messages = turns_of(record)
    expected = ("user", "system")
    for i, message in enumerate(messages):
        role, content, sender = message["role"], message["content"], record["conversations"][i]["from"]
        if role not in expected:
            raise BadSample("malformed", f"turn {i} is from {sender!r}; "
                                         "human and gpt must alternate, human first")
        expected = ("assistant",) if role == "user" else ("user",)
        if not content.strip():
            raise BadSample("malformed", f"turn {i} is empty")
        if role != "user" and IMAGE in content:
            raise BadSample("malformed", f"turn {i} is from {sender!r} and holds '{IMAGE}'; "
                                         "only a human turn can")

    users = [message for message in messages if message["role"] == "user"]
    count = sum(user["content"].count(IMAGE) for user in users)
    if names and users and count == 0:
        users[0]["content"] = (IMAGE + "\n") * len(names) + users[0]["content"]
    elif count != len(names):
        raise BadSample("malformed",
                        f"{len(names)} image(s) but {count} '{IMAGE}' in the human turns")
    elif count == 1 and image_first:
        user = next(user for user in users if IMAGE in user["content"])
        rest = user["content"].replace(IMAGE, "").strip()
        user["content"] = (IMAGE + "\n" + rest).strip()
    return messages, names


class Conversations:
    """A map-style dataset over LLaVA-format JSON files; several files are read as one.

    image: {"size", "mean", "std"[, "mode"]} for transform.
    max_length: a sample keeps its first max_length tokens; None keeps all.
    word_of_id: {id: index of the shared word that the id is}, for "words".
    features: a folder with the patches of each picture, see train.cache_features. They then take
        the place of pixels.
    [i] -> {"id": str, "input_ids": int64[T], "labels": int64[T], "words": int64[T],
        "images": float32[n, 3, S, S]}, or a BadSample that names file, record and id. train.py
        decides what to do with it. "words" is the shared word of each trained token, or -1.
    """

    def __init__(self, paths, image_folder, tokenizer, num_patches, image, template="chat",
                 max_length=2048, word_of_id=None, features=""):
        self.image_folder = str(image_folder)
        self.tokenizer = tokenizer
        self.num_patches = num_patches
        self.image = image
        self.template = template
        self.max_length = max_length
        self.word_of_id = word_of_id or {}
        self.features = features
        self.records, self.names = [], []
        for path in [paths] if isinstance(paths, (str, os.PathLike)) else paths:
            for i, record in enumerate(read_records(path)):
                self.records.append(record)
                self.names.append(f"{path}: record {i} (id {str(record.get('id'))[:60]!r})")
        # The sign says whether there is an image; group_by_modality_length in global_batches needs it.
        self.lengths = [_num_words(r) * (1 if r.get("image") else -1) for r in self.records]
        if tokenizer:           # a template that cannot work is not a bad record: fail now
            trial = [{"role": "user", "content": IMAGE}, {"role": "assistant", "content": "a"}]
            encode(trial, tokenizer, num_patches, template)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        try:
            return self.sample(i)
        except BadSample as error:      # returned, because a worker would raise it with a traceback
            return error

    def sample(self, i):
        """Return sample i. Raises BadSample. Without a tokenizer its ids and labels are empty."""
        import torch

        try:
            messages, names = messages_of(self.records[i], image_first=self.template == "chat")
            ids, labels = self.encode(messages) if self.tokenizer else ([], [])
            paths = [image_path(self.image_folder, name) for name in names]
            images = [self.image_tensor(path) for path in paths]
        except ValueError as error:
            kind = getattr(error, "kind", "untrainable")
            raise BadSample(kind, f"{self.names[i]}: {error}") from None
        words = [self.word_of_id.get(label, -1) for label in labels]
        size = self.image["size"]
        return {"id": str(self.records[i].get("id", i)),
                "input_ids": torch.tensor(ids, dtype=torch.int64),
                "labels": torch.tensor(labels, dtype=torch.int64),
                "words": torch.tensor(words, dtype=torch.int64),
                "images": torch.stack(images) if images else torch.zeros(0, 3, size, size)}

    def image_tensor(self, path):
        """Return a picture's pixels float32[3, S, S], or its cached patches float16[P, Dv]."""
        if self.features:
            from safetensors.torch import load_file

            return load_file(features_path(self.features, path))["patches"]
        return transform(open_image(path), **self.image)

    def word_frequencies(self, num_words, limit=10_000):
        """Return which part of all words in the answers each shared word is: float32[num_words].

        At most `limit` records are read. They are spread evenly, so that the result depends on
        nothing but the data.
        """
        import torch

        counts = torch.zeros(num_words)
        for record in self.records[::len(self.records) // limit + 1]:
            try:
                messages, _ = messages_of(record, image_first=self.template == "chat")
                labels = self.encode(messages)[1]
            except ValueError:                      # sample() reports it when its turn comes
                continue
            words = [self.word_of_id[label] for label in labels if label in self.word_of_id]
            counts += torch.bincount(torch.tensor(words, dtype=torch.int64), minlength=num_words)
        return counts / counts.sum().clamp(min=1)

    def encode(self, messages):
        """Return (ids, labels), at most max_length of each.

        Raises ValueError if an image is cut or if no trained token is left.
        """
        ids, labels = encode(messages, self.tokenizer, self.num_patches, self.template)
        T = self.max_length or len(ids)
        if IMAGE_ID in ids[T:]:
            raise ValueError(f"an image does not fit into the first {T} of {len(ids)} tokens")
        if all(label == IGNORE for label in labels[1:T]):       # the first token is never predicted
            raise ValueError(f"no trained token among the first {T} of {len(ids)}")
        return ids[:T], labels[:T]


def features_path(folder, path):
    """Return the file that holds the cached patches of the picture `path`."""
    digest = hashlib.sha256(os.path.realpath(path).encode()).hexdigest()
    return f"{folder}/{digest[:2]}/{digest}.safetensors"


def _num_words(record):
    """Return the number of words in all turns, at least 1: the length that batches are sorted by."""
    try:
        return max(1, sum(len(turn["value"].split()) for turn in record["conversations"]))
    except (KeyError, TypeError, AttributeError):
        return 1                        # a malformed record is reported when it is used


# --------------------------------------------------------------------------------------------------
# batches

def collate(samples, pad_id):
    """Return a batch of samples, padded on the right.

    {"ids": [str], "input_ids", "labels", "words", "attention_mask", "position_ids": int64[B, T],
     "pixel_values": float32[N, 3, S, S], "bad": [str]}
    Images are in the order of their places in input_ids. A BadSample is left out, and its sentence
    is in "bad". The mask comes from lengths and not from values, because "!" is id 0 for Qwen.
    """
    import torch

    good = [s for s in samples if not isinstance(s, BadSample)]
    B = len(good)
    T = max([len(s["input_ids"]) for s in good], default=0)
    ids = torch.full((B, T), pad_id)                                    # (B, T)
    labels = torch.full((B, T), IGNORE)                                 # (B, T)
    words = torch.full((B, T), -1)                                      # (B, T)
    mask = torch.zeros(B, T, dtype=torch.int64)                         # (B, T)
    for b, s in enumerate(good):
        n = len(s["input_ids"])
        ids[b, :n] = s["input_ids"]
        labels[b, :n] = s["labels"]
        words[b, :n] = s.get("words", words[b, :n])
        mask[b, :n] = 1
    images = [s["images"] for s in good if len(s["images"])]
    images = torch.cat(images) if images else torch.zeros(0, 3, 0, 0)
    return {"ids": [s["id"] for s in good], "input_ids": ids, "labels": labels, "words": words,
            "attention_mask": mask, "position_ids": torch.arange(T).repeat(B, 1),
            "pixel_values": images,                                     # (N, 3, S, S)
            "bad": [str(s) for s in samples if isinstance(s, BadSample)]}


def without_images(batch):
    """Return the batch with its images hidden from attention and the positions closed up.

    As many tokens are trained as before. If an image opens a row (template "plain" without BOS), its
    last patch predicts the first word, so that patch stays visible. All pixels are 0.
    """
    hidden = batch["input_ids"] == IMAGE_ID                             # (B, T)
    front = hidden.cumprod(1).bool()
    last_of_front = front & ~front.roll(-1, 1)
    seen = batch["attention_mask"] * (~hidden | last_of_front)
    return batch | {"attention_mask": seen,
                    "position_ids": (seen.cumsum(1) - 1).clamp(min=0),
                    "pixel_values": batch["pixel_values"] * 0}


def global_batches(dataset, batch_size, epoch, seed, group):
    """Return the order of an epoch: one list of sample indices for each optimizer step.

    It is a function of (seed, epoch). group is LLaVA's group_by_modality_length: a full batch is all
    image or all text, longest first, so that ranks that take batch[rank::world] do equal work.
    What is left of both kinds is one short batch at the end, or two.
    """
    import torch

    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)

    def shuffled(items):
        return [items[j] for j in torch.randperm(len(items), generator=generator).tolist()]

    def batches(indices):
        order = shuffled(indices)
        return [order[j:j + batch_size] for j in range(0, len(order), batch_size)]

    if not group:
        return batches(range(len(dataset)))
    lengths = dataset.lengths
    grouped = batches([i for i, n in enumerate(lengths) if n > 0])
    grouped += batches([i for i, n in enumerate(lengths) if n <= 0])
    grouped = [sorted(batch, key=lambda i: -abs(lengths[i])) for batch in grouped]
    full = shuffled([batch for batch in grouped if len(batch) == batch_size])
    rest = [batch for batch in grouped if len(batch) < batch_size]
    if 0 < sum(map(len, rest)) < batch_size:
        rest = [sum(rest, [])]
    return full + rest


# --------------------------------------------------------------------------------------------------
# python data.py --check

def check(dataset, workers):
    """Read and encode every sample. Return {kind: [sentence, ...]} of those that cannot be used."""
    from tqdm import tqdm

    def problem(i):
        try:
            dataset.sample(i)
        except BadSample as error:
            return error

    problems = {}
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(dataset), unit=" records") as bar:
        for start in range(0, len(dataset), 1024):      # map() would hold a task for each record
            for error in pool.map(problem, range(start, min(start + 1024, len(dataset)))):
                bar.update()
                if error:
                    problems.setdefault(error.kind, []).append(str(error))
    return problems


def main(argv=None):
    """Run the check and return the exit code, which is 1 if a sample cannot be used."""
    parser = argparse.ArgumentParser(
        description="List the missing, broken and untrainable samples of a dataset.")
    add = parser.add_argument
    add("--check", nargs="+", required=True, metavar="DATA.json", help="LLaVA-format JSON files")
    add("--images", required=True, metavar="DIR", help="the folder that image paths start from")
    add("--tokenizer", help="hub name or folder; without one the texts are not encoded")
    add("--num_patches", type=int, default=576, help="ids that one image takes")
    add("--max_length", type=int, default=2048, help="tokens, image patches included")
    add("--template", default="chat", choices=TEMPLATES)
    add("--workers", type=int, default=os.cpu_count(), help="threads")
    add("--offline", action="store_true", help=common.OFFLINE)
    args = parser.parse_args(argv)
    if args.offline:
        common.go_offline()

    tokenizer = common.load_tokenizer(args.tokenizer) if args.tokenizer else None
    image = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}   # small: only the reading is checked
    dataset = Conversations(args.check, args.images, tokenizer, args.num_patches, image,
                            args.template, args.max_length)
    if tokenizer:
        samples = map(dataset.__getitem__, range(len(dataset)))
        first = next((s for s in samples if not isinstance(s, BadSample)), None)
        if first:
            print(show_sample(first["input_ids"], first["labels"], tokenizer))
    problems = check(dataset, args.workers)
    for kind, sentences in problems.items():
        more = ["..."] if len(sentences) > 20 else []
        print(f"\n{kind}: {len(sentences)}", *sentences[:20], *more, sep="\n  ")
    count = sum(map(len, problems.values()))
    names = [str(record["id"]) for record in dataset.records if "id" in record]
    print(f"\n{len(dataset):,} records, {count:,} cannot be used; "
          f"{len(names) - len(set(names)):,} share an id with one before")
    return 1 if problems else 0


if __name__ == "__main__":
    common.run_script(main)
