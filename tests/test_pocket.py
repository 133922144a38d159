"""The pocket world on its tiny setting: files parse, answers are balanced, splits are apart, models load, runs repeat."""
import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import pocket  # noqa: E402


def run(out, *more):
    """python pocket.py --tiny into out."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run([sys.executable, str(ROOT / "pocket.py"), "--tiny", "--out", str(out), *more], capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Two runs with the same seed, side by side."""
    folders = [tmp_path_factory.mktemp("pocket") / name for name in ("a", "b")]
    for folder in folders:
        done = run(folder)
        assert done.returncode == 0, done.stderr
    return folders


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_same_seed_same_bytes(worlds):
    sums = []
    for folder in worlds:
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        assert any(p.name == "model.safetensors" for p in files)
        sums.append({str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files})
    assert sums[0] == sums[1]


def test_second_run_reuses_and_other_settings_are_refused(worlds):
    weights = worlds[0] / "pocket-qwen" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    again = run(worlds[0])
    assert again.returncode == 0 and again.stdout.count("reused") == 5 and weights.stat().st_mtime_ns == before
    other = run(worlds[0], "--seed", "1")
    assert other.returncode != 0 and "--overwrite" in other.stderr and "Traceback" not in other.stderr


def test_llava_records(worlds):
    out = worlds[0]
    for name in ("pretrain.json", "sft.json", "captions_val.json", "captions_test.json"):
        records = read(out / name)
        assert len({r["id"] for r in records}) == len(records)
        for r in records:
            turns = r["conversations"]
            assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert all(t["value"].strip() for t in turns)
            assert sum(t["value"].count("<image>") for t in turns) == turns[0]["value"].count("<image>") == ("image" in r)
            assert "image" not in r or (out / "images" / r["image"]).exists()
    sft = read(out / "sft.json")
    without = [r for r in sft if "image" not in r]
    assert 0.05 < len(without) / len(sft) < 0.15
    assert all("train" in r["image"] for r in read(out / "pretrain.json") + [r for r in sft if "image" in r])
    assert all("test" in r["image"] for r in read(out / "captions_test.json"))


def test_no_scene_is_in_training_and_in_evaluation(worlds):
    truth = read(worlds[0] / "truth.json")
    train = {pocket.scene_key(s) for n, s in truth.items() if n.startswith("train")}
    val, test = ({pocket.scene_key(s) for n, s in truth.items() if n.startswith(split)} for split in ("val", "test"))
    assert len(train) == 60 and len(val) == len(test) == 24 and not train & (val | test) and not val & test
    assert all(pocket.is_held_out(s) == (not n.startswith("train")) for n, s in truth.items())
    for folder, split in (("val", "val"), ("eval", "test")):
        names = {n[:-4] for n in os.listdir(worlds[0] / folder / "textvqa/train_images")}
        assert names and all(n.startswith(split) for n in names)


def test_pope(worlds):
    out = worlds[0] / "eval/pope"
    asked = lines(out / "llava_pope_test.jsonl")
    truth = read(worlds[0] / "truth.json")
    for category, first in (("adversarial", 0), ("random", 10_000_000), ("popular", 20_000_000)):
        labels = lines(out / f"coco/coco_pope_{category}.json")
        mine = [q for q in asked if q["category"] == category]
        assert Counter(r["label"] for r in labels) == {"yes": len(labels) // 2, "no": len(labels) // 2}
        for label, question in zip(labels, mine, strict=True):
            assert question["question_id"] == first + label["question_id"] and question["image"] == label["image"]
            assert question["text"] == label["text"] + "\n" + pocket.SUFFIX
            assert (out / "val2014" / label["image"]).exists()
            shapes = {t["shape"] for t in truth[f"{label['image'][7:-4]}.png"]["objects"]}
            assert (label["text"].split()[3] in shapes) == (label["label"] == "yes")
    assert [q["category"] for q in asked] == sorted((q["category"] for q in asked), key=["adversarial", "random", "popular"].index)


def test_gqa(worlds):
    out = worlds[0] / "eval/gqa"
    truth, asked = read(out / "testdev_balanced_questions.json"), lines(out / "llava_gqa_testdev_balanced.jsonl")
    assert [q["question_id"] for q in asked] == list(truth)
    for q in asked:
        t = truth[q["question_id"]]
        assert q["text"] == t["question"] + "\n" + pocket.SUFFIX and q["image"] == t["imageId"] + ".jpg"
        assert (out / "images" / q["image"]).exists() and t["isBalanced"] is True
        assert t["answer"] == t["answer"].lower()
        assert t["types"]["structural"] in ("query", "verify", "logical", "choose", "compare") and "global" in t["groups"]


def test_mme(worlds):
    out = worlds[0] / "eval/mme"
    asked = lines(out / "llava_mme.jsonl")
    for task in ("existence", "count", "position", "color", "OCR"):
        rows = [line.split("\t") for line in (out / f"ground_truth/{task}.txt").read_text(encoding="utf-8").splitlines()]
        mine = [q for q in asked if q["category"] == task]
        assert rows and [r[2] for r in rows] == ["Yes", "No"] * (len(rows) // 2)
        for (image, question, said), q in zip(rows, mine, strict=True):
            assert q["question_id"] == q["image"] == f"{task}/{image}"
            assert q["text"] == question.removesuffix(" Please answer yes or no.") + "\n" + pocket.SUFFIX
            folder = out / "MME_Benchmark_release_version" / task
            assert (folder / image).exists() and f"{question}\t{said}\n" in (folder / f"{image[:-4]}.txt").read_text(encoding="utf-8")


def test_textvqa(worlds):
    out = worlds[0] / "eval/textvqa"
    truth, asked = read(out / "TextVQA_0.5.1_val.json")["data"], lines(out / "llava_textvqa_val_v051_ocr.jsonl")
    scenes = read(worlds[0] / "truth.json")
    assert asked
    for t, q in zip(truth, asked, strict=True):
        word = next(o["word"] for o in scenes[f"{t['image_id']}.png"]["objects"] if "word" in o)
        assert t["answers"] == [word] * 10 and q["question_id"] == t["image_id"] and word not in q["text"].lower()
        assert q["text"] == f"{t['question']}\n{pocket.SUFFIX}" and (out / "train_images" / q["image"]).exists()


def test_mmbench_has_every_rotation(worlds):
    import base64
    import csv
    import io
    from PIL import Image
    with open(worlds[0] / "eval/mmbench/mmbench_dev_20230712.tsv", encoding="utf-8", newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t"))
    groups = {}
    for row in rows:
        groups.setdefault(int(row["index"]) % 1_000_000, []).append(row)
    assert [int(r["index"]) for r in rows] == sorted(int(r["index"]) for r in rows) and len(groups) > 5
    for group in groups.values():
        options = [[row[letter] for letter in "ABCD" if row[letter]] for row in group]
        assert [int(row["index"]) // 1_000_000 for row in group] == list(range(len(options[0])))
        assert len({row[row["answer"]] for row in group}) == 1 and len(set(options[0])) == len(options[0])
        assert len({row["answer"] for row in group}) == len(group), "the answer stands under every letter once"
        for before, after in zip(options, options[1:]):
            assert after == before[-1:] + before[:-1]
    assert Image.open(io.BytesIO(base64.b64decode(rows[0]["image"]))).format == "JPEG"


def test_a_blind_guess_of_yes_or_no_is_half_right():
    rng = random.Random(0)
    said = {}
    for _ in range(6000):
        for kind, _, answer in pocket.questions(pocket.some_scene(rng), rng, 5, pocket.TRAIN_KINDS):
            said.setdefault(kind, Counter())[answer] += 1
    for kind, counts in said.items():
        if set(counts) == {"Yes", "No"}:
            assert 0.4 < counts["Yes"] / counts.total() < 0.6, (kind, counts)
        assert counts.total() > 50 and max(counts.values()) / counts.total() < 0.62, (kind, counts)


def test_models_load_and_tokenizers_round_trip(worlds):
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
    tower = AutoModel.from_pretrained(worlds[0] / "vision-tower")
    tower = getattr(tower, "vision_model", tower)
    seen = tower(pixel_values=torch.zeros(1, 3, 96, 96), output_hidden_states=True)
    assert seen.hidden_states[-2].shape == (1, 37, 128) and len(seen.hidden_states) == 5
    text = 'There is a red diamond in the top left.\nIs the word "jazz"? é 7 books'
    talk = pocket.chat([("Is there a star?", "Yes"), ("What color is it?", "Red")], text)
    words, widths = {}, set()
    for name, recipe in pocket.LLMS.items():
        tokenizer, model = (auto.from_pretrained(worlds[0] / name) for auto in (AutoTokenizer, AutoModelForCausalLM))
        form = {"chatml": pocket.CHATML, "headers": pocket.HEADERS}[recipe["family"]]
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
        assert pocket.make_encoder(tokenizer, form)(talk)[0] == tokenizer.apply_chat_template(talk, return_dict=False)
        assert tokenizer.eos_token == form["end"] and len(tokenizer.encode(form["end"], add_special_tokens=False)) == 1
        eos = model.generation_config.eos_token_id
        assert tokenizer.eos_token_id in (eos if isinstance(eos, list) else [eos]) and tokenizer.pad_token_id != tokenizer.eos_token_id
        assert model.get_input_embeddings().weight.shape == (len(tokenizer), recipe["width"])
        assert model.config.tie_word_embeddings == (recipe["family"] == "chatml")
        for word in (*pocket.COLORS, *pocket.SIZES, "circle", "square", "image"):
            assert len(tokenizer.encode(f"a {word}", add_special_tokens=False)) == 2, f"{name} splits {word!r}"
        for word in pocket.SPLIT[recipe["family"]]:
            assert len(tokenizer.encode(f"a {word}", add_special_tokens=False)) > 2, f"{name} has {word!r} whole"
        words[recipe["family"]] = {tokenizer.decode([i]) for i in range(len(tokenizer))}
        widths.add(recipe["width"])
    assert len(widths) == 3 and len(words["chatml"] & words["headers"]) > 250
