"""Files of other projects with random weights, in their layouts: our logits against an independent computation."""
import contextlib
import copy
import io
import json
import os
import pickle
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import (AutoConfig, AutoModelForCausalLM, AutoTokenizer, CLIPVisionConfig, CLIPVisionModel,
                          SiglipVisionModel)
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaNextConfig, LlavaNextForConditionalGeneration

import checkpoint
import vocab
from conftest import run
from conversation import IMAGE_ID
from tools import import_official

TOOL = "tools/import_official.py"
H, DV, P = 24, 32, 9                # the width is that of no LLM; 24 pixels, patches of 8
IDS = [7, 9, 11, IMAGE_ID, 20, 21, 22, 23]


def random_tensors(**shapes):
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def projector(K=None, D=None, H=H, dtype=torch.bfloat16):
    """The tensors of mm_projector.bin: six of a LangBridge, or four of an MLP of the width D."""
    last = {"3.weight": (K, H), "3.bias": (K,)} if K else {}
    first, second = (H, H) if K else (D, D)
    found = random_tensors(**{"0.weight": (first, DV), "0.bias": (first,), "2.weight": (second, first),
                              "2.bias": (second,), **last})
    return {f"model.mm_projector.{name}": t.to(dtype) for name, t in found.items()}


def trained_copy(folder, scale=0.01):
    """A model of the folder whose weights have moved a little, as after stage 2."""
    torch.manual_seed(5)
    make = AutoModelForCausalLM if "qwen" in folder or "llama" in folder else CLIPVisionModel
    model = make.from_pretrained(folder)
    with torch.no_grad():
        for p in model.parameters():
            p += scale * torch.randn_like(p)
    return model


def patches_of(tower, pixels):
    return tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]


def logits_of(llm, image_embeds):
    """The logits of IDS with image embeds [1, P, D] in the place of IMAGE_ID, by inputs_embeds."""
    embed = llm.get_input_embeddings()
    at = IDS.index(IMAGE_ID)
    before, after = embed(torch.tensor([IDS[:at]])), embed(torch.tensor([IDS[at + 1:]]))
    return llm(inputs_embeds=torch.cat([before, image_embeds, after], 1)).logits


def our_logits(folder, pixels):
    vlm = checkpoint.load(str(folder))
    at = IDS.index(IMAGE_ID)
    ids = torch.tensor([IDS[:at] + [IMAGE_ID] * P + IDS[at + 1:]])
    return vlm.llm(inputs_embeds=vlm.splice(ids, pixels)).logits


def llava_names(llm, connector, tower=None, newline=None):
    """A full checkpoint's tensors as LLaVA-1.5, LLaVA-NeXT and LangBridge name them."""
    tensors = {**llm.state_dict(), **connector, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    if tower:
        tensors |= {f"model.vision_tower.vision_tower.vision_model.{name}": t for name, t in tower.state_dict().items()}
    if newline is not None:
        tensors["model.image_newline"] = newline
    return tensors


def save_shards(tensors, folder, kind, config):
    """Two shards, as the library writes them: names in any order, an index that we need not read."""
    os.makedirs(folder, exist_ok=True)
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2]), 1):
        shard = {name: tensors[name].clone() for name in part}
        if kind == "bin":
            torch.save(shard, f"{folder}/pytorch_model-0000{i}-of-00002.bin")
        else:
            save_file(shard, f"{folder}/model-0000{i}-of-00002.safetensors")
    with open(f"{folder}/training_args.bin", "wb") as file:            # a pickle that is no weights: not read
        pickle.dump(os.getcwd, file)
    with open(f"{folder}/config.json", "w") as file:
        json.dump(config, file)


def import_here(*arguments):
    """The tool in this process: a process of its own costs ten seconds. -> what it prints"""
    text = io.StringIO()
    with mock.patch.object(sys, "argv", [TOOL, *map(str, arguments)]), contextlib.redirect_stdout(text):
        import_official.main(import_official.read_arguments())
    return text.getvalue()


def import_it(source, tiny, world, out, *more, llm=None):
    return import_here(source, "--llm", llm or tiny.qwen, "--words", f"{world}/words.json", "--vision_tower", tiny.clip,
                       "--out", out, *more)


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def words(world):
    return vocab.load_words(f"{world}/words.json")


@torch.no_grad()
def langbridge_embeds(tensors, tower, base, words, pixels):
    """The release's forward pass, written down once more: raw scores in float32 times E."""
    t = {name.split("mm_projector.")[1]: tensor.float() for name, tensor in tensors.items() if "mm_projector" in name}
    z = F.linear(F.gelu(F.linear(patches_of(tower, pixels), t["0.weight"], t["0.bias"])), t["2.weight"], t["2.bias"])
    tokenizer = AutoTokenizer.from_pretrained(base.config.name_or_path)
    ids = [i for i, in vocab.word_ids(words, tokenizer)]
    return F.linear(z, t["3.weight"], t["3.bias"]) @ base.get_input_embeddings().weight[ids]


@pytest.fixture(scope="module")
def released(tiny, world, words, tmp_path_factory):
    """mm_projector.bin of stage 1 and what the tool made of it."""
    root = tmp_path_factory.mktemp("released")
    tensors = projector(len(words))
    torch.save(tensors, root / "mm_projector.bin")
    base = AutoModelForCausalLM.from_pretrained(tiny.qwen)
    ids = [i for i, in vocab.word_ids(words, AutoTokenizer.from_pretrained(tiny.qwen))]
    torch.save(base.get_input_embeddings().weight[ids], root / "E.pt")      # as the release saves it: it wants a gradient
    text = import_it(root / "mm_projector.bin", tiny, world, root / "out", "--vocab_matrix", root / "E.pt")
    return root, tensors, base, text


@torch.no_grad()
def test_the_released_connector_has_the_logits_of_the_release(released, tiny, words, pixels):
    root, tensors, base, text = released
    want = logits_of(base, langbridge_embeds(tensors, CLIPVisionModel.from_pretrained(tiny.clip), base, words, pixels))
    torch.testing.assert_close(our_logits(root / "out", pixels), want, atol=1e-4, rtol=1e-4)
    config = json.loads((root / "out" / "config.json").read_text())
    found = [config[key] for key in ("stage", "normalize", "image_mode", "template")]
    assert found == ["pretrain", "none", "crop", "plain"]
    assert "order of the words" not in text


def test_it_moves_and_reads_as_words(released, tiny, tmp_path):
    root = released[0]
    run("transfer.py", root / "out", tiny.llama, "--out", tmp_path / "moved")
    before, after = (load_file(f / "connector.safetensors") for f in (root / "out", tmp_path / "moved"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    from PIL import Image
    Image.new("RGB", (24, 24), "red").save(tmp_path / "red.png")
    run("words.py", tmp_path / "moved", tmp_path / "red.png", "--out", tmp_path / "words", "--device=cpu")
    assert (tmp_path / "words" / "words.png").stat().st_size > 1000


@torch.no_grad()
@pytest.mark.parametrize("kind, more_rows", [("bin", 1), ("safetensors", -20)])
def test_a_whole_langbridge_checkpoint(kind, more_rows, tiny, world, words, pixels, tmp_path):
    """Stage 2 of the release. Llama-3 gets a row for <pad>; other tools cut the rows that no token has."""
    base, llm = AutoModelForCausalLM.from_pretrained(tiny.qwen), trained_copy(tiny.qwen)
    llm.resize_token_embeddings(500 + more_rows, mean_resizing=False)
    tower = trained_copy(tiny.clip) if kind == "bin" else CLIPVisionModel.from_pretrained(tiny.clip)
    connector, newline = projector(len(words), dtype=torch.float32), torch.randn(44)
    config = {"model_type": "llava_qwen", "mm_projector_type": "mm_vocab", "mm_vision_select_layer": -2, "mm_hidden_size": DV,
              "mm_vision_select_feature": "patch", "image_aspect_ratio": "anyres", "mm_use_im_start_end": False,
              "image_grid_pinpoints": [[24, 48], [48, 24]]}
    stored = tower if kind == "bin" else copy.deepcopy(tower).half()           # rounding is no training
    save_shards(llava_names(llm, connector, stored, newline), tmp_path / "theirs", kind, config)
    text = import_it(tmp_path / "theirs", tiny, world, tmp_path / "out")
    want = logits_of(llm, langbridge_embeds(connector, tower, base, words, pixels))     # E is that of the LLM before stage 2
    got = our_logits(tmp_path / "out", pixels)
    assert got.shape[-1] == 500 + more_rows
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert torch.equal(load_file(tmp_path / "out" / "llm" / "image_newline.safetensors")["image_newline"], newline)
    assert (tmp_path / "out" / "vision_tower").is_dir() == (kind == "bin")      # a frozen tower is not written
    assert "order of the words" in text and json.loads((tmp_path / "out" / "config.json").read_text())["stage"] == "sft"


@torch.no_grad()
def hugging_face(tiny, next_):
    """A LLaVA of transformers with random weights, and its LLM and tower those of `tiny`, trained a little."""
    classes = (LlavaNextConfig, LlavaNextForConditionalGeneration) if next_ else (LlavaConfig, LlavaForConditionalGeneration)
    torch.manual_seed(2)
    model = classes[1](classes[0](vision_config=CLIPVisionConfig.from_pretrained(tiny.clip), image_token_id=499,
                                  text_config=AutoConfig.from_pretrained(tiny.llama))).eval()
    llm, tower = trained_copy(tiny.llama), trained_copy(tiny.clip)
    model.model.language_model.load_state_dict(llm.model.state_dict())
    model.lm_head.load_state_dict(llm.lm_head.state_dict())
    model.model.vision_tower.load_state_dict(tower.state_dict())
    return model, llm, tower


def hugging_face_logits(model, pixels):
    ids = torch.tensor([[i for j in IDS for i in ([499] * P if j == IMAGE_ID else [j])]])
    return model(input_ids=ids, pixel_values=pixels).logits


@torch.no_grad()
@pytest.mark.parametrize("names", ["on disk", "in memory"])
def test_llava_of_transformers_under_old_and_new_names(names, tiny, world, pixels, tmp_path):
    model, _, _ = hugging_face(tiny, False)
    if names == "on disk":
        model.save_pretrained(tmp_path / "theirs")
    else:
        save_shards(model.state_dict(), tmp_path / "theirs", "safetensors", model.config.to_dict())
    names_there = {name for file in (tmp_path / "theirs").glob("*.safetensors") for name in load_file(file)}
    start = {"on disk": "language_model.model.", "in memory": "model.language_model."}[names]
    assert any(name.startswith(start) for name in names_there)
    import_it(tmp_path / "theirs", tiny, world, tmp_path / "out", llm=tiny.llama)
    torch.testing.assert_close(our_logits(tmp_path / "out", pixels), hugging_face_logits(model, pixels), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_llava_next_of_transformers(tiny, world, pixels, tmp_path):
    """Its newline is kept; without tiles the rest is a LLaVA of the same weights."""
    model, llm, tower = hugging_face(tiny, True)
    model.model.image_newline.copy_(torch.arange(52))
    model.save_pretrained(tmp_path / "theirs")
    import_it(tmp_path / "theirs", tiny, world, tmp_path / "out", llm=tiny.llama)
    embeds = model.model.multi_modal_projector(patches_of(tower, pixels))
    torch.testing.assert_close(our_logits(tmp_path / "out", pixels), logits_of(llm, embeds), atol=1e-4, rtol=1e-4)
    assert torch.equal(load_file(tmp_path / "out" / "llm" / "image_newline.safetensors")["image_newline"], torch.arange(52.))


@torch.no_grad()
def test_llava_1_5_and_its_mlp_alone(tiny, world, pixels, tmp_path):
    model, llm, _ = hugging_face(tiny, False)
    tower = CLIPVisionModel.from_pretrained(tiny.clip)
    mlp = projector(D=52, dtype=torch.float16)
    first, second = ([mlp[f"model.mm_projector.{i}.{n}"].float() for n in ("weight", "bias")] for i in (0, 2))
    embeds = F.linear(F.gelu(F.linear(patches_of(tower, pixels), *first)), *second)
    save_shards(llava_names(llm, mlp), tmp_path / "whole", "bin", {"image_aspect_ratio": "pad", "mm_vision_tower": tiny.clip})
    import_here(tmp_path / "whole", "--llm", tiny.llama, "--out", tmp_path / "out")       # the tower of its config
    torch.testing.assert_close(our_logits(tmp_path / "out", pixels), logits_of(llm, embeds), atol=1e-4, rtol=1e-4)
    torch.save(mlp, tmp_path / "mm_projector.bin")
    import_it(tmp_path / "mm_projector.bin", tiny, world, tmp_path / "alone", llm=tiny.llama)
    want = logits_of(AutoModelForCausalLM.from_pretrained(tiny.llama), embeds)
    torch.testing.assert_close(our_logits(tmp_path / "alone", pixels), want, atol=1e-4, rtol=1e-4)


class Evil:
    """A pickle that runs a command when it is read."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_wrong_files_are_one_sentence(released, tiny, world, words, tmp_path):
    """What is found and what is wanted stand in the sentence."""
    K = len(words)
    file, folder = tmp_path / "mm_projector.bin", tmp_path / "theirs"
    others = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny.qwen))
    reordered = tmp_path / "reordered.json"
    vocab.save_words([words[1], words[0], *words[2:]], str(reordered))

    def refused(source, sentence, *more, llm=tiny.qwen):
        with pytest.raises(ValueError, match=sentence) as error:
            import_it(source, tiny, world, tmp_path / "out", *more, llm=llm)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()

    def saved(tensors):
        torch.save(tensors, file)
        return file

    wide = projector(K)
    wide["model.mm_projector.0.weight"] = torch.zeros(H, DV + 1)
    refused(saved(wide), r"connector.mlp.0.weight is \(24, 33\) in the file and \(24, 32\) in what --llm, --vision_tower")
    refused(saved(projector(K + 1)), rf"connector.to_scores.bias is \({K + 1},\) in the file and \({K},\) in what .*--words ask for")
    refused(saved(projector(D=44)), r"connector.mlp.2.bias is \(44,\) in the file and \(52,\)", llm=tiny.llama)
    refused(saved({"model.mm_projector.0.weight": torch.zeros(H, DV)}), r"connector.mlp.0.bias is missing in the file and \(24,\)")
    refused(saved(projector(K) | {"model.mm_projector.2.bias": torch.full((H,), torch.nan)}), "connector.mlp.2.bias has numbers")
    refused(saved({"state": 3}), "other things than tensors")
    refused(saved([Evil(tmp_path / "was here")]), "other things than tensors")
    assert not (tmp_path / "was here").exists()
    file.write_bytes(saved(projector(K)).read_bytes()[:900])
    refused(file, "is torn")
    refused(saved({"conv.weight": torch.zeros(3)}), "conv.weight is the name of no tensor")
    deeper = projector(D=44) | {"model.mm_projector.4.bias": torch.zeros(44)}
    refused(saved(deeper), r"connector.other.4.bias is \(44,\) in the file and missing in what")
    refused(saved(projector(D=44)), "holds an MLP: --vocab_matrix", "--vocab_matrix", file)
    whole, matrix = released[0] / "mm_projector.bin", ("--vocab_matrix", released[0] / "E.pt")
    refused(whole, "row 0 is not the embedding of", "--words", reordered, *matrix)
    refused(whole, "row 0 is not the embedding of", *matrix, llm=tiny_other(tiny, others, tmp_path))
    refused(whole, r"is no lone tensor \(\d+, 44\)", "--vocab_matrix", file)
    refused(released[0] / "E.pt", "E.pt: .* is the name of no tensor")
    refused(tmp_path / "none.bin", "there is no file")

    def shards(llm, **config):
        save_shards(llava_names(llm, projector(K)), folder, "safetensors", config)
        return folder

    refused(shards(others), "another LLM")
    refused(shards(trained_copy(tiny.llama)), r"llm.lm_head.weight is \(500, 52\) in the file and \(500, 44\)")
    refused(shards(trained_copy(tiny.qwen), mm_vision_select_feature="cls_patch"), "mm_vision_select_feature is 'cls_patch'")
    refused(shards(trained_copy(tiny.qwen), vision_feature_layer=[-2, -5]), r"the layers \[-2, -5\]")
    less = {name: t for name, t in llava_names(trained_copy(tiny.qwen), projector(K)).items() if "layers.1.mlp.up" not in name}
    save_shards(less, folder, "safetensors", {})
    refused(folder, "llm.model.layers.1.mlp.up_proj.weight is missing in the file")
    saved({"model.embed_tokens.weight": torch.zeros(3)})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="exists; --overwrite"):
        import_it(released[0] / "mm_projector.bin", tiny, world, tmp_path / "out")
    done = run(TOOL, tmp_path / "mm_projector.bin", "--llm", tiny.qwen, "--out", tmp_path / "new", "--offline", check=False)
    assert done.returncode == 1 and "holds no connector" in done.stderr and "Traceback" not in done.stderr


CONFIGS = {     # name: (what is in config.json, words)
    "pictures at a side of up to nine tiles": ({"image_aspect_ratio": "anyres_max_9"}, "image_aspect_ratio is 'anyres_max_9'"),
    "another arrangement of tiles": ({"image_aspect_ratio": "anyres", "mm_patch_merge_type": "flat"}, "merge_type is 'flat'"),
    "LLaVA-OneVision": ({"model_type": "llava_onevision", "text_config": {}}, "model_type is 'llava_onevision'"),
    "LLaVA-NeXT for videos": ({"model_type": "llava_next_video", "text_config": {}}, "model_type is 'llava_next_video'"),
    "another activation": ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
    "CLS among the patches": ({"vision_feature_select_strategy": "full"}, "'full' drops 0 rows of the vision tower, which has 1"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_of_another_computation(name, tiny, tmp_path):
    config, sentence = CONFIGS[name]
    torch.save(projector(D=44), tmp_path / "mm_projector.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=sentence):
        import_here(tmp_path / "mm_projector.bin", "--llm", tiny.qwen, "--vision_tower", tiny.clip, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


SHARDS = {      # name: (files in the folder, files that its index names or what the index is, the file that is missing)
    "all there": (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], None, None),
    "one missing, without an index": (["model-00002-of-00002.safetensors"], None, "model-00001-of-00002.safetensors"),
    "a pickle missing": (["pytorch_model-00001-of-00002.bin"], None, "pytorch_model-00002-of-00002.bin"),
    "a name of its own": (["a.safetensors"], ("model.safetensors", ["a.safetensors", "tower.safetensors"]), "tower.safetensors"),
    "an index of the other format": (["model.safetensors"], ("pytorch_model.bin", ["pytorch_model-00001-of-00002.bin"]), None),
    "an index without names": (["model.safetensors"], ("model.safetensors", 3), "has no weight_map"),
}


@pytest.mark.parametrize("name", SHARDS)
def test_shards_that_are_missing(name, tmp_path):
    """Without the check, a part that is in the missing file would come from --llm or --vision_tower, untrained"""
    files, index, missing = SHARDS[name]
    for file in files:
        (tmp_path / file).write_bytes(b"")
    if index:
        names = {str(i): file for i, file in enumerate(index[1])} if isinstance(index[1], list) else index[1]
        (tmp_path / f"{index[0]}.index.json").write_text(json.dumps({"weight_map": names}))
    if missing:
        with pytest.raises(ValueError, match=missing):
            import_official.shards_of(str(tmp_path))
    else:
        assert [os.path.basename(file) for file in import_official.shards_of(str(tmp_path))] == files


@torch.no_grad()
def test_siglip_has_no_row_to_drop(tiny, tmp_path, pixels):
    """A LLaVA of transformers on SigLIP takes all rows: "full". "default" would drop a patch."""
    mlp = projector(D=52, dtype=torch.float32)
    torch.save(mlp, tmp_path / "mm_projector.bin")
    arguments = (tmp_path / "mm_projector.bin", "--llm", tiny.llama, "--vision_tower", tiny.siglip, "--out", tmp_path / "out")
    (tmp_path / "config.json").write_text(json.dumps({"vision_feature_select_strategy": "default"}))
    with pytest.raises(ValueError, match="'default' drops 1 rows of the vision tower, which has 0"):
        import_here(*arguments)
    (tmp_path / "config.json").write_text(json.dumps({"vision_feature_select_strategy": "full"}))
    import_here(*arguments)
    patches = SiglipVisionModel.from_pretrained(tiny.siglip)(pixels, output_hidden_states=True).hidden_states[-2]
    first, second = ([mlp[f"model.mm_projector.{i}.{n}"] for n in ("weight", "bias")] for i in (0, 2))
    want = F.linear(F.gelu(F.linear(patches, *first)), *second)
    torch.testing.assert_close(checkpoint.load(str(tmp_path / "out")).encode(pixels), want, atol=1e-5, rtol=1e-4)


def tiny_other(tiny, llm, root):
    """A folder with the tokenizer of tiny.qwen and another LLM of the same sizes."""
    llm.save_pretrained(root / "other")
    AutoTokenizer.from_pretrained(tiny.qwen).save_pretrained(root / "other")
    return root / "other"


def test_a_tied_head_is_taken_once(tiny, world, words, tmp_path):
    """Qwen2-0.5B's head is its embedding. A file may hold it twice; two different tensors are refused."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    config = Qwen2Config.from_pretrained(tiny.qwen)
    config.tie_word_embeddings = True
    llm = Qwen2ForCausalLM(config)
    base = tiny_other(tiny, llm, tmp_path)
    tensors = llava_names(llm, projector(len(words)))
    save_shards(tensors, tmp_path / "twice", "bin", {})
    import_it(tmp_path / "twice", tiny, world, tmp_path / "out", llm=base)
    assert torch.equal(checkpoint.load(str(tmp_path / "out")).llm.lm_head.weight, llm.lm_head.weight)
    save_shards({**tensors, "lm_head.weight": llm.lm_head.weight + 1}, tmp_path / "two", "bin", {})
    with pytest.raises(ValueError, match="(embed_tokens|lm_head).weight differs from the tensor that it is tied to"):
        import_it(tmp_path / "two", tiny, world, tmp_path / "no", llm=base)
