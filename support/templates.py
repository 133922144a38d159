"""
Chat templates: the text that a template writes around the turns, and where the answers stand in it.

`texts` works in two steps, here for the turns "Hi" and "Ho" and the template of Qwen2:
    1. `gaps_of` renders the template once with a sentinel in place of each content:
           <|im_start|>user\nZq0qZ<|im_end|>\n<|im_start|>assistant\nZq1qZ<|im_end|>\n
       The text between the sentinels is what the template writes around the turns: the gaps.
    2. `texts` joins gaps and contents to one text. It notes at which character each answer begins
       and ends: "Ho<|im_end|>" is trained.
A content may hold "<|im_end|>" as ordinary text. Therefore the control tokens of the gaps are
written as private characters of Unicode, and `encoder_of` reads only these as control tokens.
"""
import copy
import functools
import re

from common import BadSample
from support.hub import DATE, freeze_date

IMAGE = "<image>"                       # the placeholder of an image in a text
IMAGE_ID = -200                         # LLaVA's id of an image, here for each image embed

# Chat templates besides the tokenizer's own. "chat" is for a tokenizer without one. "plain" is
# LLaVA's stage 1: image, caption and a newline. eval.py asks with "chat", so a name of your own is
# for training only. Let its answers end with a newline or a control token.
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


@functools.lru_cache(maxsize=16)
def encoder_of(tokenizer):
    """Return (encoder, mark, {id in the encoder: id}) of a tokenizer.

    The encoder is a copy of the tokenizer in which "<|im_end|>" is ordinary text. mark(text) writes
    each control token as a private character, which the encoder reads as this token.
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


def texts(messages, tokenizer, template):
    """Return the texts to tokenize, with marks: [(text, [(start, end) of an answer, ...]), ...]."""
    roles = tuple(message["role"] for message in messages)
    contents = [message["content"] for message in messages]
    for i, content in enumerate(contents):
        check_text(content, i)
    if template not in TEMPLATES:
        raise ValueError(f"template is one of {', '.join(TEMPLATES)}, not {template!r}")
    _, mark, _ = encoder_of(tokenizer)
    if template == "plain":
        if roles != ("user", "assistant"):
            raise ValueError(f"template 'plain' is for user, assistant, not for {', '.join(roles)}")
        # The caption is tokenized separately, so that a SentencePiece tokenizer adds its usual
        # space in front.
        front = mark(bos_of(tokenizer)) + IMAGE_MARK * contents[0].count(IMAGE)
        caption = contents[1] + "\n"
        return [(front, []), (caption, [(0, len(caption))])]

    source = TEMPLATES[template]
    if template == "chat" and tokenizer.chat_template:
        source = freeze_date(tokenizer.get_chat_template())
    # Half of the templates drop this white space themselves.
    contents = [content.strip() for content in contents]
    gaps = gaps_of(tokenizer, source, roles)
    expected = "".join(gap + content for gap, content in zip(gaps, contents + [""]))
    if render(tokenizer, source, roles, contents) != expected:
        raise ValueError("the chat template rewrites these turns (Qwen3's takes <think> out of an "
                         "answer): take that text out of them, or use another template")

    first, *gaps = map(mark, gaps)
    is_alike = roles[-2:] == ("user", "assistant") and gaps[-1].strip() == gaps[-2].strip()
    eos = mark(tokenizer.eos_token or "")
    text, answers = first, []
    for i, (role, content, gap) in enumerate(zip(roles, contents, gaps)):
        # A space before an answer (Mistral's) is part of the answer's first token.
        start = len(text.rstrip(" "))
        text += content.replace(IMAGE, IMAGE_MARK) if role == "user" else content
        if role == "assistant":
            if template == "chat" and not CONTROL.search(gap):
                gap = eos + gap                     # or the model would never learn to stop
                if not CONTROL.search(eos):         # there is none, or it is ordinary text
                    raise ValueError("the tokenizer has no end-of-sequence token")
            end = (CONTROL.search(gap) or re.search("\n|$", gap)).end()
            answers.append((start, len(text) + end))
            # Llama-3's first chat template opens a next answer after the last one. It is cut off.
            if is_alike and i == len(roles) - 1:
                gap = gap[:end]
        text += gap
    return [(text, answers)]


@functools.lru_cache(maxsize=1024)
def gaps_of(tokenizer, source, roles):
    """Return the n + 1 texts that a chat template writes around n turns with these roles.

    A sentinel stands for each content. Once for each order of roles, our ids of the whole text are
    compared with the tokenizer's. ValueError for a template that cannot be handled.
    """
    sentinels = [f"Zq{i}qZ" for i in range(len(roles))]
    text = render(tokenizer, source, roles, sentinels)
    if SENTINEL.findall(text) != sentinels:
        raise ValueError("the chat template drops, repeats, alters or moves a turn of "
                         f"{', '.join(roles)}")
    encoder, mark, ids_of_marks = encoder_of(tokenizer)
    ids = encoder.encode(mark(text), add_special_tokens=False).ids
    ids = [ids_of_marks.get(i, i) for i in ids]
    if ids != tokenizer(text, add_special_tokens=False).input_ids:
        raise ValueError("this tokenizer gives other ids to the text of its chat template than "
                         "this code expects; use another LLM")
    return SENTINEL.split(text)


def render(tokenizer, source, roles, contents):
    """Return the text that a chat template writes."""
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents)]
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=source, tokenize=False, bos=bos_of(tokenizer),
            date_string=f"{DATE:%d %b %Y}")
    except Exception as error:          # a template is a program: it may raise anything
        raise ValueError(f"the chat template refuses the turns {', '.join(roles)}: "
                         f"{' '.join(str(error).split())}") from None


@functools.lru_cache(maxsize=16)
def bos_of(tokenizer):
    """Return the name of the token that the tokenizer puts before a text, or ""."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token if ids[:1] == [tokenizer.bos_token_id] else ""


def check_text(text, i):
    """Raise BadSample if turn i holds a character that a tokenizer cannot read, or a mark."""
    if NOT_TEXT.search(text):
        raise BadSample("malformed", f"turn {i} holds half a character (a lone surrogate) or a "
                                     "character for private use")
