"""model.py against transformers' own LLaVA and against slow loops. Alone: python -m pytest tests/test_model.py"""
import dataclasses

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

import checkpoint
import common
from generate import generate
import conversation
import data
import model
import vocab
from conversation import IMAGE_ID
from support import pretrained
from support.device import own_device
from support.tensors import read_safetensors, write_safetensors

P = 9                                                               # 24 pixels, patches of 8


def words_of(*folders):
    from transformers import AutoTokenizer
    tokenizers = [AutoTokenizer.from_pretrained(f) for f in folders]
    return sorted(vocab.shared_words(tokenizers))


def make(tiny, llm="qwen", tower="clip", connector="langbridge", normalize="softmax", hidden=28, layer=-2, image_size=0):
    words = words_of(tiny.qwen, tiny.llama) if connector == "langbridge" else None
    config = model.Config(vision_tower=getattr(tiny, tower), llm=getattr(tiny, llm), connector=connector, hidden=hidden,
                          num_words=len(words or ()), normalize=normalize, vision_layer=layer, image_size=image_size)
    torch.manual_seed(1)
    vlm = checkpoint.build(config, words)
    if words:
        vlm.connector.to_scores.weight.data.mul_(3)                 # weights that differ from each other
    return vlm


def sample(tokenizer, messages, images, seed=0):
    ids, labels = conversation.encode(messages, tokenizer, P)
    pixels = torch.randn(images, 3, 24, 24, generator=torch.Generator().manual_seed(seed))
    return {"id": str(seed), "input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "images": pixels}


def turns(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def samples(tokenizer):
    """One image, several turns; two images; text only; one image and one word"""
    return [sample(tokenizer, turns("<image>\nwhat colour is the circle?", "red!", "and the star?", "a green star"), 1, 1),
            sample(tokenizer, turns("<image> and <image>\ntwo squares?", "yes, two small ones"), 2, 2),
            sample(tokenizer, turns("Is there a star?", "no"), 0, 3),
            sample(tokenizer, turns("<image>\nIs there a star?", "yes"), 1, 4)]


def test_paper_sizes_have_the_papers_number_of_parameters():
    with torch.device("meta"):
        connector = model.LangBridge(Dv=1024)
    assert sum(p.numel() for p in connector.parameters()) == 129_790_720


@pytest.mark.parametrize("connector", ["langbridge", "mlp"])
def test_logits_loss_gradients_and_answers_equal_transformers_llava(tiny, connector):
    """LlavaForConditionalGeneration with our parts inside. A LangBridge takes the place of its projector as it is."""
    vlm = make(tiny, connector=connector, hidden=28)
    batch = data.collate([s for s in samples(vlm.tokenizer) if len(s["images"]) == 1], pad_id=0)
    theirs = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=vlm.vision_tower.config, text_config=vlm.llm.config, image_token_index=499,
        vision_feature_layer=-2, vision_feature_select_strategy="default", image_seq_length=P)).eval()
    theirs.model.vision_tower.load_state_dict(vlm.vision_tower.state_dict())
    theirs.model.language_model.load_state_dict(vlm.llm.model.state_dict())
    theirs.lm_head.load_state_dict(vlm.llm.lm_head.state_dict())
    theirs.model.multi_modal_projector = vlm.connector              # shared: its gradients are compared below
    vlm.connector.requires_grad_(True)

    ids = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_ID, 499)
    out = theirs(input_ids=ids, pixel_values=batch["pixel_values"], attention_mask=batch["attention_mask"],
                 position_ids=batch["position_ids"], labels=batch["labels"])
    out.loss.backward()
    expected = {n: p.grad.clone() for n, p in vlm.connector.named_parameters()}
    vlm.connector.zero_grad()
    loss, count = vlm(batch)
    (loss / count).backward()

    embeds = vlm.splice(batch["input_ids"], batch["pixel_values"])
    logits = vlm.llm(inputs_embeds=embeds, attention_mask=batch["attention_mask"], position_ids=batch["position_ids"]).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], out.logits[real], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loss / count, out.loss, atol=1e-5, rtol=1e-5)
    for name, p in vlm.connector.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-6, rtol=1e-3, msg=name)
        assert p.grad.abs().sum() > 0, name

    prompt = conversation.encode_prompt(turns("<image>\nwhat colour is the star?"), vlm.tokenizer, P)
    pixels = batch["pixel_values"][:1]
    mine = generate(vlm, [prompt], pixels, max_new_tokens=12)[0]
    ids = torch.tensor([prompt])
    reference = theirs.generate(input_ids=ids.masked_fill(ids == IMAGE_ID, 499), pixel_values=pixels, do_sample=False,
                                max_new_tokens=12, attention_mask=torch.ones_like(ids))[0, len(prompt):].tolist()
    assert mine == [i for i in reference if i not in vlm.eos_ids][:len(mine)] and len(mine) > 2


@pytest.mark.parametrize("llm", ["qwen", "llama", "gemma"])
def test_loss_equals_the_librarys_own_on_text(tiny, llm):
    """Without an image nothing is ours but where logits are taken; Gemma's embeddings are scaled by its module."""
    vlm = make(tiny, llm=llm)
    batch = data.collate([sample(vlm.tokenizer, turns("what is this?", "a red circle!"), 0)], pad_id=0)
    loss, count = vlm(batch)
    out = vlm.llm(input_ids=batch["input_ids"], labels=batch["labels"])
    torch.testing.assert_close(loss / count, out.loss)


def test_splice_equals_a_slow_loop(tiny):
    vlm = make(tiny)
    batch = data.collate(samples(vlm.tokenizer), pad_id=0)
    got = vlm.splice(batch["input_ids"], batch["pixel_values"])
    image_embeds = vlm.encode(batch["pixel_values"])
    assert image_embeds.shape[:2] == (4, P)
    table, patch = vlm.llm.get_input_embeddings().weight, 0
    for b, row in enumerate(batch["input_ids"].tolist()):
        for t, i in enumerate(row):
            if i == IMAGE_ID:
                expected = image_embeds[patch // P, patch % P]
                patch += 1
            else:
                expected = table[i]
            assert torch.equal(got[b, t], expected), (b, t)
    assert patch == 4 * P


def test_an_image_too_many_is_refused(tiny):
    vlm = make(tiny)
    batch = data.collate(samples(vlm.tokenizer), pad_id=0)
    with pytest.raises(ValueError, match="image positions"):
        vlm.splice(batch["input_ids"], batch["pixel_values"][:-1])
    for pixels in (None, batch["pixel_values"][:0]):
        with pytest.raises(ValueError, match="there is no image"):
            vlm.splice(batch["input_ids"], pixels)


@pytest.mark.parametrize("llm", ["qwen", "gemma"])
def test_a_batch_of_four_equals_four_batches_of_one(tiny, llm):
    vlm = make(tiny, llm=llm)
    alone = [vlm(data.collate([s], pad_id=0)) for s in samples(vlm.tokenizer)]
    loss, count = vlm(data.collate(samples(vlm.tokenizer), pad_id=0))
    assert count == sum(n for _, n in alone)
    torch.testing.assert_close(loss, sum(l for l, _ in alone), atol=1e-4, rtol=1e-5)


def test_a_greedy_answer_does_not_depend_on_its_batch(tiny):
    vlm = make(tiny)
    questions = ["<image>\nwhat colour is the big circle?", "Is there a star?", "<image> <image>\ntwo?", "<image>"]
    prompts = [conversation.encode_prompt(turns(q), vlm.tokenizer, P) for q in questions]
    pixels = [torch.randn(q.count("<image>"), 3, 24, 24, generator=torch.Generator().manual_seed(7)) for q in questions]
    together = generate(vlm, prompts, torch.cat(pixels), 10)
    alone = [generate(vlm, [p], x, 10)[0] for p, x in zip(prompts, pixels)]
    assert together == alone
    back = generate(vlm, prompts[::-1], torch.cat(pixels[::-1]), 10)
    assert back[::-1] == together
    assert any(len(a) > 1 for a in together)


def test_sampling_draws_from_the_distribution_of_the_logits(tiny):
    """The first token of 200 equal prompts: frequencies near the softmax at this temperature; a seed repeats them."""
    vlm = make(tiny)
    vlm.eos_ids = set()
    prompt = conversation.encode_prompt(turns("Is there a star?"), vlm.tokenizer, P)
    draw = lambda: (torch.manual_seed(5), [a[0] for a in generate(vlm, [prompt] * 200, None, 1, temperature=0.5)])[1]
    first = draw()
    assert first == draw() and len(set(first)) > 1
    with torch.no_grad():
        hidden = vlm.llm.get_decoder()(input_ids=torch.tensor([prompt])).last_hidden_state[:, -1]
        wanted = (vlm.logits(hidden)[0] / 0.5).softmax(-1)
    seen = torch.bincount(torch.tensor(first), minlength=len(wanted)) / 200
    assert (seen - wanted).abs().sum() < 0.6 * 2 and seen.argmax() in wanted.topk(3).indices


def test_an_llm_spread_by_accelerate_answers_the_same(tiny, tmp_path, monkeypatch):
    """One of its layers is read from the disk at each step: the hooks of a device map, which several GPUs need as well."""
    accelerate = pytest.importorskip("accelerate")
    config = model.Config(tiny.clip, tiny.qwen, "mlp", 24, 0)
    build = lambda: (torch.manual_seed(1), checkpoint.build(config, None, "cpu"))[1]
    one, (llm, tokenizer) = build(), pretrained.load_llm(tiny.qwen, torch.float32, "cpu")
    places = {name: "cpu" for name, _ in [*llm.model.named_children(), ("lm_head", None)]}
    places = {f"model.{name}" if name != "lm_head" else name: place for name, place in places.items() if name != "layers"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    llm = accelerate.dispatch_model(llm, places, main_device="cpu", offload_dir=str(tmp_path))
    monkeypatch.setattr(checkpoint, "load_llm", lambda *args, **kwargs: (llm, tokenizer))
    spread = build()
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(7)) * 5
    prompts = [conversation.encode_prompt(turns(q), one.tokenizer, P) for q in ("<image>\nwhat colour?", "<image>\nIs it red?")]
    assert generate(spread, prompts, pixels, 8, image_index=[0, 0]) == generate(one, prompts, pixels, 8, image_index=[0, 0])


@pytest.mark.parametrize("text,most,words", [("auto", 1, "no device 'auto'"), ("cpu,cpu", None, "no device"), ("cuda:77", None, "GPUs"),
                                             ("cpu,", None, "no device 'cpu,'"), ("tpux", None, "no device 'tpux'")])
def test_a_device_that_is_not_there_is_one_sentence(text, most, words):
    with pytest.raises(ValueError, match=words):
        own_device(text, most)


def test_auto_is_the_cpu_where_no_gpu_is(monkeypatch):
    for is_there, device in ((False, torch.device("cpu")), (True, "auto")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
        assert own_device("auto", None) == device


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("llm", ["qwen", "llama", "gemma"])         # gemma's window of 16 is shorter than every prompt
def test_questions_about_one_image_share_its_prefix(tiny, llm, attention, monkeypatch):
    """Answers of a batch in which images repeat are those of each question alone, and an image is run once."""
    vlm = make(tiny, llm=llm)
    vlm.llm.set_attn_implementation(attention)
    asked = [("<image>\nwhat colour is the big circle?", [0]), ("<image>\nIs there a star?", [0]),
             ("<image>\ntwo?", [1]), ("<image>\nthere are two small triangles above the word cat", [1]),
             ("<image> <image>\nwhat?", [0, 1]), ("<image> <image>\na green star?", [0, 1]),
             ("<image> <image>\na green star?", [1, 0]), ("<image>\nsquare?", [2])]
    text = ("Is there a star?", [])                                 # longer than some questions, and it shares nothing
    pixels = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(7)) * 5
    lengths = []
    decode = type(vlm.llm.get_decoder()).forward
    monkeypatch.setattr(vlm.llm.get_decoder(), "forward", lambda **kwargs: lengths.append(
        kwargs["inputs_embeds"].shape[:2] if kwargs.get("inputs_embeds") is not None else ())
        or decode(vlm.llm.get_decoder(), **kwargs))
    for questions in (asked, asked[::-1], [*asked[:2], text, *asked[2:]]):
        prompts = [conversation.encode_prompt(turns(q), vlm.tokenizer, P) for q, _ in questions]
        alone = [generate(vlm, [p], pixels[which] if which else None, 20)[0]
                 for p, (_, which) in zip(prompts, questions)]
        lengths.clear()
        assert generate(vlm, prompts, pixels, 20, image_index=[i for _, which in questions for i in which]) == alone
        shared = max(map(len, prompts)) - lengths[1][1]
        assert lengths[:2] == [(5 + (text in questions), shared), (len(prompts), lengths[1][1])] and shared > P
    assert len({tuple(a) for a in alone}) > 4 and max(map(len, alone)) > 16


def test_logits_in_pieces_equal_logits_at_once(tiny, monkeypatch):
    vlm = make(tiny)
    vlm.connector.requires_grad_(True)
    batch = data.collate(samples(vlm.tokenizer), pad_id=0)
    whole, _ = vlm(batch)
    expected = torch.autograd.grad(whole, vlm.connector.to_scores.weight)[0]
    monkeypatch.setattr(model, "LOSS_ROWS", 5)
    pieces, _ = vlm(batch)
    torch.testing.assert_close(pieces, whole)
    torch.testing.assert_close(torch.autograd.grad(pieces, vlm.connector.to_scores.weight)[0], expected)


@pytest.mark.parametrize("tower,size", [("clip", 0), ("dino", 0), ("siglip", 0), ("clip", 16), ("dino", 32)])
def test_patches_of_every_tower(tiny, tower, size):
    """In row-major order and without CLS: changing the last patch's pixels changes layer 0 of the last patch only."""
    vlm = make(tiny, tower=tower, layer=0, image_size=size)
    side = size or 24
    assert vlm.num_patches == (side // 8) ** 2
    images = torch.zeros(2, 3, side, side)
    images[1, :, -8:, -8:] = 1
    features = vlm.patch_features(images)
    assert features.shape == (2, vlm.num_patches, 32)
    changed = (features[0] != features[1]).any(-1).nonzero().flatten().tolist()
    assert changed == [vlm.num_patches - 1]


@pytest.mark.parametrize("llm", ["qwen", "llama", "gemma"])
def test_vocab_embeds_are_what_the_llms_module_returns(tiny, llm):
    vlm = make(tiny, llm=llm)
    embed = vlm.llm.get_input_embeddings()
    for k, ids in enumerate(vocab.word_ids(vlm.words, vlm.tokenizer)):
        torch.testing.assert_close(vlm.connector.vocab_embeds[k], embed(torch.tensor(ids)).sum(0))
    if llm == "gemma":
        assert not torch.allclose(vlm.connector.vocab_embeds[0], embed.weight[vocab.word_ids(vlm.words[:1], vlm.tokenizer)[0][0]])


def test_a_word_in_pieces_gets_their_sum_and_in_an_old_checkpoint_their_mean(tiny, tmp_path):
    words = words_of(tiny.qwen, tiny.llama) + ["ĠnotOneToken"]
    config = model.Config(vision_tower=tiny.clip, llm=tiny.qwen, hidden=28, num_words=len(words))
    vlm = checkpoint.build(config, words)
    ids = vocab.word_ids(words[-1:], vlm.tokenizer)[0]
    rows = vlm.llm.get_input_embeddings()(torch.tensor(ids))
    assert len(ids) > 1
    torch.testing.assert_close(vlm.connector.vocab_embeds[-1], rows.sum(0))
    checkpoint.save(vlm, tmp_path / "new", "pretrain", trained_parts=("connector",))
    torch.testing.assert_close(checkpoint.load(tmp_path / "new").connector.vocab_embeds[-1], rows.sum(0))
    metadata = common.read_json(tmp_path / "new" / "config.json")
    del metadata["sum_pieces"]
    common.write_json(metadata, tmp_path / "new" / "config.json")
    old = checkpoint.load(tmp_path / "new")
    torch.testing.assert_close(old.connector.vocab_embeds[-1], rows.mean(0))
    checkpoint.save(old, tmp_path / "again", "pretrain", trained_parts=("connector",))      # and it stays so
    torch.testing.assert_close(checkpoint.load(tmp_path / "again").connector.vocab_embeds[-1], rows.mean(0))


def test_nothing_of_a_connector_has_a_dimension_of_the_llm(tiny):
    vlm = make(tiny, llm="llama")
    D = vlm.llm.config.hidden_size
    assert vlm.connector.state_dict().keys() == {"mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias",
                                                 "to_scores.weight", "to_scores.bias"}
    assert all(D not in t.shape for t in vlm.connector.state_dict().values())


def test_order_of_the_words_does_not_matter_if_w_and_e_move_together():
    torch.manual_seed(0)
    z, W, b, E = torch.randn(5, 8), torch.randn(11, 8), torch.randn(11), torch.randn(11, 6)
    order = torch.randperm(11)
    for normalize in ("softmax", "none"):
        out = model.combine(z, W, b, E, normalize)
        torch.testing.assert_close(model.combine(z, W[order], b[order], E[order], normalize), out)
        assert not torch.allclose(model.combine(z, W, b, E[order], normalize), out)


def test_two_models_in_one_process_keep_their_own_embeddings(tiny):
    one, two = make(tiny, "qwen"), make(tiny, "llama")
    assert one.connector.vocab_embeds.shape[1] == 44 and two.connector.vocab_embeds.shape[1] == 52
    assert not one.connector.vocab_embeds.requires_grad


@pytest.mark.parametrize("connector", ["langbridge", "mlp"])
@pytest.mark.parametrize("with_llm", [False, True])
def test_checkpoint_round_trip(tiny, tmp_path, connector, with_llm):
    vlm = make(tiny, connector=connector)
    batch = data.collate(samples(vlm.tokenizer), pad_id=0)
    if with_llm:                                                    # after SFT the LLM's embeddings have moved, E has not
        torch.nn.init.normal_(vlm.llm.get_input_embeddings().weight)
    checkpoint.save(vlm, str(tmp_path / "ck"), "sft" if with_llm else "pretrain", ("connector", "llm")[:1 + with_llm])
    again = checkpoint.load(str(tmp_path / "ck"))
    assert torch.equal(again(batch)[0], vlm(batch)[0])
    assert again.config == dataclasses.replace(vlm.config, vision_tower=again.config.vision_tower, llm=again.config.llm)
    assert str(tmp_path) not in (tmp_path / "ck" / "config.json").read_text()


def test_a_trained_tower_is_saved_loaded_moved_and_saved_again(tiny, tmp_path):
    """Also by a later stage that does not train it, and by a transfer."""
    import transfer
    vlm = make(tiny)
    batch = data.collate(samples(vlm.tokenizer), pad_id=0)
    for p in vlm.vision_tower.parameters():
        torch.nn.init.normal_(p, std=0.1)
    checkpoint.save(vlm, str(tmp_path / "one"), "sft", ("connector", "llm", "vision_tower"))
    again = checkpoint.load(str(tmp_path / "one"))
    assert torch.equal(again(batch)[0], vlm(batch)[0]) and again.own_parts == {"llm", "vision_tower"}
    checkpoint.save(again, str(tmp_path / "two"), "sft", ("connector",))
    assert torch.equal(checkpoint.load(str(tmp_path / "two"))(batch)[0], vlm(batch)[0])
    moved = transfer.move(str(tmp_path / "two"), tiny.llama, "cpu", torch.float32)
    pixels = batch["pixel_values"]
    assert torch.equal(moved.patch_features(pixels), vlm.patch_features(pixels)) and moved.own_parts == {"vision_tower"}


def test_a_connector_of_before_the_second_edition_loads(tiny, tmp_path):
    vlm, path = make(tiny), str(tmp_path / "ck" / "connector.safetensors")
    checkpoint.save(vlm, str(tmp_path / "ck"), "pretrain", ("connector",))
    tensors = read_safetensors(path)
    assert "to_scores.weight" in tensors
    write_safetensors({name.replace("to_scores.", "words."): t for name, t in tensors.items()}, path)
    again = checkpoint.load(str(tmp_path / "ck"))
    assert torch.equal(again.connector.to_scores.weight, vlm.connector.to_scores.weight)


def test_another_normalisation_is_one_formula(tiny, monkeypatch):
    """A reader's normalisation that fused.py does not know goes through the plain formula, with gradients."""
    monkeypatch.setattr(model, "word_weights", lambda scores, normalize: scores.relu())
    vlm = make(tiny, normalize="relu")
    vlm.connector.requires_grad_(True)
    vlm(data.collate(samples(vlm.tokenizer), pad_id=0))[0].backward()
    assert vlm.connector.to_scores.weight.grad.abs().sum() > 0


def test_a_name_without_a_formula_is_no_softmax(tiny):
    for call in (lambda: make(tiny, normalize="relu"), lambda: model.word_weights(torch.zeros(1, 2), "relu")):
        with pytest.raises(ValueError, match="'relu', and model.word_weights has no such formula"):
            call()


def test_a_checkpoint_over_another_leaves_none_of_its_llm(tiny, tmp_path):
    checkpoint.save(make(tiny, llm="qwen"), str(tmp_path / "ck"), "sft", ("connector", "llm"))
    moved = make(tiny, llm="llama")
    checkpoint.save(moved, str(tmp_path / "ck"), "transfer", ("connector",))
    again = checkpoint.load(str(tmp_path / "ck"))
    assert type(again.llm) is type(moved.llm) and torch.equal(again.connector.vocab_embeds, moved.connector.vocab_embeds)


def test_loading_refuses_another_llm_and_another_word_list(tiny, tmp_path):
    vlm = make(tiny)
    folder = tmp_path / "ck"
    checkpoint.save(vlm, str(folder), "pretrain", ("connector",))
    words = (folder / "words.json").read_text()
    (folder / "words.json").write_text(words.replace('"a"', '"zzz"', 1))
    with pytest.raises(ValueError, match="words.json"):
        checkpoint.load(str(folder))
    (folder / "words.json").write_text(words)
    torch.nn.init.normal_(vlm.llm.get_input_embeddings().weight)
    vlm.llm.save_pretrained(tmp_path / "other")
    vlm.tokenizer.save_pretrained(tmp_path / "other")
    config = (folder / "config.json").read_text()
    import os
    (folder / "config.json").write_text(config.replace(os.path.relpath(tiny.qwen, folder), "../other"))
    with pytest.raises(ValueError, match="another LLM"):
        checkpoint.load(str(folder))


def test_frozen_parts_get_no_gradient(tiny):
    vlm = make(tiny)
    vlm.connector.requires_grad_(True)
    vlm(data.collate(samples(vlm.tokenizer), pad_id=0))[0].backward()
    assert all(p.grad is None for p in [*vlm.llm.parameters(), *vlm.vision_tower.parameters()])
    assert all(p.grad is not None for p in vlm.connector.parameters())


def test_raw_scores_are_linear_in_z_and_softmax_weights_sum_to_one(tiny):
    vlm, raw = make(tiny, normalize="softmax"), make(tiny, normalize="none")
    patches = torch.randn(2, 3, 32)
    torch.testing.assert_close(vlm.connector.weights(patches).sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(raw.connector.weights(patches) @ raw.connector.vocab_embeds, raw.connector(patches))
    scores = torch.randn(3, 11)
    torch.testing.assert_close(model.word_weights(2 * scores, "none"), 2 * model.word_weights(scores, "none"))


def test_pictures_move_to_the_tower_whoever_hands_them_in(tiny):
    """A tower on another device (meta stands for a GPU) takes pictures of the CPU, as evaluation has them."""
    vlm = make(tiny, connector="mlp")                                # autocast knows no meta device
    vlm.vision_tower.to("meta")
    vlm.connector.to("meta")
    pixels = torch.zeros(2, 3, 24, 24)
    assert vlm.patch_features(pixels).device.type == "meta" and vlm.encode(pixels).device.type == "meta"
    vlm.llm.to("meta")
    assert vlm.splice(torch.zeros(1, 4, dtype=torch.int64), None).device.type == "meta"
