"""The README's flow at a tiny size, by the real command lines: world, words, pretrain, transfer, SFT, benchmark, picture."""
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.files import load_questions
from conftest import run


@pytest.fixture(scope="module")
def flow(pocket_worlds, tmp_path_factory):
    root = tmp_path_factory.mktemp("flow")
    world, out = root / "world", root / "out"
    shutil.copytree(pocket_worlds[0], world)
    run("vocab.py", "--tokenizers", world / "pocket-qwen", world / "pocket-llama", "--corpus", world / "pretrain.json",
        world / "sft.json", "--size", 300, "--out", world / "words.json")
    paths = [f"--images={world}/images", "--workers=0", "--device=cpu", "--max_steps=3"]
    data = f"--data={world}/pretrain.json"
    run("train.py", "config/pocket/words.py", f"--llm={world}/pocket-qwen", f"--vision_tower={world}/vision-tower",
        f"--words={world}/words.json", data, f"--out={out}/words", *paths)
    run("train.py", "config/pocket/pretrain.py", f"--init={out}/words", data, f"--out={out}/pretrain", *paths)
    moved = run("transfer.py", out / "pretrain", world / "pocket-llama", "--out", out / "moved",
                "--eval", world / "captions_test.json", "--limit", 16)
    run("train.py", "config/pocket/sft.py", f"--init={out}/moved", f"--data={world}/sft.json", f"--out={out}/sft", *paths)
    scored = run("eval.py", out / "sft", "--tasks", "gqa,textvqa", "--data", world / "eval", "--batch_size", 32)
    run("words.py", out / "sft", world / "images" / "test_000000.png", "--out", out / "words")
    return world, out, moved.stdout, scored.stdout


def test_the_connector_moves_untouched(flow):
    world, out, _, _ = flow
    before, after = (load_file(out / name / "connector.safetensors") for name in ("pretrain", "moved"))
    assert all((before[name] == after[name]).all() for name in before) and before.keys() == after.keys()
    assert not (out / "moved" / "llm").exists()


def test_the_report_says_what_arrived(flow):
    world, out, text, _ = flow
    report = json.loads((out / "moved" / "transfer.json").read_text())
    assert report["words"] == 300 and 0 < report["single_tokens"] <= 300
    for end in ("source", "target"):
        for name in ("right", "wrong", "none"):
            assert 0 < report[end][f"bits_per_byte_{name}"] < 20
        assert 0 <= report[end]["mass_on_single_tokens"] <= 1.0001
        assert len({report[end][f"bits_per_byte_{name}"] for name in ("right", "wrong", "none")}) == 3
    assert "bits_per_byte_wrong" in text


def test_sft_leaves_a_plain_hugging_face_folder(flow):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    world, out, _, _ = flow
    llm = AutoModelForCausalLM.from_pretrained(out / "sft" / "llm")
    assert llm.config.model_type == "llama" and len(AutoTokenizer.from_pretrained(out / "sft" / "llm"))
    config = (out / "sft" / "config.json").read_text()
    assert str(out) not in config and json.loads(config)["stage"] == "sft"


def test_every_question_has_one_answer_and_a_score(flow):
    world, out, _, table = flow
    results = json.loads((out / "sft" / "eval" / "results.json").read_text())["tasks"]
    assert results.keys() == {"gqa", "textvqa"} and "| GQA | TextVQA |" in table
    asked = sum(1 for _ in open(world / "eval" / "gqa" / "llava_gqa_testdev_balanced.jsonl"))
    assert sum(1 for _ in open(out / "sft" / "eval" / "gqa.jsonl")) == asked


@pytest.mark.parametrize("task", ["mme", "mmbench", "pope"])
def test_the_other_benchmarks_can_be_asked(flow, task):
    """Asked they are in speedrun.sh: a model of three steps says all the tokens that it may, to each question."""
    questions, lacks = load_questions(task, str(flow[0] / "eval"))
    assert len(questions) > 20 and not lacks


def test_the_picture_and_the_page_are_there(flow):
    _, out, _, _ = flow
    assert os.path.getsize(out / "words" / "words.png") > 1000 and os.path.getsize(out / "words" / "words.html") > 1000


def test_the_move_can_be_followed_by_benchmarks(flow, tmp_path):
    """--tasks asks the source and the result. Two questions of TextVQA stand for a benchmark."""
    world, out, _, _ = flow
    shutil.copytree(world / "eval" / "textvqa", tmp_path / "data" / "textvqa")
    ask, truth = (tmp_path / "data" / "textvqa" / name for name in ("llava_textvqa_val_v051_ocr.jsonl", "TextVQA_0.5.1_val.json"))
    ask.write_text("".join(ask.read_text().splitlines(keepends=True)[:2]))
    labels = json.loads(truth.read_text())
    truth.write_text(json.dumps({**labels, "data": labels["data"][:2]}))
    argv = [out / "pretrain", world / "pocket-llama", "--out", tmp_path / "moved", "--tasks", "textvqa", "--device", "cpu", "--offline"]
    done = run("transfer.py", *argv, "--data", tmp_path / "nowhere", check=False)
    assert done.returncode == 1 and "files are missing" in done.stderr and not (tmp_path / "moved").exists()
    run("transfer.py", *argv, "--data", tmp_path / "data")
    for folder in (out / "pretrain", tmp_path / "moved"):
        results = json.loads((folder / "eval" / "results.json").read_text())
        assert results["tasks"]["textvqa"]["total"] == 2
    done = run("transfer.py", *argv, check=False)
    assert done.returncode == 1 and "go together" in done.stderr


def test_an_mlp_is_not_moved_and_the_reason_is_said(flow, tmp_path):
    world, out, _, _ = flow
    run("train.py", "config/pocket/pretrain.py", "--init=", f"--llm={world}/pocket-qwen",
        f"--vision_tower={world}/vision-tower", "--connector=mlp", "--words_loss=0", f"--data={world}/pretrain.json", f"--images={world}/images", f"--out={tmp_path}/mlp",
        "--workers=0", "--device=cpu", "--max_steps=1")
    done = run("transfer.py", tmp_path / "mlp", world / "pocket-llama", check=False)
    assert done.returncode != 0 and "MLP" in done.stderr and "Traceback" not in done.stderr
    mapped = run("transfer.py", tmp_path / "mlp", world / "pocket-llama", "--map", world / "words.json",
                 "--out", tmp_path / "mapped", "--eval", world / "captions_test.json", "--limit", 16)
    assert "bits_per_byte_right" in mapped.stdout
    before, after = (load_file(tmp_path / name / "connector.safetensors") for name in ("mlp", "mapped"))
    assert (before["mlp.0.weight"] == after["mlp.0.weight"]).all()
    assert before["mlp.2.weight"].shape != after["mlp.2.weight"].shape
    done = run("transfer.py", out / "pretrain", world / "pocket-llama", "--map", world / "words.json",
               "--out", tmp_path / "x", check=False)
    assert done.returncode != 0 and "--map is for an MLP" in done.stderr


def test_a_mapped_layer_says_the_target_word_for_the_source_word():
    """If the target's embeddings are a rotation of the source's, the map is that rotation."""
    from tools import map_mlp
    torch.manual_seed(0)
    source_E = torch.randn(200, 12) + 3
    rotation = torch.linalg.qr(torch.randn(12, 12))[0]
    target_E = source_E @ rotation + 5
    weight, bias = torch.randn(12, 7), torch.randn(12)
    new_weight, new_bias = map_mlp.map_layer(weight, bias, source_E, target_E, ridge=1e-9)
    hidden = torch.randn(4, 7)
    expected = (hidden @ weight.T + bias) @ rotation + 5
    torch.testing.assert_close(hidden @ new_weight.T + new_bias, expected, rtol=1e-3, atol=1e-3)
