"""Samples in one row, setting pack: nothing that a sample learns changes, and no token of padding is left."""
import pytest
import torch
import transformers.masking_utils

import checkpoint
import conversation
import data
import model
from conftest import settings, train_here
from support.pretrained import check_packing
from test_train import losses

TURNS = [("a red circle", True), ("is it green? no", False), ("a blue square on the left of a star", True), ("red", True)]


def build(tiny, llm, attention=None):
    torch.manual_seed(3)
    vlm = checkpoint.build(model.Config(tiny.clip, getattr(tiny, llm), "mlp", 0, 0), None, attention=attention)
    return vlm.requires_grad_(True)


def make_samples(vlm):
    """Four samples of other lengths, one of them without a picture."""
    samples = []
    for i, (answer, has_image) in enumerate(TURNS):
        turns = [{"role": "user", "content": "<image>\nwhat?" * has_image or "what?"}, {"role": "assistant", "content": answer}]
        ids, labels = conversation.encode(turns, vlm.tokenizer, vlm.num_patches)
        samples.append({"id": str(i), "input_ids": torch.tensor(ids), "labels": torch.tensor(labels),
                        "images": torch.randn(int(has_image), 3, 24, 24)})
    return samples


def gradients(vlm):
    found = {name: p.grad.clone() for name, p in vlm.named_parameters() if p.grad is not None}
    vlm.zero_grad()
    return found


def test_a_row_holds_one_sample_after_another(tiny):
    samples = make_samples(build(tiny, "qwen"))
    lengths = [len(s["input_ids"]) for s in samples]
    samples[1]["labels"][0] = 7                             # the sample before it must not learn to predict this
    batch = data.collate([samples[0], data.BadSample("malformed", "no"), *samples[1:]], 9, pad_to=8, pack=True)
    T = sum(lengths)
    assert batch["input_ids"].shape == (1, -(-T // 8) * 8) and batch["ids"] == list("0123") and batch["bad"] == ["no"]
    assert batch["input_ids"][0, :T].tolist() == sum([s["input_ids"].tolist() for s in samples], [])
    assert batch["input_ids"][0, T:].eq(9).all() and batch["attention_mask"].sum() == T
    assert batch["position_ids"][0, :T].tolist() == [i for n in lengths for i in range(n)]
    assert batch["position_ids"].max() == max(lengths) - 1 and batch["labels"][0, lengths[0]] == conversation.IGNORE
    assert len(batch["pixel_values"]) == 3 and len(data.collate([], 9, 8, pack=True)["input_ids"]) == 0


@pytest.mark.parametrize("llm, attention", [("qwen", "sdpa"), ("qwen", "eager"), ("llama", None), ("gemma", None)])
def test_loss_and_gradients_are_those_of_each_sample_alone(tiny, llm, attention):
    vlm = build(tiny, llm, attention)
    samples, number = make_samples(vlm), 0
    total = 0.0
    for sample in samples:
        loss, count = vlm(data.collate([sample], vlm.pad_id))
        loss.backward()
        total, number = total + loss.item(), number + count
    alone = gradients(vlm)
    check_packing(vlm, torch.float32)
    for pad_to in (1, 64):
        loss, count = vlm(data.collate(samples, vlm.pad_id, pad_to, pack=True))
        loss.backward()
        assert count == number and loss.item() == pytest.approx(total, rel=1e-6)
        packed = gradients(vlm)
        assert packed.keys() == alone.keys()
        for name, gradient in packed.items():
            torch.testing.assert_close(gradient, alone[name], atol=1e-4, rtol=1e-3)


def test_an_llm_that_looks_into_the_sample_before_is_refused(tiny, monkeypatch):
    vlm = build(tiny, "qwen")
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(ValueError, match="lets a sample see the one before it in its row: set pack to False"):
        check_packing(vlm, torch.float32)


def test_a_run_learns_the_same(tiny, world, tmp_path, capsys):
    more = ["--stage=sft", "--template=chat", f"--data={world}/chats.json", "--group", "--llm_lr=1e-3", "--max_steps=6"]
    for name, flags in (("rows", []), ("packed", ["--pack"]), ("small", ["--pack", "--batch_size=2"])):
        assert train_here(settings(tiny, world, tmp_path / name, *more, *flags)) == 0
    assert "blind" in capsys.readouterr().out.split("wrote")[0]
    for name in ("packed", "small"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "rows"), rel=2e-4)
    assert losses(tmp_path / "packed")[0] == pytest.approx(losses(tmp_path / "rows")[0], rel=1e-6)


def test_the_words_loss_needs_samples_apart(tiny, world, tmp_path):
    with pytest.raises(ValueError, match="pack puts samples into one row, and the words loss needs them apart"):
        train_here(settings(tiny, world, tmp_path, "--pack", "--words_loss=0.1"))


def test_the_words_stage_has_no_steps_of_text_alone(tiny, world, tmp_path):
    with pytest.raises(ValueError, match="group makes steps of text alone, .*: set group to False"):
        train_here(settings(tiny, world, tmp_path, "--group", "--stage=words"))
