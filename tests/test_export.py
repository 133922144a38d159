"""What tools/export.py writes, read by plain transformers: our logits and our greedy answers."""
import contextlib
import io
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

import checkpoint
import conversation
import eval
import generate
import model
import vocab
from conftest import run
from tools import export
from support.pictures import open_image, transform

QUESTION = "what colour is the big circle?"


def export_here(*arguments):
    """The tool in this process: a process of its own costs ten seconds. -> what it prints"""
    text = io.StringIO()
    with mock.patch.object(sys, "argv", ["tools/export.py", *map(str, arguments)]), contextlib.redirect_stdout(text):
        export.main(export.read_arguments())
    return text.getvalue()


def save_checkpoint(folder, tiny, words, connector="langbridge", llm="qwen", tower="clip", hidden=24, normalize="none",
                    **more):
    """A checkpoint with random weights. D is 44 for qwen, 52 for llama, 36 for gemma."""
    torch.manual_seed(4)
    words = words if connector == "langbridge" else None
    config = model.Config(getattr(tiny, tower), getattr(tiny, llm), connector, hidden, len(words or ()), normalize, **more)
    vlm = checkpoint.build(config, words)
    with torch.no_grad():
        for p in vlm.connector.parameters():
            p.mul_(2)
    checkpoint.save(vlm, str(folder), "pretrain", ("connector",))
    return folder


@pytest.fixture(scope="module")
def words(world):
    return vocab.load_words(f"{world}/words.json")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A wide, a tall and a tiny picture with edges and noise."""
    root, random, paths = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0), []
    for i, (w, h) in enumerate(((61, 33), (30, 70), (5, 9))):
        pixels = random.integers(0, 255, (h, w, 3), dtype=np.uint8)
        pixels[: h // 2, : w // 2] = (250, 10, 10)
        Image.fromarray(pixels).save(root / f"{i}.png")
        paths.append(str(root / f"{i}.png"))
    return paths


def ours(folder, picture, question=QUESTION):
    """(logits of the prompt [T, V], the greedy answer) by this project."""
    vlm = checkpoint.load(str(folder))
    ids = eval.prompt_ids(vlm, {"image": picture, "text": question})
    s = vlm.image_settings
    pixels = transform(open_image(picture), s["size"], s["mean"], s["std"], "pad")[None]
    with torch.no_grad():
        logits = vlm.llm(inputs_embeds=vlm.splice(torch.tensor([ids]), pixels)).logits[0]
    answer, = generate.generate(vlm, [ids], pixels, max_new_tokens=12)
    return logits, answer


def theirs(folder, picture, question=QUESTION):
    """The same by from_pretrained of transformers, with nothing of this project."""
    llava, processor = LlavaForConditionalGeneration.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    content = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
                                           return_dict=True, return_tensors="pt")
    with torch.no_grad():
        logits = llava(**inputs).logits[0]
    answer = llava.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1]:].tolist()
    return logits, [i for i in answer if i not in (llava.generation_config.eos_token_id, llava.config.text_config.eos_token_id)]


CASES = {"folded and padded": dict(llm="llama"), "MLP": dict(connector="mlp", hidden=0),
         "narrow MLP": dict(connector="mlp", hidden=20), "H is D": dict(llm="gemma", hidden=36),
         "SigLIP has no CLS": dict(tower="siglip"), "DINOv2": dict(tower="dino", vision_layer=-1)}


@pytest.mark.parametrize("case", CASES)
def test_plain_transformers_gives_our_logits_and_answers(case, tiny, words, pictures, tmp_path):
    folder = save_checkpoint(tmp_path / "ours", tiny, words, **CASES[case])
    export_here(folder, tmp_path / "theirs")
    for picture in pictures if case == "folded and padded" else pictures[:1]:
        want, our_answer = ours(folder, picture)
        got, their_answer = theirs(tmp_path / "theirs", picture)
        torch.testing.assert_close(got[:, :want.shape[1]], want, atol=1e-4, rtol=1e-4)
        assert their_answer == our_answer and our_answer


def test_after_stage_2_by_the_command_line(tiny, words, pictures, tmp_path):
    """The LLM and the tower of the checkpoint are exported, not those that its config names; a tied head stays tied."""
    folder = save_checkpoint(tmp_path / "before", tiny, words)
    vlm = checkpoint.load(str(folder))
    vlm.llm.config.tie_word_embeddings = True
    vlm.llm.tie_weights()
    with torch.no_grad():
        for p in [*vlm.llm.parameters(), *vlm.vision_tower.parameters()]:
            p += 0.01 * torch.randn_like(p)
    checkpoint.save(vlm, str(tmp_path / "sft"), "sft", ("connector", "llm", "vision_tower"))
    run("tools/export.py", tmp_path / "sft", tmp_path / "theirs", "--offline")
    want, our_answer = ours(tmp_path / "sft", pictures[0])
    got, their_answer = theirs(tmp_path / "theirs", pictures[0])
    torch.testing.assert_close(got[:, :want.shape[1]], want, atol=1e-4, rtol=1e-4)
    assert their_answer == our_answer
    assert not any("lm_head" in name for name in load_file(tmp_path / "theirs" / "model.safetensors"))


@pytest.mark.parametrize("llm", ["qwen", "llama", "no template"])
def test_the_chat_template_writes_our_ids_for_whole_conversations(llm, tiny, tmp_path):
    """Several turns, contents as strings and as lists, a system turn, a text without an image, words next to control tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.qwen if llm == "no template" else getattr(tiny, llm))
    if llm == "no template":
        tokenizer.chat_template = None
    messages = [{"role": "system", "content": "be short"}, {"role": "user", "content": "<image>\nwhat is 'this'?"},
                {"role": "assistant", "content": "a cat"}, {"role": "user", "content": "and {{ this }}?\n\nyes"}]
    ours = conversation.encode_prompt(messages, tokenizer, 1)
    template = export.chat_template(tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    lists = [dict(m) for m in messages]
    lists[1]["content"] = [{"type": "text", "text": "what is 'this'?"}, {"type": "image"}]
    lists[3]["content"] = [{"type": "text", "text": messages[3]["content"]}]
    for turns in (messages, lists):
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert [conversation.IMAGE_ID if i == image_id else i for i in ids] == ours


REFUSED = {"a softmax": (dict(normalize="softmax"), "normalize=softmax is no two-layer MLP"),
           "H above D": (dict(hidden=45), r"H = 45, more than the LLM's D = 44"),
           "another picture size": (dict(image_size=16), "takes pictures of 16 pixels"),
           "pooled patches": (dict(pool=3), "its patches pooled")}


@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_cannot_compute_is_refused(case, tiny, words, tmp_path):
    settings, sentence = REFUSED[case]
    folder = save_checkpoint(tmp_path / "ours", tiny, words, **settings)
    with pytest.raises(ValueError, match=sentence) as error:
        export_here(folder, tmp_path / "theirs")
    assert "--prompt_embeds" in str(error.value) and not (tmp_path / "theirs").exists()


def test_a_tokenizer_whose_processor_writes_other_ids_is_refused(tiny, words, tmp_path):
    """Its template writes no BOS and its post-processor adds one, which the library then does and this project does not."""
    from tokenizers.processors import TemplateProcessing
    AutoModelForCausalLM.from_pretrained(tiny.llama).save_pretrained(tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(tiny.llama)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    tokenizer.chat_template = tokenizer.chat_template.replace("<|bos|>", "")
    tokenizer.save_pretrained(tmp_path / "llama")
    tiny = type("", (), {"clip": tiny.clip, "llama": str(tmp_path / "llama")})
    folder = save_checkpoint(tmp_path / "ours", tiny, words, llm="llama")
    with pytest.raises(ValueError, match="the answers would differ"):
        export_here(folder, tmp_path / "theirs")


@pytest.mark.parametrize("llm, normalize", [("qwen", "softmax"), ("gemma", "none")])
def test_prompt_embeds_give_our_answer_in_an_unchanged_llm(llm, normalize, tiny, words, pictures, tmp_path):
    folder = save_checkpoint(tmp_path / "ours", tiny, words, llm=llm, normalize=normalize, hidden=64)
    export_here(folder, tmp_path / "p.safetensors", "--prompt_embeds", "--image", pictures[1], "--ask", QUESTION)
    embeds = load_file(tmp_path / "p.safetensors")["prompt_embeds"]
    plain = AutoModelForCausalLM.from_pretrained(getattr(tiny, llm)).eval()
    assert embeds.ndim == 2 and embeds.shape[1] == plain.config.hidden_size
    answer = plain.generate(inputs_embeds=embeds[None], max_new_tokens=12, do_sample=False)[0].tolist()
    assert [i for i in answer if i != plain.config.eos_token_id] == ours(folder, pictures[1])[1]
    export_here(folder, tmp_path / "text.safetensors", "--prompt_embeds", "--ask", QUESTION)        # no image
    assert len(load_file(tmp_path / "text.safetensors")["prompt_embeds"]) == len(embeds) - 9 - 1    # the patches, the newline
    with pytest.raises(ValueError, match="exists; --overwrite"):
        export_here(folder, tmp_path / "p.safetensors", "--prompt_embeds", "--ask", QUESTION)


def test_a_wrong_call_is_one_sentence(tiny, words, tmp_path):
    folder = save_checkpoint(tmp_path / "ours", tiny, words, normalize="softmax")
    with pytest.raises(ValueError, match="no checkpoint"):
        export_here(tmp_path / "none", tmp_path / "x")
    with pytest.raises(SystemExit):
        export_here(folder, tmp_path / "x", "--prompt_embeds")      # without a question
    done = run("tools/export.py", folder, tmp_path / "x", check=False)
    assert done.returncode == 1 and "does not fold" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()
