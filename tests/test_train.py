"""train.py: what trains, that batches, ranks and kills change nothing, and what a user's mistake says."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from glob import glob

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

import checkpoint
import conversation
import data
import eval as evaluation
import model
import train
from conftest import ROOT, run, settings, train_here
from support import checks, ranks
from support.device import choose_dtype
from tools.memory import RANKS, print_estimate


def weights(out):
    """Every trained tensor of a run, from its last state, whatever the number of ranks that wrote it"""
    reader = HuggingFaceStorageReader(f"{out}/state/{max(os.listdir(f'{out}/state'))}")
    kept = {name: meta for name, meta in reader.read_metadata().state_dict_metadata.items()
            if not name.startswith("rng") and not name.endswith(("exp_avg", "exp_avg_sq"))}
    tensors = {name: torch.full(meta.size, torch.nan, dtype=meta.properties.dtype) for name, meta in kept.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def losses(out):
    return [json.loads(line)["loss"] for line in open(f"{out}/log.jsonl")]


def same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda m: f"{name}: {m}", **tolerance)


@pytest.fixture(scope="module")
def pretrained(tiny, world, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "pretrain"
    assert train_here(settings(tiny, world, out)) == 0
    return str(out)


def test_pretraining_learns_the_captions_and_leaves_a_checkpoint(pretrained):
    files = set(os.listdir(pretrained))
    assert {"config.json", "words.json", "connector.safetensors", "log.jsonl", "loss.png", "state"} <= files
    assert "llm" not in files and len(losses(pretrained)) == 10
    assert losses(pretrained)[-1] < 0.9 * losses(pretrained)[0]


def test_pretraining_trains_the_connector_and_nothing_else(pretrained):
    assert all(name.startswith("connector.") for name in weights(pretrained))


@pytest.mark.parametrize("connector", ["langbridge", "mlp"])
def test_sft_trains_connector_and_llm_and_keeps_the_frozen_e(tiny, world, tmp_path, connector):
    before, after = tmp_path / "pretrain", tmp_path / "sft"
    train_here(settings(tiny, world, before, f"--connector={connector}", "--max_steps=2"))
    assert train_here(settings(tiny, world, after, "--stage=sft", f"--init={before}", f"--data={world}/chats.json",
                               "--template=chat", "--group=True", "--llm_lr=0.001")) == 0
    trained = weights(after)
    assert {name.split(".")[0] for name in trained} == {"connector", "llm"}
    old = load_file(f"{tiny.qwen}/model.safetensors")
    assert not torch.equal(old["model.embed_tokens.weight"], trained["llm.model.embed_tokens.weight"])
    if connector == "langbridge":                                   # E is a snapshot: it did not follow the LLM
        E = load_file(f"{after}/llm/vocab_embeds.safetensors")["vocab_embeds"]
        assert torch.equal(E, checkpoint.load(str(before)).connector.vocab_embeds)
        assert torch.equal(E, checkpoint.load(str(after)).connector.vocab_embeds)


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_accumulation_changes_nothing(tiny, world, tmp_path, pretrained, stage):
    """Answers differ in length, so a mean of means would show here."""
    more = ["--max_steps=4", f"--data={world}/chats.json", "--template=chat", f"--stage={stage}"]
    more += [f"--init={pretrained}"] if stage == "sft" else []
    train_here(settings(tiny, world, tmp_path / "one", *more))
    train_here(settings(tiny, world, tmp_path / "four", *more, "--batch_size=2"))
    torch.testing.assert_close(torch.tensor(losses(tmp_path / "four")), torch.tensor(losses(tmp_path / "one")), atol=1e-4, rtol=1e-4)
    # Adam divides by the gradient's size, so that rounding in a gradient near zero moves a weight by up to lr a step.
    same(weights(tmp_path / "four"), weights(tmp_path / "one"), atol=4e-3, rtol=0)


def test_bfloat16_and_checkpointing_run_and_learn(tiny, world, tmp_path):
    assert train_here(settings(tiny, world, tmp_path / "x", "--dtype=bfloat16", "--checkpointing=True")) == 0
    assert losses(tmp_path / "x")[-1] < 0.9 * losses(tmp_path / "x")[0]


def test_checkpointing_does_not_start_the_dropout_of_a_frozen_llm(tiny, world, tmp_path, monkeypatch):
    calls, forward = [], Qwen2Attention.forward
    monkeypatch.setattr(Qwen2Attention, "forward", lambda *args, **kw: calls.append(1) or forward(*args, **kw))
    shutil.copytree(tiny.qwen, tmp_path / "llm")
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    (tmp_path / "llm" / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    for name in ("plain", "checkpointing"):
        argv = settings(tiny, world, tmp_path / name, f"--llm={tmp_path}/llm", "--max_steps=3", f"--checkpointing={name != 'plain'}")
        assert train_here(argv) == 0
        calls.append("end")
    assert calls.index("end") + 6 == len(calls) - calls.index("end") - 2, "two layers in three steps are computed again"
    assert losses(tmp_path / "checkpointing") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


@pytest.mark.parametrize("capability, has_bfloat16, expected", [
    ("AVX512", True, "bfloat16"), ("AVX512", False, "float32"), ("AVX2", True, "float32")])
def test_dtype_auto_is_what_the_cpu_computes_in(monkeypatch, capability, has_bfloat16, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
    assert choose_dtype("auto", "cpu") == expected
    assert choose_dtype("bfloat16", "cpu") == "bfloat16"


def test_a_run_with_dtype_auto_keeps_the_dtype_of_its_start(tiny, world, tmp_path, monkeypatch):
    """Its states name the dtype that was chosen, so another machine does not go on in another dtype."""
    monkeypatch.setattr(ranks, "choose_dtype", lambda name, device: "float32" if name == "auto" else name)
    argv = settings(tiny, world, tmp_path / "x", "--dtype=auto", "--max_steps=2")
    argv.remove("--dtype=float32")
    assert train_here(argv) == 0
    state = sorted((tmp_path / "x" / "state").glob("step-*"))[-1]
    assert json.loads((state / "state.json").read_text())["settings"]["dtype"] == "float32"


def test_compiled_blocks_learn_the_same(tiny, world, tmp_path, pretrained, monkeypatch):
    """Blocks traced, forward and backward, and then run as traced: making kernels of them would take half a minute."""
    compile, made = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block, **how: made.append(block) or
                        compile(block, backend="aot_eager", fullgraph=True, **how))
    more = ["--max_steps=2", f"--data={world}/chats.json", "--template=chat", "--stage=sft", f"--init={pretrained}",
            "--checkpointing", "--probe_every=0"]
    for name in ("plain", "compiled"):
        train_here(settings(tiny, world, tmp_path / name, *more, f"--compile={name == 'compiled'}"))
    assert len(made) > 1
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    same(weights(tmp_path / "compiled"), weights(tmp_path / "plain"), atol=4e-3, rtol=0)


def test_a_killed_run_goes_on_to_the_same_bits(tiny, world, tmp_path, pretrained):
    """SIGKILL between two states, then the same command again."""
    argv = settings(tiny, world, tmp_path / "killed", "--save_every=3")
    log = tmp_path / "killed" / "log.jsonl"
    job = subprocess.Popen([sys.executable, "train.py", *argv], cwd=ROOT, stdout=subprocess.DEVNULL)
    while job.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 4):
        time.sleep(0.005)
    job.send_signal(signal.SIGKILL)
    assert job.wait() != 0, "the run ended before it could be killed"
    assert train_here(argv) == 0
    assert losses(tmp_path / "killed") == losses(pretrained)
    same(weights(tmp_path / "killed"), weights(pretrained), atol=0, rtol=0)


def test_a_torn_state_is_passed_over(tiny, world, tmp_path, pretrained, capsys):
    argv = settings(tiny, world, tmp_path / "torn", "--save_every=4")
    train_here(argv)
    os.remove(tmp_path / "torn" / "config.json")                    # as if killed before the end
    states = sorted(os.listdir(tmp_path / "torn" / "state"))
    assert len(states) == 2
    newest = min((tmp_path / "torn" / "state" / states[-1]).glob("shard-*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-9])
    assert train_here(argv) == 0
    assert "is not whole" in capsys.readouterr().out
    same(weights(tmp_path / "torn"), weights(pretrained), atol=0, rtol=0)


def test_sigterm_saves_and_exits_with_a_status_of_its_own(tiny, world, tmp_path, pretrained):
    """To the whole process group, as schedulers and Ctrl-C do: the loader's process must live until the step is done."""
    argv = settings(tiny, world, tmp_path / "term", "--workers=1")
    log = tmp_path / "term" / "log.jsonl"
    job = subprocess.Popen([sys.executable, "train.py", *argv], cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    while job.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.005)
    os.killpg(job.pid, signal.SIGTERM)
    assert job.wait() == train.STOPPED
    assert train_here(argv) == 0
    same(weights(tmp_path / "term"), weights(pretrained), atol=0, rtol=0)


def test_other_settings_are_not_resumed_and_a_finished_run_is_not_overwritten(tiny, world, tmp_path):
    out = tmp_path / "x"
    train_here(settings(tiny, world, out, "--max_steps=2"))
    with pytest.raises(ValueError, match="--overwrite"):
        train.check(train.read_settings(settings(tiny, world, out)))
    os.remove(out / "config.json")
    with pytest.raises(ValueError, match="connector_lr is 0.02, and the run in .* began with 0.01"):
        train.main(train.read_settings(settings(tiny, world, out, "--max_steps=2", "--connector_lr=0.02")))


def test_overwrite_trains_again(tiny, world, tmp_path):
    out = tmp_path / "x"
    train_here(settings(tiny, world, out, "--max_steps=2"))
    first = weights(out)
    (out / "llm").mkdir()                                           # as if it had been SFT: load would take it for ours
    assert train_here(settings(tiny, world, out, "--max_steps=2", "--connector_lr=0.02", "--overwrite")) == 0
    assert not (out / "llm").exists()
    assert len(losses(out)) == 2 and any(not torch.equal(first[n], t) for n, t in weights(out).items())


@pytest.mark.parametrize("flag", ["--vision_tower=nowhere", "--data=nowhere.json", "--snapshots=99", "--images=nowhere", "--images=EMPTY"])
def test_a_mistake_beside_overwrite_does_not_cost_the_old_run(tiny, world, tmp_path, pretrained, flag):
    out = tmp_path / "run"
    shutil.copytree(pretrained, out)
    before = {path: open(path, "rb").read() for path in glob(f"{out}/**", recursive=True) if os.path.isfile(path)}
    (tmp_path / "images").mkdir()
    flag = flag.replace("EMPTY", str(tmp_path / "images"))
    done = run("train.py", *settings(tiny, world, out, "--overwrite", flag), check=False)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert before == {path: open(path, "rb").read() for path in before}


@pytest.mark.parametrize("argv,words", [
    (["--learning_rate=1"], "no setting 'learning_rate'"), (["--hidden=big"], "hidden is 'big', it must be of type int"),
    (["--checkpointing=no"], "type bool"), (["nowhere.py"], "no config file nowhere.py"),
    (["--stage=both"], "stage is 'both'"), (["--stage=pretrain"], "out is not set"),
    (["--init=nowhere", "--out=/tmp/never", "--data=x.json"], "nowhere is no checkpoint")])
def test_a_mistake_gets_one_sentence(argv, words):
    done = run("train.py", *argv, check=False)
    assert done.returncode != 0 and words in done.stderr and "Traceback" not in done.stderr and not done.stdout.strip()


@pytest.mark.parametrize("flag,words", [("--llm=other", "--llm does not go with init.*transfer.py"), ("--words_init=embeds", "--words_init does not go with init"),
                                        ("--num_words=3", "num_words is set to 3"), ("--hidden=7", "hidden is set to 7"),
                                        ("--connector=mlp", "connector is set to 'mlp'")])
def test_a_checkpoint_keeps_its_own_parts(tiny, world, tmp_path, pretrained, flag, words, capsys):
    with pytest.raises(ValueError, match=words):
        train.main(train.read_settings([a for a in settings(tiny, world, tmp_path / "x", f"--init={pretrained}")
                                        if not a.startswith("--hidden")] + [flag]))
    assert "config file is not used" not in capsys.readouterr().out         # it was not in a config file


def test_a_config_file_may_name_for_its_dry_run_what_the_checkpoint_has(tmp_path, pretrained, capsys):
    (tmp_path / "config.py").write_text('normalize, llm = "none", "other"')
    config = checkpoint.read_config(pretrained)[0]
    checks.check_init(train.read_settings([f"{tmp_path}/config.py", f"--init={pretrained}"]), config)
    assert "normalize of the config file is not used: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="normalize is set to 'none', but .* has 'softmax'"):
        checks.check_init(train.read_settings(["--normalize=none", f"--init={pretrained}"]), config)


def test_dry_run_from_a_checkpoint_takes_and_refuses_what_training_does(tmp_path, pretrained, capsys):
    flags = ["--stage=sft", f"--init={pretrained}", "--dry_run"]
    print_estimate(train.read_settings(flags))
    assert "image_newline" not in capsys.readouterr().out
    S = checkpoint.load(pretrained).image_settings["size"]
    print_estimate(train.read_settings([*flags, f"--tiles=(({S}, {2 * S}),)"]))
    assert "image_newline" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--llm does not go with init"):
        print_estimate(train.read_settings([*flags, "--llm=other"]))


def test_the_schedule_is_the_recipes():
    """2,181 steps rise for 66, 5,198 for 156 (transformers' cosine with warm-up ratio 0.03)"""
    for steps, rise in ((2181, 66), (5198, 156)):
        factors = [train.lr_factor(s, steps, 0.03) for s in range(steps)]
        assert factors[0] == 0 and factors.index(1.0) == rise and factors[-1] < 1e-5


@pytest.mark.parametrize("path", sorted(glob(f"{ROOT}/config/paper/*.py")), ids=os.path.basename)
def test_every_config_of_the_paper_works_for_a_dry_run(path, capsys, monkeypatch):
    """Nothing is downloaded and no checkpoint exists yet. The tests have no network."""
    monkeypatch.chdir(ROOT)
    cfg = train.read_settings([path, "--dry_run", "--llm=Qwen/Qwen2-7B-Instruct"])
    train.check(cfg)
    print_estimate(cfg)
    assert "7,615,616,512" in capsys.readouterr().out


def test_dry_run_tells_the_memory_of_a_sharded_llm(capsys):
    cfg = train.read_settings([f"{ROOT}/config/paper/sft.py", "--llm=Qwen/Qwen2-7B-Instruct", "--dry_run"])
    print_estimate(cfg)
    table = capsys.readouterr().out.split("GiB on each GPU")[1].splitlines()[1:]
    rows = {line[:44].strip(): [float(x) for x in line[44:].split()] for line in table if line[44:45] == " "}
    state = rows["gradients and AdamW's moments (float32)"]
    llm, connector = 7_615_616_512, 129_790_720                     # Qwen2-7B's own count; model.py's
    assert state == [round(12 * (llm / n + connector) / 2**30, 2) for n in RANKS]
    assert rows["gathered from the other ranks"][0] == 0 < rows["gathered from the other ranks"][1]
    assert "2048 tokens a sample" in " ".join(table)                # --group puts the longest samples together
    assert rows["sum"] == sorted(rows["sum"], reverse=True) and rows["sum"][0] > 80 > rows["sum"][-2]
    rest = [round(a - b, 2) for a, b in zip(rows["with what is not counted (5 GiB assumed)"], rows["sum"])]
    assert rest == [5.0] * len(RANKS)


@pytest.mark.parametrize("normalize, gib", [("none", 0.0), ("softmax", 32 * 576 * 4096 * 8 / 2**30)])
def test_dry_run_counts_the_scores_that_the_combination_makes(normalize, gib, capsys):
    """Raw scores are never made at the paper's sizes. A softmax of 1.4 GB of scores has those of a block of words."""
    print_estimate(train.read_settings([f"{ROOT}/config/paper/pretrain.py", f"--normalize={normalize}", "--plain_bytes=1", "--dry_run"]))
    row, = [line for line in capsys.readouterr().out.splitlines() if line.startswith("scores and weights")]
    assert float(row.split()[5 + 1]) == pytest.approx(gib, abs=0.01)


def test_the_vision_tower_trains_is_saved_and_goes_on(tiny, world, tmp_path, capsys):
    """With a rate of its own; the layer after vision_layer gets no gradient, stays as it is, and that is said."""
    argv = settings(tiny, world, tmp_path / "x", "--stage=sft_tower", "--vision_tower_lr=1e-3", "--llm_lr=1e-3", "--max_steps=4",
                    "--probe_every=0", "--save_every=2")
    assert train_here(argv) == 0
    assert "tensors stay frozen" in capsys.readouterr().out
    trained = weights(tmp_path / "x")
    old, new = (load_file(f"{folder}/model.safetensors") for folder in (tiny.clip, tmp_path / "x" / "vision_tower"))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert any(".layers.0." in name for name in changed) and not any(".layers.2." in name for name in changed)
    assert any(name.startswith("vision_tower.") for name in trained)
    again = checkpoint.load(str(tmp_path / "x"))
    assert again.own_parts == {"llm", "vision_tower"}
    os.remove(tmp_path / "x" / "config.json")                       # as if killed before the end
    assert train_here(argv) == 0
    same(weights(tmp_path / "x"), trained, atol=0, rtol=0)


@pytest.mark.parametrize("stage", ["sft", "pretrain"])
def test_a_part_of_the_llm_may_train_alone(stage, tiny, world, tmp_path, monkeypatch, capsys):
    """As LoRA by peft leaves it: what trains is what requires a gradient and is saved, and the rest keeps its bits."""
    make = train.make_model

    def with_few_parameters(cfg, device):
        vlm = make(cfg, device)
        for name, p in vlm.llm.named_parameters():
            p.requires_grad_("layers.1.self_attn.q_proj" in name)
        return vlm
    monkeypatch.setattr(train, "make_model", with_few_parameters)
    assert train_here(settings(tiny, world, tmp_path / "x", f"--stage={stage}", "--llm_lr=1e-2", "--max_steps=3")) == 0
    old, new = (load_file(f"{folder}/model.safetensors") for folder in (tiny.qwen, tmp_path / "x" / "llm"))
    assert {name for name in old if not torch.equal(old[name], new[name])} == {
        "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.bias"}
    assert {name.split(".")[0] for name in weights(tmp_path / "x")} == {"connector", "llm"}


def test_the_loss_without_images_is_that_of_the_whole_step(tiny, world, tmp_path):
    """Micro-batches of 8 and of 2 give the same loss without images, as they give the same loss."""
    rows = []
    for size in (8, 2):
        argv = settings(tiny, world, tmp_path / str(size), "--max_steps=1", "--probe_every=1")
        assert train_here([*argv, f"--batch_size={size}"]) == 0
        rows.append(json.loads((tmp_path / str(size) / "log.jsonl").read_text().splitlines()[0]))
    assert rows[0]["blind"] == pytest.approx(rows[1]["blind"], rel=1e-5)
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)


def test_samples_that_were_skipped_before_do_not_stop_a_run():
    cfg = train.Settings(on_bad="stop")
    assert train.report_bad([], 0, 3, 7, cfg) == ""
    assert train.report_bad(["a sentence"], 1, 0, 7, cfg) == "a sentence"
    cfg = train.Settings(on_bad="skip", bad_limit=3)
    assert train.report_bad(["a"], 1, 2, 7, cfg) == "" and "4 samples" in train.report_bad(["a"], 1, 3, 7, cfg)


def test_the_loss_without_images_does_not_change_what_dropout_draws(tiny, world, tmp_path):
    """An LLM with dropout, two micro-batches: with and without the probe the losses are the same to the bit."""
    shutil.copytree(tiny.qwen, tmp_path / "llm")
    config = json.loads((tmp_path / "llm" / "config.json").read_text())
    (tmp_path / "llm" / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    found = []
    for probe in (0, 1):
        argv = settings(tiny, world, tmp_path / str(probe), "--stage=sft", f"--data={world}/chats.json", "--template=chat",
                        "--max_steps=2", "--batch_size=2", f"--llm={tmp_path}/llm", f"--probe_every={probe}")
        assert train_here(argv) == 0
        found.append(losses(tmp_path / str(probe)))
    assert found[0] == found[1]


def test_embeddings_between_rows_of_patches(tiny, world, tmp_path, monkeypatch):
    """The README's two places for another layout of an image: all stages, and answers to questions, follow them."""
    def num_tokens(picture_size, num_patches, tiles, size):
        return num_patches + math.isqrt(num_patches)

    def arrange_images(vlm, image_embeds, picture_sizes):           # an embedding of zeros ends each row
        rows = image_embeds.unflatten(1, (math.isqrt(vlm.num_patches), -1))
        return list(F.pad(rows, (0, 0, 0, 1)).flatten(1, 2))

    monkeypatch.setattr(model.VLM, "arrange_images", arrange_images)
    for module in (data, model):
        monkeypatch.setattr(module, "num_tokens", num_tokens)
    for stage in ("words", "pretrain", "sft"):
        assert train_here(settings(tiny, world, tmp_path / stage, f"--stage={stage}", "--max_steps=1", "--normalize=softmax")) == 0
    vlm = checkpoint.load(str(tmp_path / "sft"))
    picture = sorted(glob(f"{world}/images/*"))[0]
    questions = [{"image": picture, "text": "what is it?"}, {"image": picture, "text": "why?"}]
    prompts = [evaluation.prompt_ids(vlm, question) for question in questions]
    assert prompts[0].count(conversation.IMAGE_ID) == vlm.num_patches + math.isqrt(vlm.num_patches)
    with ThreadPoolExecutor(1) as pool:
        assert len(evaluation.answer_batch(vlm, questions, prompts, evaluation.load_images(questions, vlm, pool), 2)) == 2
