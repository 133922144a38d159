"""Write words.json from a published vocabulary file, checked against the tokenizer it was made for.

    python tools/import_official.py FILE --tokenizer A --out words.json [--counts F]
"""
import argparse
import os
import sys
from collections import Counter

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common
import vocab


def import_official(path, tokenizer):
    """Return (words in order, {word: count} or None) of a published file.

    The file is {token: id}, {token: [id, rank]}, a list of such objects, or the count table
    {token: count}. Numbers that never rise and that cannot be ids (equal ones, or beyond the
    vocabulary) are counts. ValueError names the first token that is not the tokenizer's.
    """
    content = common.read_json(path)
    parts = content if isinstance(content, list) else [content]
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{path} is not a published vocabulary file: an object of token: id")
    pairs = [pair for part in parts for pair in part.items()]
    if not pairs:
        raise ValueError(f"{path} holds no token")
    if all(is_id_and_rank(value) for _, value in pairs):
        pairs = [(token, i) for token, (i, _) in sorted(pairs, key=lambda pair: pair[1][1])]
    numbers = [number for _, number in pairs]
    if not all(type(number) is int for number in numbers):
        raise ValueError(f"{path} is not a published vocabulary file: the value of "
                         f"{pairs[0][0]!r} is not an id")
    backend = vocab.rust_tokenizer(tokenizer)
    size = backend.get_vocab_size()
    never_rise = all(a >= b for a, b in zip(numbers, numbers[1:]))
    cannot_be_ids = len(set(numbers)) < len(numbers) or max(numbers) >= size
    are_counts = never_rise and cannot_be_ids

    table = vocab.tokenizer_words(tokenizer)
    for token, number in pairs:
        if token not in table:
            raise ValueError(f"{path} does not belong to this tokenizer, which has no ordinary "
                             f"token {token!r}")
        if not are_counts and table[token] != number:
            there = backend.id_to_token(number) if 0 <= number < size else None
            raise ValueError(f"{path} does not belong to this tokenizer: it gives {token!r} the id "
                             f"{number}, which is {there!r} in the tokenizer; {token!r} has id "
                             f"{table[token]}")
    words = [token for token, _ in pairs]
    word, times = Counter(words).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{path}: the token {word!r} is in the file more than once")
    return words, dict(pairs) if are_counts else None


def is_id_and_rank(value):
    """Return whether a value is a list of two ints."""
    return isinstance(value, list) and [type(x) for x in value] == [int, int]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("file", metavar="FILE", help="a published {token: id} or {token: count}")
    parser.add_argument("--tokenizer", required=True, help="the tokenizer that FILE was made for")
    parser.add_argument("--size", type=int, help="how many words (default: all)")
    parser.add_argument("--out", required=True, metavar="words.json")
    parser.add_argument("--counts", metavar="FILE", help="also write {word: count}")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.add_argument("--offline", action="store_true", help=common.OFFLINE)
    args = parser.parse_args()
    if args.offline:
        common.go_offline()
    if args.size is not None and args.size < 1:
        parser.error("--size must be at least 1")
    for path in filter(None, (args.out, args.counts)):
        if os.path.exists(path) and not args.overwrite:
            raise ValueError(f"{path} exists; --overwrite replaces it")
    if not os.path.isfile(args.file):
        raise ValueError(f"there is no file {args.file}")

    tokenizer = common.load_tokenizer(args.tokenizer)
    imported, counts = import_official(args.file, tokenizer)
    if args.counts and not counts:
        raise ValueError(f"{args.file} holds ids and no counts, so --counts has no data")
    words = imported[:args.size]
    table = vocab.tokenizer_words(tokenizer)
    assert vocab.word_ids(words, tokenizer) == [[table[word]] for word in words]
    print(f"kept         {len(words):,} of {len(imported):,}, sha256 {vocab.words_hash(words)}")
    if counts:
        vocab.print_coverage(words, counts, sum(counts.values()))
    if args.counts:
        common.write_json({word: counts[word] for word in imported if counts[word]}, args.counts, 0)
    vocab.save_words(words, args.out)
    print(f"wrote        {args.out}")


if __name__ == "__main__":
    common.run_script(main)
