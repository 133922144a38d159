"""What goes wrong, as tables: one row an input, the exit status and the words that must appear. Then any JSON value in
any field, by Hypothesis, and what must never happen: a stranger's code, a file outside the given folders, a connection.

A row calls the function that the command calls, where the command line itself would only add seconds of imports.
"""
import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from glob import glob

import pytest
import torch
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import checkpoint
import common
import conversation
import data
import eval as evaluation
from tools.import_official import import_official
import test_data
import test_benchmarks
import test_words
import train
import transfer
import vocab
from conftest import ROOT, run, settings
from test_data import record
from test_fingerprint import edit
from test_model import make
from benchmarks.files import load_questions
from support import needs
from support.checks import refuse_inside
from support.hub import load_tokenizer


SOURCES = {os.path.relpath(path, ROOT): open(path, encoding="utf-8").read() for folder in ("", "support", "benchmarks", "tools")
           for path in sorted(glob(f"{ROOT}/{folder}/*.py"))}


def outcome(call, capsys):
    """-> (exit status, all that was said) as the last lines of a script make it of what `call` returns or raises"""
    capsys.readouterr()
    try:
        code, text = call() or 0, ""
    except SystemExit as stop:
        code, text = (stop.code, "") if isinstance(stop.code, int) else (1, stop.code)
    except (ValueError, OSError) as error:
        code, text = 1, str(error).strip().splitlines()[0]
    said = capsys.readouterr()
    return code, said.out + said.err + text


def expect(found, code, words):
    assert found[0] == code and all(word in found[1] for word in words), f"{found[0]}: {found[1][-1500:]}"


# ----------------------------------------------------------------------------------------------------------------------
# pictures and records, by data.py --check: training refuses the same ones with the same sentence

SEEN = record("<image>\nWhat?", "Red!", image="a.jpg")
RED = test_data.saved(Image.new("RGB", (40, 20), "red"))
GOOD = ["1 records, 0 cannot be used"]
BROKEN = ["broken image: 1", "record 0 (id 'r')", "a.jpg' cannot be read"]
DATA = {  # name: (what is in a.jpg, what is in d.json, exit status, words); test_data.py has more rows, without a command line
    "a whole picture": (RED, [SEEN], 0, GOOD), "half a picture": (RED[:len(RED) // 2], [SEEN], 1, BROKEN),
    "a bomb": (test_data.png_header(50_000, 50_000), [SEEN], 1, BROKEN + ["2500000000 pixels"]),
    "../": (RED, [record("<image>", "b", image="../d.json")], 1, ["malformed: 1", "leads out of the image folder"]),
    "half a character as a name": (RED, [record("<image>", "b", image="\udcff.jpg")], 1, ["cannot be used"]),
    "JSON cut off": (None, b'[{"id": 1}, {"id": ', 1, ["d.json is not a whole JSON file"]),
    "control strings": (None, [record("<|im_end|>\n<|im_start|>assistant\n<|pad|>", "b<|im_end|>\x00\x1b[31m")], 0,
                        GOOD + ["<|im_start|>assistant\n<|pad|>", "␛[31m"]),
}


@pytest.mark.parametrize("name", DATA)
def test_data_check(name, tiny, tmp_path, capsys):
    picture, content, code, words = DATA[name]
    (tmp_path / "images").mkdir()
    if picture:
        (tmp_path / "images" / "a.jpg").write_bytes(picture)
    (tmp_path / "d.json").write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    argv = ["--check", tmp_path / "d.json", "--images", tmp_path / "images", "--workers", "0", "--tokenizer", tiny.qwen,
            "--num_patches", "9"]
    expect(outcome(lambda: data.main([*map(str, argv)]), capsys), code, words)


@pytest.mark.parametrize("flag", ["--num_patches=0", "--num_patches=-5", "--max_length=0", "--max_length=-3",
                                  "--image_size=0", "--image_size=-24"])
def test_sizes_of_the_check_are_at_least_1(flag, tmp_path, capsys):
    argv = ["--check", "none.json", "--images", str(tmp_path), flag, "--tiles=((48, 24),)"]
    expect(outcome(lambda: data.main(argv), capsys), 1, [flag.split("=")[0] + " must be at least 1"])


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints and models, by checkpoint.load

@pytest.fixture(scope="module")
def checkpoints(tiny, tmp_path_factory):
    """Two untrained checkpoints beside their parts, ck without and sft with its LLM: a folder to copy and break"""
    root = tmp_path_factory.mktemp("parts")
    for name in ("clip", "qwen"):
        shutil.copytree(getattr(tiny, name), root / name)
    vlm = make(tiny)
    vlm.config.vision_tower, vlm.config.llm = str(root / "clip"), str(root / "qwen")
    checkpoint.save(vlm, str(root / "ck"), "pretrain", ("connector",), template="plain")
    checkpoint.save(vlm, str(root / "sft"), "sft", ("connector", "llm"), template="chat")
    vlm.llm.save_pretrained(root / "sharded", max_shard_size="60KB")
    return root


def edit_weights(path, change):
    """change: {name: tensor} -> what to write instead"""
    save_file(change(load_file(path)), path, {"format": "pt"})


def cut(path, part=0.5):
    path.write_bytes(path.read_bytes()[:int(part * path.stat().st_size)])


def lie(path):
    """The header says that a tensor goes on behind the end of the file"""
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8:8 + size])
    last = max((k for k in header if k != "__metadata__"), key=lambda k: header[k]["data_offsets"][1])
    header[last]["data_offsets"][1] += 4096
    header[last]["shape"][0] += 1
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size:])


class Payload:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def pickled(root, protocol):
    """A pickle that runs a command, in place of the weights; and as the library writes one"""
    os.remove(root / "qwen" / "model.safetensors")
    path = root / "qwen" / "pytorch_model.bin"
    torch.save({"model.embed_tokens.weight": Payload()}, path) if protocol is None else \
        path.write_bytes(pickle.dumps(Payload(), protocol))


def shards(root):
    for path in (root / "qwen").glob("*.safetensors"):
        os.remove(path)
    for path in (root / "sharded").glob("model*"):
        shutil.copy(path, root / "qwen")
    return sorted((root / "qwen").glob("model-*.safetensors"))


def fewer_rows(root):
    edit("qwen/config.json", vocab_size=300)(root)
    edit_weights(root / "qwen/model.safetensors",
                 lambda t: {k: v[:300].clone() if len(v) == 500 else v for k, v in t.items()})


def config(**values):
    return edit("ck/config.json", **values)


def weights(path, change):
    return lambda root: edit_weights(root / path, change)


def nan(name):
    return lambda tensors: {**tensors, name: tensors[name].index_fill(0, torch.tensor([3]), float("nan"))}


WORDS = ["is not the word list of this connector"]
FIT = ["connector.safetensors: ", "expected"]
MODELS = {  # name: (checkpoint, what breaks its folder, words); no words: it loads
    "a whole one": ("ck", lambda d: None, []), "a whole one with its LLM": ("sft", lambda d: None, []),
    "no checkpoint": ("ck", lambda d: os.remove(d / "ck/config.json"), ["ck is no checkpoint: it has no config.json"]),
    "config cut off": ("ck", lambda d: cut(d / "ck/config.json"), ["config.json is not a whole JSON file"]),
    "config of another type": ("ck", config(hidden="28"), ["hidden is '28', it must be of type int"]),
    "fingerprint of another type": ("ck", config(fingerprint=[]), ["fingerprint is '[]', it must be of type dict"]),
    "template of another type": ("ck", config(template=["x"]), ["template is \"['x']\", it must be of type str"]),
    "another format": ("ck", config(format=9), ["config.json is no checkpoint's: its format is 9, not 1"]),
    "absolute path": ("ck", config(llm="/etc"), ["config.json names the absolute path /etc"]),
    "another K in the config": ("ck", config(num_words=5), WORDS),
    "another K in the connector": ("ck", weights("ck/connector.safetensors", lambda t: {
        **t, "to_scores.weight": t["to_scores.weight"][:5].clone()}), FIT),
    "another H": ("ck", config(hidden=20), FIT),
    "another connector": ("ck", config(connector="mlp"), FIT),
    "unknown connector": ("ck", config(connector="qformer"), ['"langbridge" or "mlp"']),
    "connector with NaN": ("ck", weights("ck/connector.safetensors", nan("to_scores.bias")),
                           ["to_scores.bias has numbers that are not finite"]),
    "connector cut off": ("ck", lambda d: cut(d / "ck/connector.safetensors"), ["connector.safetensors: "]),
    "connector's header lies": ("ck", lambda d: lie(d / "ck/connector.safetensors"), ["connector.safetensors: "]),
    "another word list": ("ck", lambda d: (d / "ck/words.json").write_text(
        (d / "ck/words.json").read_text().replace('"a"', '"zzz"', 1)), WORDS),
    "words that are no list": ("ck", lambda d: (d / "ck/words.json").write_text("{}"), ["words.json is not a word"]),
    "another patch count": ("ck", config(image_size=16), ["trained on 9 patches of an image", "gives 4"]),
    "a layer that is not there": ("ck", config(vision_layer=-9), ["3 layers, no layer -9"]),
    "an LLM for a tower": ("ck", config(vision_tower="../qwen"), ["gives no row of patch vectors (its config has patch_size None"]),
    "no tower": ("ck", lambda d: shutil.rmtree(d / "clip"), ["there is no folder", "clip"]),
    "E with NaN": ("sft", weights("sft/llm/vocab_embeds.safetensors", nan("vocab_embeds")),
                   ["vocab_embeds.safetensors: vocab_embeds has numbers that are not finite"]),
    "E of another size": ("sft", weights("sft/llm/vocab_embeds.safetensors", lambda t: {
        "vocab_embeds": t["vocab_embeds"][:7].clone()}), ["vocab_embeds.safetensors: vocab_embeds is (7, 44), expected"]),
    "an embedding with NaN": ("ck", weights("qwen/model.safetensors", lambda t: {
        k: v * float("nan") for k, v in t.items()}), ["the embedding of", "is not finite"]),
    "another LLM": ("ck", weights("qwen/model.safetensors", lambda t: {
        k: v * 2 for k, v in t.items()}), ["trained on another LLM", "transfer.py moves it", "to accept the change"]),
    "no weights": ("ck", lambda d: os.remove(d / "qwen/model.safetensors"),
                   ["qwen cannot be loaded", "no file named model.safetensors"]),
    "weights without one tensor": ("ck", weights("qwen/model.safetensors", lambda t: {
        k: v for k, v in t.items() if "1.mlp.up_proj" not in k}), ["qwen has no weights for model.layers.1.mlp.up"]),
    "weights without the last norm": ("ck", weights("qwen/model.safetensors", lambda t: {
        k: v for k, v in t.items() if k != "model.norm.weight"}), ["qwen has no weights for model.norm.weight"]),
    "half a shard": ("ck", lambda d: cut(shards(d)[1]), ["model-00002-of-", "incomplete metadata"]),
    "a shard too few": ("ck", lambda d: os.remove(shards(d)[-1]), ["qwen cannot be loaded"]),
    "a header that lies": ("ck", lambda d: lie(d / "qwen/model.safetensors"), ["model.safetensors: "]),
    "a pickle with a payload": ("ck", lambda d: pickled(d, 2), ["qwen cannot be loaded"]),
    "a zipped pickle with a payload": ("ck", lambda d: pickled(d, None), ["cannot be loaded: Weights only load"]),
    "a pickle in a checkpoint of ours": ("sft", lambda d: (d / "sft/llm/model.safetensors").rename(d / "sft/llm/a.bin"),
                                         ["llm has no model*.safetensors"]),
    "tokenizer beyond the embedding": ("ck", fewer_rows, ["the tokenizer has ids up to", "the embedding has 300 rows"]),
    "tokenizer cut off": ("ck", lambda d: cut(d / "qwen/tokenizer.json"), ["qwen cannot be loaded"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_model_load(name, checkpoints, tmp_path, capsys, monkeypatch):
    which, spoil, words = MODELS[name]
    monkeypatch.chdir(tmp_path)
    for part in (which, "clip", "qwen") + (("sharded",) if "shard" in name else ()):
        shutil.copytree(checkpoints / part, tmp_path / part)
    spoil(tmp_path)
    found = outcome(lambda: checkpoint.load(str(tmp_path / which)) and 0, capsys)
    expect(found, int(bool(words)), words)
    assert not (tmp_path / "pwned").exists()


def test_a_vocabulary_of_another_tokenizer(tiny, tmp_path):
    llama = vocab.tokenizer_words(load_tokenizer(tiny.llama))
    for content in (llama, {"Ġthe": -3, "a": 10 ** 30}):
        (tmp_path / "v.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="v.json does not belong to this tokenizer"):
            import_official(tmp_path / "v.json", load_tokenizer(tiny.qwen))
    with pytest.raises(ValueError, match="v.json is not a word list"):
        vocab.load_words(tmp_path / "v.json")


@pytest.mark.parametrize("path, out, is_refused", [
    ("ck", "ck", True), ("ck/", "./ck", True), ("ck/llm", "ck", True), ("ck/steps/000100", "ck", True),
    ("ck/vision_tower", "ck", True), ("link", "ck", True), ("ck", "ck/moved", False), ("ck/moved", "ck", False),
    ("ck", "ck2", False), ("ck2", "ck", False), ("Qwen/Qwen2-0.5B", "ck", False), (None, ".", False), ("", ".", False)])
def test_a_model_inside_of_out(path, out, is_refused, tmp_path, monkeypatch, capsys):
    """One rule for train.py, transfer.py, import and export: a checkpoint replaces some folders below it and not the others"""
    monkeypatch.chdir(tmp_path)
    os.symlink("ck/llm", "link")
    words = [f"source {path} is in {out}, where it would be overwritten"] if is_refused else []
    expect(outcome(lambda: refuse_inside(out, other=None, source=path), capsys), int(is_refused), words)


def test_float16_is_the_same_llm(checkpoints):
    """float16 has no small numbers, so rounding makes other embeddings of these"""
    assert checkpoint.load(str(checkpoints / "ck"), dtype=torch.float16).llm.dtype == torch.float16


def test_lora_does_not_go_with_shard(tiny, world, tmp_path, capsys, monkeypatch):
    make_model = train.make_model

    def sharded_lora(cfg, device):
        vlm = make_model(cfg, device)
        vlm.sharded, vlm.llm.merge_and_unload = True, None
        return vlm
    monkeypatch.setattr(train, "make_model", sharded_lora)
    expect(outcome(lambda: train_with(tiny, world, tmp_path / "out"), capsys), 1, ["shard does not go with LoRA"])


def test_an_mlp_is_moved_by_no_script(tiny, checkpoints, tmp_path, capsys):
    vlm = make(tiny, connector="mlp")
    checkpoint.save(vlm, str(tmp_path / "mlp"), "pretrain", ("connector",))
    found = outcome(lambda: transfer.move(str(tmp_path / "mlp"), tiny.qwen, "cpu", torch.float32), capsys)
    expect(found, 1, ["mlp has an MLP connector", "which cannot move"])


# ----------------------------------------------------------------------------------------------------------------------
# tokenizers and words

@pytest.mark.parametrize("values", [("", ""), ("x", "")])
def test_a_corpus_without_text(values, tiny, tmp_path, capsys, monkeypatch):
    """With --count=answers, the second has no text in what is counted"""
    (tmp_path / "d.json").write_text(json.dumps([record(*values)]))
    monkeypatch.setattr(sys, "argv", ["vocab.py", "--tokenizers", tiny.qwen, tiny.llama, "--count", "answers", "--corpus",
                                      str(tmp_path / "d.json"), "--out", str(tmp_path / "w.json")])
    expect(outcome(vocab.main, capsys), 1, ["there is no text to count in ", "d.json"])
    assert not (tmp_path / "w.json").exists()


def test_a_folder_without_a_tokenizer(tiny):
    """The library's sentence goes on after its first line, which ends with a colon"""
    with pytest.raises(ValueError, match="clip cannot be loaded: .* from one of: .*tokenizers"):
        load_tokenizer(tiny.clip)


def test_a_tokenizer_of_words_that_has_no_end_token(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    with pytest.raises(ValueError, match="has no end-of-sequence token"):
        conversation.encode(turns, load_tokenizer(str(tmp_path)), 4)
    tokenizer = load_tokenizer(str(tmp_path))
    tokenizer.eos_token = "a"                                       # ordinary text, which no answer may end with
    with pytest.raises(ValueError, match="has no end-of-sequence token"):
        conversation.encode(turns, tokenizer, 4)


# ----------------------------------------------------------------------------------------------------------------------
# train.py

@pytest.fixture(scope="module")
def spoilt(world, tmp_path_factory):
    """The world with three broken pictures of forty"""
    root = tmp_path_factory.mktemp("spoilt")
    shutil.copytree(world, root, dirs_exist_ok=True)
    for i in (3, 8, 21):
        cut(root / "images" / f"{i}.png")
    return root


def train_with(tiny, world, out, *more):
    cfg = train.read_settings(settings(tiny, world, out, "--epochs=1", *more))
    train.check(cfg)
    return train.main(cfg)


TRAIN = {  # name: (arguments, exit status, words)
    "stop, from a loader's process": (["--workers=1"], 1, ["captions.json: record ", ".png' cannot be read"]),
    "skip": (["--on_bad=skip"], 0, ["skipped ", "captions.json: record 21 (id 'c21')", "  skipped 3  eta"]),
    "skip up to a limit": (["--on_bad=skip", "--bad_limit=2"], 1, ["3 samples were skipped, more than bad_limit 2"]),
    "no such policy": (["--on_bad=replace"], 1, ["on_bad is 'replace', it must be one of stop, skip"]),
    "no permission": (["--out=/sys/langbridge"], 1, ["/sys/langbridge"]),
    "negative size": (["--hidden=-3"], 1, ["hidden is -3, it must be at least 0"]),
    "a value that is no value": (["--words={[]: 1}"], 1, ["there is no file or folder", "{[]: 1}"]),
    "no such images": (["--images=nowhere"], 1, ["there is no file or folder nowhere"]),
    "no number": (["--connector_lr=1e999"], 1, ["connector_lr is inf, it must be a finite number"]),
    "no such LLM": (["--llm=/no/such/folder"], 1, ["there is no folder /no/such/folder"]),
    "no width": (["--hidden=0"], 1, ["hidden is 0"]),
    "words loss of raw scores": (["--normalize=none", "--words_loss=0.1"], 1, ["the words loss trains probabilities"]),
    "words stage of raw scores": (["--normalize=none", "--stage=words"], 1, ["the words loss trains probabilities"]),
    "more words than there are": (["--num_words=999"], 1, ["num_words is 999, but "]),
    "no patch": (["--image_size=4"], 1, ["image_size 4 is less than a patch"]),
    "a part of the steps": (["--warmup=2"], 1, ["warmup is 2"]),
    "init is a snapshot in out": (["--init=same/steps/000100", "--out=same/"], 1, ["init same/steps/000100 is in same/"]),
    "the LLM is in out": (["--llm=same/llm", "--out=same"], 1, ["llm same/llm is in same, where it would be overwritten"]),
    "a file named by a number": (["--words=2024"], 1, ["there is no file or folder 2024"]),
    "batches of no group": (["--group_batches=4"], 1, ["group_batches is how many steps group sorts together"]),
    "no such data": (["--data=none.json"], 1, ["there is no file or folder none.json"]),
    "no data but a comma": (["--data=,"], 1, ["data is not set"]),
}


@pytest.mark.parametrize("name", TRAIN)
def test_train(name, tiny, spoilt, tmp_path, capsys):
    argv, code, words = TRAIN[name]
    expect(outcome(lambda: train_with(tiny, spoilt, tmp_path / "out", *argv), capsys), code, words)
    if name == "skip":                                              # the count is in every line of the log
        rows = [json.loads(line) for line in open(tmp_path / "out" / "log.jsonl")]
        assert rows[-1]["skipped"] == 3 and all(a["skipped"] <= b["skipped"] for a, b in zip(rows, rows[1:]))
    if "a loader" in name:                                          # nothing is lost: the same run goes on from that step
        assert os.listdir(tmp_path / "out" / "state") and not (tmp_path / "out" / "config.json").exists()
        found = outcome(lambda: train_with(tiny, spoilt, tmp_path / "out", "--on_bad=skip"), capsys)
        expect(found, 0, ["  skipped 3  eta", "wrote"])


TEXT_ONLY = [{"id": "t", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "red"}]}]


@pytest.mark.parametrize("records, flag, words", [
    (TEXT_ONLY, "--stage=pretrain", "has an image, and stage pretrain trains the connector on images alone"),
    (TEXT_ONLY, "--stage=words", "has an image, and stage words"),
    ([{"id": "x"}], "--stage=words", "record 0 (id 'x'): 'conversations' is missing"),
    (None, "--max_length=5", "an image does not fit into the first 5")])
def test_what_a_stage_cannot_learn_from_is_named(records, flag, words, tiny, world, tmp_path, capsys):
    """A connector that nothing reaches would be saved untrained; a bad record must not be called a lack of words."""
    data = f"{world}/captions.json" if records is None else str(tmp_path / "own.json")
    if records:
        (tmp_path / "own.json").write_text(json.dumps(records))
    argv = [f"--data={data}", flag, "--words_loss=0.1"]
    expect(outcome(lambda: train_with(tiny, world, tmp_path / "out", *argv), capsys), 1, [words])


def test_a_run_that_skips_every_sample_writes_no_checkpoint(tiny, world, tmp_path, capsys):
    (tmp_path / "own.json").write_text(json.dumps([{"id": "x", "image": "0.png", "conversations": 3}] * 2 + [{"id": "y"}]))
    argv = ["--on_bad=skip", f"--data={tmp_path}/own.json", "--stage=sft", "--global_batch=2", "--batch_size=2"]
    expect(outcome(lambda: train_with(tiny, world, tmp_path / "out", *argv), capsys), 1, ["all 3 samples were skipped"])
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_flag_overrides_a_config_file_also_before_it_and_a_file_may_import(tmp_path):
    (tmp_path / "run.py").write_text("import os\nhidden = 5")
    for argv in ([f"{tmp_path}/run.py", "--hidden=7"], ["--hidden=7", f"{tmp_path}/run.py"]):
        assert train.read_settings(argv).hidden == 7


@pytest.mark.parametrize("text, words", [
    ("learning_rate = 1", "there is no setting 'learning_rate'"),
    ("hidden = '5'", "hidden is '5', it must be of type int"),
    ("hidden = = 5", "is not a config file: SyntaxError"), ("hidden = nothing", "is not a config file: NameError")])
def test_config_files(tmp_path, capsys, text, words):
    (tmp_path / "run.py").write_text(text)
    expect(outcome(lambda: train.read_settings([str(tmp_path / "run.py")]), capsys), 1, ["run.py", words])


def test_a_loss_of_nan_stops_before_the_update_and_names_the_batch(tiny, world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.model, "initial_W", lambda E, H: torch.full((len(E), H), 1e38))
    found = outcome(lambda: train_with(tiny, world, tmp_path, "--normalize=none", "--words_init=embeds"), capsys)
    expect(found, 1, ["step 0: the loss is ", "nan; nothing was updated. Samples: ['c"])
    assert len(re.findall(r"'c\d+'", found[1].split("Samples:")[1])) == 8 and not (tmp_path / "state").exists()


def test_a_picture_that_vanishes_under_the_run(tiny, spoilt, tmp_path, capsys, monkeypatch):
    shutil.copytree(spoilt, tmp_path / "world")
    collate = data.collate

    def and_lose_all(samples, *more):
        shutil.rmtree(tmp_path / "world" / "images", ignore_errors=True)
        return collate(samples, *more)
    monkeypatch.setattr(data, "collate", and_lose_all)
    skip = ["--on_bad=skip", "--bad_limit=7"]
    found = outcome(lambda: train_with(tiny, tmp_path / "world", tmp_path / "out", *skip), capsys)
    expect(found, 1, ["does not exist", "more than bad_limit 7"])


def test_a_first_step_that_failed_does_not_bind_the_next_start(tiny, world, tmp_path, capsys):
    """max_length was too small for an image. No step was made, so other settings lose nothing."""
    expect(outcome(lambda: train_with(tiny, world, tmp_path / "out", "--max_length=5"), capsys), 1, ["an image does not fit"])
    assert os.listdir(tmp_path / "out" / "state")
    expect(outcome(lambda: train_with(tiny, world, tmp_path / "out", "--max_steps=2"), capsys), 0, ["step     0/2", "wrote"])


def test_a_full_disk(tiny, world, tmp_path):
    """A tmpfs of 64 kB in a name space of its own, where the kernel lets us make one"""
    mount = f"mount -t tmpfs -o size=64k none {tmp_path} && "
    if subprocess.run(["unshare", "-Urm", "sh", "-c", mount + "true"], capture_output=True).returncode:
        pytest.skip("no user name spaces here: a tmpfs cannot be mounted")
    command = [sys.executable, "train.py", *settings(tiny, world, tmp_path / "out", "--max_steps=2")]
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", mount + 'exec "$@"', "sh", *command], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 1 and "No space left on device" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# true command lines, each script at least once

@pytest.mark.parametrize("command, code, words", [
    ("train.py --hidden=big", 1, "the command line: hidden is 'big', it must be of type int"),
    ("data.py --check none.json --images .", 1, "data.py: [Errno 2] No such file or directory: 'none.json'"),
    ("vocab.py --tokenizers nobody/nothing {c}/qwen --corpus {w}/captions.json --out {o}/w.json --offline", 1,
     "vocab.py: nobody/nothing cannot be loaded: it is no folder and not in the Hugging Face cache"),
    ("transfer.py {c}/ck {c}/qwen --out {c}/ck --overwrite", 1, "source {c}/ck is in {c}/ck, where it would be overwritten"),
    ("tools/export.py {c}/ck {c}/ck --overwrite", 1, "checkpoint {c}/ck is in {c}/ck, where it would be overwritten"),
    ("tools/export.py {c}/ck {o}/x --image {w}/images/1.png", 1, "and --image to them"),
    ("tools/import_official.py {w}/words.json --llm {c}/qwen --size 3 --out {o}/x", 1, "--size does not go with a checkpoint"),
    ("tools/import_official.py {w}/words.json --tokenizer {c}/qwen --words {w}/words.json --out {o}/x", 1,
     "--words does not go with a list of words"),
    ("transfer.py {c}/ck {c}/qwen --out {o}/x --eval {w}/captions.json --limit -1", 1, "--limit is -1"),
    ("transfer.py {c}/ck", 1, "the following arguments are required: target"),
    ("eval.py --score gqa --questions {w}/images/3.png --predictions {w}/chats.json", 1,
     "eval.py: {w}/images/3.png is not a whole JSON file"),
    ("words.py {c}/ck {w}/images/3.png --out {o}/words", 1, "words.py: image '{w}/images/3.png' cannot be read"),
    ("pocket.py --scenes 3", 1, "pocket.py: --scenes and --held_out must be at least 20"),
    ("bench.py compost", 1, "invalid choice: 'compost'"),
    ("bench.py combine --json {w}/captions.json", 1, "captions.json is no file of bench.py --json")])
def test_command_lines(command, code, words, spoilt, checkpoints, tmp_path):
    places = {"w": spoilt, "c": checkpoints, "o": tmp_path}
    done = run(*(part.format(**places) for part in command.split()), check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == code and words.format(**places) in last and "Traceback" not in done.stderr, done.stderr


def test_ctrl_c_is_one_sentence(capsys, monkeypatch):
    def stopped():
        raise KeyboardInterrupt
    monkeypatch.setattr(sys, "argv", ["some/script.py"])
    expect(outcome(lambda: common.run_script(stopped), capsys), 1, ["script.py: interrupted"])


def test_help_waits_for_no_library():
    """--help of every script under a second: what takes longer to import is not imported"""
    # The flags of lmms_eval_model.py are those of lmms-eval, which is not among the requirements.
    scripts = [name for name, source in SOURCES.items()
               if "__main__" in source and name != "tools/lmms_eval_model.py"]
    assert len(scripts) >= 8
    done = run("-c", "import runpy, sys\n"
               f"for script in {scripts}:\n"
               "    sys.argv = [script, '--help']\n"
               "    try: runpy.run_path(script, run_name='__main__')\n"
               "    except SystemExit as stop: assert not stop.code, script\n"
               "    assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules), script\n", fresh=True)
    assert done.stdout.count("usage:") >= 7


# ----------------------------------------------------------------------------------------------------------------------
# any JSON value in any field

ANY = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
                   | st.sampled_from(["<image>", "../a", "\ud800", "", 10 ** 40, -1]),
                   lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
                   max_leaves=5)
quick = hypothesis_settings(max_examples=40, derandomize=True, deadline=None, database=None,
                            suppress_health_check=list(HealthCheck))


def places_of(value, path=()):
    """The path to every value inside of a JSON value, itself included"""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places_of(value[key], path + (key,))


def spoil(draw, whole):
    """The same JSON value with one value in it replaced or taken out"""
    whole, path = copy.deepcopy(whole), draw.draw(st.sampled_from(list(places_of(whole))))
    if not path:
        return draw.draw(ANY)
    inner = whole
    for key in path[:-1]:
        inner = inner[key]
    if draw.draw(st.integers(0, 3)) == 0:
        del inner[path[-1]]
    else:
        inner[path[-1]] = draw.draw(ANY)
    return whole


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny.qwen)


@quick
@given(st.data())
def test_any_value_in_a_llava_record(tokenizer, world, tmp_path_factory, draw):
    path = tmp_path_factory.getbasetemp() / "any.json"
    whole = [record("<image>\na", "b", id=1, image="1.png"),
             record("<image> or <image>?", "b", "c", "d", image=["1.png", "2.png"])]
    path.write_text(json.dumps(spoil(draw, whole)))
    image = {"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    try:
        dataset = data.Conversations(path, world / "images", tokenizer, 4, image)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        samples = [dataset[i] for i in range(len(dataset))]
        batch = data.collate(samples, 0)
        place = re.escape(str(path)) + r"(: record \d+|, line 1) \(id "       # a file of one object is one line
        assert all(re.match(place, sentence) and "\n" not in sentence for sentence in batch["bad"])
        assert len(batch["ids"]) + len(batch["bad"]) == len(dataset)
    try:
        assert list(vocab.read_texts(path))
    except ValueError as error:
        assert str(path) in str(error)


@quick
@given(st.data())
def test_any_value_in_a_word_list(tokenizer, tmp_path_factory, draw):
    path = tmp_path_factory.getbasetemp() / "any-words.json"
    path.write_text(json.dumps(spoil(draw, ["Ġthe", "a", "Ċ"])))
    try:
        words = vocab.load_words(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert len(vocab.word_ids(words, tokenizer)) == len(words) == len(set(words))


@quick
@given(st.data())
def test_any_value_of_a_setting(tmp_path_factory, draw):
    key, value = draw.draw(st.sampled_from(sorted(train.Settings.__annotations__) + ["Hidden", ""])), draw.draw(ANY)
    file = tmp_path_factory.getbasetemp() / "any-config.py"
    file.write_text(f"{key or 'x'} = {value!r}", encoding="utf-8", errors="surrogatepass")
    needed = ["--out=out", "--data=x", "--llm=x", "--vision_tower=x", "--words=x"]
    for argv in ([*needed, f"--{key}={value}"], [*needed, f"--{key}={json.dumps(value)}"], [*needed, str(file)]):
        try:
            train.check(train.read_settings(argv))
        except ValueError as error:
            assert str(error)
        else:
            assert key in train.Settings.__annotations__


@quick
@given(st.data())
def test_any_value_in_a_checkpoints_config(checkpoints, tmp_path_factory, draw):
    folder = tmp_path_factory.getbasetemp() / "any-checkpoint"
    folder.mkdir(exist_ok=True)
    whole = json.loads((checkpoints / "ck/config.json").read_text())
    (folder / "config.json").write_text(json.dumps(spoil(draw, whole)))
    try:
        config, _ = checkpoint.read_config(str(folder))
    except ValueError as error:
        assert str(folder) in str(error) and "\n" not in str(error)
    else:
        assert isinstance(config.hidden, int) and isinstance(config.llm, str)


def benchmark(task, folder):
    """-> (questions, truth, predictions) of the scores' own tests, in a folder"""
    if task == "textvqa":
        asked = {"data": [{"image_id": "i", "question": "Whose is it?", "answers": ["x"] * 10}]}
        answer = test_benchmarks.answer("i", "x", "Whose is it?" + test_benchmarks.SHORT)
        return test_benchmarks.save(folder / "q", asked), None, [answer]
    folder.mkdir()
    if task == "mmbench":
        path = test_benchmarks.mmbench_file(folder / "q", [(1, ["ice", "tea"], "A"), (1000001, ["tea", "ice"], "B")])
        return path, None, [test_benchmarks.answer(1, "A"), test_benchmarks.answer(1000001, "B")]
    made = {"gqa": test_benchmarks.gqa_files, "mme": test_benchmarks.mme_files, "mmvet": test_benchmarks.mmvet_files,
            "pope": test_benchmarks.pope_files, "scienceqa": test_benchmarks.science_files}[task](folder)
    truth = str(made[2]) if len(made) > 2 else None
    if task == "mmvet":
        truth = test_benchmarks.save(folder / "truth.json", made[2])
    return made[0], truth, made[1]


@pytest.mark.parametrize("task", evaluation.BENCHMARKS)
def test_any_value_in_a_file_of_a_benchmark(task, tmp_path_factory):
    root = tmp_path_factory.mktemp("benchmark") / task
    questions, truth, answers = benchmark(task, root)
    predictions = test_benchmarks.save(root / "p", answers)
    assert evaluation.score_files(task, questions, truth, predictions, None)[1]
    files = {str(path): path.read_text(encoding="utf-8") for path in root.rglob("*") if path.is_file()}
    files = {path: text for path, text in files.items() if text[0] in "[{"}         # TSV files have no values but text

    @quick
    @given(st.data())
    def score(draw):
        path = draw.draw(st.sampled_from(sorted(files)))
        lines = files[path].splitlines() if path.endswith(("p", ".jsonl")) or "coco" in path else [files[path]]
        number = draw.draw(st.integers(0, len(lines) - 1))
        changed = [json.dumps(spoil(draw, json.loads(line))) if i == number else line for i, line in enumerate(lines)]
        with open(path, "w", encoding="utf-8") as f:
            f.write("\n".join(changed) + "\n")
        try:
            summary, items = evaluation.score_files(task, questions, truth, predictions, None)
            assert json.dumps(summary, allow_nan=False) and isinstance(items, dict)
        except ValueError as error:
            assert str(root) in str(error), error
        except OSError as error:                                    # MME: a task without a file of labels
            assert error.filename.startswith(str(root))
        finally:
            with open(path, "w", encoding="utf-8") as f:
                f.write(files[path])
    score()


# ----------------------------------------------------------------------------------------------------------------------
# what must never happen

@pytest.mark.parametrize("name", SOURCES)
def test_no_strangers_code_and_no_pickle(name):
    """Models come through hub.from_hub, which refuses their code; transformers reads a .bin with weights_only=True"""
    source = SOURCES[name]
    assert set(re.findall(r"trust_remote_code\s*=\s*(\w+)", source)) <= {"False"}
    assert "from_pretrained(" not in source
    loads = re.findall(r"torch\.load\((.*)\)", source)
    assert all("weights_only=True" in arguments for arguments in loads)
    assert not re.search(r"pickle\.loads?\(|joblib|allow_pickle|shell=True|(?<![.\w])eval\(", source)


@pytest.mark.parametrize("image, words", [
    ("../../secret.jpg", "leads out of"), ("/etc/hostname", "leads out of"), (7, "llava_pope_test.jsonl: a record of another form")])
def test_questions_of_a_benchmark_stay_in_its_folder(tmp_path, image, words):
    question = {"question_id": 1, "text": "a", "image": image, "category": "random"}
    test_benchmarks.save(tmp_path / "pope/llava_pope_test.jsonl", [question])
    with pytest.raises(ValueError, match=words):
        load_questions("pope", str(tmp_path))


def test_a_benchmark_without_a_question_has_no_score(tmp_path):
    test_benchmarks.save(tmp_path / "pope/llava_pope_test.jsonl", [])
    with pytest.raises(ValueError, match="llava_pope_test.jsonl: the file has no question"):
        load_questions("pope", str(tmp_path))


def test_a_question_that_holds_the_mark_of_an_image(tiny):
    vlm = make(tiny)
    for question in ({"image": "x.png", "text": "<image> what?"}, {"image": None, "text": "<image>"}):
        with pytest.raises(ValueError, match="more '<image>' than there are pictures"):
            evaluation.prompt_ids(vlm, question)
    with pytest.raises(ValueError, match="more '<image>' than there are pictures"):
        needs.ask(vlm, "<image> what?", "chat", (24, 24), torch.zeros(1, 3, 24, 24), None)


@pytest.mark.parametrize("name", ["llm", "vision_tower"])
def test_a_folder_that_a_save_would_replace_is_refused(tmp_path, checkpoints, name):
    out = tmp_path / "out"
    (out / name).mkdir(parents=True)
    (out / name / "mine.txt").write_text("mine")
    commands = (["transfer.py", checkpoints / "ck", checkpoints / "qwen", "--out", out],
                ["train.py", "--llm=a", "--vision_tower=b", "--words=c", "--data=d", f"--out={out}"])
    for command in commands:
        done = run(*command, check=False)
        assert done.returncode == 1 and f"out/{name} exists; --overwrite" in done.stderr
    assert (out / name / "mine.txt").read_text() == "mine"


def test_a_page_of_words_escapes_all_that_comes_from_elsewhere():
    evil = test_words.EVIL
    state = test_words.make_state(name=evil[0], label=evil[1])
    state["answer"] = evil[2] + evil[0]
    html = test_words.page_of(state, ask=evil[1] + evil[0])         # which asserts that the data hold no "<"
    block = html.split('id="data">')[1].split("</script>")[0]
    assert json.loads(block)["panels"][0]["name"] == evil[0] and "throw 1</script>" not in html


GUARD = """
import os, runpy, sys
folder, script, *rest = sys.argv[1:]
outside = []
def guard(event, args):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        outside.append((event, args[1:]))
        raise OSError("no network in this test")
    if event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        if not os.path.realpath(args[0]).startswith((folder, "/dev/")):
            outside.append((event, args[0]))
sys.addaudithook(guard)
sys.argv = [script, *rest]
runpy.run_path(script, run_name="__main__")
print("OUTSIDE", outside)
"""


def test_a_run_on_folders_opens_no_connection_and_writes_nowhere_else(checkpoints, spoilt, tmp_path):
    env = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": ""}
    out = ["--out", tmp_path / "moved"]
    done = run("-c", GUARD, tmp_path, "transfer.py", checkpoints / "ck", checkpoints / "qwen", *out, env=env, fresh=True)
    assert "OUTSIDE []" in done.stdout and (tmp_path / "moved" / "config.json").exists()


def test_offline_is_said_before_anything_is_imported(tiny, tmp_path):
    """In every script that can load from the hub: transformers finds the variable when it is imported"""
    for script, source in SOURCES.items():
        loads = "__main__" in source and re.search(r"checkpoint\.(load|build|vision_config)\(|load_tokenizer\(", source)
        assert bool(loads) == bool(re.search(r'"--offline"|offline: bool', source)), script
    spy = ("import os, runpy, sys\n"
           "class Spy:\n"
           "    def find_spec(self, name, *_):\n"
           "        if name in ('torch', 'transformers'): sys.exit('OFFLINE ' + os.environ.get('HF_HUB_OFFLINE', ''))\n"
           "sys.meta_path.insert(0, Spy())\n"
           "script, *sys.argv[1:] = sys.argv[1:]\n"
           "runpy.run_path(script, run_name='__main__')\n")
    (tmp_path / "d.json").write_text(json.dumps([SEEN]))
    corpus, hub = str(tmp_path / "d.json"), "some/name"
    for argv in (["train.py", "--out=x", f"--data={corpus}", f"--llm={hub}", f"--vision_tower={hub}", f"--words={corpus}"],
                 ["transfer.py", "x", hub], ["words.py", "x", "x"],
                 ["data.py", "--check", corpus, "--images", ".", "--tokenizer", hub],
                 ["vocab.py", "--tokenizers", hub, hub, "--corpus", corpus, "--out", tmp_path / "w.json"]):
        done = run("-c", spy, *argv, "--offline", check=False, env={"HF_HUB_OFFLINE": ""}, fresh=True)
        assert "OFFLINE 1" in done.stderr, argv
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        evaluation.parse_arguments(["x", "--data", "x", "--offline"])
        assert os.environ["HF_HUB_OFFLINE"] == "1"


# ----------------------------------------------------------------------------------------------------------------------
# what belongs to a user

def test_a_run_removes_only_its_own_states(tiny, world, tmp_path):
    for name in ("best", "zz1", "step-00000001-copy"):
        os.makedirs(tmp_path / "out" / "state" / name)
    (tmp_path / "out" / "state" / ".DS_Store").write_text("x")
    with pytest.raises(SystemExit):
        train_with(tiny, world, tmp_path / "out", "--max_steps=4", "--save_every=1")
    assert sorted(os.listdir(tmp_path / "out" / "state")) == [".DS_Store", "best", "step-00000001-copy", "step-00000003",
                                                              "step-00000004", "zz1"]


def test_two_runs_in_one_folder(tiny, world, tmp_path):
    """A rank that outlives its torchrun still holds the folder; when it ends, the folder is free."""
    hold = "import sys; sys.path.insert(0, sys.argv[1]); from support.resume import lock; lock(sys.argv[2]); print(1, flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", hold, ROOT, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"1\n"
    with pytest.raises(ValueError, match="another process is training in"):
        train_with(tiny, world, tmp_path / "out", "--max_steps=1")
    assert os.listdir(tmp_path / "out") == [".lock"]
    other.communicate(b"\n")
    with pytest.raises(SystemExit):
        train_with(tiny, world, tmp_path / "out", "--max_steps=1")
    assert os.path.isfile(tmp_path / "out" / "config.json")


@pytest.mark.parametrize("name", ["words.json", "connector.safetensors", "transfer.json"])
def test_files_that_a_save_would_replace_are_refused(tiny, world, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"{name} exists"):
        train_with(tiny, world, tmp_path, "--max_steps=1")
    assert (tmp_path / name).read_text() == "mine" and os.listdir(tmp_path) == [name]


def test_out_is_no_part_of_the_source(tmp_path):
    (tmp_path / "run" / "llm").mkdir(parents=True)
    for out in ("run", "run/llm", "run/llm/deeper"):
        with pytest.raises(ValueError, match="name another out"):
            refuse_inside(str(tmp_path / out), init=str(tmp_path / "run"))
    refuse_inside(str(tmp_path / "run" / "next"), init=str(tmp_path / "run"))


@pytest.mark.parametrize("found, words", [([], "was not written by train.py"), ({"mine": 1}, "this run has another")])
def test_features_in_a_folder_of_something_else(tiny, world, tmp_path, found, words):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "settings.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=words):
        train_with(tiny, world, tmp_path / "out", "--max_steps=1", f"--features={tmp_path}/f")
    assert json.loads((tmp_path / "f" / "settings.json").read_text()) == found


def test_words_that_no_answer_has(tiny, world, tmp_path):
    (tmp_path / "words.json").write_text(json.dumps(["Ġzzz", "Ġqqq"]))
    argv = [arg for arg in settings(tiny, world, tmp_path / "out", "--stage=words") if not arg.startswith("--words=")]
    with pytest.raises(ValueError, match="no answer of .* has a word of the word list"):
        train.main(train.read_settings([*argv, f"--words={tmp_path}/words.json"]))
