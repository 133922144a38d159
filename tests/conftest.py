"""Tiny random models and tokenizers in Hugging Face folders, made once for all tests: no network, no GPU."""
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model, Gemma3ForCausalLM,
                          Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config,
                          Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ["HF_HUB_OFFLINE"] = "1"              # for warm.py; transformers above was imported without it, as most users do
import warm  # noqa: E402
DEVICE = os.environ.get("DEVICE", "cpu")        # of test_device.py and test_combine.py
TEXT = ["a red circle and a blue square on the left of a green star", "what colour is the big circle? red!",
        "there are two small triangles above the word cat", "Is there a star in the image? yes, no"] * 4
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA3 = ("<|bos|>{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
          "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}")


def byte_level(folder, size=400):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                    special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"]))
    PreTrainedTokenizerFast(tokenizer_object=t, pad_token="<|pad|>", eos_token="<|im_end|>", chat_template=CHATML,
                            extra_special_tokens=["<|im_start|>"]).save_pretrained(folder)


def sentencepiece(folder, size=460):
    t = Tokenizer(models.BPE(byte_fallback=True))
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    t.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<|pad|>", "<|bos|>", "<|header|>", "<|/header|>", "<|eot|>"]
    t.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=size, special_tokens=special + [f"<0x{i:02X}>" for i in range(256)]))
    spec = json.loads(t.to_str())                                   # the byte tokens are ordinary ones
    spec["added_tokens"] = [a for a in spec["added_tokens"] if a["content"] in special]
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), pad_token="<|pad|>", bos_token="<|bos|>",
                            eos_token="<|eot|>", chat_template=LLAMA3,
                            extra_special_tokens=["<|header|>", "<|/header|>"]).save_pretrained(folder)


PROCESSOR = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folders of tiny random models. D of each LLM differs and none is a width of anything else."""
    root = tmp_path_factory.mktemp("tiny")
    f = types.SimpleNamespace(**{name: str(root / name) for name in ("clip", "dino", "siglip", "qwen", "llama", "gemma")})
    byte_level(f.qwen)
    sentencepiece(f.llama)
    sentencepiece(f.gemma)
    torch.manual_seed(0)
    vit = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=24, patch_size=8)
    lm = dict(intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
              initializer_range=0.2, vocab_size=500, bos_token_id=None)
    models_ = {f.clip: CLIPVisionModel(CLIPVisionConfig(**vit)), f.dino: Dinov2Model(Dinov2Config(**vit, mlp_ratio=2)),
               f.siglip: SiglipVisionModel(SiglipVisionConfig(**vit)),
               f.qwen: Qwen2ForCausalLM(Qwen2Config(**lm, hidden_size=44, eos_token_id=2, pad_token_id=0)),
               f.llama: LlamaForCausalLM(LlamaConfig(**lm, hidden_size=52, eos_token_id=4, pad_token_id=0)),
               f.gemma: Gemma3ForCausalLM(Gemma3TextConfig(**lm, hidden_size=36, head_dim=18, eos_token_id=4, pad_token_id=0,
                                                           sliding_window=16))}
    for folder, m in models_.items():
        m.eval().save_pretrained(folder)
    for folder in (f.clip, f.dino, f.siglip):
        with open(f"{folder}/preprocessor_config.json", "w") as file:
            json.dump(PROCESSOR, file)
    return f


def run(*command, check=True, env=None, fresh=False):
    """A command of the README in a process of its own; `fresh`: one that has imported nothing yet, see warm.py.
    -> CompletedProcess with the output as text"""
    command = [str(word) for word in command]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    if fresh:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env=env)
    else:
        done = warm.run(command, env)
    assert not check or done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="session")
def world(tiny, tmp_path_factory):
    """40 records of plain coloured pictures in LLaVA format, one in five text-only, and the shared words: a folder."""
    import vocab
    from PIL import Image
    from transformers import AutoTokenizer
    root = tmp_path_factory.mktemp("world")
    (root / "images").mkdir()
    colours, captions, chats = ["red", "green", "blue", "white"], [], []
    for i in range(40):
        colour = colours[i % 4]
        Image.new("RGB", (24, 24), colour).save(root / "images" / f"{i}.png")
        captions.append({"id": f"c{i}", "image": f"{i}.png", "conversations": [
            {"from": "human", "value": "<image>\nwhat is this?"}, {"from": "gpt", "value": f"a {colour} square"}]})
        image = {"image": f"{i}.png"} if i % 5 else {}
        chats.append({"id": f"s{i}", **image, "conversations": [
            {"from": "human", "value": ("<image>\n" if image else "") + "what colour is it?"}, {"from": "gpt", "value": colour},
            {"from": "human", "value": "Is there a star?"}, {"from": "gpt", "value": "no" if i % 3 else "yes, two small stars"}]})
    (root / "captions.json").write_text(json.dumps(captions))
    (root / "chats.json").write_text(json.dumps(chats))
    tokenizers = [AutoTokenizer.from_pretrained(name) for name in (tiny.qwen, tiny.llama)]
    vocab.save_words(sorted(vocab.shared_words(tokenizers)), str(root / "words.json"))
    return root


@pytest.fixture(scope="session")
def pocket_worlds(tmp_path_factory):
    """Two tiny pocket worlds of the same seed, made side by side: a list of two folders."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:     # the processes of pytest -n share this folder, and the worlds
        root = root.parent
    folders = [root / "pocket" / name for name in ("a", "b")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with FileLock(root / "pocket.lock"):
        jobs = [subprocess.Popen([sys.executable, "pocket.py", "--tiny", "--out", str(folder)], cwd=ROOT, env=env,
                                 text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for folder in folders]
        for job in jobs:                        # the second process finds them complete
            text, _ = job.communicate()
            assert job.returncode == 0, text
    return folders


def settings(tiny, world, out, *more):
    """Arguments of train.py for a run of seconds."""
    parts = [f"--llm={tiny.qwen}", f"--vision_tower={tiny.clip}", f"--words={world}/words.json"]
    return [*(parts if not any(flag.startswith("--init") for flag in more) else ()),
            f"--images={world}/images", f"--data={world}/captions.json", f"--out={out}", "--hidden=24", "--dtype=float32",
            "--workers=0", "--global_batch=8", "--batch_size=8", "--epochs=2", "--connector_lr=0.01", "--device=cpu", *more]


def train_here(argv):
    """train.py in this process. -> its exit status. ValueError for what a user can mend"""
    import train
    cfg = train.read_settings(argv)
    train.check(cfg)
    with pytest.raises(SystemExit) as stop:
        train.main(cfg)
    return stop.value.code
