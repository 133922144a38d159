"""
A conversation becomes ids and labels, by the chat template of the tokenizer.

    messages --encode--> ids, labels

`encode` works in three steps:
    1. `_gaps` renders the template once with a marker in place of each content. The text between
       the markers is what the template writes around the turns: the gaps.
    2. `_texts` joins gaps and contents to one text. It notes at which character each answer begins
       and ends.
    3. The tokenizer reads this text and says which characters each token covers. A token that
       covers a part of an answer is trained.
A content may hold "<|im_end|>" as ordinary text. Therefore the control tokens of the gaps are
written as private characters of Unicode, and `_encoder` reads only these as control tokens.

T counts tokens and P the patches of an image. An image takes P places in the ids. Each of them has
IMAGE_ID, an id that no text can produce. A label is IGNORE wherever the model does not learn.
"""
import copy
import functools
import itertools
import re

from common import BadSample
from support.hub import DATE, freeze_date

IMAGE = "<image>"                       # the placeholder of an image in a text
IMAGE_ID = -200                         # LLaVA's id of an image, here once for each patch
IGNORE = -100                           # the label that cross_entropy ignores

# Chat templates besides the tokenizer's own. "chat" is for a tokenizer without one. "plain" is
# LLaVA's stage 1: image, caption and a newline.
TEMPLATES = {
    "chat": "{{ bos }}{% for m in messages %}{% if m.role == 'user' %}{{ 'USER:\n' }}{% endif %}"
            "{% if m.role == 'assistant' %}{{ 'ASSISTANT:\n' + m.content + eos_token|default('') }}"
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
    """Return the ids of one image. To put other ids around an image, change this function."""
    return [IMAGE_ID] * num_patches


def encode(messages, tokenizer, num_patches, template="chat"):
    """Return (ids, labels) of one conversation: two lists of T ints, made together.

    messages: [{"role": "system"|"user"|"assistant", "content": str}, ...]. Each "<image>" in a
        user's content becomes the ids of an image. Control tokens come from the template only:
        "<|im_end|>" in a content stays text. White space around a content is dropped.
    num_patches: the ids that an image takes, or a list of them, one for each image in the text.
    template: "chat" is the tokenizer's own chat template, or USER:/ASSISTANT: lines if it has none;
        "plain" is image, caption, newline; "prompted" writes each content and a newline.
    Each answer is trained, up to and including the token that ends its turn.
    Raises ValueError if the template cannot write these turns as they are.
    """
    ids, labels = [], []
    counts = iter(num_patches) if isinstance(num_patches, list) else itertools.repeat(num_patches)
    encoder, _, ids_of_marks = _encoder(tokenizer)
    for text, answers in _texts(messages, tokenizer, template):
        encoding = encoder.encode(text, add_special_tokens=False)
        for i, (start, end) in zip(encoding.ids, encoding.offsets):
            # A SentencePiece tokenizer may begin a text with a space that has no characters.
            is_trained = any(start < to and max(end, start + 1) > at for at, to in answers)
            new = [ids_of_marks.get(i, i)]
            if new == [IMAGE_ID]:
                count = next(counts, None)
                if count is None:
                    raise ValueError(f"the text has more '{IMAGE}' than there are pictures")
                new, is_trained = image_token_ids(count), False
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

    The encoder is a copy of the tokenizer in which "<|im_end|>" is ordinary text. mark(text)
    replaces the name of each control token by a private character, which the encoder reads as this
    token. IMAGE_MARK stands for an image.
    """
    from tokenizers import AddedToken

    special = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    marks = {token.content: chr(0xF0000 + n) for n, token in enumerate(special.values())}
    # Some control tokens (Phi-3's) remove the white space next to them.
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
        # The caption is tokenized separately, so that a SentencePiece tokenizer adds its usual
        # space in front.
        front = mark(_bos(tokenizer)) + IMAGE_MARK * contents[0].count(IMAGE)
        caption = contents[1] + "\n"
        return [(front, []), (caption, [(0, len(caption))])]

    source = TEMPLATES[template]
    if template == "chat" and tokenizer.chat_template:
        source = freeze_date(tokenizer.get_chat_template())
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
        # The first template of Llama-3 always adds the opening of one more answer at the end. Drop
        # it, and keep the token that ends the turn.
        is_last = i == len(roles) - 1 and roles[-2:] == ("user", "assistant")
        if is_last and gaps[-1].strip() == gaps[-2].strip():
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
            date_string=f"{DATE:%d %b %Y}")
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


def check_text(text, i):
    """Raise BadSample if turn i holds a character that a tokenizer cannot read, or a mark."""
    if NOT_TEXT.search(text):
        raise BadSample("malformed", f"turn {i} holds half a character (a lone surrogate) or a "
                                     "character for private use")


def eos_ids(llm, tokenizer):
    """Return the set of ids that end an answer.

    They are the end tokens of the tokenizer and of the LLM's generation config, and the token that
    the chat template writes after an answer. In a base LLM that is another one: Qwen2.5's
    end-of-sequence token is <|endoftext|>, and its template ends a turn with <|im_end|>.
    """
    ids = [tokenizer.eos_token_id]
    if llm.generation_config:
        eos = llm.generation_config.eos_token_id
        ids += eos if isinstance(eos, list) else [eos]
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            _, labels = encode(turns, tokenizer, num_patches=0)
            ids.append([label for label in labels if label != IGNORE][-1])
        except ValueError:
            pass    # This template cannot be used. In training `encode` will say so.
    return {i for i in ids if i is not None}
