"""Write words.json from a published vocabulary file, checked against the tokenizer it was made for.

    python tools/import_official.py FILE --tokenizer A --out words.json [--counts F]
"""
import argparse
import os
import sys
from collections import Counter

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common import OFFLINE, go_offline, load_tokenizer, read_json, run_script, write_json  # noqa: E402
from vocab import print_coverage, save_words, tokenizer_words, word_ids, words_hash  # noqa: E402


def import_official(path, tokenizer) -> tuple[list[str], dict[str, int] | None]:
    """(words in order, counts or None) of a published file, checked against the tokenizer that it was made for.

    Forms: {token: id}, {token: [id, rank]} (or a list of such), and the count table {token: count}. Numbers that
    fall from line to line and cannot be ids (ties, or beyond the vocabulary) are counts. ValueError names the first
    token that does not match.
    """
    data, table = read_json(path), tokenizer_words(tokenizer)
    parts = data if isinstance(data, list) else [data]
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise ValueError(f"{path} is not a published vocabulary file: an object of token: id")
    pairs = [pair for part in parts for pair in part.items()]
    if not pairs:
        raise ValueError(f"{path} holds no token")
    if all(isinstance(v, list) and len(v) == 2 and all(type(x) is int for x in v) for _, v in pairs):
        pairs = [(token, i) for token, (i, _) in sorted(pairs, key=lambda pair: pair[1][1])]
    numbers = [n for _, n in pairs]
    if not all(type(n) is int for n in numbers):
        raise ValueError(f"{path} is not a published vocabulary file: the value of {pairs[0][0]!r} is not an id")
    falling = all(a >= b for a, b in zip(numbers, numbers[1:]))
    counts = falling and (len(set(numbers)) < len(numbers) or max(numbers) >= tokenizer.backend_tokenizer.get_vocab_size())
    for token, number in pairs:
        if token not in table:
            raise ValueError(f"{path} does not belong to this tokenizer, which has no ordinary token {token!r}")
        if not counts and table[token] != number:
            size = tokenizer.backend_tokenizer.get_vocab_size()
            there = tokenizer.backend_tokenizer.id_to_token(number) if 0 <= number < size else None
            raise ValueError(f"{path} does not belong to this tokenizer: it gives {token!r} the id {number}, which is "
                             f"{there!r} in the tokenizer; {token!r} has id {table[token]}")
    words = [token for token, _ in pairs]
    if len(set(words)) < len(words):
        raise ValueError(f"{path}: the token {Counter(words).most_common(1)[0][0]!r} is in the file more than once")
    return words, dict(pairs) if counts else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("file", metavar="FILE", help="a published {token: id} or {token: count} file")
    parser.add_argument("--tokenizer", required=True, help="the tokenizer that FILE was made for")
    parser.add_argument("--size", type=int, help="how many words (default: all)")
    parser.add_argument("--out", required=True, metavar="words.json")
    parser.add_argument("--counts", metavar="FILE", help="also write {word: count}")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    parser.add_argument("--offline", action="store_true", help=OFFLINE)
    args = parser.parse_args()
    if args.offline:
        go_offline()
    if args.size is not None and args.size < 1:
        parser.error("--size must be at least 1")
    for path in filter(None, (args.out, args.counts)):
        if os.path.exists(path) and not args.overwrite:
            raise ValueError(f"{path} exists; --overwrite replaces it")
    if not os.path.isfile(args.file):
        raise ValueError(f"there is no file {args.file}")

    tokenizer = load_tokenizer(args.tokenizer)
    imported, counts = import_official(args.file, tokenizer)
    if args.counts and not counts:
        raise ValueError(f"{args.file} holds ids and no counts, so --counts has no data")
    words = imported[:args.size]
    table = tokenizer_words(tokenizer)
    assert word_ids(words, tokenizer) == [[table[word]] for word in words]
    print(f"kept         {len(words):,} of {len(imported):,}, sha256 {words_hash(words)}")
    if counts:
        print_coverage(words, counts, sum(counts.values()))
    if args.counts:
        write_json({word: counts[word] for word in imported if counts[word]}, args.counts, 0)
    save_words(words, args.out)
    print(f"wrote        {args.out}")


if __name__ == "__main__":
    run_script(main)
