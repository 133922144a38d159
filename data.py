"""
Conversations and pictures: a record of a LLaVA-format JSON file becomes ids, labels and pixels.

    record --messages_of--> messages, image names --encode--> ids, labels --collate--> batch

Letters: T tokens, P patches of an image, B samples of a batch, N images of a batch,
S side of a square image in pixels. An image takes P places in the ids, each with IMAGE_ID, an id
that no text can produce. A label is IGNORE wherever the model does not learn.

    python data.py --check DATA.json --images DIR [--tokenizer NAME --num_patches P]
"""
import argparse
import copy
import functools
import hashlib
import io
import json
import os
import re
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

import common
# torch is imported where it is used, so that --help does not wait for it.

IMAGE = "<image>"                       # the placeholder of an image in a text
IMAGE_ID = -200                         # LLaVA's id of an image, here once for each patch
IGNORE = -100                           # the label that cross_entropy ignores
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "system": "system"}


class BadSample(ValueError):
    """A record that cannot be used.

    kind: "malformed", "missing image", "broken image" or "untrainable". --check counts by kind.
    """

    def __init__(self, kind, sentence):
        super().__init__(kind, sentence)
        self.kind = kind

    def __str__(self):
        return self.args[1]


# --------------------------------------------------------------------------------------------------
# a conversation to ids and labels

# Chat templates besides the tokenizer's own. "chat" is for a tokenizer without one. "plain" is
# LLaVA's stage 1: image, caption and a newline.
TEMPLATES = {
    "chat": "{{ bos }}{% for m in messages %}{% if m.role == 'user' %}{{ 'USER:\n' }}{% endif %}"
            "{% if m.role == 'assistant' %}{{ 'ASSISTANT:\n' + m.content + eos_token }}"
            "{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'ASSISTANT:\n' }}{% endif %}",
    "prompted": "{{ bos }}{% for m in messages %}{{ m.content + '\n' }}{% endfor %}",
    "plain": None,
}

# Before a text is tokenized, its control tokens and images are written as characters that Unicode
# leaves to private use. JSON can also spell half a character ("\ud800"), which UTF-8 cannot.
CONTROL, IMAGE_MARK = re.compile("[\U000F0000-\U0010FFFC]"), "\U0010FFFD"
NOT_TEXT = re.compile("[\ud800-\udfff\U000F0000-\U0010FFFF]")
SENTINEL = re.compile(r"Zq\d+qZ")


def image_token_ids(num_patches):
    """Return the ids of one image. This is the one place that knows how an image is laid out."""
    return [IMAGE_ID] * num_patches


def encode(messages, tokenizer, num_patches, template="chat"):
    """Return (ids, labels) of one conversation: two lists of T ints, made together.

    messages: [{"role": "system"|"user"|"assistant", "content": str}, ...]. Each "<image>" in a
        user's content becomes the ids of an image. Control tokens come from the template only:
        "<|im_end|>" in a content stays text. White space around a content is dropped.
    template: "chat" is the tokenizer's own chat template, or USER:/ASSISTANT: lines if it has none;
        "plain" is image, caption, newline; "prompted" is prompt, image, newline, caption, newline.
    Each answer is trained, up to and including the token that ends its turn.
    Raises ValueError if the template cannot write these turns as they are.
    """
    ids, labels = [], []
    encoder, _, ids_of_marks = _encoder(tokenizer)
    for text, answers in _texts(messages, tokenizer, template):
        encoding = encoder.encode(text, add_special_tokens=False)
        for i, (start, end) in zip(encoding.ids, encoding.offsets):
            # A SentencePiece tokenizer may begin a text with a space that has no characters.
            is_trained = any(start < to and max(end, start + 1) > at for at, to in answers)
            new = [ids_of_marks.get(i, i)]
            if new == [IMAGE_ID]:
                new, is_trained = image_token_ids(num_patches), False
            ids += new
            labels += new if is_trained else [IGNORE] * len(new)
    return ids, labels


def encode_prompt(messages, tokenizer, num_patches, template="chat"):
    """Return the ids of messages that end with a user's turn, up to where the answer begins.

    They are the ids that encode puts before that answer.
    """
    messages = messages + [{"role": "assistant", "content": "a"}]
    ids, labels = encode(messages, tokenizer, num_patches, template)
    while labels[-1] == IGNORE:                     # what the template writes after the answer
        labels.pop()
    while labels and labels[-1] != IGNORE:          # the answer
        labels.pop()
    return ids[:len(labels)]


@functools.lru_cache(maxsize=16)
def _encoder(tokenizer):
    """Return (encoder, mark, {id in the encoder: id}) of a tokenizer.

    The encoder is a copy in which "<|im_end|>" is ordinary text. A private character stands for the
    control token; mark(text) writes it in place of the name. IMAGE_MARK stands for an image.
    """
    from tokenizers import AddedToken

    special = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    marks = {token.content: chr(0xF0000 + n) for n, token in enumerate(special.values())}
    # Some control tokens (Phi-3's) swallow the white space beside them.
    tokens = [AddedToken(marks[token.content], normalized=False, lstrip=token.lstrip,
                         rstrip=token.rstrip) for token in special.values()]
    encoder = copy.deepcopy(tokenizer.backend_tokenizer)
    encoder.encode_special_tokens = True            # as text
    encoder.post_processor = None                   # it would move the offsets
    encoder.no_truncation()
    encoder.no_padding()
    encoder.add_tokens([AddedToken(IMAGE_MARK, normalized=False), *tokens])
    ids = {encoder.token_to_id(marks[token.content]): i for i, token in special.items()}
    names = "|".join(sorted(map(re.escape, marks), key=len, reverse=True))      # the longest first

    def mark(text):
        return re.sub(names, lambda name: marks[name[0]], text) if names else text

    return encoder, mark, ids | {encoder.token_to_id(IMAGE_MARK): IMAGE_ID}


def _texts(messages, tokenizer, template):
    """Return the texts to tokenize, with marks: [(text, [(start, end) of an answer, ...]), ...]."""
    roles = tuple(message["role"] for message in messages)
    contents = [message["content"] for message in messages]
    for i, content in enumerate(contents):
        check_text(content, i)
    if template not in TEMPLATES:
        raise ValueError(f"template is one of {', '.join(TEMPLATES)}, not {template!r}")
    _, mark, _ = _encoder(tokenizer)
    if template == "plain":
        if roles != ("user", "assistant"):
            raise ValueError("template 'plain' needs one human turn and one answer, "
                             f"not {', '.join(roles)}")
        # The caption is tokenized by itself: a SentencePiece tokenizer starts it as any text.
        front = mark(_bos(tokenizer)) + IMAGE_MARK * contents[0].count(IMAGE)
        caption = contents[1] + "\n"
        return [(front, []), (caption, [(0, len(caption))])]

    source = TEMPLATES[template]
    if template == "chat" and tokenizer.chat_template:
        source = common.freeze_date(tokenizer.get_chat_template())
    # Half of the templates drop this white space themselves.
    contents = [content.strip() for content in contents]
    gaps = _gaps(tokenizer, source, roles)
    expected = "".join(gap + content for gap, content in zip(gaps, contents + [""]))
    if _render(tokenizer, source, roles, contents) != expected:
        raise ValueError("the chat template rewrites these turns (Qwen3's takes <think> out of an "
                         "answer): take that text out of them, or use another template")

    text, answers = mark(gaps[0]), []
    for i, (role, content, gap) in enumerate(zip(roles, contents, map(mark, gaps[1:]))):
        # A space before an answer (Mistral's) is part of the answer's first token.
        start = len(text.rstrip(" "))
        text += content.replace(IMAGE, IMAGE_MARK) if role == "user" else content
        if role == "assistant":
            # An answer that no control token ends gets EOS, or the model would never learn to stop.
            if template == "chat" and not CONTROL.search(gap):
                gap = mark(tokenizer.eos_token or "") + gap
                if not CONTROL.search(gap):
                    raise ValueError("the tokenizer has no end-of-sequence token, "
                                     "so that no answer could end")
            end = CONTROL.search(gap)
            answers.append((start, len(text) + (end.end() if end else len(gap))))
        # The first template of Llama-3 opens one more answer at the end, asked or not. Only the
        # token that ends the turn is kept of it.
        if roles[i - 1:] == ("user", "assistant") and gaps[-1].strip() == gaps[-2].strip():
            gap = gap[:1]
        text += gap
    return [(text, answers)]


@functools.lru_cache(maxsize=1024)
def _gaps(tokenizer, source, roles):
    """Return the n + 1 texts that a chat template writes around n turns with these roles.

    A sentinel stands for each content. Once for each order of roles, our ids of the whole text are
    compared with the tokenizer's. ValueError for a template that cannot be handled.
    """
    sentinels = [f"Zq{i}qZ" for i in range(len(roles))]
    text = _render(tokenizer, source, roles, sentinels)
    if SENTINEL.findall(text) != sentinels:
        raise ValueError("the chat template drops, repeats, alters or moves a turn of "
                         f"{', '.join(roles)}")
    encoder, mark, ids_of_marks = _encoder(tokenizer)
    ids = encoder.encode(mark(text), add_special_tokens=False).ids
    ids = [ids_of_marks.get(i, i) for i in ids]
    if ids != tokenizer(text, add_special_tokens=False).input_ids:
        raise ValueError("this tokenizer gives other ids to the text of its chat template than "
                         "this code expects; use another LLM")
    return SENTINEL.split(text)


def _render(tokenizer, source, roles, contents):
    """Return the text that a chat template writes."""
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents)]
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=source, tokenize=False, bos=_bos(tokenizer),
            date_string=f"{common.DATE:%d %b %Y}")
    except Exception as error:          # a template is a program: it may raise anything
        raise ValueError(f"the chat template refuses the turns {', '.join(roles)}: "
                         f"{' '.join(str(error).split())}") from None


@functools.lru_cache(maxsize=16)
def _bos(tokenizer):
    """Return the name of the token that the tokenizer puts before a text, or ""."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token if ids[:1] == [tokenizer.bos_token_id] else ""


def show_sample(ids, labels, tokenizer):
    """Return a sample as text for a terminal: trained tokens green, an image as [image x P]."""
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

# EPS is not among the formats, because Pillow would start Ghostscript to read it.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
# How other files begin that are found under the name of a picture.
OTHER_FILES = {"empty": rb"\Z", "AVIF": rb"....ftypavi", "HEIC": rb"....ftyp(hei|hev|mif|msf)",
               "a video": rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI", "SVG": rb"\s*(<\?xml.*?)?<svg",
               "JPEG XL": rb"\xff\x0a|\0{3}\x0cJXL", "JPEG 2000": rb"\xff\x4f|\0{3}\x0cjP",
               "PDF": rb"%PDF", "PostScript": rb"%!PS", "PSD": rb"8BPS", "ICO": rb"\0\0\x01\0",
               "a web page": rb"\s*<(!doctype|html)", "a Git LFS pointer": rb"version https://"}


def inside(folder, name):
    """Return the real path of a file name in the folder.

    Raises BadSample for a path, or a link in it, that leads out of the folder.
    """
    root = os.path.realpath(folder)
    try:
        path = os.path.realpath(os.path.join(root, name))
    except ValueError as error:                             # a null byte
        raise BadSample("malformed", f"image {name[:200]!r} is not a file name: {error}") from None
    above = os.path.commonpath([path, root])
    if above != root:
        link = " through a link" if path != os.path.normpath(os.path.join(root, name)) else ""
        raise BadSample("malformed", f"image {name!r} leads{link} out of the image folder {folder} "
                                     f"to {path}: put the file itself into the image folder, or "
                                     f"take {above} as the image folder")
    return path


def image_path(folder, name):
    """Return the path of an image in the folder. Raises BadSample if there is no such file."""
    path = inside(folder, name)
    if not os.path.isfile(path):
        path = os.path.join(folder, name)[:200]
        raise BadSample("missing image", f"image {path!r} does not exist or is not a file")
    return path


def open_image(source):
    """Return a picture as a PIL image: RGB, upright by its EXIF, an animation's first frame.

    source: a path, or the bytes of a file. Transparency is dropped as in LLaVA, not blended.
    Raises BadSample if it is not a complete picture.
    """
    try:
        content = source
        if not isinstance(source, bytes):
            with open(source, "rb") as file:
                content = file.read()
        pixels = io.BytesIO(without_png_metadata(content))
        with Image.open(pixels, formats=FORMATS) as image:
            image.load()
            rgb = to_rgb(image)
            try:
                orientation = image.getexif().get(0x0112)
            except Exception:                               # damaged EXIF does not cost the picture
                orientation = None
        rgb.info = {}                                       # exif_transpose would rewrite the EXIF
        rgb.getexif()[0x0112] = orientation
        return ImageOps.exif_transpose(rgb)
    except Exception as error:                              # Pillow's readers raise nearly anything
        if isinstance(error, UnidentifiedImageError):
            kinds = [kind for kind, start in OTHER_FILES.items()
                     if re.match(start, content, re.DOTALL | re.IGNORECASE)]
            error = (f"it is {(kinds + ['damaged or of another format'])[0]}; the formats that are "
                     f"read are {', '.join(FORMATS)}")
        name = "" if isinstance(source, bytes) else f" {str(source)!r}"
        raise BadSample("broken image", f"image{name} cannot be read: {error}") from None


def without_png_metadata(content):
    """Return a PNG file without the chunks that its pixels do not need; other files as they are.

    Pillow refuses a picture for a damaged colour profile or comment, which nothing here reads.
    """
    start = content[:8]
    if start != b"\x89PNG\r\n\x1a\n":
        return content
    kept, at = [start], 8
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at:at + 4], "big")
        chunk = content[at:end]
        kind, is_whole = chunk[4:8], zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if kind[:1].isupper() or kind in (b"tRNS", b"eXIf") and is_whole:
            kept.append(chunk)
        at = end
    return b"".join(kept)


def to_rgb(image):
    """Return a loaded PIL image as RGB. ValueError if it is not certain which value is white."""
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        is_deep = image.mode == "I" and image.format == "TIFF"      # more than 16 bits, or signed
        if is_deep or 0 < grey.max() < 4096 or getattr(image, "tag_v2", {}).get(262) == 0:
            raise ValueError(f"its grey values go from {grey.min()} to {grey.max()}, and it is not "
                             "certain which is white: save it with 8 bits")
        image = Image.fromarray((grey >> 8).astype(np.uint8))       # 16 bits
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, and it is not certain which is "
                         "white: save it with 8 bits")
    rgb = image.convert("RGB")
    if image.has_transparency_data and is_uniform(rgb) and not is_uniform(image.convert("RGBA")):
        raise ValueError("it has one colour, and what it shows is in its transparency: "
                         "save it on a background")
    return rgb


def is_uniform(image):
    """Return whether all pixels are equal."""
    return all(low == high for low, high in image.getextrema())


def transform(image, size, mean, std, mode="pad"):
    """Return a PIL RGB image as float32[3, S, S], S = size, normalised.

    mode: "crop" scales the short edge to S and cuts out the middle (LLaVA's stage 1); "pad" first
        centres the image on a square of the mean colour (LLaVA's stage 2 and evaluation);
        "squash" changes the aspect ratio.
    The numbers are those of transformers' CLIPImageProcessor (bicubic).
    """
    import torch

    w, h = image.size
    # Lines of pixels would become pictures of many GB on the way. They are made smaller before.
    if mode == "crop" and max(w, h) > 100 * min(w, h):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    if mode == "pad" and max(w, h) > 13_000:
        image = image.reduce(max(w, h) // 13_000 + 1)
    w, h = image.size
    short, long = min(w, h), max(w, h)
    if mode == "crop":
        scaled = int(size * long / short)
        w, h = (size, scaled) if w <= h else (scaled, size)
        left, top = (w - size) // 2, (h - size) // 2
        image = image.resize((w, h), Image.Resampling.BICUBIC)
        image = image.crop((left, top, left + size, top + size))
    elif mode == "pad":
        canvas = Image.new("RGB", (long, long), tuple(int(m * 255) for m in mean))
        canvas.paste(image, ((long - w) // 2, (long - h) // 2))
        image = canvas.resize((size, size), Image.Resampling.BICUBIC)
    else:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    x = np.asarray(image, dtype=np.float32) / 255                       # (S, S, 3)
    x = (x - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(x.transpose(2, 0, 1).copy())                # (3, S, S)


# --------------------------------------------------------------------------------------------------
# records and the dataset

# What a record may hold that is not read: by the name of its key, or by a name of a file in its
# value. Training without it would be blind, but nothing else would show it.
OTHER_KEY = re.compile("(video|audio|speech|system|tool)s?")
OTHER_FILE = re.compile(r'\.(mp4|avi|mov|mkv|webm|wav|mp3|flac|ogg|m4a)"')
# These say something of the picture that is read ("image_id"), where there is one.
MEDIUM_KEY = re.compile("image|img|picture|photo|video|audio")
PICTURE_FILE = re.compile(r'\.(jpe?g|png|gif|webp|bmp|tiff?|avif|heic)"|"data:')


def refuse_unread(fields, read, has_image, where):
    """Raise BadSample if a record or a turn names a medium under a key that is not in `read`."""
    for key, value in fields.items():
        if key in read or not value:
            continue
        name, text = key.lower(), json.dumps(value).lower()
        is_unread = OTHER_KEY.fullmatch(name) or OTHER_FILE.search(text)
        if not has_image:
            is_unread = is_unread or MEDIUM_KEY.search(name) or PICTURE_FILE.search(text)
        if is_unread:
            raise BadSample("malformed", f"{where} has {key[:40]!r}, which is not read: only the "
                                         "record's 'image' and its 'conversations' are")


def check_text(text, i):
    """Raise BadSample if turn i holds a character that a tokenizer cannot read, or a mark."""
    if NOT_TEXT.search(text):
        raise BadSample("malformed", f"turn {i} holds half a character (a lone surrogate) or a "
                                     "character for private use")


def read_records(path):
    """Return the records of a LLaVA-format file: a list of (place in the file, dict), not empty."""
    records = common.read_records(path)
    if not records:
        raise ValueError(f"{path} holds no records")
    return records


def image_names(record):
    """Return the list of a record's image names. Raises BadSample.

    They stand under "image", or under "images" as in LLaMA-Factory: one name or a list.
    """
    keys = [key for key in ("image", "images") if record.get(key) not in (None, [])]
    if len(keys) == 2:
        raise BadSample("malformed", "there are pictures under 'image' and under 'images'")
    names = record[keys[0]] if keys else []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise BadSample("malformed", f"{keys[0]!r} is neither a file name nor a list of file names")
    return names


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
                                         f"which is not one of {', '.join(ROLES)}")
        check_text(turn["value"], i)
        messages.append({"role": ROLES[turn["from"]], "content": turn["value"]})
    return messages


def messages_of(record, image_first=True):
    """Return (messages for encode, list of image names) of a LLaVA record. Raises BadSample.

    The images have the order of the "<image>" in the human turns. If no turn has an "<image>", they
    go before the first human turn. If there is one image and image_first is true, its "<image>"
    moves to the front of its turn, as in LLaVA.
    """
    names = image_names(record)
    messages = turns_of(record)
    refuse_unread(record, ("id", "image", "images", "conversations"), names, "the record")
    expected = ("user", "system")
    for i, message in enumerate(messages):
        role, content, turn = message["role"], message["content"], record["conversations"][i]
        refuse_unread(turn, ("from", "value"), False, f"turn {i}")
        if role not in expected:
            raise BadSample("malformed", f"turn {i} is from {turn['from']!r}; "
                                         "human and gpt must alternate, human first")
        expected = ("assistant",) if role == "user" else ("user",)
        if not content.strip():
            raise BadSample("malformed", f"turn {i} is empty")
        if role != "user" and IMAGE in content:
            raise BadSample("malformed", f"turn {i} is from {turn['from']!r} and holds '{IMAGE}'; "
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
    image_names: for each record its image names; none for a record that is malformed.
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
        paths = [paths] if isinstance(paths, (str, os.PathLike)) else paths
        self.places, self.records = zip(*[pair for path in paths for pair in read_records(path)])
        self.image_names, self.lengths = [], []
        for record in self.records:
            try:
                names = image_names(record)
                length = sum(len(turn["content"].split()) for turn in turns_of(record))
            except BadSample:           # it is reported when it is used
                names, length = [], 1
            self.image_names.append(names)
            # The sign says whether there is an image; global_batches needs it.
            self.lengths.append(max(1, length) * (1 if names else -1))
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

        record = self.records[i]
        try:
            messages, names = messages_of(record, image_first=self.template == "chat")
            ids, labels = self.encode(messages) if self.tokenizer else ([], [])
            paths = [image_path(self.image_folder, name) for name in names]
            images = [self.image_tensor(path) for path in paths]
        except ValueError as error:
            where = f"{self.places[i]} (id {str(record.get('id'))[:60]!r})"
            kind = getattr(error, "kind", "untrainable")
            raise BadSample(kind, f"{where}: {error}") from None
        words = [self.word_of_id.get(label, -1) for label in labels]
        size = self.image["size"]
        return {"id": str(record.get("id", i)),
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


# --------------------------------------------------------------------------------------------------
# batches

def collate(samples, pad_id, pad_to=1):
    """Return a batch of samples, padded on the right to a T that is a multiple of pad_to.

    {"ids": [str], "input_ids", "labels", "words", "attention_mask", "position_ids": int64[B, T],
     "pixel_values": float32[N, 3, S, S], "bad": [str]}
    Images are in the order of their places in input_ids. A BadSample is left out, and its sentence
    is in "bad". The mask comes from lengths and not from values, because "!" is id 0 for Qwen.
    """
    import torch

    good = [s for s in samples if not isinstance(s, BadSample)]
    B = len(good)
    T = max([len(s["input_ids"]) for s in good], default=0)
    T = -(-T // pad_to) * pad_to                                        # rounded up
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

    As many tokens are trained as before. If an image opens a row (template "plain" without BOS),
    its last patch predicts the first word, so that patch stays visible. All pixels are 0.
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

    It is a function of (seed, epoch). group is LLaVA's group_by_modality_length: a full batch is
    all image or all text, longest first, so that ranks that take batch[rank::world] do equal work.
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

def main(argv=None):
    """Read and encode every sample. Return the exit code, which is 1 if one cannot be used."""
    parser = argparse.ArgumentParser(
        description="List the missing, broken and untrainable samples of a dataset.")
    add = parser.add_argument
    add("--check", nargs="+", required=True, metavar="DATA.json", help="LLaVA-format JSON files")
    add("--images", required=True, metavar="DIR", help="the folder that image paths start from")
    add("--tokenizer", help="hub name or folder; without one the texts are not encoded")
    add("--num_patches", type=int, default=576, help="ids that one image takes")
    add("--max_length", type=int, default=2048, help="tokens, image patches included")
    add("--template", default="chat", choices=TEMPLATES)
    add("--workers", type=int, default=os.cpu_count(), help="processes")
    add("--offline", action="store_true", help=common.OFFLINE)
    args = parser.parse_args(argv)
    if args.offline:
        common.go_offline()
    import torch
    from tqdm import tqdm

    tokenizer = common.load_tokenizer(args.tokenizer) if args.tokenizer else None
    # Small, because no picture is refused for the mode or the size that a run has.
    image = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    dataset = Conversations(args.check, args.images, tokenizer, args.num_patches, image,
                            args.template, args.max_length)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=args.workers)
    shown, problems = tokenizer is None, {}
    for sample in tqdm(loader, unit=" records"):
        if isinstance(sample, BadSample):
            problems.setdefault(sample.kind, []).append(str(sample))
        elif not shown:
            print(show_sample(sample["input_ids"], sample["labels"], tokenizer))
            shown = True
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
