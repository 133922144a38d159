"""
The shared vocabulary: the words that several tokenizers have in common, most frequent first.

A word is a sequence of bytes, written as a string in the GPT-2 byte alphabet: "Ġthe" is b" the".
The tokens of byte-level BPE have this form. SentencePiece writes a space as "▁" and a byte as
"<0xAB>", so its tokens are brought into this form. words.json is a JSON list of words by rank. It
holds no ids, because each tokenizer gives its own.

    python vocab.py --tokenizers A B [C ...] --corpus X.json [...] --size 19200 --out words.json
"""
import hashlib
from collections import Counter

from common import OFFLINE, argument_parser, go_offline, read_json, run_script, write_json
from conversation import IMAGE
from support.checks import refuse_files
from support.hub import load_tokenizer
from support.records import read_records, turns_of
from support.spelling import (BYTE_TOKEN, IN_ALPHABET, RESERVED, Speller, show, special_tokens,
                              spelling_of, to_word, token_to_word)

# --------------------------------------------------------------------------------------------------
# words of a tokenizer

def tokenizer_words(tokenizer):
    """Return {word: id} of every ordinary token.

    Special, added, reserved and unused tokens are not words. If an ordinary token "a" exists, the
    tokenizer never produces the byte token "<0x61>". The embedding of "<0x61>" was therefore never
    trained, and it is no word. ValueError if tokens are not bytes.
    """
    spelling = spelling_of(tokenizer)
    special, added = special_tokens(tokenizer, spelling)
    tokens = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False)
    excluded, words, byte_tokens = special | added, {}, {}
    # By id: of two spellings of one word the lower id counts.
    for token, i in sorted(tokens.items(), key=lambda item: item[1]):
        if token in excluded or (token[:1] in "<[" and RESERVED.fullmatch(token)):
            continue
        word = token_to_word(token, spelling)
        if word:
            is_byte = spelling != "bytes" and BYTE_TOKEN.fullmatch(token)
            (byte_tokens if is_byte else words).setdefault(word, i)
    # Gemma's "\n" is an added token, so its "<0x0A>" is never produced either.
    spelt = words.keys() | {to_word(token.encode()) for token in added}
    return words | {word: i for word, i in byte_tokens.items() if word not in spelt}


def shared_words(tokenizers):
    """Return the words that all tokenizers have, in the order of their UTF-8 bytes."""
    tables = [tokenizer_words(tokenizer) for tokenizer in tokenizers]
    return sorted(set(tables[0]).intersection(*tables[1:]))


def word_ids(words, tokenizer):
    """Return the ids of each word: one id if it is one token, else those of its pieces.

    An assert checks that the pieces spell the word. ValueError if a word cannot be spelt.
    """
    table = tokenizer_words(tokenizer)
    speller = Speller(tokenizer)
    result = []
    for word in words:
        ids = [table[word]] if word in table else speller.pieces(word)
        if None in ids:
            raise ValueError(f"this tokenizer cannot spell the word {show(word)!r} ({word!r})")
        spelt = speller.word_of(ids)
        assert ids and spelt == word, f"round trip: {word!r} -> {ids} -> {spelt!r}"
        result.append(ids)
    return result


# --------------------------------------------------------------------------------------------------
# the corpus

def read_texts(path, count="all"):
    """Yield for each record of a LLaVA-format file the list of its texts to count.

    count: "all" takes every turn as it stands; "answers" takes the gpt turns, without "<image>".
    ValueError names the file and the first record that is not of the format.
    """
    for place, record in read_records(path):
        try:
            messages = turns_of(record)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        if count == "answers":
            answers = [m["content"] for m in messages if m["role"] == "assistant"]
            yield [text.replace(IMAGE, "") for text in answers]
        else:
            yield [m["content"] for m in messages]


def count_words(paths, tokenizer, count="all"):
    """Return ({word: count}, number of tokens counted, number of records) of LLaVA-format files."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()                 # transformers sets both at each of its own calls
    backend.no_padding()
    records = [texts for path in paths for texts in read_texts(path, count)]
    texts = [text for record in records for text in record]
    ids = Counter()
    for start in range(0, len(texts), 10_000):          # bounds the memory of the encodings
        part = texts[start:start + 10_000]
        for encoding in backend.encode_batch_fast(part, add_special_tokens=False):
            ids.update(encoding.ids)
    words = tokenizer_words(tokenizer)
    return Counter({word: ids[i] for word, i in words.items() if ids[i]}), ids.total(), len(records)


def rank_words(shared, counts, size):
    """Return the `size` most counted words: by falling count, ties by UTF-8 bytes."""
    return sorted(shared, key=lambda word: (-counts.get(word, 0), word.encode()))[:size]


# --------------------------------------------------------------------------------------------------
# words.json

def words_hash(words):
    """Return the SHA-256 (hex) of the words joined by newlines; no word holds a newline."""
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def save_words(words, path):
    """Write words.json, one word a line."""
    write_json(words, path, indent=0)


def load_words(path):
    """Return the words of words.json. ValueError if it is not a list of different words."""
    words = read_json(path)
    if not isinstance(words, list) or not words or not all(isinstance(w, str) and w for w in words):
        raise ValueError(f"{path} is not a word list: a JSON list of strings")
    for word in words:
        if not IN_ALPHABET(word):
            raise ValueError(f"{path}: {word!r} is not a word in the byte alphabet (a space is "
                             "written 'Ġ')")
    word, times = Counter(words).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{path}: the word {word!r} is in the list more than once")
    return words


# --------------------------------------------------------------------------------------------------
# the command

def print_coverage(words, counts, total):
    """Print what part of the counted tokens the words cover, and which were never seen."""
    covered = sum(counts.get(word, 0) for word in words)
    unseen = [word for word in words if not counts.get(word)]
    print(f"coverage     {covered / total:.2%} of {total:,} counted tokens")
    print("top 20       " + " ".join(show(word) for word in words[:20]))
    print(f"never seen   {len(unseen):,} of the kept words  {' '.join(map(show, unseen[:10]))}")


def read_arguments():
    parser = argument_parser(__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--tokenizers", nargs="+", metavar="NAME", help="two or more: hub names or folders")
    add("--corpus", nargs="+", metavar="X.json", help="LLaVA-format files to count")
    add("--size", type=int, default=19200, help="how many words (default 19200)")
    add("--count", choices=("all", "answers"), default="all",
        help="all turns, as for the official list, or the gpt turns without <image>")
    add("--out", required=True, metavar="words.json")
    add("--overwrite", action="store_true", help="replace existing files")
    add("--offline", action="store_true", help=OFFLINE)
    args = parser.parse_args()
    if args.offline:
        go_offline()
    if len(args.tokenizers or ()) < 2 or not args.corpus:
        parser.error("give two or more --tokenizers and a --corpus")
    if args.size < 1:
        parser.error("--size must be at least 1")
    refuse_files([args.out], args.overwrite)
    return args


def main():
    args = read_arguments()
    print("tokenizers  ", ", ".join(args.tokenizers), flush=True)
    tokenizers = {name: load_tokenizer(name) for name in args.tokenizers}
    shared = shared_words(list(tokenizers.values()))
    if not shared:
        raise ValueError(f"{' and '.join(tokenizers)} share no word")
    counter = args.tokenizers[0]
    counts, total, records = count_words(args.corpus, tokenizers[counter], args.count)
    if not total:
        raise ValueError(f"there is no text to count in {' '.join(args.corpus)}")
    print(f"counted      {records:,} records, by {counter}")
    words = rank_words(shared, counts, args.size)
    if len(words) < args.size:
        print(f"note         only {len(words):,} words are shared, {args.size:,} were asked for: "
              "all are taken")
    for name, tokenizer in tokenizers.items():
        table = tokenizer_words(tokenizer)
        print(f"tokens       {len(table):,} ordinary ones in {name}")
    print(f"shared       {len(shared):,}\nkept         {len(words):,}, sha256 {words_hash(words)}")
    print_coverage(words, counts, total)
    save_words(words, args.out)
    print(f"wrote        {args.out}")


if __name__ == "__main__":
    run_script(main)
