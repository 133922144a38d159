"""How tokenizers spell bytes: byte-level BPE, SentencePiece and plain text, all as words."""
import re

# The GPT-2 byte alphabet. Printable latin-1 bytes stand for themselves. The other 68 bytes take the
# code points from 256 on. Both dicts are tables for str.translate.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHER_BYTES = [b for b in range(256) if b not in PRINTABLE]
BYTE_TO_CHAR = {b: chr(b) for b in PRINTABLE}
BYTE_TO_CHAR |= {b: chr(256 + i) for i, b in enumerate(OTHER_BYTES)}
CHAR_TO_BYTE = {ord(c): b for b, c in BYTE_TO_CHAR.items()}
IN_ALPHABET = re.compile("[" + re.escape("".join(BYTE_TO_CHAR.values())) + "]*").fullmatch

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
RESERVED = re.compile(
    r"[<\[]\|?(unused|reserved|extra_id|special|placeholder)\w*\d+\|?[>\]]", re.IGNORECASE)
# For SentencePiece only. In a byte-level vocabulary "<s>" may be HTML.
SENTENCEPIECE_CONTROL = {"<unk>", "<s>", "</s>", "<pad>"}
# Bytes that are not valid UTF-8, after bytes.decode(errors="surrogateescape").
STRAY_BYTE = re.compile("([\udc80-\udcff])")


def to_word(data):
    """Return the word of some bytes, one character for each byte."""
    return data.decode("latin-1").translate(BYTE_TO_CHAR)


def to_bytes(word):
    """Return the bytes of a word. ValueError if a character is not in the byte alphabet."""
    if not IN_ALPHABET(word):
        raise ValueError(f"{word!r} is not in the byte alphabet, where a space is written 'Ġ'")
    return word.translate(CHAR_TO_BYTE).encode("latin-1")


def show(word):
    """Return a word for people: "Ġthe" is "␣the"; stray bytes and controls are escaped."""
    shown = ""
    for c in to_bytes(word).decode("utf-8", errors="surrogateescape").replace(" ", "␣"):
        if STRAY_BYTE.match(c):
            shown += f"<0x{ord(c) - 0xDC00:02X}>"
        else:
            shown += c if c.isprintable() else c.encode("unicode_escape").decode()
    return shown


def spelling_of(tokenizer):
    """Return how tokens are spelt: "bytes", or the character for a space, such as "▁" or " "."""
    backend = tokenizer.backend_tokenizer
    for affix in ("end_of_word_suffix", "continuing_subword_prefix"):   # CLIP's </w>, BERT's ##
        mark = getattr(backend.model, affix, None)
        if mark:
            raise ValueError(f"{tokenizer.name_or_path} marks pieces of words with {mark!r}, so it "
                             "has no words in bytes")
    # The JSON of each part. backend.to_str() would add half a million merges, seconds for Gemma.
    parts = (backend.decoder, backend.pre_tokenizer, backend.normalizer)
    spec = "".join(part.__getstate__().decode() for part in parts if part is not None)
    if '"ByteLevel"' in spec:
        return "bytes"
    # A decoder replaces "▁" by " ", a normalizer " " by "▁".
    space = re.search(r'"Metaspace","replacement":"(.)"|"String":"([^ ])"},"content":" "|'
                      r'"String":" "},"content":"(.)"', spec)
    return space[space.lastindex] if space else " "


def token_to_word(token, spelling):
    """Return the word of an ordinary token; None for a string that no text can produce."""
    if spelling == "bytes":
        return token if IN_ALPHABET(token) else None
    byte = BYTE_TOKEN.fullmatch(token)
    return to_word(bytes.fromhex(byte[1])) if byte else text_to_word(token, spelling)


def text_to_word(text, spelling):
    """Return the word of a text in the tokenizer's own spelling. Surrogates are stray bytes."""
    if spelling == "bytes":
        return text
    return to_word(text.replace(spelling, " ").encode("utf-8", errors="surrogateescape"))


def special_tokens(tokenizer, spelling):
    """Return (tokens that no text may produce, all added tokens): two sets of strings."""
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special} | {*tokenizer.all_special_tokens}
    special |= {getattr(tokenizer.backend_tokenizer.model, "unk_token", None)}
    if spelling not in ("bytes", " "):
        special |= SENTENCEPIECE_CONTROL
    return special, {token.content for token in added}


class Speller:
    """A tokenizer without added spaces, normalizer and special tokens: word -> ids -> word."""

    def __init__(self, tokenizer):
        self.backend = tokenizer.backend_tokenizer
        self.spelling = spelling_of(tokenizer)
        self.special = special_tokens(tokenizer, self.spelling)[0]

    def word_of(self, ids):
        """Return the word that ids spell; None if a token is special, reserved or no bytes."""
        tokens = [self.backend.id_to_token(i) for i in ids]
        if any(token in self.special or RESERVED.fullmatch(token) for token in tokens):
            return None
        parts = [token_to_word(token, self.spelling) for token in tokens]
        return None if None in parts else "".join(parts)

    def pieces(self, word):
        """Return the ids of the tokens that spell a word; None is a byte without a token."""
        text = word
        if self.spelling != "bytes":
            text = to_bytes(word).decode("utf-8", errors="surrogateescape")
            text = text.replace(" ", self.spelling)
        return [i for part in STRAY_BYTE.split(text) if part for i in self.pieces_of_text(part)]

    def pieces_of_text(self, text):
        """Return the ids of a text in the tokenizer's own spelling, as `pieces` does."""
        word = text_to_word(text, self.spelling)
        if not STRAY_BYTE.match(text[-1]):
            try:
                ids = [piece.id for piece in self.backend.model.tokenize(text)]
            except Exception:               # some models raise for what they cannot spell
                ids = []
            if self.word_of(ids) == word:   # not so for an unknown token or a special one in it
                return ids
        if len(text) > 1:
            return [i for c in text for i in self.pieces_of_text(c)]
        names = word if self.spelling == "bytes" else [f"<0x{b:02X}>" for b in to_bytes(word)]
        return [self.backend.token_to_id(name) for name in names]
