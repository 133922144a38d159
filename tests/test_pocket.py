"""The tiny pocket world: files are well formed, answers balanced, splits disjoint, runs repeat."""
import base64
import csv
import hashlib
import io
import json
import os
import random
from collections import Counter

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import conftest
import conversation
from common import read_json
from support import pocket_models, pocket_world
from support.pocket_world import SUFFIX

# The JSON files of the tiny world: their number, and a hash of their hashes. If this hash changes,
# the tables in results/ no longer belong to this world.
DATA_FILES = (23, "b15f939d3133b3575af59a8be79ddef994aae232cd78147469e2a45e8716b6d1")


@pytest.fixture(scope="module")
def world(pocket_worlds):
    return pocket_worlds[0]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def sums(folder, pattern="*"):
    """Return {path in the folder: SHA-256} of its files."""
    files = sorted(p for p in folder.rglob(pattern) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_same_seed_same_bytes(pocket_worlds):
    first, second = map(sums, pocket_worlds)
    assert "pocket-qwen/model.safetensors" in first
    assert first == second


def test_the_world_is_the_one_that_the_results_were_made_in(world):
    """Scenes and texts depend only on the order of random numbers, so no machine changes them."""
    files = {name: digest for name, digest in sums(world, "*.json*").items()
             if not name.startswith(("pocket-", "vision-tower", "pocket.json"))}
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    assert (len(files), digest) == DATA_FILES


def test_second_run_reuses_and_other_settings_are_refused(world):
    weights = world / "pocket-qwen" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    again = conftest.run("pocket.py", "--tiny", "--out", world)
    assert again.stdout.count("reused") == 4
    assert weights.stat().st_mtime_ns == before
    other = conftest.run("pocket.py", "--tiny", "--out", world, "--seed", "1", check=False)
    assert other.returncode != 0
    assert "--overwrite" in other.stderr and "Traceback" not in other.stderr


@pytest.mark.parametrize("name", ["pretrain", "sft", "captions_val", "captions_test"])
def test_llava_records(world, name):
    records = read_json(world / f"{name}.json")
    assert len({r["id"] for r in records}) == len(records)
    for r in records:
        turns = r["conversations"]
        assert [t["from"] for t in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert turns and all(t["value"].strip() for t in turns)
        num_images = sum(t["value"].count("<image>") for t in turns)
        assert num_images == turns[0]["value"].count("<image>") == ("image" in r)
        assert "image" not in r or (world / "images" / r["image"]).exists()
    split = {"captions_val": "val", "captions_test": "test"}.get(name, "train")
    assert all(split in r["image"] for r in records if "image" in r)
    share = sum("image" not in r for r in records) / len(records)
    assert 0.05 < share < 0.15 if name == "sft" else share == 0


def test_no_scene_is_in_training_and_in_evaluation(world):
    truth = read_json(world / "truth.json")
    keys = {split: {pocket_world.scene_key(s) for n, s in truth.items() if n.startswith(split)}
            for split in ("train", "val", "test")}
    assert {split: len(k) for split, k in keys.items()} == {"train": 60, "val": 24, "test": 24}
    assert len(set().union(*keys.values())) == 60 + 24 + 24
    for name, scene in truth.items():
        assert pocket_world.is_held_out(scene) == (not name.startswith("train"))
    for folder, split in (("val", "val"), ("eval", "test")):
        names = os.listdir(world / folder / "textvqa/train_images")
        assert names and all(n.startswith(split) for n in names)


def test_pope(world):
    out = world / "eval/pope"
    asked = lines(out / "llava_pope_test.jsonl")
    truth = read_json(world / "truth.json")
    starts = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
    for category, start in starts.items():
        labels = lines(out / f"coco/coco_pope_{category}.json")
        mine = [q for q in asked if q["category"] == category]
        half = len(labels) // 2
        assert Counter(r["label"] for r in labels) == {"yes": half, "no": half}
        for label, question in zip(labels, mine, strict=True):
            assert question["question_id"] == start + label["question_id"]
            assert question["image"] == label["image"]
            assert question["text"] == label["text"] + "\n" + SUFFIX
            assert (out / "val2014" / label["image"]).exists()
            scene = truth[f"{label['image'][7:-4]}.png"]
            shapes = {t["shape"] for t in scene["objects"]}
            assert (label["text"].split()[3] in shapes) == (label["label"] == "yes")
    categories = [q["category"] for q in asked]
    assert categories == sorted(categories, key=list(starts).index)


def test_gqa(world):
    out = world / "eval/gqa"
    truth = read_json(out / "testdev_balanced_questions.json")
    asked = lines(out / "llava_gqa_testdev_balanced.jsonl")
    assert [q["question_id"] for q in asked] == list(truth)
    for q in asked:
        t = truth[q["question_id"]]
        assert q["text"] == t["question"] + "\n" + SUFFIX
        assert q["image"] == t["imageId"] + ".jpg" and (out / "images" / q["image"]).exists()
        assert t["answer"] == t["answer"].lower() and t["isBalanced"] is True
        assert t["types"]["structural"] in ("query", "verify", "logical", "choose", "compare")
        assert t["types"]["semantic"] in ("attr", "cat", "obj")


@pytest.mark.parametrize("task", ["existence", "count", "position", "color", "OCR"])
def test_mme(world, task):
    out = world / "eval/mme"
    mine = [q for q in lines(out / "llava_mme.jsonl") if q["category"] == task]
    text = (out / f"ground_truth/{task}.txt").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in text.splitlines()]
    assert rows and [r[2] for r in rows] == ["Yes", "No"] * (len(rows) // 2)
    for (image, question, answer), q in zip(rows, mine, strict=True):
        assert q["question_id"] == q["image"] == f"{task}/{image}"
        plain = question.removesuffix(" Please answer yes or no.")
        assert q["text"] == plain + "\n" + SUFFIX
        folder = out / "MME_Benchmark_release_version" / task
        assert (folder / image).exists()
        beside = (folder / f"{image[:-4]}.txt").read_text(encoding="utf-8")
        assert f"{question}\t{answer}\n" in beside


def test_textvqa(world):
    out = world / "eval/textvqa"
    truth = read_json(out / "TextVQA_0.5.1_val.json")["data"]
    asked = lines(out / "llava_textvqa_val_v051_ocr.jsonl")
    scenes = read_json(world / "truth.json")
    assert asked
    for t, q in zip(truth, asked, strict=True):
        word = pocket_world.sign_of(scenes[f"{t['image_id']}.png"])["word"]
        assert t["answers"] == [word] * 10 and q["question_id"] == t["image_id"]
        assert q["text"] == f"{t['question']}\n{SUFFIX}" and word not in q["text"].lower()
        assert (out / "train_images" / q["image"]).exists()


def test_mmbench_has_every_rotation(world):
    path = world / "eval/mmbench/mmbench_dev_20230712.tsv"
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    indices = [int(row["index"]) for row in rows]
    assert indices == sorted(indices)
    groups = {}
    for row in rows:
        groups.setdefault(int(row["index"]) % 1_000_000, []).append(row)
    assert len(groups) > 5
    for group in groups.values():
        options = [[row[letter] for letter in "ABCD" if row[letter]] for row in group]
        turns = [int(row["index"]) // 1_000_000 for row in group]
        assert turns == list(range(len(options[0])))
        assert len(set(options[0])) == len(options[0])
        assert len({row[row["answer"]] for row in group}) == 1
        # The answer stands under every letter once.
        assert len({row["answer"] for row in group}) == len(group)
        for before, after in zip(options, options[1:]):
            assert after == before[-1:] + before[:-1]
    assert Image.open(io.BytesIO(base64.b64decode(rows[0]["image"]))).format == "JPEG"


def test_a_blind_guess_of_yes_or_no_is_half_right():
    rng = random.Random(0)
    answers = {}
    for _ in range(6000):
        scene = pocket_world.random_scene(rng)
        for kind, _, answer in pocket_world.questions(scene, rng, 5, pocket_world.TRAIN_KINDS):
            answers.setdefault(kind, Counter())[answer] += 1
    for kind, counts in answers.items():
        if set(counts) == {"Yes", "No"}:
            assert 0.4 < counts["Yes"] / counts.total() < 0.6, (kind, counts)
        assert counts.total() > 50, (kind, counts)
        assert max(counts.values()) / counts.total() < 0.62, (kind, counts)


def test_the_tower_loads(world):
    tower = AutoModel.from_pretrained(world / "vision-tower")
    tower = getattr(tower, "vision_model", tower)
    seen = tower(pixel_values=torch.zeros(1, 3, 96, 96), output_hidden_states=True)
    assert seen.hidden_states[-2].shape == (1, 37, 128) and len(seen.hidden_states) == 5


@pytest.mark.parametrize("name", pocket_models.LLMS)
def test_an_llm_loads_and_its_tokenizer_round_trips(world, name):
    form, config = pocket_models.TOKENIZERS[name], pocket_models.LLMS[name]
    tokenizer = AutoTokenizer.from_pretrained(world / name)
    llm = AutoModelForCausalLM.from_pretrained(world / name)

    def ids_of(text):
        return tokenizer.encode(text, add_special_tokens=False)

    text = 'There is a red diamond in the top left.\nIs the word "jazz"? é 7 books'
    assert tokenizer.decode(ids_of(text)) == text
    talk = pocket_world.chat([("Is there a star?", "Yes"), ("What color is it?", "Red")], text)
    ids, labels = conversation.encode(talk, tokenizer, 0)
    assert ids == tokenizer.apply_chat_template(talk, return_dict=False)
    trained = tokenizer.decode([i for i in labels if i != -100])
    eos = form["eos_token"]
    assert trained == f"Yes{eos}Red{eos}"
    lines = pocket_world.chat([("Is there a star?", "Yes"), ("What color is it?", "Red")], text, ending="")
    row = pocket_models.encode(lines, "prompted", tokenizer)
    assert tokenizer.decode(row["input_ids"]) == f"{form['bos_token'] or ''}{text}\nIs there a star?\nYes\nWhat color is it?\nRed\n"
    assert tokenizer.decode([i for i in row["labels"] if i != -100]) == "Yes\nRed\n"
    assert tokenizer.eos_token == eos and len(ids_of(eos)) == 1
    eos = llm.generation_config.eos_token_id
    assert tokenizer.eos_token_id in (eos if isinstance(eos, list) else [eos])
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert llm.get_input_embeddings().weight.shape == (len(tokenizer), config["hidden_size"])
    assert llm.config.tie_word_embeddings == config["tie_word_embeddings"]
    for word in (*pocket_world.COLORS, *pocket_world.SIZES, "circle", "square", "image"):
        assert len(ids_of(f"a {word}")) == 2, f"{name} splits {word!r}"
    for word in pocket_models.SPLIT[name]:
        assert len(ids_of(f"a {word}")) > 2, f"{name} has {word!r} as one token"


def test_the_families_share_words_and_the_widths_differ(world):
    assert len({config["hidden_size"] for config in pocket_models.LLMS.values()}) == 2
    words = []
    for name in ("pocket-qwen", "pocket-llama"):
        tokenizer = AutoTokenizer.from_pretrained(world / name)
        words.append({tokenizer.decode([i]) for i in range(len(tokenizer))})
    assert len(words[0] & words[1]) > 250


def test_muon_is_that_of_torch_and_orthogonal_in_float32():
    torch.manual_seed(0)
    shapes = [(8, 8), (12, 5), (5, 12)]
    ours, torchs = ([torch.nn.Parameter(torch.linspace(-1, 1, m * n).reshape(m, n).clone()) for m, n in shapes]
                    for _ in range(2))
    means = [torch.zeros_like(p) for p in ours]
    optimizer = torch.optim.Muon(torchs, lr=5e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours, torchs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        pocket_models.muon_step(ours, means, 5e-3, torch.bfloat16)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, torchs))
    for p in ours:
        p.detach().zero_()              # so the step is all that is left; in float32, the other dtype
        pocket_models.muon_step([p], [torch.zeros_like(p)], 1.0, torch.float32)
        singular = torch.linalg.svdvals(p) / (0.2 * max(p.shape) ** 0.5)
        assert 0.5 < singular.min() and singular.max() < 1.3
