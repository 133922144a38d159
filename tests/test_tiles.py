"""Tiles of LLaVA-NeXT: layouts, pixels, logits, loss and gradients against transformers' LlavaNext on the same weights."""
import contextlib
import io
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (AutoProcessor, CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration,
                          LlavaNextImageProcessorPil, Qwen2Config)
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

import checkpoint
import conversation
import data
import eval
import model
import transfer
import vocab
from conftest import settings, train_here
from generate import generate
from test_export import export_here
from tools import import_official
from support import pictures, tiles

PAPER = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
S, SIDE, P = 24, 3, 9                                               # of the tiny towers
TILES = ((24, 48), (48, 24), (48, 48), (72, 24), (24, 72))
SIZES = {"tall": (30, 70), "wide": (61, 33), "square": (40, 40), "tiny": (5, 9), "line": (200, 3)}


@pytest.mark.parametrize("picture_size, tokens", [((336, 336), 1176), ((640, 480), 2340), ((480, 640), 2352), ((1024, 1024), 2928),
                                                ((1920, 1080), 1948), ((800, 200), 1890), ((200, 800), 1944)])
def test_the_releases_numbers_of_tokens(picture_size, tokens):
    """Measured with the released code on CLIP-L/336."""
    assert tiles.num_tokens(picture_size, 576, PAPER, 336) == tokens


class Their:
    """The library's own counting, which needs nothing but these attributes."""
    patch_size, num_additional_image_tokens = 14, 0
    _get_unpadded_features = LlavaNextProcessor._get_unpadded_features

    def __init__(self, pinpoints):
        self.image_processor = LlavaNextImageProcessorPil(image_grid_pinpoints=pinpoints)


def test_the_librarys_numbers_of_tokens():
    """3,000 random sizes. Sizes whose float arithmetic is a hair off would differ; the library rounds to 7 digits for them."""
    theirs, random = Their([[h, w] for w, h in PAPER]), np.random.default_rng(0)
    for w, h in random.integers(5, 2500, (3000, 2)).tolist():
        want = LlavaNextProcessor._get_number_of_features(theirs, h, w, 336, 336)
        assert tiles.num_tokens((w, h), 576, PAPER, 336) == want, (w, h)


def picture(name, seed=0):
    w, h = SIZES[name]
    pixels = np.random.default_rng(seed).integers(0, 255, (h, w, 3), dtype=np.uint8)
    pixels[: h // 2, : w // 2] = (250, 10, 10)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("name", SIZES)
def test_tiles_have_the_librarys_pixels(name):
    """Order, black border, the squashed first tile. The list of grids says (width, height) here and (height, width) there."""
    mean, std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": S}, crop_size={"height": S, "width": S}, image_mean=mean, image_std=std,
        image_grid_pinpoints=[[h, w] for w, h in TILES])
    want = processor(picture(name), return_tensors="pt")["pixel_values"][0]
    got = pictures.tile_pixels(picture(name), S, mean, std, tiles=TILES)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_grids_that_do_not_fit_are_refused():
    for wrong in ((24, 48), ((24, 50),), ((0, 24),), (24,), 5, "x", (("a", 24),)):
        with pytest.raises(ValueError, match="multiples of 24"):
            tiles.check_tiles(wrong, S)


# ---- the model against the library's

@pytest.fixture(scope="module")
def pair(tiny):
    """A VLM with tiles and an MLP, and the library's model with the same weights; both in training mode without dropout."""
    torch.manual_seed(5)
    vlm = checkpoint.build(model.Config(tiny.clip, tiny.qwen, "mlp", 0, 0, tiles=TILES), None)
    theirs = LlavaNextForConditionalGeneration(LlavaNextConfig(
        vision_config=CLIPVisionConfig.from_pretrained(tiny.clip), text_config=Qwen2Config.from_pretrained(tiny.qwen),
        image_token_id=499, image_grid_pinpoints=[[h, w] for w, h in TILES])).eval()
    theirs.model.vision_tower.load_state_dict(vlm.vision_tower.state_dict())
    theirs.model.language_model.load_state_dict(vlm.llm.model.state_dict())
    theirs.lm_head.load_state_dict(vlm.llm.lm_head.state_dict())
    ours = vlm.connector.mlp.state_dict()
    projector = theirs.model.multi_modal_projector
    projector.linear_1.load_state_dict({k: ours[f"0.{k}"] for k in ("weight", "bias")})
    projector.linear_2.load_state_dict({k: ours[f"2.{k}"] for k in ("weight", "bias")})
    theirs.model.image_newline.data.copy_(vlm.image_newline)
    return vlm.requires_grad_(True), theirs.requires_grad_(True)


def sample(vlm, image, answer="a red square"):
    messages = [{"role": "user", "content": "<image>\nwhat is this?"}, {"role": "assistant", "content": answer}]
    ids, labels = conversation.encode(messages, vlm.tokenizer, [vlm.num_tokens(image.size)])
    return {"id": "0", "input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "picture_sizes": [image.size],
            "images": pictures.tile_pixels(image, **vlm.image_settings, tiles=TILES)}


@pytest.mark.parametrize("name", SIZES)
def test_logits_loss_and_gradients_are_the_librarys(name, pair):
    vlm, theirs = pair
    vlm.zero_grad()
    theirs.zero_grad()
    image = picture(name)
    batch = data.collate([sample(vlm, image)], vlm.pad_id)
    ids, labels = batch["input_ids"], batch["labels"]
    assert (ids == conversation.IMAGE_ID).sum() == vlm.num_tokens(image.size)
    output = theirs(input_ids=ids.where(ids != conversation.IMAGE_ID, 499), pixel_values=batch["pixel_values"][None], labels=labels,
                    image_sizes=torch.tensor([[image.height, image.width]]))
    embeds = vlm.splice(ids, batch["pixel_values"], picture_sizes=batch["picture_sizes"])
    torch.testing.assert_close(vlm.llm(inputs_embeds=embeds).logits, output.logits, atol=1e-4, rtol=1e-4)
    loss, number = vlm(batch)
    assert number == (labels != conversation.IGNORE).sum()
    torch.testing.assert_close(loss / number, output.loss, atol=1e-5, rtol=1e-5)
    (loss / number).backward()
    output.loss.backward()
    for ours, other in ((vlm.image_newline, theirs.model.image_newline),
                        (vlm.connector.mlp[0].weight, theirs.model.multi_modal_projector.linear_1.weight),
                        (vlm.connector.mlp[2].bias, theirs.model.multi_modal_projector.linear_2.bias),
                        (vlm.llm.model.layers[0].mlp.up_proj.weight, theirs.model.language_model.layers[0].mlp.up_proj.weight),
                        (vlm.vision_tower.embeddings.patch_embedding.weight,
                         theirs.model.vision_tower.embeddings.patch_embedding.weight)):
        if name != "line" or ours is not vlm.image_newline:         # no row of a line's grid is left: there is no newline
            assert ours.grad.abs().max() > 0
        torch.testing.assert_close(ours.grad, torch.zeros_like(ours) if other.grad is None else other.grad, atol=1e-5, rtol=1e-4)


def test_a_batch_of_4_is_4_batches_of_1(pair):
    """Samples of other lengths and numbers of tiles, one of them without a picture, one with two."""
    vlm, _ = pair
    samples = [sample(vlm, picture(name), answer) for name, answer in (("tall", "red"), ("tiny", "a blue star and a red cat"))]
    text = [{"role": "user", "content": "<image>\n<image>\nwhich?"}, {"role": "assistant", "content": "no"}]
    two = [picture("wide"), picture("square", 1)]
    ids, labels = conversation.encode(text, vlm.tokenizer, [vlm.num_tokens(image.size) for image in two])
    samples.append({"id": "2", "input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "picture_sizes": [i.size for i in two],
                    "images": torch.cat([pictures.tile_pixels(i, **vlm.image_settings, tiles=TILES) for i in two])})
    ids, labels = conversation.encode([{"role": "user", "content": "is it?"}, {"role": "assistant", "content": "yes"}],
                                      vlm.tokenizer, [])
    samples.append({"id": "3", "input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "picture_sizes": [],
                    "images": torch.zeros(0, 3, S, S)})
    with torch.no_grad():
        batch = data.collate(samples, vlm.pad_id)
        # No row of pixels is padding: each picture has its own number of tiles.
        layouts = [tiles.tile_layout(picture_size, TILES, S, SIDE) for picture_size in batch["picture_sizes"]]
        assert len(batch["pixel_values"]) == sum(1 + columns * rows for columns, rows, _, _ in layouts)
        loss, number = vlm(batch)
        losses = [vlm(data.collate([one], vlm.pad_id)) for one in samples]
        blind, blind_number = vlm(data.without_images(batch))
        packed, packed_number = vlm(data.collate(samples, vlm.pad_id, pack=True))
    torch.testing.assert_close(packed, loss)
    assert packed_number == number
    torch.testing.assert_close(loss, sum(one for one, _ in losses))
    assert number == blind_number == sum(n for _, n in losses)
    assert abs(blind - loss) > 1e-3


def test_two_questions_share_a_tiled_image(pair):
    """A prefix is computed once: the answers are those of each prompt alone, and a third prompt has another picture."""
    vlm, _ = pair
    images = [picture("wide"), picture("tall")]
    asked = [(0, "what is this?"), (1, "what colour is it?"), (0, "Is there a star? yes or no")]
    prompts = [conversation.encode_prompt([{"role": "user", "content": f"<image>\n{text}"}], vlm.tokenizer,
                                          [vlm.num_tokens(images[i].size)]) for i, text in asked]
    pixels = [pictures.tile_pixels(image, **vlm.image_settings, tiles=TILES) for image in images]
    together = generate(vlm, prompts, torch.cat(pixels), 12, image_index=[0, 1, 0], picture_sizes=[i.size for i in images])
    alone = [generate(vlm, [prompt], pixels[i], 12, picture_sizes=[images[i].size])[0] for (i, _), prompt in zip(asked, prompts)]
    assert together == alone and any(together)


@torch.no_grad()
def test_without_sizes_each_square_is_an_image(tiny):
    """As of a model without tiles."""
    vlm = checkpoint.build(model.Config(tiny.clip, tiny.qwen, "mlp", 0, 0, tiles=TILES), None)
    plain = checkpoint.build(model.Config(tiny.clip, tiny.qwen, "mlp", 0, 0), None)
    plain.load_state_dict(vlm.state_dict(), strict=False)           # it lacks image_newline
    P, pixels = vlm.num_patches, torch.randn(2, 3, S, S)
    prompts = [[5] + [conversation.IMAGE_ID] * P + [9], [7] + [conversation.IMAGE_ID] * P + [8, 8]]
    answers = generate(vlm, prompts, pixels, 6)
    assert answers == generate(plain, prompts, pixels, 6) and any(answers)


# ---- checkpoints and command lines

@pytest.fixture(scope="module")
def tiled_world(tmp_path_factory):
    """20 records with pictures of many shapes, some text-only: a folder."""
    root = tmp_path_factory.mktemp("tiled")
    (root / "images").mkdir()
    records = []
    for i in range(20):
        name = list(SIZES)[i % 4]
        picture(name, i).save(root / "images" / f"{i}.png")
        image = {"image": f"{i}.png"} if i % 5 else {}
        records.append({"id": f"t{i}", **image, "conversations": [{"from": "human", "value": "what is it?"},
                                                                  {"from": "gpt", "value": f"a {name} square"}]})
    (root / "chats.json").write_text(json.dumps(records))
    return root


@pytest.fixture(scope="module")
def trained(tiny, world, tiled_world, tmp_path_factory):
    """Stage 1 without tiles, then SFT with tiles from its checkpoint, by train.py: (stage 1's folder, SFT's folder)."""
    root = tmp_path_factory.mktemp("trained")
    assert train_here(settings(tiny, world, root / "pretrain", "--epochs=1", "--normalize=none")) == 0
    argv = [a for a in settings(tiny, world, root / "sft", f"--init={root}/pretrain", "--stage=sft_tower", f"--tiles={TILES}",
                                "--llm_lr=0.01", "--template=chat", "--epochs=1", "--save_every=1")
            if not a.startswith(("--images", "--data", "--hidden"))]
    argv += [f"--images={tiled_world}/images", f"--data={tiled_world}/chats.json"]
    assert train_here(argv) == 0
    return root / "pretrain", root / "sft", argv


def call(script, *argv):
    """A script in this process, where starting costs nothing: what it prints. Its errors are raised."""
    text = io.StringIO()
    with mock.patch.object(sys, "argv", [script.__name__, *map(str, argv)]), contextlib.redirect_stdout(text):
        script.main(script.read_arguments())
    return text.getvalue()


def newline_of(folder):
    return load_file(folder / "llm" / "image_newline.safetensors")["image_newline"]


def test_the_newline_trains_and_is_the_llms(tiny, trained, tmp_path):
    """It starts where a run without a learning rate leaves it; it lies in llm/ and not in the connector; a resumed run has its bits."""
    pretrain, sft, argv = trained
    assert not (pretrain / "llm").exists()
    assert 44 not in {n for t in load_file(sft / "connector.safetensors").values() for n in t.shape}
    vlm = checkpoint.load(str(sft))
    assert vlm.config.tiles == TILES and torch.equal(vlm.image_newline, newline_of(sft)) and vlm.own_parts == {"llm", "vision_tower"}
    frozen = [a for a in argv if not a.startswith(("--out", "--llm_lr"))] + [f"--out={tmp_path}/frozen", "--llm_lr=0"]
    assert train_here(frozen) == 0
    start = newline_of(tmp_path / "frozen")
    assert 0.5 < start.std() * math.sqrt(44) < 1.5 and (start - newline_of(sft)).abs().max() > 1e-3
    checkpoint.save(vlm, str(tmp_path / "again"), "sft", ())        # saved again: it is kept
    assert torch.equal(newline_of(tmp_path / "again"), newline_of(sft))


def test_a_tiled_run_goes_on_with_the_same_bits(trained):
    """The state keeps the newline and its moments, and JSON's lists are the same setting as Python's tuples."""
    _, sft, argv = trained
    before = {path: load_file(sft / path) for path in ("connector.safetensors", "llm/image_newline.safetensors")}
    (sft / "config.json").rename(sft / "kept.json")
    states = sorted((sft / "state").iterdir())
    assert len(states) == 2
    for file in states[1].iterdir():
        file.unlink()
    states[1].rmdir()                                               # as if killed one step earlier
    assert train_here(argv) == 0
    (sft / "kept.json").unlink()
    for path, tensors in before.items():
        after = load_file(sft / path)
        assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())


def test_transfer_draws_a_new_newline_and_says_so(tiny, trained, tmp_path):
    for out in ("a", "b"):
        text = call(transfer, trained[1], tiny.llama, "--out", tmp_path / out, "--device=cpu")
        assert "image_newline: new" in text
    assert newline_of(tmp_path / "a").shape == (52,) and torch.equal(newline_of(tmp_path / "a"), newline_of(tmp_path / "b"))
    vlm = checkpoint.load(str(tmp_path / "a"))
    assert torch.equal(vlm.image_newline, newline_of(tmp_path / "a")) and "llm" not in vlm.own_parts


def test_the_report_measures_a_tiled_checkpoint(world, trained):
    """With the first tile only, because a wrong image must have as many tokens as the right one."""
    vlm = checkpoint.load(str(trained[1]))
    batches = transfer.caption_batches(vlm, f"{world}/captions.json", f"{world}/images", {}, 16)
    report = transfer.measure(vlm, *batches)
    assert len(batches[0][0]["pixel_values"]) == 16 and all(math.isfinite(value) for value in report.values())


def test_tiles_go_with_sft_only(tiny, world, trained, tmp_path):
    import train
    argv = settings(tiny, world, tmp_path / "x", f"--tiles={TILES}")
    with pytest.raises(ValueError, match="stages that train the LLM"):
        train.check(train.read_settings(argv))
    argv = [a for a in settings(tiny, world, tmp_path / "x", f"--init={trained[1]}") if not a.startswith("--hidden")]
    with pytest.raises(ValueError, match="has tiles"):
        train_in(train, argv)


def train_in(train, argv):
    cfg = train.read_settings(argv)
    train.check(cfg)
    train.main(cfg)


def test_check_counts_the_tokens_of_tiles(tiny, tiled_world, capsys):
    """The largest picture, 48 x 48 pixels in 2 x 2 tiles, has 9 + 6 * 7 tokens; with one token less of room it is named."""
    arguments = ["--check", f"{tiled_world}/chats.json", "--images", f"{tiled_world}/images", "--tokenizer", tiny.qwen,
                 "--num_patches", str(P), "--tiles", str(TILES), "--image_size", str(S), "--workers=0"]
    assert data.main(arguments) == 0
    settings_ = {"size": S, "mean": [0.5] * 3, "std": [0.5] * 3}
    dataset = data.Conversations(f"{tiled_world}/chats.json", f"{tiled_world}/images", vocab_tokenizer(tiny), P, settings_,
                                 max_length=None, tiles=TILES)
    samples = [dataset[i] for i in range(len(dataset))]
    images = [s["input_ids"] == conversation.IMAGE_ID for s in samples]
    longest = max(int(image.nonzero().max()) + 1 for image in images if image.any())
    too_long = sum(bool(image[longest - 1:].any()) for image in images)
    capsys.readouterr()
    assert data.main([*arguments, "--max_length", str(longest - 1)]) == 1
    text = capsys.readouterr().out
    assert text.count("an image does not fit") == too_long > 0


def vocab_tokenizer(tiny):
    from support.hub import load_tokenizer
    return load_tokenizer(tiny.qwen)


def test_words_of_a_tile(trained, tiled_world, tmp_path):
    """The page of a tile is the page of that tile's pixels, which are another picture than the first tile's."""
    import words
    vlm = checkpoint.load(str(trained[1]))
    path = f"{tiled_world}/images/1.png"
    pixels = pictures.tile_pixels(pictures.open_image(path), **vlm.image_settings, tiles=TILES)
    assert not torch.equal(words.read(vlm, pixels[0])["cosine"]["values"], words.read(vlm, pixels[2])["cosine"]["values"])
    call(words, trained[1], path, "--tile", 2, "--ask", "what is it?", "--out", tmp_path / "w", "--device=cpu")
    assert (tmp_path / "w" / "words.html").stat().st_size > 1000
    with pytest.raises(ValueError, match="counted from 0"):
        call(words, trained[1], path, "--tile", 9, "--out", tmp_path / "w9", "--device=cpu")


@pytest.mark.parametrize("llm, tower", [("llama", "clip"), ("qwen", "siglip")])
def test_export_and_import_again(llm, tower, tiny, world, tmp_path):
    """from_pretrained of the library gives our logits and greedy answers; the folder comes back as the same checkpoint."""
    torch.manual_seed(6)
    words = vocab.load_words(f"{world}/words.json")
    config = model.Config(getattr(tiny, tower), getattr(tiny, llm), "langbridge", 24, len(words), "none", tiles=TILES)
    vlm = checkpoint.build(config, words)
    checkpoint.save(vlm, str(tmp_path / "ours"), "sft", ("connector", "llm"))
    export_here(tmp_path / "ours", tmp_path / "theirs")
    theirs = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "theirs").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "theirs")
    vlm = checkpoint.load(str(tmp_path / "ours"))
    for name in SIZES if tower == "clip" else ["tall"]:
        picture(name).save(tmp_path / f"{name}.png")
        ids = eval.prompt_ids(vlm, {"image": str(tmp_path / f"{name}.png"), "text": "what is this?"})
        pixels = pictures.tile_pixels(picture(name), **vlm.image_settings, tiles=TILES)
        content = [{"type": "image", "image": picture(name)}, {"type": "text", "text": "what is this?"}]
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
                                               return_dict=True, return_tensors="pt")
        assert inputs["input_ids"].shape[1] == len(ids)
        with torch.no_grad():
            embeds = vlm.splice(torch.tensor([ids]), pixels, picture_sizes=[picture(name).size])
            want, got = vlm.llm(inputs_embeds=embeds).logits, theirs(**inputs).logits
        torch.testing.assert_close(got[..., :want.shape[-1]], want, atol=1e-4, rtol=1e-4)
        answer, = generate(vlm, [ids], pixels, 8, picture_sizes=[picture(name).size])
        their_answer = theirs.generate(**inputs, max_new_tokens=8, do_sample=False)[0, len(ids):].tolist()
        assert [i for i in their_answer if i not in vlm.eos_ids] == answer
    if tower == "siglip":
        return                                                      # the import knows towers with a CLS token only
    argv = ["import_official.py", tmp_path / "theirs", "--llm", getattr(tiny, llm), "--vision_tower", getattr(tiny, tower),
            "--out", tmp_path / "back"]
    with mock.patch.object(sys, "argv", [str(part) for part in argv]):
        import_official.main(import_official.read_arguments())
    back = checkpoint.load(str(tmp_path / "back"))
    assert back.config.tiles == TILES
    with torch.no_grad():
        embeds = back.splice(torch.tensor([ids]), pixels, picture_sizes=[picture(name).size])
        torch.testing.assert_close(back.llm(inputs_embeds=embeds).logits[..., :want.shape[-1]], want, atol=1e-4, rtol=1e-4)


def test_questions_of_benchmarks_see_tiles(trained, tiled_world):
    """eval.py's batch: two questions share an image, one has none; the answers are those of each question alone."""
    vlm = checkpoint.load(str(trained[1]))
    questions = [{"image": f"{tiled_world}/images/1.png", "text": "what is it?"}, {"image": None, "text": "is it?"},
                 {"image": f"{tiled_world}/images/2.png", "text": "what?"}, {"image": f"{tiled_world}/images/1.png", "text": "why?"}]
    prompts = [eval.prompt_ids(vlm, q) for q in questions]
    assert prompts[0].count(conversation.IMAGE_ID) == vlm.num_tokens(SIZES["wide"])
    with ThreadPoolExecutor(2) as pool:
        together = eval.answer_batch(vlm, questions, prompts, eval.load_images(questions, vlm, pool), 8)
        alone = [eval.answer_batch(vlm, [q], [p], eval.load_images([q], vlm, pool), 8)[0] for q, p in zip(questions, prompts)]
    assert together == alone
