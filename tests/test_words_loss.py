"""The words loss, stage "words", W from the words' embeddings, pooled patches, cached features."""
import json
import math
import os
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import checkpoint
import data
import model
import train
from conftest import settings, train_here
from support import features, pictures
from support.log import plot_loss


def log_of(out):
    return [json.loads(line) for line in open(f"{out}/log.jsonl")]


@pytest.mark.parametrize("background, patches", [(0.9, 0.0), (0.0, 0.0), (0.9, 0.3), (0.0, 2.0)])
def test_words_loss_is_what_a_slow_loop_gives(background, patches):
    torch.manual_seed(0)
    N, P, K = 2, 5, 7
    scores = torch.randn(N, P, K, dtype=torch.float64)
    frequencies = torch.rand(K).double()
    frequencies /= frequencies.sum()
    targets = [3, 0, 3]
    said = [[math.exp(s) / sum(math.exp(other) for other in patch) for s in patch] for patch in scores.flatten(0, 1).tolist()]
    expected = 0
    for k in targets:
        mean = sum(p[k] for p in said) / (N * P)
        expected -= math.log((1 - background) * mean + background * frequencies[k])
    for p in said:
        lift = sum(p[k] / frequencies[k].item() for k in targets)
        expected -= patches * len(targets) / (N * P) * math.log(lift)
    got = model.words_loss(scores.float(), torch.tensor(targets), frequencies.float(), background, patches)
    assert got.item() == pytest.approx(expected, rel=1e-5)


def test_a_word_of_every_answer_teaches_less_than_a_rare_word():
    """The gradient on the word "a", which the background explains, is the smaller one."""
    frequencies = torch.full((10,), 0.01)
    frequencies[0] = 0.91
    for patches in (0.0, 1.0):
        scores = torch.zeros(1, 4, 10, requires_grad=True)
        model.words_loss(scores, torch.tensor([0, 5]), frequencies, 0.9, patches).backward()
        gradient = scores.grad.abs().sum(dim=(0, 1))
        assert gradient[5] > 10 * gradient[0]


def test_a_patch_that_explains_no_word_learns_only_with_patches():
    """Patch 0 says the answer's word 5, and patch 1 a word of no answer. Only patch_weight moves patch 1."""
    frequencies = torch.full((10,), 0.1)
    for patches, moves in ((0.0, False), (0.1, True)):
        scores = torch.zeros(1, 2, 10)
        scores[0, 0, 5] = scores[0, 1, 7] = 30
        scores.requires_grad_()
        model.words_loss(scores, torch.tensor([5]), frequencies, 0.9, patches).backward()
        assert (scores.grad[0, 1, 7] > 1e-2) == moves


def test_a_word_that_no_patch_says_and_no_background_has_a_finite_loss_and_a_gradient():
    scores = torch.zeros(1, 4, 10)
    scores[..., 0] = 300                                            # exp(-300) is 0 in float32
    scores.requires_grad_()
    loss = model.words_loss(scores, torch.tensor([5]), torch.full((10,), 0.1))
    loss.backward()
    assert loss.item() == pytest.approx(300) and scores.grad.isfinite().all() and (scores.grad[..., 5] < -0.2).all()


def test_a_word_that_was_not_counted_has_a_finite_loss():
    """word_frequencies reads a part of large data, so an answer may have a word of frequency 0."""
    scores = torch.zeros(1, 4, 10, requires_grad=True)
    frequencies = torch.full((10,), 1 / 9)
    frequencies[5] = 0
    loss = model.words_loss(scores, torch.tensor([5]), frequencies, 0.9, 0.3)
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all() and (scores.grad[..., 5] < 0).all()


@pytest.mark.parametrize("H", [6, 40])
def test_initial_W_keep_the_angles_of_the_words(H):
    torch.manual_seed(0)
    E = torch.randn(30, 16) + 5
    W = model.initial_W(E, H)
    default = torch.nn.Linear(H, 4000).weight.norm(dim=1).mean()
    assert W.shape == (30, H)
    assert torch.allclose(W.norm(dim=1), default, rtol=0.02)
    if H > 16:                                  # in fewer dimensions angles are kept only roughly
        centred = F.normalize(E - E.mean(dim=0), dim=1)
        assert torch.allclose(F.normalize(W, dim=1) @ F.normalize(W, dim=1).T, centred @ centred.T,
                              atol=1e-5)


@pytest.mark.parametrize("tower", ["clip", "dino"])
def test_pooled_patches_are_means_of_neighbours(tiny, world, tower):
    words = json.load(open(world / "words.json"))
    plain = model.Config(getattr(tiny, tower), tiny.qwen, hidden=24, num_words=len(words),
                         image_size=32)
    pooled = model.Config(**{**vars(plain), "pool": 2})
    a, b = checkpoint.build(plain, words), checkpoint.build(pooled, words)
    pixels = torch.randn(2, 3, 32, 32)
    grid = a.patch_features(pixels).unflatten(1, (4, 4)).permute(0, 3, 1, 2)    # (N, Dv, 4, 4)
    expected = F.avg_pool2d(grid, 2).flatten(2).transpose(1, 2)                 # (N, 4, Dv)
    assert (a.num_patches, b.num_patches) == (16, 4)
    torch.testing.assert_close(b.patch_features(pixels), expected)


def test_a_pool_that_does_not_divide_is_refused(tiny, world):
    with pytest.raises(ValueError, match="3 x 3 patches of 8 pixels, which pool 2 does not divide"):
        checkpoint.build(model.Config(tiny.clip, tiny.qwen, connector="mlp", hidden=8, pool=2), None)


@pytest.fixture(scope="module")
def words_stage(tiny, world, tmp_path_factory):
    out = tmp_path_factory.mktemp("words") / "run"
    argv = settings(tiny, world, out, "--stage=words", f"--features={out}-features",
                    "--normalize=softmax", "--words_init=embeds", "--epochs=8")
    assert train_here(argv) == 0
    return out, argv


def test_stage_words_learns_which_colour_a_picture_has(tiny, world, words_stage):
    """The pictures are of one colour, and "red", "green" and "blue" are shared words."""
    out, _ = words_stage
    losses = [row["loss"] for row in log_of(out)]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    vlm = checkpoint.load(str(out))
    dataset = data.Conversations([f"{world}/captions.json"], f"{world}/images", vlm.tokenizer,
                                 vlm.num_patches, {**vlm.image_settings, "mode": "crop"}, "plain")
    right = 0
    for i, colour in enumerate(["red", "green", "blue"]):
        with torch.no_grad():
            weights = vlm.connector.weights(vlm.patch_features(dataset[i]["images"]))[0].mean(dim=0)
        k = {c: vlm.words.index(f"Ġ{c}") for c in ["red", "green", "blue"] if f"Ġ{c}" in vlm.words}
        right += colour in k and max(k, key=lambda c: weights[k[c]]) == colour
    assert right == 3


def test_with_patch_weight_each_patch_says_more_of_the_answer(tiny, world, words_stage, tmp_path):
    """By the same steps the colour of a picture gets more of each of its patches, and the loss may be below 0."""
    out, argv = words_stage
    argv = [*argv, f"--out={tmp_path}/each", "--words_patch_weight=2"]
    assert train_here(argv) == 0 and os.path.getsize(tmp_path / "each" / "loss.png") > 0
    assert min(row["loss"] for row in log_of(tmp_path / "each")) < 0
    said = {}
    for folder in (out, tmp_path / "each"):
        vlm = checkpoint.load(str(folder))
        dataset = data.Conversations([f"{world}/captions.json"], f"{world}/images", vlm.tokenizer,
                                     vlm.num_patches, {**vlm.image_settings, "mode": "crop"}, "plain")
        with torch.no_grad():
            weights = [vlm.connector.weights(vlm.patch_features(dataset[i]["images"]))[0] for i in range(3)]
        said[folder] = [w[:, vlm.words.index(f"Ġ{c}")].min().item() for c, w in zip(["red", "green", "blue"], weights)]
    assert all(each > plain for plain, each in zip(*said.values()))


def test_the_background_is_read_by_the_training(tiny, world, tmp_path):
    """Before any training the words' frequencies explain a caption better than the patches do."""
    losses = []
    for background in (0.0, 0.9):
        argv = settings(tiny, world, tmp_path / str(background), "--stage=words", "--max_steps=1",
                        f"--words_background={background}")
        assert train_here(argv) == 0
        losses.append(log_of(tmp_path / str(background))[0]["loss"])
    assert losses[1] < losses[0] - 0.1


@pytest.mark.parametrize("lowest, scale", [(0.5, "log"), (-0.5, "linear")])
def test_the_plot_shows_a_loss_below_0(lowest, scale, tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    scales = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **more: scales.append(figure.axes[0].get_yscale()))
    (tmp_path / "log.jsonl").write_text("".join(f'{{"step": {i}, "loss": {loss}}}\n' for i, loss in enumerate((2, lowest))))
    plot_loss(tmp_path / "log.jsonl", tmp_path / "loss.png")
    assert scales == [scale]


def test_the_temperature_belongs_to_the_checkpoint_and_not_to_the_words_loss(tiny, world, tmp_path):
    outs = [tmp_path / "1", tmp_path / "half"]
    for out, temperature in zip(outs, (1.0, 0.5)):
        argv = settings(tiny, world, out, "--stage=words", "--max_steps=3")
        assert train_here([*argv, f"--temperature={temperature}"]) == 0
    plain, sharp = (checkpoint.load(str(out)) for out in outs)
    for one, other in zip(plain.connector.parameters(), sharp.connector.parameters(), strict=True):
        assert torch.equal(one, other)
    patches = torch.randn(1, plain.num_patches, plain.vision_tower.config.hidden_size)
    entropy = [torch.special.entr(vlm.connector.weights(patches)).sum().item()
               for vlm in (plain, sharp)]
    assert sharp.connector.temperature == 0.5 and entropy[1] < entropy[0]

    following = settings(tiny, world, tmp_path / "next", f"--init={outs[1]}", "--max_steps=1")
    assert train_here(following) == 0
    assert checkpoint.load(str(tmp_path / "next")).connector.temperature == 0.5
    with pytest.raises(ValueError, match="temperature"):
        train_here([*following, "--overwrite", "--temperature=1.0"])

    config = json.load(open(outs[1] / "config.json"))
    del config["temperature"]                                       # a checkpoint of before
    json.dump(config, open(outs[1] / "config.json", "w"))
    assert checkpoint.load(str(outs[1])).connector.temperature == 1.0


def test_cached_features_give_what_the_tower_gives(tiny, world, words_stage):
    out, _ = words_stage
    vlm = checkpoint.load(str(out))
    image = {**vlm.image_settings, "mode": "crop"}
    path = pictures.image_path(f"{world}/images", "3.png")
    cached = load_file(data.features_path(f"{out}-features", path))["patches"]
    pixels = pictures.transform(pictures.open_image(path), **image)
    with torch.no_grad():
        expected = vlm.patch_features(pixels[None])[0]
    torch.testing.assert_close(cached.float(), expected, rtol=1e-3, atol=1e-3)


def test_a_picture_that_cannot_be_cached_is_a_bad_sample(tiny, world, tmp_path, capfd):
    """With --on_bad=skip it is named and counted when its record is used, as without a cache."""
    shutil.copytree(world / "images", tmp_path / "images")
    (tmp_path / "images" / "1.png").write_bytes(b"no picture")
    os.remove(tmp_path / "images" / "2.png")
    argv = settings(tiny, world, tmp_path / "x", "--stage=words", f"--images={tmp_path}/images", "--epochs=1",
                    f"--features={tmp_path}/features", "--on_bad=skip")
    assert train_here(argv) == 0
    named = capfd.readouterr().err
    assert "1.png' cannot be read" in named and "2.png' does not exist" in named
    assert log_of(tmp_path / "x")[-1]["skipped"] == 2


def test_cached_features_of_another_layer_are_refused(tiny, world, words_stage, tmp_path):
    out, _ = words_stage
    with pytest.raises(ValueError, match="holds the patches of .*'layer': -2.*another layer"):
        train.main(train.read_settings(settings(tiny, world, tmp_path / "other", "--stage=words",
                                                f"--features={out}-features", "--vision_layer=-1")))


def test_cached_features_with_a_cls_token_are_others(tiny, world, words_stage):
    """Who keeps the CLS token adds one to num_patches: the cache without it must not be taken."""
    out, _ = words_stage
    vlm = checkpoint.load(str(out))
    dataset = data.Conversations([f"{world}/captions.json"], f"{world}/images", vlm.tokenizer,
                                 vlm.num_patches, {**vlm.image_settings, "mode": "crop"}, "plain")
    features.write_missing(vlm, dataset, f"{out}-features", 8)
    vlm.num_patches += 1
    with pytest.raises(ValueError, match="another patches"):
        features.write_missing(vlm, dataset, f"{out}-features", 8)


def test_pretraining_starts_from_stage_words_and_logs_both_losses(tiny, world, words_stage,
                                                                  tmp_path):
    out, _ = words_stage
    argv = settings(tiny, world, tmp_path / "next", f"--init={out}", "--words_loss=0.1",
                    "--max_steps=3", "--probe_every=1")
    assert train_here(argv) == 0
    row = log_of(tmp_path / "next")[0]
    # The answer's words were learned already, the captions were not.
    assert row["words_loss"] == pytest.approx(log_of(out)[-1]["loss"], rel=0.3)
    assert row["loss"] > row["words_loss"] / 3 and "blind" in row


def test_the_words_loss_adds_its_gradient(tiny, world, tmp_path):
    """Weight 0 is the paper: the same bits as without the setting."""
    runs = {}
    for name, more in (("none", []), ("zero", ["--words_loss=0.0"]), ("some", ["--words_loss=0.3"])):
        train_here(settings(tiny, world, tmp_path / name, "--max_steps=3", *more))
        runs[name] = load_file(tmp_path / name / "connector.safetensors")["to_scores.weight"]
    assert torch.equal(runs["none"], runs["zero"]) and not torch.equal(runs["none"], runs["some"])


def test_words_loss_does_not_depend_on_accumulation(tiny, world, tmp_path):
    rows = []
    for batch_size in (8, 2):
        out = tmp_path / str(batch_size)
        train_here(settings(tiny, world, out, "--words_loss=0.3", "--max_steps=3",
                            f"--batch_size={batch_size}", f"--data={world}/chats.json",
                            "--template=chat"))
        rows.append([(r["loss"], r["words_loss"]) for r in log_of(out)])
    for one, other in zip(*rows, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_stage_words_passes_over_text_without_a_picture(tiny, world, tmp_path):
    """One record in five has no picture, so with one sample at a time some batches have none."""
    argv = [f"--data={world}/chats.json", "--template=chat", "--stage=words", "--epochs=1"]
    rows = {}
    for batch_size in (8, 1):
        out = tmp_path / str(batch_size)
        assert train_here(settings(tiny, world, out, *argv, f"--batch_size={batch_size}")) == 0
        rows[batch_size] = [row["loss"] for row in log_of(out)]
    assert rows[1] == pytest.approx(rows[8], rel=1e-4)


@pytest.mark.parametrize("more, words", [
    (["--connector=mlp", "--words_loss=0.1"], "need the words of a LangBridge"),
    (["--connector=mlp", "--stage=words"], "need the words of a LangBridge"),
    (["--connector=mlp", "--words_init=embeds"], "need the words of a LangBridge"),
    (["--stage=sft_tower", "--features=x"], "trains it"),
    (["--words_init=none"], "it must be one of random, embeds"),
    (["--pool=0"], "pool is 0, it must be at least 1"),
    (["--temperature=0"], "temperature is 0.0, it must be at least 0.001"),
])
def test_settings_that_cannot_work(tiny, world, tmp_path, more, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        train_here(settings(tiny, world, tmp_path / "out", *more))
    assert not os.path.exists(tmp_path / "out/config.json")


def test_an_mlp_of_init_has_no_words(tiny, world, tmp_path):
    assert train_here(settings(tiny, world, tmp_path / "mlp", "--connector=mlp", "--max_steps=1")) == 0
    argv = settings(tiny, world, tmp_path / "next", f"--init={tmp_path}/mlp", "--words_loss=0.1")
    with pytest.raises(ValueError, match="mlp has an MLP"):
        train_here([arg for arg in argv if not arg.startswith("--hidden")])
