"""What a run, a checkpoint and a kept answer depend on: one row for each part that changes, and the words that name it."""
import datetime
import json
import os
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import chat_template_utils

import checkpoint
import conversation
import eval as evaluation
import test_benchmarks
import train
import transfer
from conftest import CHATML, settings, train_here
from support import fingerprint
from support.hub import load_tokenizer


def weights(path, part, which=slice(None)):
    """Change the sign of the numbers `which` in all tensors that have `part` in their names"""
    def change(root):
        tensors = load_file(root / path)
        chosen = [name for name in tensors if part in name]
        assert chosen
        for name in chosen:
            tensors[name].view(-1)[which] *= -1
        save_file(tensors, root / path, {"format": "pt"})
    return change


def edit(path, **values):
    """Set keys of a JSON file; a key of value None is taken out"""
    def change(root):
        whole = {**json.loads((root / path).read_text()), **values} if (root / path).exists() else values
        gone = [key for key, value in values.items() if value is None]
        (root / path).write_text(json.dumps({key: value for key, value in whole.items() if key not in gone}))
    return change


def replace(path, old, new):
    def change(root):
        text = (root / path).read_text()
        assert old in text
        (root / path).write_text(text.replace(old, new, 1))
    return change


def merges(root):
    """The same tokens with the same ids, but other pieces of a word"""
    spec = json.loads((root / "llm/tokenizer.json").read_text())
    spec["model"]["merges"].reverse()
    (root / "llm/tokenizer.json").write_text(json.dumps(spec))


def reverse_words(root):
    words = json.loads((root / "words.json").read_text())
    (root / "words.json").write_text(json.dumps(words[::-1]))


def shards(root):
    llm = AutoModelForCausalLM.from_pretrained(root / "llm")
    os.remove(root / "llm/model.safetensors")
    llm.save_pretrained(root / "llm", max_shard_size="60KB")
    assert len(list((root / "llm").glob("model-*.safetensors"))) > 1


def repaint(name):
    """Another picture in a file of the same size: BMP does not compress"""
    def change(root):
        size = (root / "images" / name).stat().st_size
        Image.new("RGB", (24, 24), "yellow").save(root / "images" / name, "BMP")
        assert (root / "images" / name).stat().st_size == size
    return change


def swap(root):
    a, b = root / "images/one.bmp", root / "images/two.bmp"
    a.rename(root / "images/x"), b.rename(a), (root / "images/x").rename(b)


TEMPLATE = "llm/chat_template.jinja"
MODELS = {  # name: (what changes, source and part that are named; None: nothing that counts has changed)
    "nothing": (lambda root: None, None),
    "the template's text after a turn": (lambda root: (root / TEMPLATE).write_text(CHATML + "changed"), "llm chat template"),
    "the template's system turn": (replace(TEMPLATE, "{{ m.content }}", "{{ m.content }}{% if m.role == 'system' %}!{% endif %}"),
                                   "llm chat template"),
    "the template's prompt": (replace(TEMPLATE, "assistant\n{% endif", "assistant\n<think>{% endif"), "llm chat template"),
    "the template drops thoughts": (replace(TEMPLATE, "{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"), "llm chat template"),
    "a comment in the template": (lambda root: (root / TEMPLATE).write_text("{# new #}" + CHATML), None),
    "the tower": (weights("tower/model.safetensors", ""), "vision_tower weights"),
    "one layer of the tower": (weights("tower/model.safetensors", "layers.1.mlp.fc1.weight"), "vision_tower weights"),
    "the tower's activation": (edit("tower/config.json", hidden_act="relu"), "vision_tower config.json"),
    "the preprocessor's std": (edit("tower/preprocessor_config.json", image_std=[0.9, 0.9, 0.9]), "vision_tower preprocessor_config.json"),
    "the LLM's blocks": (weights("llm/model.safetensors", "mlp"), "llm weights"),
    "one tensor of the LLM": (weights("llm/model.safetensors", "layers.1.self_attn.q_proj.weight"), "llm weights"),
    "one number of the LLM": (weights("llm/model.safetensors", "layers.0.mlp.up_proj.weight", 7), "llm weights"),
    "the LLM's config": (edit("llm/config.json", rms_norm_eps=0.1), "llm config.json"),
    "where an answer ends": (edit("llm/generation_config.json", eos_token_id=7), "llm generation_config.json"),
    "the tokenizer's merges": (merges, "llm tokenizer"),
    "the tokenizer's end of text": (edit("llm/tokenizer_config.json", eos_token="<|pad|>"), "llm tokenizer"),
    "other files with the same tensors": (shards, None),
    "the version of the library": (edit("llm/config.json", transformers_version="9.9"), None),
    "a file that nobody reads": (lambda root: (root / "llm/README.md").write_text("new"), None),
}
RUN = {
    "the words in another order": (reverse_words, "words words"),
    "a record": (replace("data.json", "a red square", "a red circle"), "data data"),
    "a record less": (lambda root: (root / "data.json").write_text(
        json.dumps(json.loads((root / "data.json").read_text())[:-1])), "data number of records"),
    "a picture": (repaint("one.bmp"), "images images of the data"),
    "a picture named in a list": (repaint("two.bmp"), "images images of the data"),
    "a picture in a folder of the folder": (repaint("sub/three.bmp"), "images images of the data"),
    "two pictures change names": (swap, "images images of the data"),
    "a picture less": (lambda root: os.remove(root / "images/two.bmp"), "images images of the data"),
    "the time of a picture": (lambda root: os.utime(root / "images/one.bmp", (1, 1)), None),
    "a picture that no record names": (lambda root: Image.new("RGB", (9, 9)).save(root / "images/new.png"), None),
}


@pytest.fixture(scope="module")
def parts(tiny, world, tmp_path_factory):
    """A run of two steps, as if killed after the first, and a checkpoint of it: a folder to copy and change"""
    root = tmp_path_factory.mktemp("parts")
    for name, source in (("llm", tiny.qwen), ("tower", tiny.clip)):
        shutil.copytree(source, root / name)
    shutil.copy(world / "words.json", root)
    records = json.loads((world / "captions.json").read_text())[:8]
    (root / "images/sub").mkdir(parents=True)
    for i, name in enumerate(("one.bmp", "two.bmp", "sub/three.bmp")):
        Image.new("RGB", (24, 24), ("red", "green", "blue")[i]).save(root / "images" / name)
        records[i]["image"] = name if i != 1 else [name]
    shutil.copytree(world / "images", root / "images", dirs_exist_ok=True)
    (root / "data.json").write_text(json.dumps(records))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert train_here(argv(tiny, root)) == 0
    shutil.copytree(root / "out", root / "ck", ignore=shutil.ignore_patterns("state"))
    os.remove(root / "out/config.json")
    shutil.rmtree(root / "out/state/step-00000002")
    return root


def argv(tiny, root, *more):
    return settings(tiny, root, "out", "--llm=llm", "--vision_tower=tower", "--words=words.json", "--data=data.json",
                    "--images=images", "--max_steps=2", "--save_every=1", "--probe_every=0", *more)


@pytest.fixture
def place(parts, tmp_path, monkeypatch):
    shutil.copytree(parts, tmp_path / "all")
    monkeypatch.chdir(tmp_path / "all")
    return tmp_path / "all"


@pytest.mark.parametrize("name", MODELS | RUN)
def test_a_run_goes_on_only_with_what_it_began_with(tiny, place, name):
    change, part = (MODELS | RUN)[name]
    change(place)
    if part is None:
        assert train_here(argv(tiny, place)) == 0
        return
    source, part = part.split(" ", 1)
    path = {"llm": "llm", "vision_tower": "tower", "words": "words.json", "data": "data.json", "images": "images"}[source]
    with pytest.raises(ValueError, match=f"{path}: {part}.* changed since out/state/step-00000001 was written"):
        train.main(train.read_settings(argv(tiny, place)))


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_is_loaded_only_with_what_it_was_trained_with(place, name):
    change, part = MODELS[name]
    change(place)
    if part is None:
        checkpoint.load("ck")
        return
    source, part = part.split(" ", 1)
    label, path = {"llm": ("LLM", "llm"), "vision_tower": ("vision tower", "tower")}[source]
    with pytest.raises(ValueError, match=rf"ck was trained on another {label} than what {path} is now \({part}.*changed"):
        checkpoint.load("ck")
    edit("ck/config.json", fingerprint=None)(place)                 # as the sentence says, and as old checkpoints are
    checkpoint.load("ck")


@pytest.mark.parametrize("path, tensor, words", [
    ("own/llm/model.safetensors", "layers.0.mlp.up_proj.weight", "another LLM than what own/llm is now \\(weights"),
    ("own/llm/vocab_embeds.safetensors", "vocab_embeds", "another LLM than what own/llm is now \\(weights"),
    ("own/vision_tower/model.safetensors", "layers.0.mlp.fc1.weight", "another vision tower than what own/vision_tower is now")])
def test_the_parts_that_a_checkpoint_holds_itself(place, path, tensor, words):
    vlm = checkpoint.load("ck")
    checkpoint.save(vlm, "own", "sft_tower", ("connector", "llm", "vision_tower"))
    shutil.rmtree("llm"), shutil.rmtree("tower")                    # not needed any more
    checkpoint.load("own")
    weights(path, tensor)(place)
    with pytest.raises(ValueError, match=words):
        checkpoint.load("own")


@pytest.mark.parametrize("change, words", [
    (weights("tower/model.safetensors", ""), "another vision tower than what tower is now \\(weights changed\\): to accept"),
    (edit("tower/preprocessor_config.json", image_std=[0.9, 0.9, 0.9]), "tower is now \\(preprocessor_config.json changed"),
    (replace("ck/words.json", '"a"', '"zzz"'), "words.json is not the word list of this connector"),
    (weights("llm/model.safetensors", ""), None)])                  # of the LLM that it leaves
def test_a_connector_moves_only_with_the_tower_and_words_that_it_was_trained_with(tiny, place, change, words):
    change(place)
    if words is None:
        transfer.move("ck", tiny.llama, "cpu", torch.float32)
        return
    with pytest.raises(ValueError, match=words):
        transfer.move("ck", tiny.llama, "cpu", torch.float32)


def test_a_run_goes_on_only_with_the_config_of_init(tiny, place):
    def argv():
        return settings(tiny, place, "sft", "--init=ck", "--stage=sft", "--data=data.json", "--images=images", "--max_steps=2",
                        "--save_every=1")
    assert train_here(argv()) == 0
    os.remove("sft/config.json")
    shutil.rmtree("sft/state/step-00000002")
    edit("ck/config.json", normalize="none")(place)
    with pytest.raises(ValueError, match="ck: config.json changed since sft/state/step-00000001 was written"):
        train.main(train.read_settings(argv()))


def test_the_tokens_belong_to_a_tokenizer_and_not_only_its_files(tiny, tmp_path):
    """Settings that stand beside tokenizer.json decide about spaces, and so does the library."""
    shutil.copytree(tiny.llama, tmp_path / "llm")
    edit("llm/tokenizer_config.json", tokenizer_class="LlamaTokenizer", add_prefix_space=False)(tmp_path)
    parts = []
    for _ in range(2):
        parts.append(fingerprint.of_llm(str(tmp_path / "llm"), load_tokenizer(str(tmp_path / "llm"))))
        edit("llm/tokenizer_config.json", add_prefix_space=True)(tmp_path)
    assert [part for part in parts[0] if parts[0][part] != parts[1][part]] == ["tokens of a text"]


def test_a_checkpoint_that_was_not_overwritten_to_the_end_is_none(place, monkeypatch):
    vlm = checkpoint.load("ck")
    monkeypatch.setattr(checkpoint, "save_words", None)             # it is killed after it wrote the connector
    with pytest.raises(TypeError):
        checkpoint.save(vlm, "ck", "transfer", ())
    with pytest.raises(ValueError, match="ck is no checkpoint"):
        checkpoint.load("ck")


def test_a_checkpoint_and_a_state_without_a_fingerprint_are_used(tiny, place):
    """Those of older versions"""
    edit("ck/config.json", fingerprint=None)(place)
    edit("out/state/step-00000001/state.json", fingerprint=None)(place)
    reverse_words(place)
    checkpoint.load("ck")
    assert train_here(argv(tiny, place)) == 0


def test_a_picture_is_repaired_and_the_run_goes_on(tiny, place, capsys):
    """To the bits of a run that had the good picture from the start"""
    shutil.rmtree("out")
    good = (place / "images/two.bmp").read_bytes()
    (place / "images/two.bmp").write_bytes(good[:99])
    with pytest.raises(ValueError, match="two.bmp' cannot be read"):
        train.main(train.read_settings(argv(tiny, place)))
    (place / "images/two.bmp").write_bytes(good)
    assert train_here(argv(tiny, place)) == 0
    again = (place / "out/connector.safetensors").read_bytes()
    assert again == (place / "ck/connector.safetensors").read_bytes()


def test_a_large_tensor_is_sampled_and_its_size_counts(tmp_path):
    path, size = tmp_path / "x", fingerprint.BLOCK * fingerprint.BLOCKS
    found = []
    for content in (bytes(4 * size), bytes(4 * size + 1), b"1" + bytes(4 * size - 1),
                    bytes(2 * size) + b"1" * (5 * fingerprint.BLOCK) + bytes(2 * size - 5 * fingerprint.BLOCK)):
        path.write_bytes(content)
        found.append(fingerprint.file_hash(path))
    assert len(set(found)) == 4
    path.write_bytes(bytes(size - 1) + b"1")                        # a small one is read completely
    assert fingerprint.file_hash(path) == fingerprint.file_hash(path, complete=True)


class Tomorrow(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(days=1)


@pytest.mark.parametrize("template, words", [
    ("{{- 'Today: ' + strftime_now('%d %B %Y') }}\n", "Today: 26 July 2024"),                              # SmolLM3
    ("{{- \"Today's Date: \" + strftime_now('%B %d, %Y') }}.\n", "Today's Date: July 26, 2024."),          # Granite
    ("{%- macro head() %}{{ 'Current date: ' + strftime_now(\"%Y-%m-%d\") }}{% endmacro %}{{- head() }}\n",
     "Current date: 2024-07-26"),                                                                          # gpt-oss
    ("{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}{{- date_string }}\n",
     "26 Jul 2024"),                                                                                       # Llama-3.2
    ("{%- set form = '%A, %-d.%-m.%y' %}{{- strftime_now(form) }}\n", "Friday, 26.7.24")])
@pytest.mark.parametrize("several", [False, True])
def test_a_template_that_prints_the_date_prints_the_same_one_tomorrow(tiny, tmp_path, monkeypatch, template, words, several):
    tokenizer = AutoTokenizer.from_pretrained(tiny.qwen)
    tokenizer.chat_template = {"default": template + CHATML, "tools": CHATML} if several else template + CHATML
    tokenizer.save_pretrained(tmp_path / "dated")
    dated, tokenizer = tokenizer, load_tokenizer(str(tmp_path / "dated"))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    render = lambda: dated.apply_chat_template(messages, tokenize=False)
    plain, ours, asked = render(), conversation.encode(messages, tokenizer, 1), conversation.encode_prompt(messages[:1], tokenizer, 1)
    mark = fingerprint.template_hash(tokenizer)
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert render() != plain                                        # so the test would notice
    assert conversation.encode(messages, tokenizer, 1) == ours and ours[0][:len(asked)] == asked
    assert fingerprint.template_hash(tokenizer) == mark
    assert words in tokenizer.decode(ours[0])
    tokenizer.save_pretrained(tmp_path / "saved")                   # and so does the tokenizer of a checkpoint
    assert load_tokenizer(str(tmp_path / "saved")).chat_template == tokenizer.chat_template
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").apply_chat_template(messages, tokenize=False).startswith(words)


def test_kept_answers_are_of_the_same_models_and_pictures(tiny, place, capsys):
    """Of a checkpoint without a fingerprint, too, which loads with another tower"""
    edit("ck/config.json", fingerprint=None)(place)
    labels = [{"question_id": i, "image": f"{i}.jpg", "text": f"{i}?", "label": "no"} for i in (1, 2)]
    splits = evaluation.BENCHMARKS["pope"].SPLITS
    for split in splits:
        test_benchmarks.save(place / f"d/pope/coco/coco_pope_{split}.json", "\n".join(map(json.dumps, labels)))
    asked = [{**label, "question_id": f"{split}{label['question_id']}", "category": split}
             for split in splits for label in labels]
    test_benchmarks.save(place / "d/pope/llava_pope_test.jsonl", "\n".join(map(json.dumps, asked)))
    (place / "d/pope/val2014").mkdir()
    for i in (1, 2):
        Image.new("RGB", (24, 24), "red").save(place / f"d/pope/val2014/{i}.jpg", "BMP")

    def ask(*more):
        evaluation.main(["ck", "--tasks", "pope", "--data", "d", "--out", "e", "--device", "cpu", *more])

    ask()
    ask()                                                           # the same again
    for change, file, words in (
            (weights("tower/model.safetensors", ""), "results.json", "other vision_tower weights"),
            (edit("llm/generation_config.json", eos_token_id=7), "results.json", "other llm generation_config.json"),
            (lambda root: Image.new("RGB", (24, 24), "blue").save(root / "d/pope/val2014/2.jpg", "BMP"), "pope.jsonl", "other images"),
            (edit("ck/config.json", vision_layer=-1), "results.json", "other checkpoint")):
        change(place)
        before = (place / "e/results.json").read_bytes()
        for gone in (False, True):                                  # results without answers are refused as well
            if gone and file == "results.json":
                os.rename(place / "e/pope.jsonl", place / "pope.jsonl")
            with pytest.raises(ValueError, match=rf"e/{file} is of another run \({words}\)"):
                ask()
        if file == "results.json":
            os.rename(place / "pope.jsonl", place / "e/pope.jsonl")
        assert (place / "e/results.json").read_bytes() == before
        ask("--overwrite")
