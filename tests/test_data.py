"""data.py: masks as literal text, ids against joint tokenisation, pictures against transformers, and bad input.

Alone: python -m pytest tests/test_data.py. Tokenizers are trained here, pictures drawn here: no network.
"""
import io
import json
import os
import pathlib
import re
import struct
import types
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import conversation
import data
import vocab
from common import BadSample
from conversation import IGNORE, IMAGE_ID, encode, encode_prompt
from data import Conversations, collate, global_batches, messages_of
from support import pictures
from support.log import show_sample

ROOT = pathlib.Path(data.__file__).parent
P = 3
TEXT = ["Is the bicycle leaning on a fence?", "Yes, it leans on a wooden fence.", "What colour is it? Red!",
        "a red bicycle !\n", "system user assistant model You are a helpful assistant.", "USER: ASSISTANT: describe",
        "It is red.\n\nRed!", "Today Date: 26 Jul 2024 [INST] [/INST]"] * 3
CHATML = ("{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
          "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
          "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# As in the first Llama-3 snapshots: writes the BOS itself, trims, and always opens another assistant turn at the end.
LLAMA3 = ("{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}<|head|>{{ m.role }}<|/head|>\n\n"
          "{{ m.content | trim }}<|eot|>{% endfor %}<|head|>assistant<|/head|>\n\n")
GEMMA = ("{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
         "{% for m in messages %}<|head|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
         "{{ m.content | trim }}<|eot|>\n{% endfor %}{% if add_generation_prompt %}<|head|>model\n{% endif %}")
NO_SPECIAL = "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}"
SPECIAL = ["<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>"]


QWEN_WORD = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def make_tokenizer(template, eos="<|im_end|>", adds_bos=False, kind="gpt2", lstrip=(), rstrip=(), special=SPECIAL, bos="<|bos|>"):
    """A small BPE that splits, prepends and swallows as a real one does.

    kind: "gpt2" or "qwen", byte-level; or SentencePiece, of which "never", "first" and "always" put ▁ before a text by a
    pre-tokenizer, and "gemma" (never) and "legacy" (always) by a normalizer. lstrip, rstrip: tokens that take the white space
    before them, after them.
    """
    is_bytes = kind in ("gpt2", "qwen")
    t = Tokenizer(models.BPE(byte_fallback=not is_bytes))
    special = [AddedToken(s, special=True, normalized=False, lstrip=s in lstrip, rstrip=s in rstrip) for s in special]
    if is_bytes:
        t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        if kind == "qwen":
            t.normalizer, byte_level = normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(QWEN_WORD, "isolated"), byte_level])
        t.post_processor = processors.ByteLevel(trim_offsets=True)
        trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    else:
        if kind == "gemma":
            t.normalizer = normalizers.Replace(" ", "▁")
        elif kind == "legacy":
            t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
        t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        trainer = trainers.BpeTrainer(vocab_size=460, special_tokens=special + [f"<0x{i:02X}>" for i in range(256)],
                                      max_token_length=12)
    t.train_from_iterator(TEXT, trainer)
    if adds_bos:
        t.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, t.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token=eos, bos_token=bos, chat_template=template)


def turns(*texts, roles=("user", "assistant")):
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


QA = turns("<image>\nIs the bicycle leaning on a fence?", "Yes, it leans on a wooden fence.",
           "What colour is it?", "Red!")


def marked(ids, labels, tokenizer):
    """A sample as text, trained tokens in «», an image as <P>: what tests compare"""
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels)), "a label is its own id or ignored"
    assert all(label == IGNORE for i, label in zip(ids, labels) if i == IMAGE_ID), "images are not trained"
    text = re.sub("\033\\[2m(.*?)\033\\[0m", r"\1", show_sample(ids, labels, tokenizer), flags=re.S)
    return re.sub("\033\\[32m(.*?)\033\\[0m", r"«\1»", text, flags=re.S).replace(f"[image x {P}]", f"<{P}>")


# ----------------------------------------------------------------------------------------------------------------------
# text

EXPECTED = {
    "chatml": (dict(template=CHATML),
               "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<3>\n"
               "Is the bicycle leaning on a fence?<|im_end|>\n"
               "<|im_start|>assistant\n«Yes, it leans on a wooden fence.<|im_end|>»\n"
               "<|im_start|>user\nWhat colour is it?<|im_end|>\n<|im_start|>assistant\n«Red!<|im_end|>»\n"),
    "llama3": (dict(template=LLAMA3, eos="<|eot|>", adds_bos=True), "<|bos|><|head|>user<|/head|>\n\n<3>\n"
               "Is the bicycle leaning on a fence?<|eot|><|head|>assistant<|/head|>\n\n"
               "«Yes, it leans on a wooden fence.<|eot|>»<|head|>user<|/head|>\n\n"
               "What colour is it?<|eot|><|head|>assistant<|/head|>\n\n«Red!<|eot|>»"),
    "gemma": (dict(template=GEMMA, eos="<|eot|>", adds_bos=True, kind="never"), "<|bos|><|head|>user\n<3>\n"
              "Is the bicycle leaning on a fence?<|eot|>\n<|head|>model\n«Yes, it leans on a wooden fence.<|eot|>»\n"
              "<|head|>user\nWhat colour is it?<|eot|>\n<|head|>model\n«Red!<|eot|>»\n"),
    "no template": (dict(template=None, eos="<|eot|>", adds_bos=True), "<|bos|>USER:\n<3>\n"
                    "Is the bicycle leaning on a fence?\nASSISTANT:\n«Yes, it leans on a wooden fence.<|eot|>»"
                    "USER:\nWhat colour is it?\nASSISTANT:\n«Red!<|eot|>»"),
    "no template, no bos": (dict(template=None), "USER:\n<3>\nIs the bicycle leaning on a fence?\nASSISTANT:\n"
                            "«Yes, it leans on a wooden fence.<|im_end|>»"
                            "USER:\nWhat colour is it?\nASSISTANT:\n«Red!<|im_end|>»"),
    "no control token": (dict(template=NO_SPECIAL), "### user: <3>\nIs the bicycle leaning on a fence?\n### assistant:"
                         "« Yes, it leans on a wooden fence.<|im_end|>»\n"
                         "### user: What colour is it?\n### assistant:« Red!<|im_end|>»\n"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_mask_is_each_answer_and_its_end_token_and_a_prompt_ends_where_an_answer_begins(name):
    kind, expected = EXPECTED[name]
    tokenizer = make_tokenizer(**kind)
    assert marked(*encode(QA, tokenizer, P), tokenizer) == expected
    for n in (1, 3):
        ids, labels = encode(QA[:n + 1], tokenizer, P)
        prompt = encode_prompt(QA[:n], tokenizer, P)
        assert ids[:len(prompt)] == prompt and labels[len(prompt)] != IGNORE
        assert labels[len(prompt) - 1] == IGNORE


@pytest.mark.parametrize("template, eos", [(CHATML, "<|im_end|>"), (GEMMA, "<|eot|>")])
@pytest.mark.parametrize("kind", ["gpt2", "never", "first", "always", "legacy"])
@pytest.mark.parametrize("eats", [(), ("<|head|>", "<|im_end|>")])
def test_ids_equal_joint_tokenisation(template, eos, kind, eats):
    """White space around a content is dropped first, as half of the templates do themselves."""
    tokenizer = make_tokenizer(template, eos, kind=kind, lstrip=eats, rstrip=eats)
    messages = turns(" What colour is  it?\n", "Red! \n", "Is it  a fence?\n\n", "Yes, it leans.")
    stripped = [{**message, "content": message["content"].strip()} for message in messages]
    joint = tokenizer.apply_chat_template(stripped, tokenize=True, return_dict=False)
    assert encode(messages, tokenizer, P)[0] == joint


@pytest.mark.parametrize("template, adds_bos, expected", [
    ("plain", False, "<3>«a red bicycle !\n»"), ("plain", True, "<|bos|><3>«a red bicycle !\n»"),
    ("prompted", False, "describe\n<3>\n«a red bicycle !\n»"),
    ("prompted", True, "<|bos|>describe\n<3>\n«a red bicycle !\n»"),
])
def test_stage_one_templates_train_caption_and_newline(template, adds_bos, expected):
    tokenizer = make_tokenizer(CHATML, adds_bos=adds_bos)
    messages = turns("describe\n<image>", "a red bicycle !")
    ids, labels = encode(messages, tokenizer, P, template)
    assert marked(ids, labels, tokenizer) == expected
    prompt = encode_prompt(messages[:1], tokenizer, P, template)
    assert ids[:len(prompt)] == prompt and labels[len(prompt) - 1] == IGNORE != labels[len(prompt)]


def test_plain_caption_starts_as_a_text_starts_for_sentencepiece():
    tokenizer = make_tokenizer(None, kind="first")
    ids, _ = encode(turns("<image>", "red fence"), tokenizer, P, "plain")
    assert ids[P:] == tokenizer("red fence\n", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(ids[P]).startswith("▁")


def test_an_exclamation_mark_survives_collation():
    """Id 0 is "!" for Qwen and Llama-3; code that takes 0 for padding loses each of them."""
    tokenizer = make_tokenizer(CHATML)
    bang = tokenizer.convert_tokens_to_ids("!")
    ids, labels = encode(turns("What!", "Red!"), tokenizer, P)
    sample = {"id": "a", "input_ids": torch.tensor(ids), "labels": torch.tensor(labels),
              "images": torch.zeros(0, 3, 4, 4)}
    short = sample | {"input_ids": sample["input_ids"][:9], "labels": sample["labels"][:9]}
    batch = collate([sample, short], pad_id=bang)
    assert batch["input_ids"][0].tolist() == ids and batch["labels"][0].tolist() == labels
    assert (batch["attention_mask"][0] == 1).all() and batch["attention_mask"][1].sum() == 9
    assert (batch["labels"][1, 9:] == IGNORE).all() and (batch["input_ids"][1, 9:] == bang).all()
    assert labels.count(bang) == 1 and ids.count(bang) == 2


def test_several_images_stand_where_they_are_written():
    tokenizer = make_tokenizer(CHATML)
    text = marked(*encode(turns("a <image> on <image><image>", "Red!", "Is <image>?", "Yes"), tokenizer, P), tokenizer)
    text = text.replace(f"[image x {2 * P}]", "<6>")
    assert "user\na <3> on <6><|im_end|>" in text and "user\nIs <3>?<|im_end|>" in text


@pytest.mark.parametrize("template, messages, words", [
    (GEMMA, [{"role": "system", "content": "a"}] + QA, "refuses the turns system, user.*no system turn"),
    ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", QA, "alters"),
    ("{% for m in messages[:1] %}{{ m.content }}{% endfor %}", QA, "drops"),
    ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", QA, "repeats"),
    ("{% for m in messages[::-1] %}{{ m.content }}|{% endfor %}", QA, "moves"),
    ("{% for m in messages %}{{ m.content | replace('\t', ' ') }}|{% endfor %}", turns("a\tb", "c"), "rewrites these turns"),
    (CHATML, turns("a", "b\U000F0001c"), "turn 1 holds half a character .* or a character for private use"),
])
def test_templates_and_turns_that_cannot_work_are_refused_in_a_sentence(template, messages, words):
    with pytest.raises(ValueError, match=words):
        encode(messages, make_tokenizer(template), P)


def test_another_chat_template_on_the_same_tokenizer_is_used():
    tokenizer = make_tokenizer(CHATML)
    before = encode(QA, tokenizer, P)
    tokenizer.chat_template = LLAMA3
    assert encode(QA, tokenizer, P) != before


def test_show_decodes_characters_of_several_tokens_and_escapes_terminal_codes():
    tokenizer = make_tokenizer(CHATML)
    text = show_sample(*encode(turns("ⴲ\033[31m", "žluť"), tokenizer, P), tokenizer)
    assert "ⴲ␛[31m" in text and "\033[32mžluť<|im_end|>\033[0m" in text


# ----------------------------------------------------------------------------------------------------------------------
# records

def record(*values, **more):
    conversations = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {"id": "r", "conversations": conversations, **more}


@pytest.mark.parametrize("value, image, first, expected", [
    ("Summarise.\n<image>", "a.png", True, "<image>\nSummarise."), ("A <image> B", "a.png", True, "<image>\nA  B"),
    ("<image>", "a.png", True, "<image>"), ("Summarise.\n<image>", "a.png", False, "Summarise.\n<image>"),
    ("What?", "a.png", True, "<image>\nWhat?"),
    ("A <image> B <image>", ["a.png", "b.png"], True, "A <image> B <image>"),
    ("What?", ["a.png", "b.png"], True, "<image>\n<image>\nWhat?"), ("What?", None, True, "What?"),
])
def test_placeholders_of_a_record(value, image, first, expected):
    messages, names = messages_of(record(value, "Red", image=image), first)
    assert messages == turns(expected, "Red")
    assert names == ([] if image is None else [image] if isinstance(image, str) else image)


@pytest.mark.parametrize("bad, words", [
    (record("<image><image>", "a", image="a.png"), "1 image.s. but 2"), (record("<image>", "a"), "0 image.s. but 1"),
    (record("<image>", "a", image=["a.png", "b.png"]), "2 image.s. but 1"),
    (record("<image>", "see <image>", image="a.png"), "turn 1 is from 'gpt' and holds"),
    (record("a", "  \n"), "turn 1 is empty"), (record("", "a"), "turn 0 is empty"),
    (record("a\ud800", "b"), "half a character"),
    ({"conversations": [{"from": "gpt", "value": "a"}]}, "turn 0 is from 'gpt'"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "user", "value": "a"}]}, "turn 1 is from 'user'"),
    ({"conversations": [{"from": "wizard", "value": "a"}]}, "'wizard'"),
    ({"conversations": []}, "missing or empty"), ({}, "missing"),
    ({"conversations": "a"}, "missing or empty"), ({"conversations": [3]}, "turn 0 lacks"),
    ({"conversations": [{"from": ["human"], "value": 1}]}, "turn 0 lacks"),
    (record("a", "b", image=3), "neither"), (record("a", "b", image=[None]), "neither"),
    (record("a", "b", image=""), "neither"),
])
def test_malformed_records_are_named_in_a_sentence(bad, words):
    with pytest.raises(BadSample, match=words) as caught:
        messages_of(bad)
    assert caught.value.kind == "malformed"


@pytest.mark.parametrize("content, words", [
    (b'[{"id": "a"', "not a whole JSON file"), (b'{"id": 1}\n{"id": ', "line 2: not complete JSON"), (b"[]", "no records"),
    (b"[1]", "record 0 is not a JSON object"), (b"[{}, {}] [{}]", "not a whole JSON file"),
    (b'{"a": 1}\n\n7\n', "line 3 is not a JSON object"), (b'{\n"a": 1,\n', "line 1: not complete JSON"),
    (b'[{"id": "\xff\xfe"}]', "not a whole JSON file: 'utf-8' codec"),
    (b'{"id": 1}\n{"id": "\xff"}', "line 2: not complete JSON: 'utf-8' codec"), (b"", "no records"), (b"\n \n", "no records"),
    (b"[" * 100_000, "not a whole JSON file"), (b"[" + b"1" * 5000 + b"]", "not a whole JSON file"),
])
def test_bad_files_are_named_in_a_sentence(tmp_path, content, words):
    (tmp_path / "d.json").write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        Conversations(tmp_path / "d.json", tmp_path, None, P, IMAGE)
    assert str(tmp_path / "d.json") in str(caught.value)
    with pytest.raises(OSError, match="No such file.*none.json"):
        Conversations(tmp_path / "none.json", tmp_path, None, P, IMAGE)


# ----------------------------------------------------------------------------------------------------------------------
# pictures

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def noise(w, h, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))


def reference(image, **more):
    import transformers
    processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    return processor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD,
                     resample=Image.Resampling.BICUBIC, **more)(image, return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize("w, h", [(64, 48), (48, 64), (33, 97), (97, 33), (32, 32), (7, 5), (51, 50), (1, 9)])
def test_transform_equals_transformers_processor(w, h):
    image = noise(w, h)
    torch.testing.assert_close(pictures.transform(image, 32, MEAN, STD, "crop"), reference(image), rtol=0, atol=1e-5)
    square = Image.new("RGB", (max(w, h),) * 2, (122, 116, 104))
    square.paste(image, ((max(w, h) - w) // 2, (max(w, h) - h) // 2))
    torch.testing.assert_close(pictures.transform(image, 32, MEAN, STD, "pad"), reference(square), rtol=0, atol=1e-5)
    squashed = image.resize((32, 32), Image.Resampling.BICUBIC)
    torch.testing.assert_close(pictures.transform(image, 32, MEAN, STD, "squash"), reference(squashed), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["crop", "pad", "squash"])
@pytest.mark.parametrize("size", [(200_000, 1), (1, 200_000), (4000, 3), (20_000, 30)])
def test_thin_pictures_are_read_in_every_mode(mode, size):
    """No setting of a run decides whether a picture can be used, so --check cannot judge otherwise than training."""
    x = pictures.transform(Image.new("RGB", size, (255, 0, 0)), 336, MEAN, STD, mode)
    rgb = (x[:, 168, 168] * torch.tensor(STD) + torch.tensor(MEAN)) * 255
    # The middle is red; where the line is padded, 336 rows of which one was red leave little of it.
    assert x.shape == (3, 336, 336) and (mode == "pad" or rgb.round().tolist() == [255, 0, 0])


def test_a_thin_picture_is_cut_in_its_middle():
    picture = Image.new("RGB", (3001, 2), (0, 0, 255))
    picture.paste((255, 0, 0), (1490, 0, 1511, 2))
    x = pictures.transform(picture, 32, [0, 0, 0], [1, 1, 1], "crop")
    assert (x[0] > 0.99).all() and (x[2] < 0.01).all()


def chunk(kind, body, crc=None):
    """A piece of a PNG file"""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) if crc is None else crc)


def png_header(w, h):
    """A PNG that says it has w x h pixels and has none"""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"")


def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 256, 32768, 65535]], dtype=np.uint16)).save(tmp_path / "grey.png")
    assert [p[0] for p in pictures.open_image(tmp_path / "grey.png").get_flattened_data()] == [0, 1, 128, 255]


@pytest.mark.parametrize("name, words", [
    ("../secret.png", "leads out of the image folder .* to .*/secret.png: put"), ("/etc/passwd", "leads out of"),
    ("a/../../secret.png", "leads out of"), ("../images-of-others/a.png", "leads out of"),
    ("link.png", "leads through a link out of the image folder .* to .*/secret.png: .* take .* as the image folder"),
    ("linked/secret.png", "leads through a link out of"), ("none.png", "does not exist"), (".", "or is not a file"),
    ("gone.png", "does not exist"), ("loop.png", "does not exist"), ("a/none/../../b.png", "does not exist"),
    ("a\0b", "not a file name"), ("\ud800.png", "not a file name"), ("x" * 5000, "does not exist"),
    ("https://example.com/a.png", "does not exist"), ("data:image/png;base64," + "A" * 9999, "does not exist"),
])
def test_image_names_stay_in_the_folder(tmp_path, name, words):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"")
    os.symlink(tmp_path / "secret.png", tmp_path / "images" / "link.png")
    os.symlink(tmp_path, tmp_path / "images" / "linked")
    os.symlink("nothing.png", tmp_path / "images" / "gone.png")
    os.symlink("loop.png", tmp_path / "images" / "loop.png")
    with pytest.raises(BadSample, match=words) as caught:
        pictures.image_path(tmp_path / "images", name)
    assert len(str(caught.value)) < 700


def test_links_inside_the_folder_and_a_linked_folder_are_fine(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"")
    os.symlink(tmp_path / "images" / "a.png", tmp_path / "images" / "b.png")
    os.symlink(tmp_path / "images", tmp_path / "elsewhere")
    inside = str(tmp_path / "images" / "a.png")
    assert pictures.image_path(tmp_path / "images", inside) == pictures.image_path("/", inside) == os.path.realpath(inside)
    assert pictures.image_path(tmp_path / "elsewhere", "b.png") == os.path.realpath(tmp_path / "images" / "a.png")


# ----------------------------------------------------------------------------------------------------------------------
# dataset, batches, command line

IMAGE = {"size": 8, "mean": MEAN, "std": STD, "mode": "pad"}


def write(folder, *records):
    noise(6, 4, 1).save(folder / "a.png")
    noise(4, 6, 2).save(folder / "b.png")
    (folder / "broken.png").write_bytes(b"no")
    (folder / "d.json").write_text(json.dumps(records))
    return folder / "d.json"


def test_samples_and_batches(tmp_path):
    tokenizer = make_tokenizer(CHATML)
    path = write(tmp_path, record("What?\n<image>", "Red!", image="a.png"), record("Is it?", "Yes", "a?", "it"),
                 record("<image> or <image>?", "Yes", image=["b.png", "a.png"]))
    dataset = Conversations([path, path], tmp_path, tokenizer, P, IMAGE)
    samples = [dataset[i] for i in range(3)]
    a, b = (pictures.transform(pictures.open_image(tmp_path / name), **IMAGE) for name in ("a.png", "b.png"))
    assert len(dataset) == 6 and [len(s["images"]) for s in samples] == [1, 0, 2]
    assert "user\n<3>\nWhat?<" in marked(samples[0]["input_ids"].tolist(), samples[0]["labels"].tolist(), tokenizer)
    batch = collate(samples, pad_id=7)
    T = max(len(s["input_ids"]) for s in samples)
    assert {k: (tuple(v.shape), v.dtype) for k, v in batch.items() if torch.is_tensor(v)} == {
        "input_ids": ((3, T), torch.int64), "labels": ((3, T), torch.int64), "word_index": ((3, T), torch.int64),
        "attention_mask": ((3, T), torch.int64), "position_ids": ((3, T), torch.int64), "pixel_values": ((3, 3, 8, 8), torch.float32)}
    assert torch.equal(batch["pixel_values"], torch.stack([a, b, a]))
    assert batch["bad"] == [] and batch["ids"] == ["r"] * 3
    assert (batch["input_ids"] == IMAGE_ID).sum(1).tolist() == [P, 0, 2 * P]
    assert batch["position_ids"][0].tolist() == list(range(T))
    blind = data.without_images(batch)
    hidden = batch["input_ids"] == IMAGE_ID
    assert (blind["attention_mask"][hidden] == 0).all()
    assert blind["attention_mask"].sum() == batch["attention_mask"].sum() - 3 * P
    assert blind["pixel_values"].abs().sum() == 0 and torch.equal(blind["labels"], batch["labels"])
    words = blind["position_ids"][0][blind["attention_mask"][0] == 1]
    assert words.tolist() == list(range(len(words))), "positions close up over a hidden image"


def test_an_image_that_opens_the_row_leaves_its_last_patch_grey_when_hidden():
    ids, labels = encode(turns("<image>", "red"), make_tokenizer(CHATML), P, "plain")
    sample = {"id": "a", "input_ids": torch.tensor(ids), "labels": torch.tensor(labels),
              "images": torch.ones(1, 3, 4, 4)}
    blind = data.without_images(collate([sample], 0))
    n = len(ids) - P
    assert blind["attention_mask"].tolist() == [[0] * (P - 1) + [1] * (n + 1)] and not blind["pixel_values"].any()
    assert blind["position_ids"].tolist() == [[0] * (P - 1) + list(range(n + 1))]


def test_truncation_cuts_text_from_the_right_and_never_an_image(tmp_path):
    tokenizer = make_tokenizer(CHATML)
    path = write(tmp_path, record("What?", "Yes, it leans on a wooden fence."),
                 record("a <image>?", "Red!", image="a.png"))
    long = Conversations(path, tmp_path, tokenizer, P, IMAGE, max_length=None)
    whole, image = long[0]["input_ids"], long[1]["input_ids"].tolist()
    first = (long[0]["labels"] != IGNORE).nonzero()[0].item()
    cut = Conversations(path, tmp_path, tokenizer, P, IMAGE, max_length=first + 2)[0]
    assert torch.equal(cut["input_ids"], whole[:first + 2]) and (cut["labels"] != IGNORE).sum() == 2
    with pytest.raises(BadSample, match=r"d.json: record 0 \(id 'r'\): no trained token among the first") as caught:
        Conversations(path, tmp_path, tokenizer, P, IMAGE, max_length=first).sample(0)
    assert caught.value.kind == "untrainable"
    for length in (image.index(IMAGE_ID), image.index(IMAGE_ID) + P - 1):
        with pytest.raises(BadSample, match="record 1 .*an image does not fit"):
            Conversations(path, tmp_path, tokenizer, P, IMAGE, max_length=length).sample(1)


def test_bad_samples_are_named_and_left_out_of_the_batch(tmp_path):
    tokenizer = make_tokenizer(CHATML)
    path = write(tmp_path, record("What?", "Red!"), record("<image>", "Red!", image="broken.png"), {"id": "x"})
    dataset = Conversations(path, tmp_path, tokenizer, P, IMAGE)
    with pytest.raises(BadSample, match=r"d.json: record 1 \(id 'r'\): image .*broken.png' cannot be read"):
        dataset.sample(1)
    samples = [dataset[i] for i in range(3)]
    assert [type(s) for s in samples] == [dict, BadSample, BadSample]
    batch, nothing = collate(samples, 0), collate(samples[1:], 0)
    assert batch["ids"] == ["r"] and "record 1 (id 'r')" in batch["bad"][0] and "record 2 (id 'x')" in batch["bad"][1]
    assert nothing["ids"] == [] and len(nothing["bad"]) == 2 and nothing["input_ids"].shape == (0, 0)


def test_a_wrong_setting_fails_at_once_and_is_no_bad_record(tmp_path):
    with pytest.raises(ValueError, match="template is one of"):
        Conversations(write(tmp_path, record("a", "b")), tmp_path, make_tokenizer(CHATML), P, IMAGE, template="chta")


@pytest.mark.parametrize("images, texts", [(40, 20), (37, 21), (35, 4), (3, 0), (0, 9), (36, 20)])
def test_grouped_batches_are_of_one_modality_and_complete(images, texts):
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 500, (images + texts,), generator=generator).tolist()
    dataset = types.SimpleNamespace(lengths=[n if i < images else -n for i, n in enumerate(words)])
    steps = global_batches(dataset, 8, epoch=0, seed=1, group=True)
    assert sorted(sum(steps, [])) == list(range(images + texts))
    full = [step for step in steps if len(step) == 8]
    assert len(full) == images // 8 + texts // 8 and steps[:len(full)] == full
    for step in full:
        assert len({i < images for i in step}) == 1
        assert [words[i] for i in step] == sorted((words[i] for i in step), reverse=True)
    assert len(steps) - len(full) <= (1 if images % 8 + texts % 8 < 8 else 2)
    kinds = [step[0] < images for step in full]
    assert images < 40 or kinds != sorted(kinds, reverse=True), "kinds of batches are shuffled"


def test_batches_sorted_together_have_less_padding_and_the_same_samples():
    """The 8 ranks of a cluster with one micro-batch each: a rank's own samples are padded to their longest."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 500, (1024,), generator=generator).tolist()
    dataset = types.SimpleNamespace(lengths=[n if i < 800 else -n for i, n in enumerate(words)])

    def padding(steps):
        own = [step[rank::8] for step in steps for rank in range(8)]
        return 1 - sum(words) / sum(max(words[i] for i in part) * len(part) for part in own)

    alone, together = (global_batches(dataset, 32, epoch=0, seed=1, group=True, group_batches=n) for n in (1, 16))
    assert sorted(sum(together, [])) == list(range(1024))
    assert all(len({i < 800 for i in step}) == 1 for step in together)
    assert padding(alone) > 0.3 and padding(together) < 0.08
    assert together != sorted(together, key=lambda step: -words[step[0]]), "the order of the steps is shuffled"


@pytest.mark.parametrize("group", [False, True])
def test_order_is_a_function_of_seed_and_epoch(group):
    class Dataset(types.SimpleNamespace):
        def __len__(self):
            return len(self.lengths)

    dataset = Dataset(lengths=[i + 1 if i % 3 else -i - 1 for i in range(100)])
    order = global_batches(dataset, 8, epoch=1, seed=5, group=group)
    torch.manual_seed(99)                                           # the global random state plays no part
    assert global_batches(dataset, 8, epoch=1, seed=5, group=group) == order
    assert global_batches(dataset, 8, epoch=2, seed=5, group=group) != order != global_batches(dataset, 8, 1, 6, group)
    assert sorted(sum(order, [])) == list(range(100)) and len(order) == 13


def test_lengths_count_words_of_all_turns_and_tell_text_from_image(tmp_path):
    path = write(tmp_path, record("<image>\nwhat is it", "a red fence", image="a.png"),
                 record("one two", "three"), {"id": 1})
    assert Conversations(path, tmp_path, None, P, IMAGE).lengths == [7, -3, -1]


def test_check_lists_each_kind_of_problem(tmp_path, capsys):
    make_tokenizer(CHATML).save_pretrained(tmp_path / "tokenizer")
    path = write(tmp_path, record("<image>", "Red!", image="broken.png"), record("<image>", "Red!", image="a.png"),
                 *[record("<image>", "Red!", image=f"none{i}.png") for i in range(25)], record("<image>", "b"),
                 record("What " * 300, "Red!"))
    code = data.main(["--check", str(path), "--images", str(tmp_path), "--tokenizer", str(tmp_path / "tokenizer"),
                      "--num_patches", str(P), "--max_length", "200", "--workers", "2"])
    out = capsys.readouterr().out
    for line in ("missing image: 25", "broken image: 1", "malformed: 1", "untrainable: 1", "record 2 (id 'r')", "  ...",
                 "29 records, 28 cannot be used", "\033[32mRed!<|im_end|>\033[0m"):
        assert line in out, line
    assert code == 1 and out.count("does not exist") == 20


# ----------------------------------------------------------------------------------------------------------------------
# media that are not read, formats of files, damaged metadata: what is used, and else one true sentence

def sentence_of(folder, record, picture=None, name="a.png"):
    """-> the sentence about one record, "" if it is used"""
    if picture is not None:
        (folder / name).write_bytes(picture)
    (folder / "d.json").write_text(json.dumps([record]))
    found = Conversations(folder / "d.json", folder, None, P, IMAGE)[0]
    return str(found) if isinstance(found, BadSample) else ""


SAID = {"from": "human", "value": "What?"}, {"from": "gpt", "value": "Red!"}
UNREAD = {  # name: (fields of the record, what the sentence says; "" if the record is used)
    "video": (dict(video="clip.mp4"), "has 'video', which is not read"), "videos": (dict(videos=["a.mp4"]), "'videos'"),
    "audio": (dict(audio="a.wav"), "'audio'"), "audios": (dict(audios=["a.mp3"], image="a.png"), "'audios'"),
    "video beside a picture": (dict(video="a.mp4", image="a.png"), "'video'"),
    "a film under another name": (dict(clip="x/y.MKV"), "'clip'"), "speech": (dict(speech=[{"path": "a.flac"}]), "'speech'"),
    "image_path": (dict(image_path="a.png"), "'image_path'"), "img": (dict(img="a"), "'img'"), "Image": (dict(Image="a.png"), "'Image'"),
    "image_id": (dict(image_id=17), "'image_id'"), "pictures": (dict(pictures=["a"]), "'pictures'"),
    "a file of a picture": (dict(file_name="a.JPG"), "'file_name'"), "a nested file": (dict(media=[{"url": "x/a.webp"}]), "'media'"),
    "base64": (dict(content="data:image/png;base64,iVBO"), "'content'"), "has_image": (dict(has_image=True), "'has_image'"),
    "a system text": (dict(system="Be brief."), "'system'"), "tools": (dict(tools="[]"), "'tools'"),
    "a picture in a turn": (dict(conversations=[{**SAID[0], "image": "a.png"}, SAID[1]]), "turn 0 has 'image'"),
    "a film in a turn": (dict(conversations=[{**SAID[0], "file": "a.mov"}, SAID[1]], image="a.png"), "turn 0 has 'file'"),
    "both": (dict(image="a.png", images=["a.png"]), "under 'image' and under 'images'"),
    "a dict for an image": (dict(image={"path": "a.png"}), "'image' is neither"),
    "dicts for images": (dict(images=[{"bytes": None, "path": "a.png"}]), "'images' is neither"),
    "a list in a list": (dict(images=[["a.png"]]), "'images' is neither"), "a number": (dict(image=7), "'image' is neither"),
    "no such picture": (dict(images=["none.png"]), "does not exist"),
    "images": (dict(images=["a.png"]), ""), "images, a name": (dict(images="a.png"), ""), "two images": (dict(images=["a.png"] * 2), ""),
    "a list of one": (dict(image=["a.png"]), ""), "null": (dict(image=None, images=None, video=None), ""),
    "empty lists": (dict(image="a.png", images=[], videos=[], audios=[]), ""), "no media": (dict(images=[], has_image=False, num_videos=0), ""),
    "numbered pictures": (dict(image="a.png", image_2="a.png"), "'image_2'"),
    "Qwen-VL's picture": (dict(conversations=[{**SAID[0], "value": "Picture 1: <img>x/a.jpg</img>\nWhat?"}, SAID[1]]),
                          "turn 0 holds '<img>x/a.jpg</img>', which is not read: a picture is written '<image>'"),
    "Phi-3's picture": (dict(image="a.png", conversations=[{**SAID[0], "value": "<|image_1|>\nWhat?"}, SAID[1]]), "'<|image_1|>'"),
    "Qwen2-VL's picture": (dict(conversations=[{**SAID[0], "value": "<|vision_start|><|image_pad|><|vision_end|>What?"}, SAID[1]]),
                           "'<|vision_start|>'"),
    "HTML": (dict(conversations=[{**SAID[0], "value": "<img src='a.jpg'><video></video><img></img>"}, SAID[1]]), ""),
    "an answer that is not to be learnt": (dict(conversations=[{**SAID[0], "loss": False}, {**SAID[1], "loss": False}]),
                                           "turn 1 has 'loss' False, which is not read: every answer is trained"),
    "an answer of half the weight": (dict(conversations=[SAID[0], {**SAID[1], "weight": 0.5}]), "turn 1 has 'weight' 0.5"),
    "a loss for every turn": (dict(conversations=[{**SAID[0], "loss": False}, {**SAID[1], "loss": True, "weight": 1}]), ""),
    "notes": (dict(model="", source="sharegpt", score=0.3, task="vqa", split="train", lang="en", clip_score=0.3), ""),
    "notes on the picture": (dict(image="a.png", image_id="0017", width=6, image_source="coco.jpg", url="http://x/a.jpg",
                                  video_id="v1", file_name="a.png"), ""),
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_medium_that_is_not_read_is_never_no_picture(tmp_path, name):
    fields, words = UNREAD[name]
    write(tmp_path)
    record = {"id": "r", "conversations": list(SAID), **fields}
    sentence = sentence_of(tmp_path, record)
    assert words in sentence if words else sentence == ""
    if not words:
        number = (2 if name == "two images" else 1) if fields.get("images") or fields.get("image") else 0
        assert len(Conversations(tmp_path / "d.json", tmp_path, None, P, IMAGE)[0]["images"]) == number
        assert (Conversations(tmp_path / "d.json", tmp_path, None, P, IMAGE).lengths[0] > 0) == (number > 0)


def saved(array, form="PNG", mode=None, **more):
    """The bytes of a picture file made of an array"""
    file = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    (image.convert(mode) if mode else image).save(file, form, **more)
    return file.getvalue()


RAMP = np.linspace(0, 1, 256).reshape(1, 256).repeat(4, 0)
SHAPE = np.zeros((8, 8, 4), np.uint8)                           # black, and a shape in the transparency
SHAPE[2:6, 2:6, 3] = 255
JPEG = saved(noise(60, 40), "JPEG")
PIXELS = {  # name: (file, what the sentence says; "" if it is read as the ramp from black to white)
    "half a JPEG": (JPEG[:len(JPEG) // 2], "truncated"), "a header only": (JPEG[:20], "damaged or of another format"),
    "a bomb": (png_header(50_000, 50_000), "2500000000 pixels"), "no data": (png_header(5, 5), "truncated"),
    "zero pixels": (png_header(0, 5), "damaged or of another format"), "damaged": (b"GIF89a" + b"\xff" * 50, "cannot be read"),
    "grey 8": (saved((RAMP * 255).astype(np.uint8)), ""), "grey 16 PNG": (saved((RAMP * 65535).astype(np.uint16)), ""),
    "grey 16 TIFF": (saved((RAMP * 65535).astype(np.uint16), "TIFF"), ""),
    "grey 16 PPM": (saved((RAMP * 65535).astype(np.uint16), "PPM"), ""),
    "grey 16, big-endian TIFF": (saved(Image.frombytes("I;16B", (256, 4), (RAMP * 65535).astype(">u2").tobytes()), "TIFF"), ""),
    "grey with transparency": (saved((RAMP * 255).astype(np.uint8), mode="LA"), ""),
    "RGBA": (saved((RAMP * 255).astype(np.uint8), mode="RGBA"), ""), "CMYK": (saved((RAMP * 255).astype(np.uint8), "TIFF", "CMYK"), ""),
    "1 bit": (saved((RAMP > 0.5).astype(np.uint8) * 255, mode="1"), ""),
    "float 0 to 1": (saved(RAMP.astype(np.float32), "TIFF"), "floating-point numbers"),
    "float 0 to 255": (saved((RAMP * 255).astype(np.float32), "TIFF"), "floating-point numbers"),
    "float PFM": (saved(RAMP.astype(np.float32), "PPM"), "floating-point numbers"),
    "32 bits": (saved((RAMP * 2 ** 31).clip(0, 2 ** 31 - 1).astype(np.int32), "TIFF"), "not certain which is white"),
    "32 bits to 255": (saved((RAMP * 255).astype(np.int32), "TIFF"), "go from 0 to 255"),
    "negative": (saved((RAMP * 255 - 128).astype(np.int32), "TIFF"), "go from -128 to 127"),
    "12 bits in 16": (saved((RAMP * 4095).astype(np.uint16)), "go from 0 to 4095"),
    "8 bits in 16": (saved((RAMP * 255).astype(np.uint16), "TIFF"), "go from 0 to 255"),
    "16 bits, 0 is white": (saved((RAMP * 65535).astype(np.uint16), "TIFF", tiffinfo={262: 0}), "not certain which is white"),
    "a shape in the transparency": (saved(SHAPE), "what it shows is in its transparency"),
    "grey, a shape in the transparency": (saved(Image.fromarray(SHAPE).convert("LA")), "what it shows is in its transparency"),
}


@pytest.mark.parametrize("name", PIXELS)
def test_pixels_are_scaled_with_certainty_or_refused(tmp_path, name):
    content, words = PIXELS[name]
    sentence = sentence_of(tmp_path, {"conversations": list(SAID), "image": "a.png"}, content)
    if words:
        assert words in sentence and "a.png' cannot be read: " in sentence and "\n" not in sentence
        return
    assert sentence == ""
    grey = np.asarray(pictures.open_image(tmp_path / "a.png"))[..., 0].astype(float)[0]
    wanted = (RAMP[0] > 0.5) * 255 if name == "1 bit" else RAMP[0] * 255
    assert np.abs(grey - wanted).max() <= 1.01


def test_one_colour_with_transparency_is_a_picture():
    assert pictures.open_image(saved(Image.new("RGBA", (4, 4), (9, 9, 9, 0)))).getpixel((0, 0)) == (9, 9, 9)


def with_chunks(png, *chunks):
    """A PNG with more chunks behind its header"""
    return png[:33] + b"".join(chunks) + png[33:]


def with_segment(jpeg, marker, body):
    return jpeg[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def whole_pictures():
    """-> {name: the bytes of a picture that is red at the left and blue at the right when upright}, formats and damaged metadata"""
    rgb = Image.new("RGB", (40, 20), (255, 0, 0))
    rgb.paste((0, 0, 255), (20, 0, 40, 20))
    png, jpeg, webp = saved(rgb), saved(rgb, "JPEG", quality=95, subsampling=0), saved(rgb, "WEBP", lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = rgb.rotate(90, expand=True)
    whole = exif.tobytes()
    # Orientation 6, and a resolution of 1 divided by 0 whose values lie behind the end.
    cut = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + struct.pack("<HHII", 0x0112, 3, 1, 6) + \
        struct.pack("<HHII", 0x011A, 5, 1, 0xFFFFFF) + b"\0\0\0\0"
    odd = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 2) + struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0) + \
        struct.pack(">HHII", 0x011A, 5, 1, 26 + 12) + b"\0\0\0\0" + b"\0" * 8
    bad = zlib.crc32(b"x")
    icc = b"icc\0\0" + zlib.compress(b"x" * 99)
    return {
        "PNG": png, "WebP": webp, "CMYK": saved(rgb, "JPEG", "CMYK", quality=95), "palette": saved(rgb.quantize(4)),
        "RGBA": saved(rgb, mode="RGBA"), "turned": saved(turned, exif=exif),
        "animated": saved(rgb, "GIF", save_all=True, append_images=[Image.new("RGB", (40, 20), (0, 255, 0))]),
        "PNG, comment with a wrong sum": with_chunks(png, chunk(b"tEXt", b"Comment\0hello", bad)),
        "PNG, profile with a wrong sum": with_chunks(png, chunk(b"iCCP", icc, bad)),
        "PNG, profile that is no zlib": with_chunks(png, chunk(b"iCCP", b"icc\0\0" + b"\xff" * 40)),
        "PNG, profile that is cut off": with_chunks(png, chunk(b"iCCP", icc[:-9])),
        "PNG, profile of 100 MB": with_chunks(png, chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(100_000_000)))),
        "PNG, comment of 100 MB": with_chunks(png, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000)))),
        "PNG, comment behind the pixels": png[:-12] + chunk(b"zTXt", b"a\0\0" + b"\xff" * 9, bad) + png[-12:],
        "PNG, EXIF with a wrong sum": with_chunks(png, chunk(b"eXIf", whole[6:], bad)),
        "PNG, EXIF that is none": with_chunks(png, chunk(b"eXIf", b"nonsense")),
        "PNG, EXIF as text that is not hexadecimal": with_chunks(png, chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 9\nzzzz")),
        "PNG, XMP that is no XML": with_chunks(png, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation=")),
        "PNG, turned, comment with a wrong sum": with_chunks(saved(turned, exif=exif), chunk(b"tEXt", b"a\0b", bad)),
        "PNG, no date, no sizes": with_chunks(png, chunk(b"tIME", b""), chunk(b"pHYs", b"\0"), chunk(b"gAMA", b"")),
        "JPEG, EXIF that is none": with_segment(jpeg, 0xE1, b"Exif\0\0nonsense"),
        "JPEG, EXIF of no bytes": with_segment(jpeg, 0xE1, b"Exif\0\0"),
        "JPEG, turned, EXIF cut off": with_segment(saved(turned, "JPEG", quality=95, subsampling=0), 0xE1, cut),
        "JPEG, turned, a resolution of 0/0": with_segment(saved(turned, "JPEG", quality=95, subsampling=0), 0xE1, odd),
        "JPEG, Orientation 99": saved(rgb, "JPEG", quality=95, subsampling=0, exif=whole.replace(b"\x01\x12\0\x03\0\0\0\x01\0\x06", b"\x01\x12\0\x03\0\0\0\x01\0\x63")),
        "JPEG, profile in parts that lack one": with_segment(jpeg, 0xE2, b"ICC_PROFILE\0\x02\x03" + b"x" * 99),
        "JPEG, profile that is none": saved(rgb, "JPEG", quality=95, subsampling=0, icc_profile=b"nonsense"),
        "JPEG, several pictures that are none": with_segment(jpeg, 0xE2, b"MPF\0II*\0\xff\xff\xff\xff"),
        "JPEG, Photoshop's block cut off": with_segment(jpeg, 0xED, b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0\xff\xff"),
        "JPEG, XMP that is no XML": with_segment(jpeg, 0xE1, b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="),
        "JPEG, bytes behind its end": jpeg + b"\0" * 99,
        "WebP, EXIF that is none": saved(rgb, "WEBP", lossless=True, exif=b"Exif\0\0nonsense"),
        "WebP, profile that is none": saved(rgb, "WEBP", lossless=True, icc_profile=b"nonsense"),
        "TIFF, profile that is none": saved(rgb, "TIFF", icc_profile=b"nonsense"),
    }


WHOLE = whole_pictures()


@pytest.mark.parametrize("name", WHOLE)
def test_formats_and_damaged_metadata_come_out_as_the_same_upright_rgb(tmp_path, name):
    assert sentence_of(tmp_path, {"conversations": list(SAID), "image": "a.png"}, WHOLE[name]) == ""
    image = pictures.open_image(tmp_path / "a.png")
    assert image.mode == "RGB" and image.size == (40, 20)
    for x, colour in ((5, (255, 0, 0)), (35, (0, 0, 255))):
        assert np.abs(np.subtract(image.getpixel((x, 10)), colour)).max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_all_eight_orientations_as_pillow_turns_them(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(noise(7, 5), form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    assert pictures.open_image(content).tobytes() == wanted.tobytes()


OTHERS = {  # name: (how the file begins, what the sentence says it is)
    "avif": (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1", "it is AVIF"), "avif sequence": (b"\0\0\0\x1cftypavis\0\0", "it is AVIF"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "it is HEIC"), "heif": (b"\0\0\0\x18ftypmif1\0\0\0\0", "it is HEIC"),
    "mp4": (b"\0\0\0\x18ftypisom\0\0\2\0", "it is a video"), "webm": (b"\x1a\x45\xdf\xa3\x01", "it is a video"),
    "avi": (b"RIFF\0\0\1\0AVI LIST", "it is a video"), "jxl": (b"\xff\x0a\xfa", "it is JPEG XL"),
    "jxl box": (b"\0\0\0\x0cJXL \r\n\x87\n", "it is JPEG XL"), "jp2": (b"\0\0\0\x0cjP  \r\n\x87\n", "it is JPEG 2000"),
    "j2k": (b"\xff\x4f\xff\x51", "it is JPEG 2000"), "svg": (b"<svg xmlns=", "it is SVG"),
    "svg with a head": (b'<?xml version="1.0"?>\n<!-- a -->\n<svg xmlns=', "it is SVG"), "pdf": (b"%PDF-1.7", "it is PDF"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n", "it is PostScript"), "psd": (b"8BPS\0\1", "it is PSD"), "ico": (b"\0\0\1\0\1\0", "it is ICO"),
    "html": (b"\n<!DOCTYPE html><html>", "it is a web page"), "html, short": (b"<HTML><body>404", "it is a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "it is a Git LFS pointer"), "empty": (b"", "it is empty"),
    "unknown": (b"nonsense", "it is damaged or of another format"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_sentence_about_another_format_is_true(tmp_path, name):
    content, words = OTHERS[name]
    sentence = sentence_of(tmp_path, {"id": 1, "conversations": list(SAID), "image": "a.jpg"}, content, "a.jpg")
    assert f"d.json: record 0 (id '1'): image '{tmp_path}/a.jpg' cannot be read: {words}; " in sentence
    assert sentence.endswith("the formats that are read are JPEG, PNG, GIF, WEBP, BMP, TIFF, PPM") and "BytesIO" not in sentence


FORMS = {  # name: (text of the file, number of records)
    "a list": ("[{0}, {0}]", 2), "lines": ("{0}\n{0}\n", 2), "lines without a last end": ("{0}\n{0}", 2), "one line": ("{0}", 1),
    "an empty last line": ("{0}\n{0}\n\n", 2), "empty lines": ("\n{0}\n\n \n{0}\n\n\n", 2), "Windows": ("{0}\r\n{0}\r\n", 2),
    "a mark of bytes": ("\ufeff{0}\n{0}\n", 2), "a list with a mark": ("\ufeff[{0}]", 1), "space around a list": ("\n [{0}]\n\n", 1),
    "one object over lines": ("{1}\n", 1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("roles", [("human", "gpt"), ("user", "assistant"), ("user", "gpt")])
def test_every_script_reads_the_same_files(tmp_path, form, roles):
    from benchmarks.reading import read_lines
    text, number = FORMS[form]
    said = [{"from": role, "value": value} for role, value in zip(roles, ("What?\u2028\x85", "Red!"))]
    record = {"id": "r", "image": "a.png", "conversations": said}
    write(tmp_path)
    path = tmp_path / "d.json"
    lines = [json.dumps(record, ensure_ascii=False), json.dumps(record, ensure_ascii=False, indent=1)]
    for i, line in enumerate(lines):
        text = text.replace(f"{{{i}}}", line)
    path.write_bytes(text.encode())
    dataset = Conversations(path, tmp_path, None, P, IMAGE)
    assert [type(dataset[i]) for i in range(len(dataset))] == [dict] * number and dataset.image_names == [["a.png"]] * number
    assert list(vocab.read_texts(path, "answers")) == [["Red!"]] * number
    assert read_lines(path, "id", "conversations") == [record] * number
    assert data.main(["--check", str(path), "--images", str(tmp_path), "--workers", "0"]) == 0


def test_no_script_reads_records_in_a_way_of_its_own():
    """Only support/records.py knows the keys of a LLaVA record; the pocket writes such records"""
    paths = [path for folder in (".", "support", "results", "tools") for path in sorted(ROOT.joinpath(folder).glob("*.py"))]
    assert [path.name for path in paths if '"conversations"' in path.read_text()] == ["pocket.py", "records.py"]
