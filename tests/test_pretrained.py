"""Models of other people: what is tried of them before they are used, the sentence for one that does not fit, and that
what is saved can be loaded. One row a model. Alone: python -m pytest tests/test_pretrained.py"""
import json
import shutil

import pytest
import torch
import transformers

import checkpoint
import conversation
import data
import model
import train
from conftest import PROCESSOR
from generate import generate
from test_model import make, sample, turns
from tools import memory
from support import pictures, pretrained

P = 9
V = 500
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
VIT = dict(**SIZES, image_size=24, patch_size=8)
KV = dict(**SIZES, vocab_size=V, num_key_value_heads=1, pad_token_id=0, bos_token_id=None, eos_token_id=2)
H16 = dict(**KV, head_dim=16)
EYES = dict(**SIZES, image_size=28, patch_size=14)


def write(folder, kind, tokenizer_of=None, **sizes):
    """Save a random model of transformers' class `kind`, large enough in its numbers that a softcap shows."""
    torch.manual_seed(0)
    made = getattr(transformers, kind)
    made = made(made.config_class(**sizes))
    for p in made.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3)
    made.save_pretrained(folder)
    if tokenizer_of:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(f"{tokenizer_of}/{name}", folder)
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return str(folder)


def build(tiny, **parts):
    names = {"vision_tower": tiny.clip, "llm": tiny.qwen} | parts
    return checkpoint.build(model.Config(**names, connector="mlp", hidden=24, num_words=0), None)


def dry_run(tiny, **parts):
    names = {"vision_tower": tiny.clip, "llm": tiny.qwen} | parts
    return memory.meta_model(train.Settings(**names, connector="mlp", hidden=24), ("connector",))


def batch_of(vlm, question="what is this?"):
    return data.collate([sample(vlm.tokenizer, turns(question, "a red circle!"), question.count("<image>"))], pad_id=0)


# ----------------------------------------------------------------------------------------------------------------------
# towers

NO_ROW = "gives no row of patch vectors"
TOWERS = {  # name: (class, sizes, words of the refusal; None: it fits)
    "vit": ("ViTModel", VIT, None),
    "vit, sizes as lists": ("ViTModel", {**VIT, "image_size": [24, 24], "patch_size": [8, 8]}, None),
    "deit, two extra tokens": ("DeiTModel", VIT, None),
    "dinov2, registers": ("Dinov2WithRegistersModel", VIT, None),
    "dinov3": ("DINOv3ViTModel", VIT, None),
    "beit": ("BeitModel", VIT, None),
    "i-jepa, no extra token": ("IJepaModel", VIT, None),
    "clip, both halves": ("CLIPModel", dict(vision_config=VIT, text_config=dict(**SIZES, vocab_size=99)), None),
    "siglip2 naflex": ("Siglip2VisionModel", dict(**SIZES, patch_size=8, num_patches=9), NO_ROW),
    "pixtral, all images in one row": ("PixtralVisionModel", dict(**VIT, head_dim=16), NO_ROW),
    "internvl, sizes as lists": ("InternVLVisionModel", {**VIT, "image_size": [24, 24], "patch_size": [8, 8]}, None),
    "convnext": ("ConvNextModel", dict(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], image_size=32), NO_ROW),
    "swin": ("SwinModel", dict(embed_dim=16, depths=[1, 1], num_heads=[2, 2], image_size=24, window_size=3), NO_ROW),
    "sam": ("SamVisionModel", dict(**SIZES, image_size=24, patch_size=8, global_attn_indexes=[1], mlp_dim=64), NO_ROW),
    "mae drops patches": ("ViTMAEModel", VIT, NO_ROW),
    "resnet": ("ResNetModel", dict(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1]), NO_ROW),
    "yolos, other rows after the patches": ("YolosModel", {**VIT, "image_size": [24, 24]}, "last row is not that of the last patch"),
    "an oblong": ("ViTModel", {**VIT, "image_size": [24, 32]}, NO_ROW),
    "an llm": ("LlamaModel", dict(**SIZES, vocab_size=V), NO_ROW),
}


@pytest.mark.parametrize("name", TOWERS)
def test_towers(name, tiny, tmp_path):
    """In training and in the dry run: the same width, or the same sentence"""
    kind, sizes, words = TOWERS[name]
    folder = write(tmp_path / "tower", kind, **sizes)
    if words is None:
        vlm, (dry, _) = build(tiny, vision_tower=folder), dry_run(tiny, vision_tower=folder)
        assert vlm.num_patches == P and vlm.encode(torch.zeros(2, 3, 24, 24)).shape == (2, P, 44)
        assert dry.connector.mlp[0].weight.shape == vlm.connector.mlp[0].weight.shape
        return
    for attempt in (build, dry_run)[:1 if "last row" in words else 2]:      # rows are not compared without weights
        with pytest.raises(ValueError, match=words):
            attempt(tiny, vision_tower=folder)


def test_a_tower_with_sizes_as_lists_is_saved_as_it_was(tiny, tmp_path):
    kind, sizes, _ = TOWERS["internvl, sizes as lists"]
    vlm = build(tiny, vision_tower=write(tmp_path / "tower", kind, **sizes))
    checkpoint.save(vlm, str(tmp_path / "out"), "sft_tower", ("connector", "vision_tower"))
    pixels = torch.rand(2, 3, 24, 24)
    assert torch.equal(checkpoint.load(str(tmp_path / "out")).encode(pixels), vlm.encode(pixels))


def test_a_pool_that_does_not_divide_is_refused_by_the_dry_run(tiny):
    cfg = train.Settings(llm=tiny.qwen, vision_tower=tiny.clip, connector="mlp", hidden=24, pool=2)
    for attempt in (lambda: memory.print_estimate(cfg),
                    lambda: checkpoint.build(model.Config(tiny.clip, tiny.qwen, "mlp", 24, 0, pool=2), None)):
        with pytest.raises(ValueError, match="3 x 3 patches of 8 pixels, which pool 2 does not divide"):
            attempt()


THIRD = [0.25, 0.5, 0.75]
PREPROCESSORS = {  # name: (entries, what (200 / 255) must become in the first channel, or words of the refusal)
    "as usual": ({"image_mean": THIRD, "image_std": THIRD}, (200 / 255 - 0.25) / 0.25),
    "do_rescale as usual": ({"image_mean": THIRD, "image_std": THIRD, "do_rescale": True, "rescale_factor": 1 / 255},
                            (200 / 255 - 0.25) / 0.25),
    "not rescaled": ({"image_mean": [100, 100, 100], "image_std": [50, 50, 50], "do_rescale": False}, 2.0),
    "to [0, 2]": ({"image_mean": THIRD, "image_std": THIRD, "rescale_factor": 2 / 255}, (400 / 255 - 0.25) / 0.25),
    "not normalised": ({"image_mean": THIRD, "image_std": THIRD, "do_normalize": False}, 200 / 255),
    "neither": ({"image_mean": None, "image_std": None, "do_normalize": False, "do_rescale": False}, 200.0),
    "one number": ({"image_mean": 0.5, "image_std": 0.5}, (200 / 255 - 0.5) / 0.5),
    "null mean": ({"image_mean": None, "image_std": THIRD}, "image_mean .* is None; three numbers"),
    "no std": ({"image_mean": THIRD}, "image_std .* is None; three numbers"),
    "a std of 0": ({"image_mean": THIRD, "image_std": [0, 1, 1]}, "a std above 0"),
    "one channel": ({"image_mean": [0.5], "image_std": [0.5]}, "three numbers"),
    "BGR": ({"image_mean": THIRD, "image_std": THIRD, "do_flip_channel_order": True}, "asks for do_flip_channel_order"),
}


@pytest.mark.parametrize("name", PREPROCESSORS)
def test_preprocessors(name, tiny, tmp_path):
    entries, wanted = PREPROCESSORS[name]
    shutil.copytree(tiny.clip, tmp_path / "tower")
    (tmp_path / "tower" / "preprocessor_config.json").write_text(json.dumps(entries))
    if isinstance(wanted, str):
        for attempt in (build, dry_run):
            with pytest.raises(ValueError, match=wanted):
                attempt(tiny, vision_tower=str(tmp_path / "tower"))
        return
    from PIL import Image
    vlm = build(tiny, vision_tower=str(tmp_path / "tower"))
    dry_run(tiny, vision_tower=str(tmp_path / "tower"))
    pixels = pictures.transform(Image.new("RGB", (24, 24), (200, 200, 200)), mode="crop", **vlm.image_settings)
    assert float(pixels[0, 3, 3]) == pytest.approx(wanted, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# LLMs

SCALES = "scales or caps embeddings or logits"
LLMS = {  # name: (class, sizes, words of the refusal; None: it fits)
    "gpt2": ("GPT2LMHeadModel", dict(n_embd=32, n_layer=2, n_head=2, n_positions=64, vocab_size=V), None),
    "opt, another width inside": ("OPTForCausalLM", dict(
        hidden_size=32, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=V), None),
    "gemma2 caps logits": ("Gemma2ForCausalLM", H16, None),
    "gpt-oss has no sdpa": ("GptOssForCausalLM", dict(
        **{**H16, "intermediate_size": 32}, num_local_experts=4, num_experts_per_tok=2, sliding_window=64,
        max_position_embeddings=2048), None),
    "granite scales embeddings inside": ("GraniteForCausalLM", dict(**KV, embedding_multiplier=3.0), None),
    "gemma3, multimodal": ("Gemma3ForConditionalGeneration", dict(
        text_config=H16, vision_config=EYES, mm_tokens_per_image=4), None),
    "llava, multimodal": ("LlavaForConditionalGeneration", dict(
        text_config=dict(model_type="llama", **KV), vision_config=dict(model_type="clip_vision_model", **EYES)), None),
    "granite scales logits": ("GraniteForCausalLM", dict(**KV, logits_scaling=8.0), SCALES),
    "cohere scales logits": ("CohereForCausalLM", dict(**KV, logit_scale=0.0625), SCALES),
    "falcon-h1 scales both": ("FalconH1ForCausalLM", dict(
        **H16, max_position_embeddings=512, lm_head_multiplier=0.0390625, embedding_multiplier=5.656854, mamba_d_ssm=64,
        mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1), SCALES),
    "recurrent gemma has another cache": ("RecurrentGemmaForCausalLM", dict(**H16, lru_width=32), "LLM .* does not fit"),
    "bert has no cache": ("BertLMHeadModel", dict(**SIZES, vocab_size=V), "LLM .* does not fit"),
    "mamba remembers padding": ("MambaForCausalLM", dict(
        hidden_size=32, num_hidden_layers=2, vocab_size=V, state_size=8), "other logits with padding and a cache"),
    "gemma4 must know the ids": ("Gemma4ForCausalLM", H16, "LLM .* does not fit"),
    "t5": ("T5ForConditionalGeneration", dict(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=V),
           "no causal LM of type 't5'"),
}


@pytest.mark.parametrize("name", LLMS)
def test_llms(name, tiny, tmp_path):
    """An LLM that fits has the loss of its own forward, and what is saved of it is what was there."""
    kind, sizes, words = LLMS[name]
    folder = write(tmp_path / "llm", kind, tiny.qwen, **sizes)
    if words:
        for attempt in (build, dry_run)[:2 if "of type" in words else 1]:       # the dry run has no weights to try
            with pytest.raises(ValueError, match=words):
                attempt(tiny, llm=folder)
        return
    cfg = train.Settings(vision_tower=tiny.clip, llm=folder, connector="mlp", hidden=24, max_length=64)
    memory.memory(memory.meta_model(cfg, ("connector",))[0], cfg, cfg, P, 20, P, 1)
    vlm = build(tiny, llm=folder)
    batch = batch_of(vlm)
    loss, count = vlm(batch)
    whole = getattr(transformers, kind).from_pretrained(folder)
    own = whole(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    torch.testing.assert_close(loss / count, own, rtol=1e-4, atol=1e-4)
    checkpoint.save(vlm, str(tmp_path / "out"), "sft", ("connector", "llm"))
    again = checkpoint.load(str(tmp_path / "out"))
    assert again.llm.config._attn_implementation == vlm.llm.config._attn_implementation
    found, wanted = again.llm.state_dict(), vlm.llm.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in found)
    assert torch.equal(again(batch)[0], loss)


def test_an_llm_that_sees_later_tokens_is_refused(tiny):
    vlm = make(tiny)
    pretrained.probe_llm(vlm, torch.float32)
    for layer in vlm.llm.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(ValueError, match="lets a token see later ones"):
        pretrained.probe_llm(vlm, torch.float32)


def test_the_attention_is_stored_and_can_be_chosen(tiny, tmp_path):
    vlm = make(tiny)
    assert vlm.llm.config._attn_implementation == "sdpa"            # the library's choice
    vlm.llm.set_attn_implementation("eager")
    checkpoint.save(vlm, str(tmp_path / "ck"), "pretrain", ("connector",))
    kinds = [checkpoint.load(str(tmp_path / "ck"), attention=kind).llm.config._attn_implementation
             for kind in (None, "sdpa")]
    assert kinds == ["eager", "sdpa"]
    config = json.loads((tmp_path / "ck" / "config.json").read_text())
    (tmp_path / "ck" / "config.json").write_text(json.dumps(config | {"attention": "flash_attention_2"}))    # of a GPU
    assert checkpoint.load(str(tmp_path / "ck")).llm.config._attn_implementation == "sdpa"
    del config["attention"]                                         # a checkpoint of before
    (tmp_path / "ck" / "config.json").write_text(json.dumps(config))
    assert checkpoint.load(str(tmp_path / "ck")).llm.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_more_tokens_than_positions(tiny, tmp_path, kind):
    """Learned positions end in an IndexError otherwise, and rotary ones in silence."""
    sizes = LLMS["gpt2"][1] if kind[0] == "G" else dict(**KV, max_position_embeddings=64)
    folder = write(tmp_path / "llm", kind, tiny.qwen, **sizes)
    with pytest.raises(ValueError, match="max_length 2048 is more than the 64 positions"):
        dry_run(tiny, llm=folder)
    vlm = build(tiny, llm=folder)
    pretrained.check_length(64, vlm.llm.config, folder)
    with pytest.raises(ValueError, match="max_length 65 is more than the 64 positions"):
        pretrained.check_length(65, vlm.llm.config, folder)
    with pytest.raises(ValueError, match="tokens are more than the 64 positions"):
        vlm(batch_of(vlm, "a red circle and a blue square " * 20))
    vlm.eos_ids = set()
    prompts = [[5] * 60, [5] * 20, [5] * 64]
    answers = generate(vlm, prompts, None, 10)
    assert [len(answer) for answer in answers] == [5, 10, 1]        # the last token takes no position
    assert answers == [generate(vlm, [prompt], None, 10)[0] for prompt in prompts]


# ----------------------------------------------------------------------------------------------------------------------
# the end of an answer

def base_llm(tiny, folder):
    """tiny.qwen as a base model: its end-of-sequence token is another than the template writes after an answer."""
    shutil.copytree(tiny.qwen, folder)
    for name, entries in (("tokenizer_config.json", {"eos_token": "<|pad|>", "extra_special_tokens": ["<|im_end|>", "<|im_start|>"]}),
                          ("generation_config.json", {"eos_token_id": 0}), ("config.json", {"eos_token_id": 0})):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    return str(folder)


def test_an_answer_ends_where_the_template_ends_it(tiny, tmp_path):
    vlm = build(tiny, llm=base_llm(tiny, tmp_path / "base"))
    end = vlm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert vlm.tokenizer.eos_token_id == 0 and vlm.eos_ids == {0, end}
    torch.nn.init.zeros_(vlm.llm.lm_head.weight)
    vlm.llm.model.norm.weight.data.fill_(1)
    prompt = conversation.encode_prompt(turns("what?"), vlm.tokenizer, P)
    hidden = vlm.llm.get_decoder()(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1]
    vlm.llm.lm_head.weight.data[end] = hidden                       # it answers with the end, and then again
    assert generate(vlm, [prompt], None, 5) == [[]]
    checkpoint.save(vlm, str(tmp_path / "out"), "sft", ("connector", "llm"))
    saved = json.loads((tmp_path / "out/llm/generation_config.json").read_text())
    assert saved["eos_token_id"] == [0, end] and checkpoint.load(str(tmp_path / "out")).eos_ids == {0, end}


def test_a_generation_config_that_the_library_does_not_save_is_no_hindrance(tiny, tmp_path):
    """A changed one with a temperature and do_sample false stops save_pretrained, after all the training."""
    folder = base_llm(tiny, tmp_path / "base")
    path = tmp_path / "base" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_sample": False, "temperature": 0.6, "top_p": 0.9}))
    vlm = build(tiny, llm=folder)
    checkpoint.save(vlm, str(tmp_path / "out"), "sft", ("connector", "llm"))
    saved = json.loads((tmp_path / "out/llm/generation_config.json").read_text())
    assert saved["temperature"] == 0.6 and len(saved["eos_token_id"]) == 2


# ----------------------------------------------------------------------------------------------------------------------
# what is saved can be loaded

ADAPTER = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "x", "r": 4,
           "target_modules": ["q_proj"]}


@pytest.mark.parametrize("part, other_files", [("llm", ["tokenizer.json"]), ("llm", ["config.json", "model.safetensors"]),
                                               ("vision_tower", ["config.json"])])
def test_an_adapter_is_refused_at_the_start(tiny, tmp_path, part, other_files):
    """With nothing but the adapter in its folder, and beside a model"""
    source = tiny.qwen if part == "llm" else tiny.clip
    for name in other_files:
        shutil.copy(f"{source}/{name}", tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    for attempt in (build, dry_run):
        with pytest.raises(ValueError, match="is an adapter, not a model: merge it into its base model"):
            attempt(tiny, **{part: str(tmp_path)})


@pytest.mark.parametrize("part", ["llm", "vision_tower"])
def test_saved_is_said_after_it_was_loaded(tiny, tmp_path, monkeypatch, part):
    """Tensors under names that the model does not know, as those of a LoRA that was not merged"""
    vlm = make(tiny)
    stored = checkpoint.sharding.stored_tensors
    monkeypatch.setattr(checkpoint.sharding, "stored_tensors", lambda model: {
        name.replace("q_proj.", "q_proj.base_layer."): tensor for name, tensor in stored(model).items()})
    with pytest.raises(ValueError, match=f"{part} has no weights for .*q_proj"):
        checkpoint.save(vlm, str(tmp_path / "ck"), "sft", ("connector", part))


def test_an_llm_with_lora_is_saved_merged(tiny, tmp_path):
    peft = pytest.importorskip("peft")
    vlm = make(tiny)
    vlm.llm = peft.get_peft_model(vlm.llm, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    batch = batch_of(vlm, "<image>\nwhat?")
    checkpoint.save(vlm, str(tmp_path / "ck"), "sft", ("connector", "llm"))
    torch.testing.assert_close(checkpoint.load(str(tmp_path / "ck"))(batch)[0], vlm(batch)[0])
    assert any(p.requires_grad for p in vlm.llm.parameters())       # the model in training is as it was
