"""Several ranks: sharded or whole, the same losses and weights as one process; kills, and what a full disk says."""
import ctypes
import gc
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from datetime import timedelta

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

import model
import train
from conftest import ROOT, settings, train_here
from kill_loop import end, kill_loop, start
from test_train import losses, same, weights
from support import pretrained, sharding
from support.ranks import check_shared_memory, leave, length_multiple, local, own_device, sum_up

# Sums over two ranks are rounded in another order than over one, so gradients differ in their last bits: measured,
# losses by 2e-7 and weights by 8e-7 after 4 steps. Adam divides a gradient by its own size, so that one near zero could
# move its weight by lr in a direction that rounding chose: not seen, and 1e-4 is still a tenth of one such step.
LOSS, WEIGHT = dict(abs=1e-5), dict(atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def five(world):
    """Five records, the first without an image. With --global_batch=4 every second step is one sample: a rank idles"""
    path = world / "five.json"
    path.write_text(json.dumps(json.loads((world / "chats.json").read_text())[:5]))
    return [f"--data={path}", "--template=chat", "--global_batch=4", "--batch_size=1", "--epochs=2", "--llm_lr=1e-3",
            "--probe_every=2"]


def ranks(count, work, *args):
    return end(start(count, work, *args))


@pytest.mark.parametrize("stage,more", [
    ("sft", ["--shard"]),
    ("sft", ["--shard", "--connector=mlp", "--checkpointing"]),
    ("sft", ["--shard", "--words_loss=0.1"]),
    ("words", ["--shard"]),
    ("sft", ["--normalize=none"]),
    ("pretrain", ["--shard", "--normalize=softmax", "--checkpointing"]),
    ("pretrain", ["--shard", "--normalize=none"]),
    ("sft", ["--shard", "--pack", "--batch_size=2"]),
    ("pretrain", ["--connector=mlp"])])
def test_two_ranks_train_as_one_process(tiny, world, five, tmp_path, stage, more):
    """With micro-batches of one, text alone on one rank meets images on the other, and a rank may have nothing."""
    argv = [*five, f"--stage={stage}", *more]
    assert train_here(settings(tiny, world, tmp_path / "one", *argv)) == 0
    assert ranks(2, train_here, settings(tiny, world, tmp_path / "two", *argv)) == [0, 0]
    assert len(losses(tmp_path / "two")) == 4
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), **LOSS)
    same(weights(tmp_path / "two"), weights(tmp_path / "one"), **WEIGHT)
    if stage == "sft":                                              # the final folder is a plain one
        one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / n / "llm") for n in ("one", "two"))
        same(dict(two.state_dict()), dict(one.state_dict()), **WEIGHT)
        assert two.config.to_dict() | {"_name_or_path": ""} == one.config.to_dict() | {"_name_or_path": ""}


def test_a_sharded_run_in_bfloat16_follows_the_one_in_float32(tiny, world, five, tmp_path):
    argv = [*five, "--stage=sft", "--shard"]
    assert ranks(2, train_here, settings(tiny, world, tmp_path / "half", *argv, "--dtype=bfloat16")) == [0, 0]
    train_here(settings(tiny, world, tmp_path / "whole", *argv))
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "whole"), abs=0.05)
    assert load_file(tmp_path / "half" / "llm" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for t in weights(tmp_path / "half").values())


def die_after(step, argv):
    """train.py until it has saved the state of `step`, then gone as by SIGKILL"""
    save = train.save_state

    def save_and_die(vlm, optimizer, facts, cfg):
        save(vlm, optimizer, facts, cfg)
        if facts["step"] == step:
            os._exit(9)
    train.save_state = save_and_die
    return train_here(argv)


def test_a_sharded_run_goes_on_with_another_number_of_ranks(tiny, world, five, tmp_path):
    argv = [*five, "--stage=sft", "--shard", "--save_every=1"]
    train_here(settings(tiny, world, tmp_path / "one", *argv))
    moving = settings(tiny, world, tmp_path / "moving", *argv)
    assert ranks(2, die_after, 1, moving) == [9, 9]
    assert ranks(1, die_after, 3, moving) == [9]
    assert json.load(open(tmp_path / "moving" / "state" / "step-00000003" / "state.json"))["world"] == 1
    assert ranks(2, train_here, moving) == [0, 0]
    assert losses(tmp_path / "moving") == pytest.approx(losses(tmp_path / "one"), **LOSS)
    same(weights(tmp_path / "moving"), weights(tmp_path / "one"), **WEIGHT)


KILLS = int(os.environ.get("KILLS", 0))                             # KILLS=25 pytest -s tests/test_ranks.py -k kills
MORE = [("sft", 1, []), ("pretrain", 2, ["--shard"]), ("sft", 2, [])] if KILLS else []


@pytest.mark.parametrize("stage,count,more", [("pretrain", 1, ["--pack", "--batch_size=4"]), ("sft", 2, ["--shard"]), *MORE])
def test_kills_change_no_bit(tiny, world, five, tmp_path, stage, count, more):
    argv = settings(tiny, world, "later", *five, f"--stage={stage}", "--save_every=2", "--epochs=4", *more)
    report = kill_loop(argv, f"{tmp_path}/kills", count, kills=KILLS or 3)
    print(json.dumps({"stage": stage, **report}))
    assert report["kills"] == (KILLS or 3) and report["runs ended"] >= 1 and report["differences"] == 0


def compare_loaded(name, tower, words):
    """On each rank: weights, buffers and E as the library loads them, and half of the LLM is here"""
    cfg = train.Settings(llm=name, vision_tower=tower, words=words, shard=True, dtype="float32", device="cpu")
    device = train.setup_ranks(cfg)
    vlm = train.make_model(cfg, device)
    cfg.shard = False
    whole = train.make_model(cfg, device)
    here = 0
    for (key, p), (_, q) in zip(vlm.llm.named_parameters(), whole.llm.named_parameters(), strict=True):
        assert isinstance(p, DTensor) and torch.equal(p.full_tensor(), q), key
        here += p.to_local().numel()
    for (key, b), (_, c) in zip(vlm.llm.named_buffers(), whole.llm.named_buffers(), strict=True):
        assert torch.equal(b, c), key
    assert torch.equal(vlm.connector.vocab_embeds, whole.connector.vocab_embeds) and vlm.fingerprint == whole.fingerprint
    assert vlm.eos_ids == whole.eos_ids and here < 0.6 * sum(p.numel() for p in whole.llm.parameters())


@pytest.mark.parametrize("name", ["qwen", "llama", "gemma"])
def test_each_rank_reads_its_pieces(tiny, world, name):
    assert ranks(2, compare_loaded, getattr(tiny, name), tiny.clip, f"{world}/words.json") == [0, 0]


def test_an_llm_is_written_as_the_library_writes_it(tiny, tmp_path):
    llm, _ = pretrained.load_llm(tiny.llama, torch.float32, "cpu")
    sharding.save_model(llm, str(tmp_path / "ours"), torch.bfloat16, is_writer=True)
    llm.to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("ours", "theirs"))
    same(ours.state_dict(), theirs.state_dict(), atol=0, rtol=0)
    for file in ("config.json", "generation_config.json"):
        our, their = (json.loads((tmp_path / n / file).read_text()) for n in ("ours", "theirs"))
        assert our == their


def test_a_parameter_without_a_gradient_is_named(tiny, world, tmp_path, monkeypatch):
    forward = model.LangBridge.forward
    monkeypatch.setattr(model.LangBridge, "forward", lambda self, patches: forward(self, patches).detach())
    with pytest.raises(ValueError, match="connector.mlp.0.weight trains, but the loss does not depend on it"):
        train.main(train.read_settings(settings(tiny, world, tmp_path / "x")))


def train_in_little_room(argv):
    """Rank 0 may write no file of more than 30,000 bytes, which is what a full disk looks like to it"""
    if os.environ.get("RANK", "0") == "0":
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match=r"state/tmp cannot be written.*File too large"):
        train.main(train.read_settings(argv))
    return 0


@pytest.mark.parametrize("count", [1, 2])
def test_a_full_disk_is_found_after_one_step_on_every_rank(tiny, world, five, tmp_path, count):
    assert ranks(count, train_in_little_room, settings(tiny, world, tmp_path, *five)) == [0] * count
    assert len(open(tmp_path / "log.jsonl").readlines()) == 1


def test_a_folder_that_cannot_be_written_is_found_at_once(tiny, world, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        train.main(train.read_settings(settings(tiny, world, tmp_path / "file" / "out")))


def test_the_count_of_skipped_samples_goes_on(tiny, world, five, tmp_path):
    records = json.loads((world / "five.json").read_text())
    (tmp_path / "six.json").write_text(json.dumps([*records, {**records[1], "image": "gone.png"}]))
    argv = settings(tiny, world, tmp_path / "run", *five, f"--data={tmp_path}/six.json", "--on_bad=skip", "--save_every=1")
    assert ranks(1, die_after, 3, argv) == [9]
    assert train_here(argv) == 0
    assert json.loads(open(tmp_path / "run" / "log.jsonl").readlines()[-1])["skipped"] == 2


def wait_for(what, job, seconds=300):
    until = time.time() + seconds
    while not what():
        assert job.poll() is None and time.time() < until, "ended or too slow"
        time.sleep(0.02)


def test_torchrun_starts_a_killed_rank_again_and_passes_a_signal_on(tiny, world, five, tmp_path):
    """Kill one rank: torchrun starts both again, from the last state. Then end torchrun: the ranks save and go."""
    out, log = tmp_path / "run", tmp_path / "run" / "log.jsonl"
    argv = [*five, "--stage=sft", "--shard", "--save_every=5", "--epochs=400"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    job = subprocess.Popen([*torchrun, "train.py", *settings(tiny, world, out, *argv)], cwd=ROOT,
                           start_new_session=True, stdout=open(tmp_path / "text", "w"), stderr=subprocess.STDOUT,
                           env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    try:
        wait_for(lambda: len(list(out.glob("state/step-*"))) == 2, job)
        os.kill(int(subprocess.check_output(["pgrep", "-P", str(job.pid)], text=True).split()[1]), signal.SIGKILL)
        wait_for(lambda: "going on at step" in (tmp_path / "text").read_text(), job)
        lines = len(log.read_text().splitlines())
        wait_for(lambda: len(log.read_text().splitlines()) > lines, job)
        job.send_signal(signal.SIGTERM)
        job.wait(120)
    finally:
        if job.poll() is None:                                      # torchrun's ranks have process groups of their own
            subprocess.run(["pkill", "-KILL", "-f", str(out)])
    text = (tmp_path / "text").read_text()
    at = int(re.search(r"stopped after (\d+) steps", text)[1])
    assert f"step-{at:08d}" in os.listdir(out / "state")
    # Not one bit differs from two ranks that nobody disturbed.
    assert ranks(2, die_after, at, settings(tiny, world, tmp_path / "calm", *argv, f"--save_every={at}")) == [9, 9]
    assert losses(out) == losses(tmp_path / "calm")[:at]
    same(weights(out), weights(tmp_path / "calm"), atol=0, rtol=0)


def test_restarts_with_a_store_that_outlives_them_are_refused(tiny, world, tmp_path, monkeypatch):
    for key, value in {"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match="needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        train.main(train.read_settings(settings(tiny, world, tmp_path)))


M_MMAP_THRESHOLD = -3               # of malloc.h


def model_memory():
    """Bytes that a model can be in: this process's own pages and mapped safetensors files, not the libraries'"""
    total = 0
    for line in open("/proc/self/smaps"):
        field, value = line.split()[:2]
        if "-" in field:                                            # the head of a mapping
            count = ("Anonymous:", "Rss:")[".safetensors" in line]
        total += int(value) * 1024 if field == count else 0
    return total


def peak_of_loading(name, small, tower, words, report):
    """Load the model as train.py does, touch it all, and write by how many bytes the memory rose at most.

    The small LLM is loaded first. Otherwise what Python takes for a while to import transformers would count.
    """
    # glibc keeps freed memory of this size for later use, and it would count as held. 65,536 bytes and more go back now.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65_536)
    cfg = train.Settings(llm=small, vision_tower=tower, words=words, stage="sft", dtype="float32", shard=True,
                         hidden=64)
    device = train.setup_ranks(cfg)
    train.make_model(cfg, device)
    cfg.llm = name
    gc.collect()
    seen, done = [model_memory()], threading.Event()

    def look():
        while not done.wait(0.005):
            seen.append(model_memory())
    threading.Thread(target=look).start()
    vlm = train.make_model(cfg, device)
    for p in vlm.parameters():
        local(p.detach()).sum()                               # a mapped page counts when it is touched
    seen.append(model_memory())
    done.set()
    with open(f"{report}{train.ranks.rank}", "w") as f:
        f.write(str(max(seen) - seen[0]))


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="reads Linux's /proc")
def test_no_rank_ever_holds_the_whole_llm(tiny, world, tmp_path):
    config = AutoConfig.from_pretrained(tiny.qwen, hidden_size=512, intermediate_size=2048, num_hidden_layers=16,
                                        num_attention_heads=8, layer_types=["full_attention"] * 16, max_window_layers=16)
    llm = AutoModelForCausalLM.from_config(config)
    size = sum(p.numel() * 4 for p in llm.parameters())
    shutil.copytree(tiny.qwen, tmp_path / "llm", ignore=shutil.ignore_patterns("*.safetensors"))
    llm.save_pretrained(tmp_path / "llm", max_shard_size=size // 16)
    del llm
    peaks = {}
    for count in (1, 2):
        argv = str(tmp_path / "llm"), tiny.qwen, tiny.clip, f"{world}/words.json", f"{tmp_path}/peak"
        assert ranks(count, peak_of_loading, *argv) == [0] * count
        peaks[count] = [int((tmp_path / f"peak{r}").read_text()) / size for r in range(count)]
    print(f"of {size / 1e6:.0f} MB of weights at most held, by the number of ranks: {peaks}")
    assert peaks[1][0] > 0.95 and max(peaks[2]) < 0.85


# ---- what is about CUDA, without a GPU

@pytest.fixture
def two_gpus(monkeypatch):
    """A machine with two GPUs, as torch describes it. -> the list of devices that became the process's own"""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize("name, local_rank, found", [       # the index of the device, or words of the refusal
    ("cuda:1", "", 1), ("cuda", "", 0), ("", "", 0), ("cuda", "1", 1), ("cuda:1", "0", "all ranks of torchrun on one GPU"),
    ("cuda", "2", "lower --nproc_per_node"), ("cuda:2", "", "torch sees 2 GPUs")])
def test_cuda_uses_the_device_that_was_named_or_refuses_it(two_gpus, monkeypatch, name, local_rank, found):
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            own_device(name)
        assert not two_gpus
        return
    device = own_device(name)
    assert device == torch.device("cuda", found) and two_gpus == [device]


def test_training_on_a_device_without_float64_is_refused(tiny, world, tmp_path):
    with pytest.raises(ValueError, match="float64.*use --device=cpu"):
        train.main(train.read_settings(settings(tiny, world, tmp_path / "x", "--device=mps")))


def test_too_little_shared_memory_is_said_before_the_run(monkeypatch):
    """Docker's 64 MB, and a loader of two processes with pictures of the paper's size; half as many bytes fit."""
    monkeypatch.setattr(os.path, "isdir", lambda path: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=64 << 20))
    with pytest.raises(ValueError, match=r"67 MB free and the loader needs 173 MB: .*--ipc=host"):
        check_shared_memory(2, 32, 336)
    check_shared_memory(0, 32, 336)
    check_shared_memory(2, 12, 336)
    with pytest.raises(ValueError, match="325 MB"):                 # a picture is up to 1 + 4 squares
        check_shared_memory(2, 12, 336, ((336, 672), (672, 672)))


def test_lengths_in_multiples_change_no_loss(tiny, world, five, tmp_path):
    """Padding on the right is seen by nobody. A multiple that the LLM has no positions for is made smaller."""
    for pad_to in (1, 64):
        train_here(settings(tiny, world, tmp_path / f"{pad_to}", *five, "--stage=sft", f"--pad_to={pad_to}"))
    assert losses(tmp_path / "64") == pytest.approx(losses(tmp_path / "1"), **LOSS)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert [length_multiple(0, cuda, None), length_multiple(0, cpu, None), length_multiple(0, cuda, 2048)] == [64, 1, 64]
    assert [length_multiple(0, cuda, 1000), length_multiple(128, cpu, 4096)] == [8, 128]


def sum_on_rank(report):
    """Sums of two ranks, where each rank has numbers and tensors, and a gradient for other parameters."""
    os.environ.setdefault("RANK", "0")
    train.setup_ranks(train.Settings(device="cpu", dtype="float32"))
    rank = train.ranks.rank
    parameters = [(name, torch.nn.Parameter(torch.zeros(2))) for name in "abc"]
    for _, p in parameters[:1 + rank]:
        p.grad = torch.ones(2)
    sums = {"loss": torch.tensor(0.1, dtype=torch.float64) * (rank + 1), "trained": 3 + rank, "images": 0}
    with open(f"{report}{rank}", "w") as file:
        json.dump(sum_up(sums, parameters), file)
    leave()
    return 0


def test_sums_and_the_parameters_that_were_reached(tmp_path):
    assert ranks(2, sum_on_rank, f"{tmp_path}/sums") == [0, 0]
    for rank in range(2):
        assert json.loads((tmp_path / f"sums{rank}").read_text()) == [
            {"loss": 0.1 + 0.2, "trained": 7, "images": 0}, [2, 1, 0]]


def wait_long(report):
    """Ranks with a patience of 1 s in the default group; rank 0 works for longer before the others go on."""
    from support import ranks as module
    module.NCCL_TIMEOUT = timedelta(seconds=1)
    for name, value in {"device_count": lambda: 2, "is_available": lambda: True, "set_device": lambda device: None}.items():
        setattr(torch.cuda, name, value)
    begin, new_group = torch.distributed.init_process_group, torch.distributed.new_group
    groups = []
    # NCCL is not here. gloo keeps to its timeout as well.
    torch.distributed.init_process_group = lambda backend, timeout, device_id: groups.append((backend, timeout)) or begin(
        "gloo", timeout=timeout)
    torch.distributed.new_group = lambda backend, timeout: groups.append((backend, timeout)) or new_group(
        backend=backend, timeout=timeout)
    module.setup_ranks(train.Settings(device="cuda", dtype="float32"))
    assert groups == [("nccl", timedelta(seconds=1)), ("gloo", timedelta(hours=6))]
    assert module.on_rank0(lambda: time.sleep(2) or "done") == "done"
    if module.rank == 0:
        time.sleep(2)
    module.wait_for_all()
    if report == "hang" and module.rank == 0:
        time.sleep(2)
    try:
        module.reduce_sum(torch.ones(1))
    except RuntimeError as error:
        return 3 if "imed out" in str(error) else 4
    return 0


def test_long_work_of_rank_0_is_waited_for_and_a_hang_is_not():
    assert ranks(2, wait_long, "work") == [0, 0]
    assert ranks(2, wait_long, "hang")[1] == 3
