"""The shared vocabulary: the words that two or more tokenizers have in common, ordered by how often a corpus uses them.

A word is a sequence of bytes, written as a string in the GPT-2 byte alphabet ("Ġthe" is b" the"). All tokenizers map
to this one form: byte-level BPE spells its tokens so already, SentencePiece writes the space as "▁" and bytes as
"<0xAB>", a plain BPE writes text. words.json, a JSON list of words by rank, says nothing of ids: each tokenizer gives
its own.

    python vocab.py --tokenizers A B [C ...] --corpus X.json [...] --size 19200 --out words.json
"""
import argparse
import hashlib
import json
import os
import re
import sys
import time
from collections import Counter

from common import OFFLINE, go_offline, load_tokenizer, read_json, write_json
from data import IMAGE, read_records, turns_of

# The GPT-2 byte alphabet: printable latin-1 bytes stand for themselves, the other 68 for the code points from 256 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [b for b in range(256) if b not in _PRINTABLE]
BYTE_TO_CHAR = {**{b: chr(b) for b in _PRINTABLE}, **{b: chr(256 + i) for i, b in enumerate(_OTHERS)}}
CHAR_TO_BYTE = {ord(c): b for b, c in BYTE_TO_CHAR.items()}                 # both are tables for str.translate
IN_ALPHABET = re.compile("[" + re.escape("".join(BYTE_TO_CHAR.values())) + "]*").fullmatch

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
RESERVED = re.compile(r"[<\[]\|?(unused|reserved|extra_id|special|placeholder)\w*\d+\|?[>\]]", re.IGNORECASE)
SP_CONTROL = {"<unk>", "<s>", "</s>", "<pad>"}      # SentencePiece only: in a byte-level vocabulary "<s>" may be HTML


def to_word(data: bytes) -> str:
    """The canonical word of some bytes, one character per byte."""
    return data.decode("latin-1").translate(BYTE_TO_CHAR)


def to_bytes(word: str) -> bytes:
    """The bytes of a canonical word. ValueError if a character is not of the byte alphabet."""
    if not IN_ALPHABET(word):
        raise ValueError(f"{word!r} is not a word in the byte alphabet (a space is written 'Ġ', a newline 'Ċ')")
    return word.translate(CHAR_TO_BYTE).encode("latin-1")


def show(word: str) -> str:
    """For people: "Ġthe" -> "␣the"; a byte that is not UTF-8 on its own as <0xAB>, control characters escaped."""
    text = to_bytes(word).decode("utf-8", errors="surrogateescape").replace(" ", "␣")
    return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if "\udc80" <= c <= "\udcff" else c if c.isprintable()
                   else c.encode("unicode_escape").decode() for c in text)


# --- what a tokenizer's tokens stand for

def _backend(tokenizer):
    """The Rust tokenizer behind a transformers one (a bare tokenizers.Tokenizer is taken as it is)."""
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not hasattr(backend, "pre_tokenizer"):
        raise ValueError(f"{type(tokenizer).__name__} has no fast form, which says what its tokens mean")
    return backend


def _spelling(tokenizer) -> str:
    """How tokens are spelt: "bytes", "text", or the character for a space ("▁"); read from its own parts."""
    backend = _backend(tokenizer)
    for affix in ("end_of_word_suffix", "continuing_subword_prefix"):
        if mark := getattr(backend.model, affix, None):
            raise ValueError(f"a tokenizer that marks pieces of words with {mark!r} has no words in bytes")
    # A part's __getstate__ is its JSON; backend.to_str() says the same after half a million merges (seconds for Gemma).
    parts = (backend.decoder, backend.pre_tokenizer, backend.normalizer)
    todo = [json.loads(part.__getstate__()) for part in parts if part is not None]
    space, kinds = None, set()
    while todo:
        part = todo.pop()
        kinds.add(part["type"])
        if part["type"] == "Metaspace":
            space = part["replacement"]
        if part["type"] == "Replace" and "String" in part["pattern"]:       # normalizer " " -> "▁", decoder "▁" -> " "
            ends = {part["pattern"]["String"], part["content"]}
            if " " in ends and len(ends) == 2 and all(len(c) == 1 for c in ends):
                space = (ends - {" "}).pop()
        lists = [value for value in part.values() if isinstance(value, list)]
        todo += [x for value in lists for x in value if isinstance(x, dict) and "type" in x]
    return "bytes" if "ByteLevel" in kinds else space or "text"


def _token_word(token: str, spelling: str) -> str | None:
    """The canonical word of an ordinary token; None for a string that the tokenizer can never produce."""
    if spelling == "bytes":
        return token if IN_ALPHABET(token) else None
    if match := BYTE_TOKEN.fullmatch(token):
        return to_word(bytes.fromhex(match[1]))
    return to_word((token if spelling == "text" else token.replace(spelling, " ")).encode())


def _excluded(tokenizer, spelling: str) -> tuple[set[str], set[str]]:
    """(added, special): every added token, and the tokens that no text may produce."""
    backend = _backend(tokenizer)
    added = backend.get_added_tokens_decoder().values()
    special = {t.content for t in added if t.special} | {getattr(backend.model, "unk_token", None)}
    special |= set(getattr(tokenizer, "all_special_tokens", ()))
    special |= set() if spelling in ("bytes", "text") else SP_CONTROL
    return {t.content for t in added}, special


def tokenizer_words(tokenizer) -> dict[str, int]:
    """Every ordinary token: canonical word -> id. Special, added, reserved and unused tokens are not words.

    A byte token ("<0x61>") is a word only where nothing else spells its byte: next to "a" it is never produced, so its
    embedding was never trained. ValueError if the tokens are not bytes (BERT's "##", CLIP's "</w>").
    """
    spelling = _spelling(tokenizer)
    added, special = _excluded(tokenizer, spelling)
    vocab = _backend(tokenizer).get_vocab(with_added_tokens=False)
    words, byte_tokens = {}, {}
    for token, i in sorted(vocab.items(), key=lambda item: item[1]):       # two spellings of one word: the lower id
        if token in added or token in special or (token[:1] in "<[" and RESERVED.fullmatch(token)):
            continue
        if word := _token_word(token, spelling):
            is_byte = spelling != "bytes" and BYTE_TOKEN.fullmatch(token)
            (byte_tokens if is_byte else words).setdefault(word, i)
    taken = {to_word(t.encode()) for t in added}            # Gemma's "\n" is an added token; "<0x0A>" is dead beside it
    return words | {w: i for w, i in byte_tokens.items() if w not in words and w not in taken}


def shared_words(tokenizers: list) -> list[str]:
    """The words of all tokenizers, in order of their UTF-8 bytes (which is also Python's order of strings)."""
    tables = [tokenizer_words(t) for t in tokenizers]
    return sorted(set(tables[0]).intersection(*tables[1:]))


def word_ids(words: list[str], tokenizer) -> list[list[int]]:
    """Ids of each word in this tokenizer: one id where it is one token, else those of its pieces.

    The pieces are the tokenizer model's own for exactly these bytes: no dummy prefix, no normalizer, no special token
    parsed from text. Their bytes are asserted to be those of the word. ValueError if a word cannot be spelt.
    """
    backend, spelling, table = _backend(tokenizer), _spelling(tokenizer), tokenizer_words(tokenizer)
    special = _excluded(tokenizer, spelling)[1]

    def word_of(ids: list[int]) -> str | None:
        tokens = [backend.id_to_token(i) for i in ids]
        parts = [None if t in special or RESERVED.fullmatch(t) else _token_word(t, spelling) for t in tokens]
        return None if None in parts else "".join(parts)

    def spell(word: str, text: str) -> list[int]:       # text: the word as this tokenizer's model reads it
        if not "\udc80" <= text[-1] <= "\udcff":
            try:
                ids = [piece.id for piece in backend.model.tokenize(text)]
            except Exception:                           # some models raise on what they cannot spell
                ids = []
            if word_of(ids) == word:                    # not so for an unknown token, nor for a special one in the text
                return ids
        if len(text) > 1:                               # character by character
            return [i for c in text for i in spell(_text_word(c, spelling), c)]
        ids = [backend.token_to_id(c if spelling == "bytes" else f"<0x{b:02X}>") for c, b in zip(word, to_bytes(word))]
        if None in ids:
            raise ValueError(f"this tokenizer has no token for {show(word)!r}")
        return ids

    result = []
    for word in words:
        text = word
        if spelling != "bytes":
            text = to_bytes(word).decode("utf-8", errors="surrogateescape")
            text = text if spelling == "text" else text.replace(" ", spelling)
        parts = [part for part in re.split("([\udc80-\udcff])", text) if part]      # stray bytes go one by one
        try:
            ids = [table[word]] if word in table else [i for p in parts for i in spell(_text_word(p, spelling), p)]
        except ValueError as error:
            raise ValueError(f"the word {show(word)!r} ({word!r}) cannot be spelt: {error}") from None
        assert ids and word_of(ids) == word, f"round trip: {word!r} -> {ids} -> {word_of(ids)!r}"
        result.append(ids)
    return result


def _text_word(text: str, spelling: str) -> str:
    """The canonical word of a text in the tokenizer's own spelling; surrogates are stray bytes."""
    if spelling == "bytes":
        return text
    text = text if spelling == "text" else text.replace(spelling, " ")
    return to_word(text.encode("utf-8", errors="surrogateescape"))


# --- the corpus

def read_texts(path, count: str = "all"):
    """Yield for each record of a LLaVA-format file the list of its texts to count.

    count: "all" takes every turn as it stands; "answers" takes the gpt turns, without "<image>".
    Raises ValueError, which names the file and the first record that is not of the format.
    """
    for number, record in enumerate(read_records(path)):
        try:
            messages = turns_of(record)
        except ValueError as error:
            raise ValueError(f"{path}: record {number}: {error}") from None
        if count == "answers":
            answers = [m["content"] for m in messages if m["role"] == "assistant"]
            yield [text.replace(IMAGE, "") for text in answers]
        else:
            yield [m["content"] for m in messages]


def count_words(paths: list, tokenizer, count: str = "all") -> tuple[Counter, int, int]:
    """Return ({word: count}, number of tokens counted, number of records) of LLaVA-format files."""
    backend = _backend(tokenizer)
    backend.no_truncation()                     # transformers sets both anew at each of its own calls
    backend.no_padding()
    ids, texts, records = Counter(), [], 0

    def count_texts():
        for encoding in backend.encode_batch_fast(texts, add_special_tokens=False):
            ids.update(encoding.ids)
        texts.clear()

    for path in paths:
        for turns in read_texts(path, count):
            texts += turns
            records += 1
            if len(texts) >= 10_000:            # bounds the memory of the encodings
                count_texts()
    count_texts()
    words = tokenizer_words(tokenizer)
    return Counter({word: ids[i] for word, i in words.items() if ids[i]}), ids.total(), records


def rank_words(shared: list[str], counts: dict[str, int], size: int) -> list[str]:
    """The `size` most counted words: count descending, ties by UTF-8 bytes; words never counted come last."""
    return sorted(shared, key=lambda w: (-counts.get(w, 0), w.encode()))[:size]


# --- files

def words_hash(words: list[str]) -> str:
    """SHA-256 (hex) of the words joined by newlines, UTF-8. No word contains a newline: it is written "Ċ"."""
    return hashlib.sha256("\n".join(words).encode()).hexdigest()










def save_words(words: list[str], path) -> None:
    """Write words.json, one word a line."""
    write_json(words, path, indent=0)


def load_words(path) -> list[str]:
    """Read words.json. ValueError if it is not a list of different canonical words."""
    words = read_json(path)
    if not isinstance(words, list) or not words or not all(isinstance(w, str) and w for w in words):
        raise ValueError(f"{path} is not a word list: a JSON list of strings")
    for word in words:
        if not IN_ALPHABET(word):
            raise ValueError(f"{path}: {word!r} is not a word in the byte alphabet (a space is written 'Ġ')")
    if twice := [w for w, n in Counter(words).items() if n > 1]:
        raise ValueError(f"{path}: the word {twice[0]!r} is in the list more than once")
    return words


# --- the command

def report(words: list[str], counts: dict[str, int], total: int) -> None:
    """Print what the kept words cover of the counted tokens, the first twenty, and what was never seen."""
    kept = sum(counts.get(w, 0) for w in words)
    if total:
        print(f"coverage     {kept / total:.2%} of {total:,} counted tokens")
    print("top 20       " + " ".join(show(w) for w in words[:20]))
    unseen = [w for w in words if not counts.get(w)]
    print(f"never seen   {len(unseen):,} of the kept words  {' '.join(map(show, unseen[:10]))}")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--tokenizers", nargs="+", metavar="NAME", help="two or more tokenizers: hub names or folders")
    parser.add_argument("--corpus", nargs="+", metavar="X.json", help="LLaVA-format files to count")
    parser.add_argument("--size", type=int, help="how many words (default 19200; an imported file is kept whole)")
    parser.add_argument("--count", choices=("all", "answers"), default="all",
                        help="all turns as they stand (as the official list did), or the gpt turns without <image>")
    parser.add_argument("--count_tokenizer", metavar="NAME", help="the tokenizer that counts (default: the first)")
    parser.add_argument("--out", required=True, metavar="words.json")
    parser.add_argument("--counts", metavar="FILE", help="also write {word: count} of the shared words that were seen")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.add_argument("--offline", action="store_true", help=OFFLINE)
    if any(argument.startswith("--import-official") for argument in sys.argv[1:]):
        raise ValueError("--import-official is now python tools/import_official.py "
                         "FILE --tokenizer A --out words.json")
    args = parser.parse_args()
    if args.offline:
        go_offline()
    if len(args.tokenizers or ()) < 2 or not args.corpus:
        parser.error("give two or more --tokenizers and a --corpus")
    if args.size is not None and args.size < 1:
        parser.error("--size must be at least 1")
    for path in filter(None, (args.out, args.counts)):
        if os.path.exists(path) and not args.overwrite:
            raise ValueError(f"{path} exists; --overwrite replaces it")
    for path in args.corpus:
        if not os.path.isfile(path):
            raise ValueError(f"there is no file {path}")
    return args


def main():
    args = parse_args()
    tokenizers = {name: load_tokenizer(name) for name in args.tokenizers}
    shared = shared_words(list(tokenizers.values()))
    if not shared:
        raise ValueError(f"{' and '.join(tokenizers)} share no word")
    counter = args.count_tokenizer or args.tokenizers[0]
    start = time.time()
    counting = tokenizers[counter] if counter in tokenizers else load_tokenizer(counter)
    counts, total, records = count_words(args.corpus, counting, args.count)
    seconds = time.time() - start
    print(f"counted      {records:,} records in {seconds:.1f} s, {records / seconds:,.0f} per second, by {counter}")
    size = args.size or 19200
    words = rank_words(shared, counts, size)
    if len(words) < size:
        print(f"note         only {len(words):,} words are shared, {size:,} were asked for: all are taken")
    for name, tokenizer in tokenizers.items():
        table = tokenizer_words(tokenizer)
        assert word_ids(words, tokenizer) == [[table[w]] for w in words]        # asserts string -> id -> string as well
        print(f"tokens       {len(table):,} ordinary ones in {name}")
    print(f"shared       {len(shared):,}\nkept         {len(words):,}, sha256 {words_hash(words)}")
    report(words, counts, total)
    if args.counts:
        write_json({w: counts[w] for w in rank_words(shared, counts, len(shared)) if counts.get(w)}, args.counts, 0)
    save_words(words, args.out)
    print(f"wrote        {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"vocab.py: {error}")
