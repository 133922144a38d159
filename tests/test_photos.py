"""How results/photos.py counts on photographs: words in boxes, captions, the length of image embeds."""
import json
import math
import sys

import pytest
import torch

import checkpoint
import conversation
import words
from conftest import settings, train_here
from results import photos, questions
from support import pictures


@pytest.fixture(scope="module")
def trained(tiny, world, tmp_path_factory):
    out = tmp_path_factory.mktemp("photos") / "words"
    argv = settings(tiny, world, out, "--stage=words", "--words_init=embeds", "--epochs=4", "--temperature=0.5")
    assert train_here(argv) == 0
    return out


def test_a_patch_belongs_to_the_smallest_box_and_colours_name_no_thing():
    objects = [{"label": "a brown field", "box": [0, 0, 1, 1]}, {"label": "two Dogs", "box": [0.4, 0.4, 0.9, 0.9]}]
    labels = photos.labels_of_patches(objects, 2)
    assert labels == [{"field"}, {"field"}, {"field"}, {"dogs"}]
    assert photos.labels_of_patches(objects[1:], 2)[:3] == [set(), set(), set()]


@pytest.mark.parametrize("text, line", [("A dog.", "A dog."), ("\n\n A dog. \nIt runs.", "A dog."), (" \n", ""), ("", "")])
def test_a_caption_may_begin_with_line_breaks(text, line):
    assert photos.first_line(text) == line


def test_the_report_counts_what_a_slow_loop_counts(trained, world, tmp_path, monkeypatch):
    """Box and label of half a picture. Colours count here, because the pictures have nothing else."""
    monkeypatch.setattr(photos, "NO_THING", {"a"})
    colours = ["red", "green", "blue", "white"]
    boxes = {f"{i}.png": {"objects": [{"label": f"a {colours[i % 4]} square", "box": [0, 0, 1, 0.5]}]} for i in range(8)}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    monkeypatch.setattr(sys, "argv", [
        "photos.py", f"run={trained}", "--captions", f"{world}/captions.json", "--boxes", f"{tmp_path}/boxes.json",
        "--images", f"{world}/images", "--out", f"{tmp_path}/report.json", "--number", "8", "--prompt"])
    asked, generate = [], photos.generate
    monkeypatch.setattr(photos, "generate", lambda vlm, prompts, *more, **kw: asked.extend(prompts) or generate(vlm, prompts, *more, **kw))
    photos.main()
    report = json.loads((tmp_path / "report.json").read_text())["run"]

    vlm = checkpoint.load(str(trained))
    assert asked == [conversation.encode_prompt([photos.ASKED], vlm.tokenizer, vlm.num_patches, "chat")] * 8
    right = other = nats = num_bytes = 0
    captions = {r["image"]: r["conversations"][1]["value"] for r in reversed(json.load(open(f"{world}/captions.json")))}
    for i in range(8):
        image = pictures.open_image(f"{world}/images/{i}.png")
        pixels = pictures.transform(image, **vlm.image_settings)[None]
        answer = {"role": "assistant", "content": captions[f"{i}.png"]}
        ids, labels = conversation.encode([photos.ASKED, answer], vlm.tokenizer, vlm.num_patches)
        logits = vlm.llm(inputs_embeds=vlm.splice(torch.tensor([ids]), pixels)).logits[0, :-1]
        nats += torch.nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum").item()
        num_bytes += len(captions[f"{i}.png"].encode())
        patches = vlm.patch_features(pixels)
        for row in vlm.connector.weights(patches)[0][:6]:           # two of three rows of patches
            word = vlm.words[int(row.argmax())].strip("Ġ").lower()
            right += word in (colours[i % 4], "square")
            other += word in (colours[(i - 1) % 4], "square")
    assert report["words_top1"][0] == pytest.approx(right / 48, abs=1e-4)
    assert report["words_top1_other"][0] == pytest.approx(other / 48, abs=1e-4)
    assert right > 24 and report["pictures"] == 8
    assert report["prompt_bits_per_byte_right"][0] == pytest.approx(nats / math.log(2) / num_bytes, abs=1e-3)
    difference = report["bits_per_byte_wrong"][0] - report["bits_per_byte_right"][0]
    assert report["wrong_minus_right"][0] == pytest.approx(difference, abs=2e-4)


def test_match_norm_gives_each_embed_the_length_of_words(trained):
    vlm = checkpoint.load(str(trained))
    patches = torch.randn(2, vlm.num_patches, vlm.vision_tower.config.hidden_size)
    before = vlm.connector(patches)
    photos.match_norm(vlm)
    after = vlm.connector(patches)
    length = words.vocabulary(vlm)[1].norm(dim=-1).mean()
    assert torch.allclose(after.norm(dim=-1), length.expand(2, vlm.num_patches), rtol=1e-4)
    assert torch.allclose(torch.cosine_similarity(before, after, dim=-1), torch.ones(2, vlm.num_patches))


def test_questions_are_split_by_photograph_and_answers_become_a_text(world, tmp_path):
    questions.split(f"{world}/chats.json", str(tmp_path), held_out=10)
    train, val, answers = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("train", "val", "answers"))
    assert len(val) == 10 and len(train) == 30 and not {r["id"] for r in train} & {r["id"] for r in val}
    assert [(a["id"], a.get("image")) for a in answers] == [(r["id"], r["image"]) for r in train if "image" in r]
    first = next(r for r in train if r["id"] == answers[0]["id"])
    said = [turn["value"] for turn in first["conversations"] if turn["from"] == "gpt"]
    assert answers[0]["conversations"][1]["value"] == "There is a " + ", a ".join(", ".join(said).split(", ")) + "."
    assert questions.things("Cup, chair.") == questions.things("chair, cup") != questions.things("cup")
