"""python -m pytest tests/test_words.py: the numbers against closed forms, the picture, the page, the command"""
import base64
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
import urllib.request
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import checkpoint
import conversation
import model
import vocab
import words
from conftest import run
from results import study
from test_model import make
from support import needs, pictures

EVIL = ["</script><script>throw 1</script>", '"><img src=x onerror="throw 2">', "<!--", "&lt;", "'\\\u2028\u2029", "\x00\x07\n\r",
        "\u202eabc", "$x^$", " the", "中文", "שלום", "😀", " "]
SPELT = [vocab.to_word(text.encode()) for text in EVIL] + [vocab.to_word(b"\xff\xab")]


def build(tiny, llm, shared, normalize="softmax", **more):
    """Return an untrained VLM: a LangBridge on the words `shared`, or an MLP for None."""
    torch.manual_seed(0)
    kind = "langbridge" if shared else "mlp"
    return checkpoint.build(model.Config(tiny.clip, getattr(tiny, llm), kind, 24, len(shared or ()), normalize, **more), shared)


def save(vlm, folder, stage="pretrain", trained_parts=("connector",), template="plain", **extra):
    checkpoint.save(vlm, str(folder), stage, trained_parts, template=template, image_mode="pad", **extra)
    return str(folder)


@pytest.fixture(scope="module")
def shared(world):
    return vocab.load_words(f"{world}/words.json")


def make_state(g=3, kind="shares", K=40, name="an <LLM>", label="pretrain", seed=0):
    """Return a state as read_checkpoint makes it, from random scores."""
    generator = torch.Generator().manual_seed(seed)
    names = (SPELT + [f"Ġw{i}" for i in range(K)])[:K]
    scores = torch.randn(g * g, K, generator=generator) * 3
    E, modes = torch.randn(K, 7, generator=generator), {}
    if kind != "cosine":
        w = scores.softmax(-1) if kind == "shares" else scores
        modes["weights"] = words.make_mode(kind, names, w, 1 / K if kind == "shares" else 0.0)
    embeds = torch.randn(g * g, 7, generator=generator)
    modes["cosine"] = words.make_mode("cosine", names, words.cosine(embeds, E), 0.4)
    picks, coefficients, explained = words.pursuit(embeds, E)
    together = torch.zeros(g * g, K).scatter_(1, picks, coefficients)
    modes["together"] = words.make_mode("together", names, together, 0.3, explained)
    return {"label": label, "name": name, "group": (name, kind), "modes": modes, "side": g, "mean": [0.5] * 3, "answer": None, "needs": None}


def picture(side=96):
    """A picture that is dark on the left and light on the right"""
    return Image.fromarray(np.tile(np.linspace(0, 255, side).astype(np.uint8)[None, :, None], (side, 1, 3)))


def page_of(*states, ask=None):
    return words.make_page(words.make_panels(states), picture(), "</title>.png", ask)


def content_of(html):
    """Return what the data block of a page holds. Nothing can end the block early, and the rest is words.html unchanged."""
    with open(words.PAGE, encoding="utf-8") as file:
        before, after = file.read().split("@DATA@")
    assert html.startswith(before) and html.endswith(after)
    block = html[len(before):-len(after)]
    assert "<" not in block and block.isprintable()                 # no markup, control character or line separator
    return json.loads(block)


# --- the numbers

def test_entropy_at_its_ends():
    even, one = torch.full((4, 8), 1 / 8), torch.eye(4, 8)
    assert torch.allclose(study.entropy(even), torch.full((4,), 3.0)) and torch.allclose(study.entropy(one), torch.zeros(4))
    assert torch.allclose(study.entropy(-5 * even), torch.full((4,), 3.0))           # raw scores: by their size


def test_cosine_null_is_what_random_directions_find():
    E = torch.randn(2000, 64, generator=torch.Generator().manual_seed(1))
    null = words.cosine_null(E)
    others = torch.randn(128, 64, generator=torch.Generator().manual_seed(5))
    assert null == words.cosine_null(E) and null == pytest.approx(words.cosine(others, E).amax(1).mean().item(), abs=0.02)
    assert words.cosine_null(E[:50]) < null < words.cosine_null(E[:, :16])           # more rows, or fewer dimensions: higher


def slow_pursuit(x, E, number):
    """One vector by numpy: pick, fit all picks with lstsq, go on with the rest. -> picks, coefficients, R^2"""
    E, x = E / np.linalg.norm(E, axis=1, keepdims=True), x / np.linalg.norm(x)
    picks, rest = [], x
    for _ in range(number):
        order = np.argsort(-np.abs(E @ rest))
        picks.append(int(next(i for i in order if i not in picks)))
        coefficients = np.linalg.lstsq(E[picks].T, x, rcond=None)[0]
        rest = x - coefficients @ E[picks]
    return picks, coefficients, 1 - rest @ rest


def test_pursuit_is_what_a_slow_loop_with_lstsq_finds():
    generator = torch.Generator().manual_seed(3)
    E, x = (torch.randn(n, 24, generator=generator) * torch.rand(n, 1, generator=generator).exp() for n in (300, 20))
    E = E + torch.randn(24, generator=generator)                    # like an LLM's: all lean one way
    for number in (1, 2, 5):
        picks, coefficients, explained = words.pursuit(x, E, number)
        for i in range(len(x)):
            want = slow_pursuit(x[i].double().numpy(), E.double().numpy(), number)
            assert picks[i].tolist() == want[0]
            np.testing.assert_allclose(coefficients[i], want[1], rtol=1e-3, atol=1e-4)
            assert explained[i].item() == pytest.approx(want[2], abs=1e-5)
    assert (words.pursuit(x, E, 5)[2] > words.pursuit(x, E, 2)[2]).all()


def test_pursuit_finds_the_words_that_a_sum_was_made_of():
    generator = torch.Generator().manual_seed(4)
    E = torch.randn(3000, 256, generator=generator) * 7
    planted = torch.stack([torch.randperm(3000, generator=generator)[:5] for _ in range(30)])
    factors = torch.tensor([1.0, -0.9, 0.8, 0.7, -0.6]).expand(30, 5)
    x = (factors[..., None] * E[planted]).sum(1)
    picks, coefficients, explained = words.pursuit(x, E)
    found, want = (torch.zeros(30, 3000).scatter_(1, a, b) for a, b in
                   ((picks, coefficients), (planted, factors * E[planted].norm(dim=-1) / x.norm(dim=-1, keepdim=True))))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert explained.min() > 0.99999
    # One embedding for two words, an embed of one word alone, and one of length 0: no failure, and nothing is not a number
    _, coefficients, explained = words.pursuit(torch.stack([E[0], 0 * E[0]]), torch.cat([E[:9], E[:9]]))
    assert coefficients.isfinite().all() and explained.tolist() == pytest.approx([1, 0], abs=1e-5)


def test_the_page_compares_five_words_with_five_for_a_random_direction(checkpoints):
    vlm, pixels = checkpoint.load(str(checkpoints / "mlp")), torch.randn(3, 24, 24)
    mode = words.read(vlm, pixels)["together"]
    tokens, E = words.vocabulary(vlm)
    E, embeds = E.detach().double().numpy(), vlm.encode(pixels[None])[0].detach().double().numpy()
    assert mode["size"] == len(tokens) and mode["top"].shape == (9, 5) and mode["null"] > 0
    for i, x in enumerate(embeds):
        picks, coefficients, explained = slow_pursuit(x, E, 5)
        shown = [mode["words"][column] for column in mode["top"][i].tolist()]
        assert shown == [tokens[picks[j]] for j in np.argsort(-np.abs(coefficients))]           # strongest first
        assert mode["explained"][i].item() == pytest.approx(explained, abs=1e-4)
    random = words.random_directions(torch.zeros(1, E.shape[1])).double().numpy()
    assert mode["null"] == pytest.approx(np.mean([slow_pursuit(x, E, 5)[2] for x in random]), abs=1e-4)
    assert torch.equal(mode["loud"].argmax(), mode["explained"].argmax())


@pytest.mark.parametrize("kind", ["shares", "signed"])
def test_a_mode_keeps_the_strongest_words_and_raw_scores_keep_both_ends(kind):
    names, scores = [f"w{i}" for i in range(100)], torch.randn(9, 100)
    mode = words.make_mode(kind, names, scores.softmax(-1) if kind == "shares" else scores)
    order = scores.argsort(descending=True)
    top = order[:, :words.TOP] if kind == "shares" else order[:, [*range(words.TOP), *range(-words.TOP, 0)]]
    assert [[mode["words"][i] for i in row] for row in mode["top"].tolist()] == [[names[i] for i in row] for row in top.tolist()]
    texts, (first, *_, last) = [text for text, _ in words.labels_of(mode, 0)], top[0].tolist()
    assert texts == ([names[first]] if kind == "shares" else ["+" + names[first], "−" + names[last]])
    if kind == "signed":
        assert torch.equal(mode["values"].gather(1, mode["top"]), scores.gather(1, top))
    assert mode["loud"].min() >= 0 and mode["loud"].max() <= 1


@pytest.mark.parametrize("values,null,loud", [([1 / 500, 1.0], 1 / 500, [0, 1]), ([0.08, 0.09], 0.08, [0, 0.1]), ([0.05, 0.48], 0.08, [0, 1])])
def test_a_word_near_chance_is_quiet_and_the_strongest_word_is_loud(values, null, loud):
    scores = torch.tensor(values)[:, None]
    assert words.make_mode("cosine", ["word"], scores, null)["loud"].tolist() == pytest.approx(loud, abs=1e-6)


# --- what an answer needs

def strong(vlm):
    """Make the image embeds as long as words, so that they matter."""
    with torch.no_grad():
        for parameter in (*vlm.connector.mlp.parameters(), *([vlm.connector.to_scores.weight] if vlm.words else [])):
            parameter.mul_(3)
    return vlm


def slow_log_probability(vlm, prompt, answer, image_embeds):
    """log p(answer | prompt) by the LLM of transformers alone, token by token. image_embeds float[P, D]"""
    ids = torch.tensor(prompt + answer)
    embeds = vlm.llm.get_input_embeddings()(ids.clamp(min=0)).clone()
    embeds[ids == conversation.IMAGE_ID] = image_embeds.to(embeds)
    logits = vlm.llm(inputs_embeds=embeds[None]).logits[0].float().log_softmax(-1)
    return sum(logits[len(prompt) + i - 1, token].item() for i, token in enumerate(answer))


def embeds_with_weight_zero(vlm, patches, word):
    """The formula of model.combine by hand, one weight 0: float[P, Dv] -> float[P, D]"""
    w, E = vlm.connector.scores(patches).double(), vlm.connector.vocab_embeds.double()
    if vlm.connector.normalize != "none":
        w = w.exp()
    w[:, vlm.words.index(word)] = 0
    return (w / w.sum(1, keepdim=True) if vlm.connector.normalize == "softmax" else w) @ E


@torch.no_grad()
@pytest.mark.parametrize("llm, normalize, tile", [("qwen", "softmax", None), ("gemma", "none", None), ("llama", "mlp", None),
                                                  ("qwen", "softmax", 0), ("qwen", "softmax", 1), ("qwen", "softmax", 2)])
def test_what_an_answer_needs_one_by_one_through_transformers(tiny, shared, llm, normalize, tile, monkeypatch):
    """With tiles: a picture of 60 x 10 pixels on two tiles of 24. Their first and last row of patches show border alone."""
    tiles = () if tile is None else ((48, 24),)
    vlm = strong(build(tiny, llm, None if normalize == "mlp" else shared[:60], normalize.replace("mlp", "softmax"), tiles=tiles))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (10, 60, 3), np.uint8))
    pixels = pictures.tile_pixels(image, **vlm.image_settings, tiles=tiles)
    assert vlm.num_tokens(image.size) == 9 + 7 * len(tiles)         # the square, then one row of both tiles and its end
    prompt, answer = [7, 8] + [conversation.IMAGE_ID] * vlm.num_tokens(image.size) + [9, 10, 11], [40, 41, 42, 43]
    tile, seen = tile or 0, range(3, 6) if tile else range(9)       # the patches that the LLM reads
    patches = words.grid_patches(vlm, pixels[tile, None])
    tested = [] if normalize == "mlp" else needs.strongest_words(words.read(vlm, pixels[tile])["weights"])[:5]
    monkeypatch.setattr(needs, "BATCH_TOKENS", 60)                  # three runs in a batch, or two
    of_patches, of_words = needs.lost_nats(vlm, prompt, answer, pixels, [image.size], patches, tile, tested)

    def log_probability(embeds):
        return slow_log_probability(vlm, prompt, answer, vlm.arrange_images(embeds, [image.size])[0])

    embeds = vlm.encode(pixels)
    before = log_probability(embeds)
    for p in range(9):
        changed = embeds.clone()
        changed[tile, p] = embeds[tile, list(seen)].mean(0)
        assert of_patches[p].item() == pytest.approx(before - log_probability(changed), abs=2e-4)
        assert (of_patches[p] != 0) == (p in seen)
    for word, lost in zip(tested, of_words.tolist(), strict=True):
        changed = embeds.clone()
        changed[tile] = embeds_with_weight_zero(vlm, patches[0], word)
        assert lost == pytest.approx(before - log_probability(changed), abs=2e-4)
    assert of_patches[list(seen)].abs().median() > 1e-3 and (not tested or of_words.abs().max() > 1e-3)


def test_weights_that_do_not_sum_to_1_are_not_called_shares(tiny, shared, monkeypatch):
    vlm = strong(build(tiny, "qwen", shared[:60]))
    assert words.read(vlm, torch.randn(3, 24, 24))["weights"]["kind"] == "shares"
    monkeypatch.setattr(model, "word_weights", lambda scores, normalize: scores.sigmoid())
    assert words.read(vlm, torch.randn(3, 24, 24))["weights"]["kind"] == "signed"


def test_a_word_is_removed_from_a_readers_own_normalisation_too(tiny, shared, monkeypatch):
    """As in the README's exercise: the embeds are those of a connector that never had the word."""
    monkeypatch.setattr(model, "word_weights", lambda scores, normalize: scores.sigmoid() / scores.norm(dim=-1, keepdim=True))
    vlm = strong(build(tiny, "qwen", shared[:60], normalize="mine", temperature=0.5))
    patches, bridge = torch.randn(1, 9, 32), vlm.connector
    found = needs.embeds_without(vlm, patches, vlm.words[3])
    fewer = model.LangBridge(32, bridge.mlp[0].out_features, 59, "mine", 0.5)
    without = lambda tensor: torch.cat([tensor[:3], tensor[4:]])
    fewer.load_state_dict({name: without(t) if name.startswith("to_scores") else t for name, t in bridge.state_dict().items()})
    fewer.vocab_embeds = without(bridge.vocab_embeds)
    torch.testing.assert_close(found, fewer(patches), rtol=1e-4, atol=1e-5)


def test_what_is_not_tested_is_said(tiny, shared, monkeypatch, capsys):
    vlm, pixels = strong(build(tiny, "qwen", shared[:60])), torch.randn(1, 3, 24, 24)
    question = ("what is it?", "chat", (24, 24), pixels, words.grid_patches(vlm, pixels))
    mode = words.read(vlm, pixels[0])["weights"]
    answer, lost = needs.ask(vlm, *question, mode=mode)
    assert answer and lost["patches"].shape == (9,) and len(lost["words"]) == 16
    sums = Counter()                                                # the words that the page's lists weigh most
    for columns, values in zip(mode["top"].tolist(), mode["values"].tolist()):
        sums.update({mode["words"][c]: values[c] for c in columns})
    assert [word for word, _ in lost["words"]] == [word for word, _ in sums.most_common(16)]
    assert needs.ask(vlm, *question)[1]["words"] == []              # an MLP
    monkeypatch.setattr(needs, "CPU_OPERATIONS", 1e6)
    assert needs.ask(vlm, *question, mode=mode) == (answer, None) and "too long" in capsys.readouterr().out
    monkeypatch.setattr(needs, "generate", lambda *args, **kwargs: [[]])
    assert needs.ask(vlm, *question, mode=mode) == ("", None) and "empty" in capsys.readouterr().out


# --- the picture

def drawn(panels, image=None):
    """Return words.png as an array: uint8[height, width, 3]."""
    with tempfile.TemporaryDirectory() as folder:
        words.save_figure(words.draw_picture(panels, image or picture()), f"{folder}/words.png")
        return np.asarray(Image.open(f"{folder}/words.png").convert("RGB"))


@pytest.mark.parametrize("g", [4, 8, 24])
def test_the_picture_has_room_for_every_grid(g):
    height, width, _ = drawn([[make_state(g)]]).shape
    assert 71 <= width / g <= 193 and height > width


def test_ink_contrasts_with_its_patch():
    def luminance(colour):
        rgb = np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)]) / 255
        return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ (0.2126, 0.7152, 0.0722)

    for shade in range(0, 256, 15):
        colour = f"#{shade:02x}{shade:02x}{shade:02x}"
        dark, light = sorted([luminance(words.ink_on(colour)), luminance(colour)])
        assert (light + 0.05) / (dark + 0.05) > 4


def test_a_quiet_word_is_paler_than_a_loud_one():
    state, darkest = make_state(2), []
    for loud in (0.0, 1.0):
        state["modes"]["weights"]["loud"] = torch.full((4,), loud)
        sheet = drawn([[state]], Image.new("RGB", (96, 96), (200, 200, 200)))
        darkest.append(sheet[:300, 40:-40].max(2).min())
    assert darkest[1] < 50 and 60 < darkest[0] < 140


def test_unknown_glyphs_and_long_words_are_drawn(tmp_path, recwarn):
    state = make_state(4)
    state["modes"]["weights"]["words"] = [vocab.to_word(["\U000e0fff", "$a$", "中文", "שלום", "x" * 99, "$"][i % 6].encode()) for i in range(40)]
    words.save_figure(words.draw_picture([[state]], picture()), f"{tmp_path}/new/words.png")
    assert Image.open(f"{tmp_path}/new/words.png").width > 500 and not recwarn.list
    text, size = words.fit("antidisestablishmentarianism", 20, 60)
    assert text == "antidises…" and size == 8 and words.fit("the", 20, 60) == ("the", 20)


def test_the_square_is_what_the_vision_tower_sees():
    wide = Image.new("RGB", (80, 40), "red")
    padded = words.square(wide, "pad", [0, 0, 1], 40)
    assert padded.getpixel((20, 2)) == (0, 0, 255) and padded.getpixel((20, 20)) == (255, 0, 0)
    assert words.square(wide, "crop", [0, 0, 1], 40).getpixel((0, 0)) == (255, 0, 0)


# --- the page

@pytest.mark.parametrize("kind", ["shares", "signed", "cosine"])
def test_the_page_holds_its_data_and_nothing_breaks_out(kind):
    state = make_state(kind=kind)
    state["answer"] = EVIL[0]
    state["needs"] = {"patches": torch.linspace(-1, 2, 9), "words": [(SPELT[0], 1.5), (vocab.to_word(b" unseen"), -0.25)]}
    html = page_of(state, ask=EVIL[1])
    content = content_of(html)
    assert not re.search(r"https?://|<[^>]*\s(src|href|on\w+)=", html) and html.count("<script") == 2
    shown_state = content["panels"][0]["states"][0]
    lost = shown_state["needs"]
    assert content["ask"] == EVIL[1] and shown_state["answer"] == EVIL[0] and lost["patches"] == pytest.approx(torch.linspace(-1, 2, 9).tolist())
    assert [(one["word"], one["value"]) for one in lost["words"]] == [(vocab.show(SPELT[0]), 1.5), ("␣unseen", -0.25)]
    for key, mode in state["modes"].items():
        there = shown_state["modes"][key]
        shown = [vocab.show(word) for word in mode["words"]]
        assert there["explained"] == (key == "together" and pytest.approx(mode["explained"].tolist()))
        assert [[one["word"] for one in top] for top in there["tops"]] == [[shown[i] for i in top] for top in mode["top"].tolist()]
        values = [[one["value"] for one in top] for top in there["tops"]]
        np.testing.assert_allclose(values, mode["values"].gather(1, mode["top"]), rtol=0.01)
        assert values[0] == sorted(values[0], reverse=True) or key == "together"
        assert there["labels"] == [[list(label) for label in words.labels_of(mode, i)] for i in range(9)]
        for one in there["maps"]:
            levels = np.frombuffer(base64.b64decode(one["levels"]), np.int8)
            want = mode["values"][:, shown.index(one["word"])].numpy()
            assert np.abs(levels / 127 * one["peak"] - want).max() <= 0.011 * one["peak"]
        assert len(there["maps"]) == len(shown)
    assert html == page_of(state, ask=EVIL[1])


def test_a_large_page_stays_small(monkeypatch):
    states = [make_state(24, K=3000, label=f"step {i}") for i in range(2)]
    assert len(page_of(*states)) < 2 * words.MAP_BYTES


def test_snapshots_become_a_slider_and_llms_stand_side_by_side():
    run_ = [make_state(label="step 1"), make_state(label="step 2")]
    assert [len(states) for states in words.make_panels(run_)] == [2]
    panels = words.make_panels(run_ + [make_state(name="other")])
    assert [len(states) for states in panels] == [2, 1]
    sheet = drawn(panels)
    assert sheet.shape[0] > sheet.shape[1] and (sheet == drawn(panels)).all()       # two rows; the same picture twice


class Browser:
    """Chromium by chromedriver's HTTP protocol (W3C WebDriver): real mouse moves, keys and touches, not events made up"""
    def __init__(self, folder):
        self.driver = subprocess.Popen([shutil.which("chromedriver"), "--port=0"], stdout=subprocess.PIPE, text=True)
        port = next(m[1] for line in self.driver.stdout if (m := re.search(r"on port (\d+)\.", line)))
        self.url, flags = f"http://127.0.0.1:{port}/session", ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
            "disable-background-networking", "disable-component-update", "disable-sync", f"user-data-dir={folder}", "window-size=1200,1000"]
        chrome = {"args": [f"--{flag}" for flag in flags], "binary": CHROMIUM}
        self.url += "/" + self.call("", capabilities={"alwaysMatch": {"goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}}})["sessionId"]

    def call(self, path, **body):
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request, timeout=120))["value"]

    def js(self, script):
        return self.call("/execute/sync", script="return " + script, args=[])

    def keys(self, *keys):
        self.act("key", "key", *[{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")])

    def point(self, node, *then, pointer="mouse"):
        """Move to the middle of the node that a script names, then press and let go for each of `then`"""
        x, y = self.js(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({node}.getBoundingClientRect())")
        move = {"type": "pointerMove", "x": round(x), "y": round(y)}
        self.act("pointer", pointer, move, *[{"type": kind, "button": 0} for kind in then])

    def act(self, kind, pointer, *actions):
        device = {"type": kind, "id": pointer, "actions": actions, "parameters": {"pointerType": pointer}}
        self.call("/actions", actions=[device])

    def close(self):
        urllib.request.urlopen(urllib.request.Request(self.url, method="DELETE"), timeout=60)
        self.driver.terminate()
        self.driver.wait()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ENTER, ESCAPE, RIGHT, DOWN, END, HOME = "\ue007", "\ue00c", "\ue014", "\ue015", "\ue010", "\ue011"


@pytest.mark.skipif(not (CHROMIUM and shutil.which("chromedriver")), reason="no Chromium with its chromedriver on this machine")
def test_the_page_works_in_a_browser(tmp_path):
    states = [make_state(kind="signed", label="step 1"), make_state(kind="signed", label="step 2", seed=1), make_state(kind="signed", name="other")]
    for state, largest in zip(states, (2, 1)):                      # the other LLM was not tested
        state["needs"] = {"patches": torch.arange(9) / 8 * largest - 0.5, "words": [("Ġw3", 0.75), ("Ġw1", 1.5)]}
    (tmp_path / "page.html").write_text(page_of(*states), encoding="utf-8")
    browser = Browser(tmp_path / "profile")
    try:
        browser.call("/url", url=f"file://{tmp_path}/page.html")
        read = "panels[0].read.textContent"
        assert browser.js("document.querySelectorAll('[role=grid]').length") == 2
        browser.point("panels[0].cells[4]")
        assert "row 2, column 2" in browser.js(read) and "row 2, column 2" in browser.js("panels[1].read.textContent")
        browser.point("panels[0].cells[4]", "pointerDown", "pointerUp")             # a click fixes the patch
        browser.point("panels[0].cells[0]")
        assert "row 2, column 2" in browser.js(read) and "fixed" in browser.js(read)
        browser.keys(ESCAPE, RIGHT, DOWN)
        assert "row 3, column 3" in browser.js(read) and browser.js("document.activeElement === panels[0].cells[8]")
        browser.point("panels[1].cells[1]", "pointerDown", "pointerUp", pointer="touch")
        assert "row 1, column 2" in browser.js(read)

        browser.js("$('search').focus()")
        browser.keys(*"</SCRIPT")
        assert browser.js("$('chips').textContent").startswith("</script>") and browser.js("$('chips').children.length") == 1
        assert "1 of" in browser.js("$('found').textContent")
        browser.keys(ENTER)
        assert browser.js("state.word").startswith("</script>") and browser.js("panels[0].stage.classList.contains('mapped')")
        alpha = browser.js("[...panels[0].canvas.getContext('2d').getImageData(0, 0, side, side).data].filter((v, i) => i % 4 === 3)")
        map_ = browser.js("Array.from(mapAt(momentOf(panels[0])))")
        assert len(map_) == 9 and int(np.abs(map_).argmax()) == int(np.argmax(alpha)) and max(alpha) > 0
        browser.keys(ESCAPE)
        assert browser.js("state.word") is None

        label = "panels[0].cells[0].getAttribute('aria-label')"
        assert browser.js("$('when').textContent") == "step 2"
        late = browser.js(label)
        browser.js("$('step').focus()")
        browser.keys(HOME)
        assert browser.js("$('when').textContent") == "step 1" and browser.js(label) != late
        best = states[0]["modes"]["weights"]
        assert vocab.show(best["words"][best["top"][0, 0]]) in browser.js(label)
        browser.keys(END)
        assert browser.js(label) == late
        browser.point("document.querySelectorAll('#modes label')[1]", "pointerDown", "pointerUp")
        assert "random direction" in browser.js(read)
        browser.point("document.querySelectorAll('#modes label')[2]", "pointerDown", "pointerUp")
        together = states[1]["modes"]["together"]
        browser.point("panels[0].cells[3]")
        assert f"Together these 5 words explain {100 * together['explained'][3]:.0f} %" in browser.js(read) and "explain 30 %" in browser.js(read)
        best = [vocab.show(together["words"][column]) for column in together["top"][3].tolist()]
        assert browser.js("[...panels[0].read.querySelectorAll('.words bdi')].map(b => b.textContent)") == best

        assert "loses 0.13 nats" not in browser.js(read) and "gains 0.13 nats" in browser.js(read)       # 3 / 8 - 0.5
        assert browser.js("panels[0].read.querySelector('.chips').textContent") == "␣w1+1.50␣w3+0.75"
        assert "nats" not in browser.js("panels[1].read.textContent")
        browser.point("$('needs')", "pointerDown", "pointerUp")
        assert browser.js("$('needs').ariaPressed") == "true" and "nats" in browser.js("panels[0].legend.textContent")
        assert browser.js("panels.map(p => p.stage.classList.contains('mapped'))") == [True, False]
        copy = "(c => (c.drawImage(panels[0].canvas, 0, 0), [...c.getImageData(0, 0, side, side).data]))(make('canvas').getContext('2d'))"
        colours = browser.js(copy)                                  # a second read of the canvas itself would be a warning
        red, alpha = colours[::4], colours[3::4]
        assert [r > 200 for r, a in zip(red, alpha) if a] == [False] * 4 + [True] * 4 and alpha[4] == 0          # below 0, 0, above
        assert "+1.50 nats" in browser.js("panels[0].legend.textContent") and "+0.50 nats" in browser.js("panels[0].cells[8].ariaLabel")
        browser.keys(ESCAPE)
        assert browser.js("panels.map(p => p.stage.classList.contains('mapped'))") == [False, False]

        unnamed = "b => !(b.getAttribute('aria-label') || b.textContent.trim() || b.labels?.length)"
        assert browser.js(f"[...document.querySelectorAll('button, input')].filter({unnamed}).length") == 0
        colours = []
        for scheme in ("light", "dark"):
            browser.call("/goog/cdp/execute", cmd="Emulation.setEmulatedMedia", params={"features": [{"name": "prefers-color-scheme", "value": scheme}]})
            colours.append(browser.js("getComputedStyle(document.body).backgroundColor"))
        assert colours == ["rgb(252, 251, 248)", "rgb(22, 22, 26)"]
        assert browser.call("/se/log", type="browser") == []                        # no error, and no connection was tried
    finally:
        browser.close()


# --- the command

@pytest.fixture(scope="module")
def checkpoints(tiny, shared, tmp_path_factory):
    """Three untrained checkpoints: softmax on qwen, raw on gemma (which scales its embeddings), an MLP on qwen"""
    root = tmp_path_factory.mktemp("checkpoints")
    save(build(tiny, "qwen", shared), root / "soft")
    save(build(tiny, "gemma", shared, "none"), root / "raw")
    save(build(tiny, "qwen", None), root / "mlp")
    return root


def test_checkpoints_to_picture_and_page(checkpoints, world, tmp_path, capsys):
    args = words.read_arguments([*(f"{checkpoints}/{name}" for name in ("soft", "raw", "mlp")), f"{world}/images/0.png",
                                 f"--out={tmp_path}/out", "--ask=What is this?", "--device=cpu"])
    words.main(args)
    assert sorted(os.listdir(tmp_path / "out")) == ["words.html", "words.png"]
    printed = capsys.readouterr().out
    assert "wrote" in printed and printed.count("without a patch the answer loses") == 3 and printed.count("without a word") == 2
    content = content_of((tmp_path / "out" / "words.html").read_text(encoding="utf-8"))
    modes = [panel["states"][0]["modes"] for panel in content["panels"]]
    assert [list(m) for m in modes] == [["weights", "cosine", "together"]] * 2 + [["cosine", "together"]]
    assert [m.get("weights", {}).get("kind") for m in modes] == ["shares", "signed", None]
    assert all(isinstance(panel["states"][0]["answer"], str) for panel in content["panels"])
    lost = [panel["states"][0]["needs"] for panel in content["panels"]]
    assert [len(one["patches"]) for one in lost] == [9] * 3 and [len(one["words"]) for one in lost] == [8, 16, 0]
    with pytest.raises(ValueError, match="--overwrite"):
        words.main(args)


def test_read_agrees_with_the_connector(checkpoints):
    vlm, pixels = checkpoint.load(str(checkpoints / "raw")), torch.randn(3, 24, 24)
    mode = words.read(vlm, pixels)["weights"]
    best = vlm.connector.weights(vlm.patch_features(pixels[None]))[0].argmax(1).tolist()
    assert [mode["words"][i] for i in mode["top"][:, 0].tolist()] == [vlm.words[i] for i in best]
    assert mode["kind"] == "signed" and mode["size"] == len(vlm.words)


# --- the study

@pytest.mark.parametrize("found, wanted", [
    ([study.plain(w) for w in ("ĠRed", "red", "<", "Ġ")], ["red", "red", "<", ""]),
    (study.content_words("A large Red heart, and the star2 of it", study.NO_THING), {"large", "red", "heart", "star"})])
def test_small_functions_of_the_study(found, wanted):
    assert found == wanted


def test_a_patch_has_the_name_of_what_covers_it():
    box = lambda shape, *corners: {"shape": shape, "color": "Red", "box": list(corners)}
    named = study.names_of_patches([box("circle", 0, 0, 26, 20), box("star", 26, 0, 47, 20)], (60, 60), 3, "pad")
    assert named == [{"circle", "red"}, {"star", "red"}, {"star", "red"}] + [set()] * 6        # 6 and 14; 7 of 20 pixels
    assert study.names_of_patches([box("star", 40, 40, 46, 60)], (60, 60), 3, "crop") == [set()] * 9       # 6 of 20: too little
    # 80 x 40, two patches a side: cropped to the pixels from 20 to 60, or padded to 80 with 20 above and below
    wide = [box("star", 20, 0, 40, 20)]
    assert study.names_of_patches(wide, (80, 40), 2, "crop") == [{"star", "red"}, set(), set(), set()]
    assert study.names_of_patches([box("star", 0, 0, 40, 40)], (80, 40), 2, "pad") == [{"star", "red"}, set(), {"star", "red"}, set()]
    assert study.names_of_patches([], (80, 40), 2, "pad") == [set()] * 4


def test_shares_count_only_patches_with_a_name():
    words, counts = ["red", "y", "red", "x"], Counter(["red", "Red", "red", "star", "x"])
    names, others = [{"red", "star"}, {"x"}, set(), {"y"}], [set(), {"y"}, {"x", "z"}]      # others: y, then x and z, then y
    assert study.shares_of(words, names, others, counts) == pytest.approx(
        {"right picture": 1 / 3, "another picture": 0, "chance": (3 / 5 + 1 / 5 + 0) / 3})
    assert study.shares_of(words, names, [{"red"}, {"y"}], counts)["another picture"] == pytest.approx(2 / 3)
    assert study.shares_of(words, names, [set()], counts)["another picture"] == 0
    assert all(math.isnan(x) for x in study.shares_of(words, [set()] * 4, others, counts).values())


def test_intervals_hold_the_mean_as_often_as_they_say():
    assert study.interval_over_seeds([[0.25] * 9]) == [0.25] * 3 and study.interval_over_seeds([[math.nan] * 3]) is None
    assert study.interval_over_seeds([[1, math.nan, 3]])[0] == 2
    generator = np.random.default_rng(0)
    held = [low <= 0.5 <= high for _, low, high in (study.interval_over_seeds([generator.random(50)], 400) for _ in range(300))]
    assert 0.90 <= np.mean(held) <= 0.98
    one, two = (study.interval_over_seeds(v) for v in ([[0, 1] * 50] * 2, [[0, 1] * 50, [1, 2] * 50]))
    assert one[2] - one[1] < 0.25 and two[1:] == pytest.approx([0.45, 1.55], abs=0.1)          # seeds that differ count


def test_a_connector_that_always_says_red(tiny, world, shared, tmp_path, capsys):
    folders = []
    for folder, llm, stage in (("seed1/red", "qwen", "pretrain"), ("seed2/red", "qwen", "pretrain"), ("moved", "llama", "transfer"), ("mlp", "qwen", "pretrain")):
        vlm = build(tiny, llm, None if folder == "mlp" else shared)
        if vlm.words:
            vlm.connector.to_scores.bias.data[shared.index("Ġred")] = 1e3
        folders.append(save(vlm, tmp_path / folder, stage, **({} if folder == "moved" else {"steps": 7})))
    folders[-1] = f"an MLP={folders[-1]}"
    truth = {f"{i}.png": {"objects": [{"shape": "square", "color": c, "box": [0, 0, 8, 8]}]} for i, c in enumerate(["red", "green", "blue", "white"] * 10)}
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    argv = [*folders, f"--data={world}/captions.json", f"--images={world}/images", f"--truth={tmp_path}/truth.json",
            f"--out={tmp_path}/study", "--number=8"]
    study.main(argv)
    assert sorted(os.listdir(tmp_path / "study")) == ["study.json", "study.md"]
    result = json.loads((tmp_path / "study" / "study.json").read_text())
    red, moved, mlp = (row["values"] for row in result["rows"])
    assert [(row["name"], row["step"], row["seeds"]) for row in result["rows"]] == [("red", 7, 2), ("moved", None, 1), ("an MLP", 7, 1)]
    assert result["pictures"] == 8
    assert red["entropy"][0] < 1e-6 and red["top-1 cosine"] == pytest.approx([1] * 3) and 0.3 < red["above random directions"][0] < 1
    for how, against in itertools.product(("weights", "cosine"), ("right", "another")):         # two pictures of eight are red
        assert red[f"object, by {how}: {against} picture"][0] == red[f"caption, by {how}: {against} picture"][0] == 0.25
    assert red["object, by weights: chance"][0] == pytest.approx(
        np.mean([sum(study.plain(w) in ("square", c) for w in shared) / len(shared) for c in ("red", "green", "blue", "white")]))
    assert moved["object, by weights: right picture"] == red["object, by weights: right picture"]
    assert "entropy" not in mlp and "object, by weights: right picture" not in mlp and mlp["object, by cosine: right picture"][0] < 1
    table = (tmp_path / "study" / "study.md").read_text()
    assert table in capsys.readouterr().out and re.search(r"\| red, step 7 \|.* \| 25\.0 \[[\d.]+, [\d.]+\] / 25\.0 / ", table)
    truth.pop("3.png")
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    for more, sentence in (([], "--overwrite"), (["--overwrite"], "does not know 3.png"),
                           (["--overwrite", "--number=1"], "needs two images or more: 1 of .*--number is 1")):
        with pytest.raises(ValueError, match=sentence):
            study.main(argv + more)


@pytest.mark.parametrize("read", [words.read_arguments, study.main])
def test_arguments_that_do_not_fit(read):
    with pytest.raises(SystemExit) as stop:
        read(["somewhere"])
    assert "the following arguments are required: " in str(stop.value.code)


class Far(torch.Tensor):
    """A tensor that behaves in numpy() as one on a GPU does, and so does all that is computed from it, up to cpu()."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def numpy(self):
        raise TypeError("can't convert a device tensor to numpy")


@pytest.mark.parametrize("normalize", ["softmax", "none"])
def test_what_is_read_for_people_is_on_the_cpu(tiny, shared, normalize):
    vlm = build(tiny, "qwen", shared[:100], normalize)
    embed, features = vlm.llm.get_input_embeddings(), vlm.patch_features
    vlm.patch_features = lambda pixels: features(pixels).as_subclass(Far)
    embed.register_forward_hook(lambda _, args, out: out.as_subclass(Far))
    vlm.connector.vocab_embeds = vlm.connector.vocab_embeds.as_subclass(Far)
    modes = words.read(vlm, torch.rand(3, 24, 24))
    found = {key: type(x) for mode in modes.values() for key, x in mode.items() if torch.is_tensor(x)}
    assert set(found.values()) == {torch.Tensor}, found
    words.page_mode(modes["weights"], 10)


def test_a_reader_that_keeps_the_cls_token_shows_the_grid(tiny, shared):
    vlm = build(tiny, "qwen", shared[:100])
    pixels, features = torch.rand(3, 24, 24), vlm.patch_features
    plain_values = words.read(vlm, pixels)["weights"]["values"]
    vlm.patch_features = lambda pixels: torch.cat([torch.zeros(1, 1, 32), features(pixels)], 1)
    assert words.grid_patches(vlm, pixels[None]).shape == (1, 9, 32)
    assert torch.equal(words.read(vlm, pixels)["weights"]["values"], plain_values)


def test_another_place_of_the_tower_keeps_the_llm_of_the_checkpoint(tiny, shared, tmp_path, monkeypatch):
    """After stage 2 the LLM is in the checkpoint. --vision_tower must not put the untrained one in its place."""
    folder = save(build(tiny, "qwen", shared), tmp_path / "sft", "sft", ("connector", "llm"), template="chat")
    shutil.copytree(tiny.clip, tmp_path / "tower")
    seen = []
    monkeypatch.setattr(words, "read", lambda vlm, pixels: seen.append(vlm.own_parts) or {})
    words.read_checkpoint(folder, picture(), "pad", words.read_arguments([folder, "-", f"--vision_tower={tmp_path}/tower", "--device=cpu"]))
    assert seen == [{"llm"}]


def test_a_published_connector_is_read_with_models_in_folders(tiny, world, shared, tmp_path):
    """results/release.py ties a connector to no LLM; --llm and --vision_tower name local folders."""
    save(build(tiny, "qwen", shared), tmp_path / "trained")
    out = tmp_path / "weights"
    run("results/release.py", tmp_path / "trained", out, "--vision_tower", "nobody/tower", "--llm", "nobody/llm")
    assert sorted(os.listdir(out)) == ["config.json", "connector.safetensors", "words.json"]
    assert "fingerprint" not in json.loads((out / "config.json").read_text())
    half, whole = (load_file(f"{folder}/connector.safetensors") for folder in (out, tmp_path / "trained"))
    for name, tensor in half.items():
        assert tensor.dtype == torch.float16
        torch.testing.assert_close(tensor.float(), whole[name], rtol=1e-3, atol=1e-4)
    place = ["--llm", tiny.llama, "--vision_tower", tiny.clip]
    run("words.py", out, world / "images" / "0.png", "--out", tmp_path / "picture", *place, "--ask", "What is this?")
    assert os.path.getsize(tmp_path / "picture" / "words.png") > 1000
    run("transfer.py", out, tiny.llama, "--vision_tower", tiny.clip, "--out", tmp_path / "moved")
    assert checkpoint.load(str(tmp_path / "moved")).config.llm == tiny.llama
    failed = run("words.py", out, world / "images" / "0.png", "--out", tmp_path / "other", "--offline", check=False)
    assert failed.returncode and "nobody/" in failed.stderr and "Traceback" not in failed.stderr


def test_checkpoints_of_two_llms_read_with_one_share_a_slider(tiny, tmp_path):
    """With --llm both become that LLM. Without it they stand side by side."""
    for llm in ("qwen", "llama"):
        checkpoint.save(make(tiny, llm=llm), str(tmp_path / llm), "pretrain", ("connector",))
    folders = [str(tmp_path / llm) for llm in ("qwen", "llama")]
    for more, panels in (([f"--llm={tiny.gemma}"], [2]), ([], [1, 1])):
        args = words.read_arguments([*folders, "-", "--device=cpu", *more])
        states = [words.read_checkpoint(folder, picture(), "pad", args) for folder in folders]
        assert [len(group) for group in words.make_panels(states)] == panels
