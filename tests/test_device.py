"""
The parts of the project on the device that DEVICE names, by default the CPU:

    DEVICE=cuda python -m pytest -q tests/test_device.py tests/test_combine.py

The references are float64 on the CPU and loops without a cache, so the tests say something on a CPU, too.
"""
import copy

import pytest
import torch

import checkpoint
import data
import model
import vocab
import words
from conftest import DEVICE
from conversation import encode, encode_prompt
from generate import generate

P = 9                               # patches of an image of 24 pixels


@pytest.fixture(scope="module", params=["langbridge", "mlp"])
def vlm(tiny, world, request):
    shared = vocab.load_words(f"{world}/words.json") if request.param == "langbridge" else None
    config = model.Config(vision_tower=tiny.clip, llm=tiny.qwen, connector=request.param, hidden=24,
                          num_words=len(shared or ()))
    torch.manual_seed(1)
    vlm = checkpoint.build(config, shared, DEVICE)
    if shared:
        vlm.connector.to_scores.weight.data.mul_(3)
    vlm.connector.requires_grad_(True)
    return vlm


def batch_of(vlm, pad_to=1):
    """Three samples of other lengths: with one image, with two, and of text alone."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for question, answer, images in (("<image>\nwhat is this?", "a red circle", 1), ("Is there a star?", "no", 0),
                                     ("<image> <image>\ntwo?", "yes, two small stars", 2)):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids, labels = encode(messages, vlm.tokenizer, P)
        samples.append({"id": question, "input_ids": torch.tensor(ids), "labels": torch.tensor(labels),
                        "images": torch.randn(images, 3, 24, 24, generator=generator)})
    return data.collate(samples, vlm.pad_id, pad_to)


def to(batch, device):
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}


def loss_and_gradients(vlm, batch):
    vlm.zero_grad()
    loss, count = vlm(batch)
    loss.backward()
    gradients = {name: p.grad.cpu().double() for name, p in vlm.connector.named_parameters()}
    return loss.item() / count, gradients


def in_float64(vlm):
    exact = copy.deepcopy(vlm).cpu().double()
    exact.logits = lambda hidden: exact.llm.get_output_embeddings()(hidden)
    return exact


@pytest.mark.parametrize("pad_to", [1, 64])
def test_loss_and_gradients_are_those_of_float64_on_the_cpu(vlm, pad_to):
    """Also with lengths that are rounded up, as on CUDA."""
    batch = batch_of(vlm, pad_to)
    assert batch["input_ids"].shape[1] % pad_to == 0
    loss, gradients = loss_and_gradients(vlm, to(batch, DEVICE))
    exact_loss, exact_gradients = loss_and_gradients(in_float64(vlm), batch_of(vlm))
    assert loss == pytest.approx(exact_loss, rel=1e-5)
    for name, gradient in gradients.items():
        scale = exact_gradients[name].abs().max()
        assert (gradient - exact_gradients[name]).abs().max() < 1e-4 * scale, name


def test_answers_are_those_of_a_loop_without_a_cache(vlm):
    """Three prompts of other lengths, pictures on the CPU: the loop computes all tokens anew, in float64."""
    texts = ["<image>\nwhat is this?", "Is there a star?", "<image>\nwhat colour is the big circle?"]
    prompts = [encode_prompt([{"role": "user", "content": text}], vlm.tokenizer, P) for text in texts]
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(3))
    answers = generate(vlm, prompts, pixels, max_new_tokens=6)
    exact, expected = in_float64(vlm), []
    for prompt, image in zip(prompts, (pixels[:1], None, pixels[1:])):
        ids = list(prompt)
        while len(ids) < len(prompt) + 6:
            with torch.no_grad():
                embeds = exact.splice(torch.tensor([ids]), image)
                hidden = exact.llm.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, -1]
                token = exact.logits(hidden).argmax().item()
            if token in vlm.eos_ids:
                break
            ids.append(token)
        expected.append(ids[len(prompt):])
    assert answers == expected and sum(map(len, answers)) > 6


def test_a_checkpoint_comes_back_with_the_same_bits(vlm, tmp_path):
    checkpoint.save(vlm, str(tmp_path), "pretrain", ("connector",))
    again = checkpoint.load(str(tmp_path), DEVICE)
    for (name, a), (_, b) in zip(vlm.state_dict().items(), again.state_dict().items(), strict=True):
        assert a.device == b.device and torch.equal(a, b), name
    if vlm.words:
        assert torch.equal(vlm.connector.vocab_embeds, again.connector.vocab_embeds)


def test_what_people_read_is_on_the_cpu(vlm):
    modes = words.read(vlm, torch.randn(3, 24, 24))
    tensors = [value for mode in modes.values() for value in mode.values() if torch.is_tensor(value)]
    assert tensors and all(t.device.type == "cpu" and t.isfinite().all() for t in tensors)


def test_precision_follows_the_dtype(tiny):
    """TF32 only beside bfloat16, and no sum over words in less than float32."""
    config = model.Config(vision_tower=tiny.clip, llm=tiny.qwen, connector="mlp", hidden=8)
    for dtype, tf32 in ((torch.bfloat16, True), (torch.float32, False)):
        checkpoint.build(config, None, DEVICE, dtype)
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
