"""Run: python -m pytest tests/test_vocab.py. Tokenizers of four families are made here: hermetic."""
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import conftest  # noqa: E402
import vocab  # noqa: E402
from support.spelling import to_bytes  # noqa: E402
from tools.import_official import import_official  # noqa: E402

TEXT = ["a red ball beside a blue box.\nthe ball is small, the box is big", "the cat sees the red box and a café",
        "Describe the image.\n<image>", "two red balls; the box!", "the the the ball"] * 4
BYTES = [f"<0x{b:02X}>" for b in range(256)]
SPECIAL = ["<unk>", "<|end|>"]


def wrap(backend):
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<|end|>")


def byte_level(size=340):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    t.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet,
                                                    show_progress=False))
    t.add_tokens([AddedToken("<tool>", special=False)])
    return wrap(t)


def sentencepiece_bpe():
    t = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    t.normalizer = normalizers.Replace(" ", "▁")
    t.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    t.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL + ["<unused7>"] + BYTES,
                                                    show_progress=False))
    # the trainer makes the byte tokens special; in a real model they are ordinary entries of the vocabulary
    state = json.loads(t.to_str())
    state["added_tokens"] = [a for a in state["added_tokens"] if a["content"] in SPECIAL]
    return wrap(Tokenizer.from_str(json.dumps(state)))


def sentencepiece_unigram():
    pieces = ["▁the", "▁red", "▁ball", "▁box", "▁a", "▁b", "all", "the", "</s>"] + list("▁abcdefghilmnorstuxy.,;!\n")
    vocabulary = [("<unk>", 0.0), ("<|end|>", 0.0)] + [(b, -20.0) for b in BYTES]
    vocabulary += [(p, -2.0 - i / 9) for i, p in enumerate(pieces)]
    t = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    t.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    metaspace = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    t.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace])
    t.add_special_tokens(SPECIAL)
    return wrap(t)


def plain_bpe():
    t = Tokenizer(models.BPE(unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False))
    return wrap(t)


FAMILIES = [byte_level, sentencepiece_bpe, sentencepiece_unigram, plain_bpe]


@pytest.fixture(scope="module")
def toks():
    return {make.__name__: make() for make in FAMILIES}


def corpus(path, texts=TEXT):
    records = [{"id": str(i), "image": "x.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": text}]}
        for i, text in enumerate(texts)]
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1))
    return records


def slow_counts(records, tokenizer, answers=False):
    """An independent count: every text by itself, token string by token string."""
    ids = Counter()
    for record in records:
        for turn in record["conversations"]:
            if answers and turn["from"] != "gpt":
                continue
            text = turn["value"].replace("<image>", "") if answers else turn["value"]
            ids.update(tokenizer.encode(text, add_special_tokens=False))
    words = {i: w for w, i in vocab.tokenizer_words(tokenizer).items()}
    return {words[i]: n for i, n in ids.items() if i in words}, ids.total()


def test_words_and_bytes_are_a_bijection():
    assert vocab.to_word(b" the\n") == "ĠtheĊ" and to_bytes("Ġthe") == b" the"
    data = bytes(range(256))
    assert to_bytes(vocab.to_word(data)) == data and len(set(vocab.to_word(data))) == 256
    assert set(vocab.to_word(data)) == set(pre_tokenizers.ByteLevel.alphabet())        # GPT-2's, from another source
    with pytest.raises(ValueError, match="byte alphabet"):
        to_bytes("a b")


def test_show_is_readable():
    words = ["Ġthe", "Ċ", vocab.to_word("é".encode()), vocab.to_word(b"\xc3")]
    assert [vocab.show(w) for w in words] == ["␣the", "\\n", "é", "<0xC3>"]


def test_families_are_recognised_and_share_words(toks):
    assert [vocab.spelling_of(t) for t in toks.values()] == ["bytes", "▁", "▁", " "]
    three = vocab.shared_words([toks["byte_level"], toks["sentencepiece_bpe"], toks["sentencepiece_unigram"]])
    assert {"Ġthe", "Ġred", "Ġbox", "a", "."} <= set(three)
    assert "the" in vocab.shared_words([toks["sentencepiece_unigram"], toks["plain_bpe"]])
    assert three == sorted(three, key=str.encode)


def test_word_is_what_the_tokenizer_decodes(toks):
    for name in ("byte_level", "sentencepiece_bpe"):
        backend = toks[name].backend_tokenizer
        for word, i in vocab.tokenizer_words(toks[name]).items():
            assert backend.decode([i]) == to_bytes(word).decode(errors="replace"), (name, word)


def test_special_added_reserved_and_dead_tokens_are_not_words(toks):
    for name, tokenizer in toks.items():
        words = vocab.tokenizer_words(tokenizer)
        ids = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
        assert not ids & set(words.values()), name
        assert not {"<unk>", "<|end|>", "<tool>", "<unused7>"} & set(words), name
    unigram = vocab.tokenizer_words(toks["sentencepiece_unigram"])
    pieces = toks["sentencepiece_unigram"].get_vocab()
    assert "</s>" not in unigram and unigram["a"] == pieces["a"] != pieces["<0x61>"]
    assert unigram["Z"] == pieces["<0x5A>"]             # no other token spells it, so this one is produced


def test_pieces_spell_the_word_on_every_family(toks):
    words = ["Ġthe", "Ġredball", "Ġzebra", "ĠĠ", "</s>", "<unk>", "<|end|>", "<unused7>", "ĊĊ"]
    words += [vocab.to_word(x) for x in ("café".encode(), "漢".encode(), b"\xc3", b"ab\xff\xfe", b"\xa9z")]
    for name in ("byte_level", "sentencepiece_bpe", "sentencepiece_unigram"):
        tokenizer = toks[name]
        forbidden = set(tokenizer.all_special_ids)
        for word, ids in zip(words, vocab.word_ids(words, tokenizer)):
            assert ids and not forbidden & set(ids), (name, word)
            pieces = []
            for token in tokenizer.convert_ids_to_tokens(ids):                   # an own, naive reading of the pieces
                if name == "byte_level":
                    pieces.append(to_bytes(token))
                else:
                    byte = token.startswith("<0x")
                    pieces.append(bytes([int(token[3:5], 16)]) if byte else token.replace("▁", " ").encode())
            assert b"".join(pieces) == to_bytes(word), (name, word)
    assert len(vocab.word_ids(["Ġthe"], toks["sentencepiece_unigram"])[0]) == 1
    assert vocab.word_ids(["Ġredball"], toks["byte_level"])[0] == toks["byte_level"].encode(" redball")


def test_a_word_that_cannot_be_spelt_is_named(toks):
    with pytest.raises(ValueError, match="␣the"):
        vocab.word_ids(["the", "Ġthe"], toks["plain_bpe"])
    with pytest.raises(ValueError, match="##"):
        vocab.tokenizer_words(wrap(Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))))


@pytest.mark.parametrize("answers", [False, True])
def test_counts_equal_a_slow_loop(toks, tmp_path, answers):
    odd = ["two  spaces here", " leading", "trailing ", "tab\t x", "line \n x\n  y", "the ball <|end|> the", "",
           "don't <tool> 漢字 x"]
    records = corpus(tmp_path / "c.json", TEXT + odd)
    for name, tokenizer in toks.items():
        counts, total, n = vocab.count_words([tmp_path / "c.json"], tokenizer, "answers" if answers else "all")
        assert (dict(counts), total) == slow_counts(records, tokenizer, answers), name
        assert n == len(records)


def test_order_is_count_then_bytes_and_a_small_list_is_a_prefix():
    shared, counts = ["b", "a", "é", "Ġz", "Z"], {"b": 2, "é": 2, "Z": 5}
    full = vocab.rank_words(shared, counts, 99)
    assert full == ["Z", "b", "é", "a", "Ġz"] == vocab.rank_words(shared[::-1], counts, 99)
    assert all(vocab.rank_words(shared, counts, k) == full[:k] for k in range(6))


def test_word_list_round_trip_and_refusals(tmp_path):
    words = ["Ġthe", "Ċ", "ÃĤ"]
    vocab.save_words(words, tmp_path / "w.json")
    assert vocab.load_words(tmp_path / "w.json") == words == json.loads((tmp_path / "w.json").read_text())
    assert vocab.words_hash(["a", "b"]) == \
        "7e18f737311b2dc3b2f269dd78396b0351f14fb66efa879f768cb23181883c78"        # printf 'a\nb' | sha256sum
    for bad, sentence in ((["a", "a"], "more than once"), (["a b"], "alphabet"), ({"a": 1}, "list"), ([], "list")):
        (tmp_path / "bad.json").write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=sentence):
            vocab.load_words(tmp_path / "bad.json")


def test_official_files_are_accepted_or_refused(toks, tmp_path):
    tokenizer, path = toks["byte_level"], tmp_path / "o.json"
    table = vocab.tokenizer_words(tokenizer)
    words = ["Ġthe", "Ġred", "a", ".", "Ġbox"]
    forms = [({w: table[w] for w in words}, None), ([{w: [table[w], k]} for k, w in enumerate(words)], None),
             ({w: [table[w], k] for k, w in enumerate(words)}, None), (dict(zip(words, (900, 70, 3, 3, 1))),) * 2]
    for content, counts in forms:
        path.write_text(json.dumps(content))
        assert import_official(path, tokenizer) == (words, counts)
    wrong = {w: table[w] for w in words}
    wrong["a"], wrong["."] = wrong["."], wrong["a"]
    missing = {"Ġthe": table["Ġthe"], "Ġgiraffe": 3}
    for content, name in ((wrong, "'a'"), (missing, "Ġgiraffe"), ({"<|end|>": 1}, "end")):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=name):
            import_official(path, tokenizer)


def run(*args):
    return conftest.run("vocab.py", *args, check=False)


def test_command_line_end_to_end(toks, tmp_path, monkeypatch, capsys):
    def inside(*args):                                  # the same call without a new process, which costs seconds
        monkeypatch.setattr(sys, "argv", ["vocab.py", *map(str, args)])
        vocab.main()
        return capsys.readouterr().out

    for name in ("byte_level", "sentencepiece_bpe"):
        toks[name].save_pretrained(tmp_path / name)
    records = corpus(tmp_path / "c.json")
    a, b, out = tmp_path / "byte_level", tmp_path / "sentencepiece_bpe", tmp_path / "words.json"
    build = ["--tokenizers", a, b, "--corpus", tmp_path / "c.json", "--out", out]
    done = run(*build, "--size", 20)
    assert done.returncode == 0, done.stderr
    words, counts = vocab.load_words(out), slow_counts(records, toks["byte_level"])[0]
    shared = vocab.shared_words([toks["byte_level"], toks["sentencepiece_bpe"]])
    assert words == sorted(shared, key=lambda w: (-counts.get(w, 0), w.encode()))[:20]
    assert "coverage" in done.stdout and vocab.words_hash(words) in done.stdout

    refused = run(*build)
    assert refused.returncode != 0 and "exists" in refused.stderr and "Traceback" not in refused.stderr
    assert vocab.load_words(out) == words
    assert "all are taken" in inside(*build, "--overwrite")                     # more asked for than there are
    assert len(vocab.load_words(out)) == len(shared) and vocab.load_words(out)[:20] == words

    (tmp_path / "o.json").write_text(json.dumps({w: i for w, i in vocab.tokenizer_words(toks["byte_level"]).items()}))
    tool = [ROOT / "tools" / "import_official.py", tmp_path / "o.json", "--tokenizer", a, "--out", tmp_path / "i.json"]
    conftest.run(*tool)
    assert len(vocab.load_words(tmp_path / "i.json")) == len(vocab.tokenizer_words(toks["byte_level"]))
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("content, sentence", [
    ('{"a": 1}', "line 1: 'conversations' is missing"), ('[{"conversations": [{"from": "gpt", "value": "x"}]}, {"text": 1}]', "record 1"),
    ('[{"conversations": [{"from": "gpt", "value": 3}]}]', "record 0"), ('[{"conversations": [', "whole JSON"),
    ('[{"conversations": [{"from": "wizard", "value": "x"}]}]', "record 0"), ("", "no records"),
    ('{"conversations": [{"from": "gpt", "value": "x"}]}\n{"conversations": 1}\n', "line 2")])
def test_broken_corpus_is_one_sentence_with_file_and_record(tmp_path, content, sentence):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ValueError, match=sentence) as error:
        list(vocab.read_texts(tmp_path / "c.json"))
    assert "c.json" in str(error.value) and "\n" not in str(error.value)


def test_wrong_calls_are_one_line_without_traceback(tmp_path):
    corpus(tmp_path / "c.json")
    for args in (["--tokenizers", "x", "y", "--corpus", tmp_path / "none.json", "--out", tmp_path / "w.json"],
                 ["--tokenizers", tmp_path, tmp_path, "--corpus", tmp_path / "c.json", "--out", tmp_path / "w.json"]):
        done = run(*args)
        assert done.returncode != 0 and "Traceback" not in done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith("vocab.py: ")
