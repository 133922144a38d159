"""
The checks of tests/gpu.sh. Each prints one line with its criterion, and all go into one JSON file.

    python tests/gpu.py [--out FILE.json] [--sections 1 4 ...]

Each section runs in a process of its own with a time box, so that a failure or a crash ends that
section alone. DEVICE and SMALL come from the environment, see gpu.sh.
"""
import argparse
import functools
import importlib.util
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
import bench  # noqa: E402
import common  # noqa: E402
import data  # noqa: E402
import generate  # noqa: E402
import train  # noqa: E402
import vocab  # noqa: E402
from support import sharding  # noqa: E402
from support.device import set_precision  # noqa: E402

DEVICE = os.environ.get("DEVICE", "cuda")
SMALL = bool(os.environ.get("SMALL"))
TOTAL = 470             # seconds for all sections; the last one gets what is left
# Operations a second of dense bfloat16 products, by the data sheets.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
ATTENTION = ["sdpa"] + ["flash_attention_2"] * bool(importlib.util.find_spec("flash_attn"))


# ---- results

def check(name, passed, criterion, **numbers):
    """Print one line and add it to the results. passed: None where the numbers have no bar."""
    verdict = {True: "pass", False: "FAIL", None: "note"}[passed]
    shown = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in numbers.items()}
    text = "  ".join(f"{key} {value}" for key, value in shown.items())
    print(f"{verdict}  {name:58} {criterion:42} {text}", flush=True)
    row = {"name": name, "verdict": verdict, "criterion": criterion, **shown}
    with open(os.environ["GPU_RESULTS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def attempt(name, work, *args):
    """Run a part of a section. An error fails this part alone."""
    try:
        work(*args)
    except Exception as error:          # whatever goes wrong here is a result
        traceback.print_exc()
        lines = str(error).splitlines() or [""]
        check(name, False, "runs", error=f"{type(error).__name__}: {lines[0]}")


def median_seconds(calls, most=3):
    """Return {name: median of the seconds that a call takes} of {name: function}."""
    times = bench.take_turns(calls, most)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def peak_bytes(call):
    """Return the bytes that a call adds at its worst moment to those before it; 0 on a CPU."""
    if DEVICE == "cpu":
        call()
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def bar(passed):
    """Return whether a bar of speed or memory is reached. None at tiny sizes: it says nothing."""
    return None if SMALL or DEVICE == "cpu" else bool(passed)


def run(*command):
    """Return (exit status, output) of a Python command in the repository's folder."""
    job = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, text=True, timeout=600,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if job.returncode:
        print(job.stdout[-3000:], flush=True)
    return job.returncode, job.stdout


# ---- 1. the parts of the project, against float64

def parts(folder):
    files = ["tests/test_device.py"] + ["tests/test_combine.py"] * (not SMALL)
    status, output = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
    failed = re.findall(r"^FAILED (\S+)", output, re.M)
    check("device-independent tests", status == 0, "all pass",
          summary=output.strip().splitlines()[-1], failed=failed)


# ---- 2. the vocabulary combination

def combination(folder):
    for normalize in ("softmax", "none"):
        attempt(f"combination, {normalize}, errors", combination_errors, normalize)
    for D in (24,) if SMALL else (896, 3584):
        attempt(f"combination, D {D}, speed", combination_speed, D)


def combination_errors(normalize):
    """Compare fused.py with the plain formula in float64.

    Also for one patch, a K that no block size divides, and scores up to 1e4.
    """
    H, K, D = (16, 203, 12) if SMALL else (256, 19203, 896)
    set_precision(torch.float32)
    spreads = (1.0, 1e4) if normalize == "softmax" else (1.0,)  # raw scores cannot overflow
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        worst = {}
        for P, spread in itertools.product((1, 577), spreads):
            at = bench.Combination(P, H, K, D, dtype, spread)
            exact = bench.Combination(P, H, K, D, torch.float64, spread)
            results, expected = at.run("fused", normalize), exact.run("plain", normalize)
            # Near one-hot weights the gradients nearly vanish. Their error says nothing then, and
            # it is enough that they are finite.
            compared = 1 if spread > 1 else 4
            errors = [float((a.double() - e).abs().max() / e.abs().max())
                      for a, e in zip(results[:compared], expected)]
            is_finite = all(t.isfinite().all() for t in results)
            worst[f"P {P}, spread {spread:g}"] = max(errors) if is_finite else float("inf")
        check(f"combination, {normalize}, {str(dtype)[6:]}, error by float64's",
              max(worst.values()) < limit, f"largest relative error < {limit:g}", **worst)


def combination_speed(D):
    """Measure time and memory at the paper's sizes: 32 pictures of 576 patches."""
    P, H, K = (50, 16, 203) if SMALL else (18432, 5120, 19200)
    at = bench.Combination(P, H, K, D, torch.bfloat16)
    calls = {"products": at.six_products, "raw": lambda: at.run("fused", "none")}
    for way in ("fused", "plain") if SMALL else ("fused", "plain", "compiled"):
        calls[way] = functools.partial(at.run, way)
    times = median_seconds(calls)
    ratio = times["fused"] / times["products"]
    check(f"combination, D {D}, time by its six products'", bar(ratio <= 1.25), "fused <= 1.25",
          fused_by_products=ratio, **{f"{name}_s": value for name, value in times.items()})
    fused, plain = (peak_bytes(calls[name]) / 1e9 for name in ("fused", "plain"))
    ratio = fused / max(plain, 1e-9)
    check(f"combination, D {D}, extra memory / the plain formula's", bar(ratio <= 0.3),
          "fused <= 0.3", fused_by_plain=ratio, fused_GB=fused, plain_GB=plain)


# ---- 3. stage 1

def sizes():
    """Return (config of the tower, config of the LLM, pixels of a side, H, K, images)."""
    if SMALL:
        from test_bench import configs
        return *configs(), 24, 24, 200, 2
    tower = bench.config_of("openai/clip-vit-large-patch14-336")
    return tower, bench.config_of("Qwen/Qwen2-0.5B-Instruct"), 336, 5120, 19200, 32


def random_vlm(normalize, dtype="bfloat16"):
    """Return (VLM with random weights and a LangBridge, images of a batch)."""
    tower, llm, side, H, K, images = sizes()
    with torch.device(DEVICE):                          # draws the weights there, which is faster
        vlm = bench.random_vlm(tower, llm, side, getattr(torch, dtype))
        vlm.connector = bench.random_bridge(vlm, normalize, H, K)
    return vlm, images


def stage1(folder):
    for normalize in ("none", "softmax"):
        attempt(f"stage 1, {normalize}", stage1_step, normalize)
    attempt("loader", loader, folder)


def stage1_step(normalize):
    vlm, images = random_vlm(normalize)
    batch = bench.captions(vlm, images, 64)
    calls = bench.steps(vlm, batch, "bfloat16")
    losses = {name: call() for name, call in calls.items()}
    error = abs(losses["ours"] - losses["LLaVA"]) / losses["LLaVA"]
    check(f"stage 1, {normalize}, loss by transformers' LLaVA's", error < 2e-2,
          "relative difference < 0.02", **losses)

    times = median_seconds(calls)
    check(f"stage 1, {normalize}, a step by transformers' LLaVA's",
          bar(times["ours"] <= 1.02 * times["LLaVA"]), "ours <= 1.02",
          images_a_second=images / times["ours"], LLaVA_images_a_second=images / times["LLaVA"])

    if not SMALL:
        weights = sum(t.numel() * t.element_size() for t in [*vlm.parameters(), *vlm.buffers()])
        moments = 8 * sum(p.numel() for p in vlm.connector.parameters())
        measured = weights + moments + peak_bytes(calls["ours"])
        said = dry_run_bytes(normalize, images)
        check(f"stage 1, {normalize}, memory by what --dry_run says",
              bar(0.6 * said < measured < said + (5 << 30)), "0.6 x said < measured < said + 5 GiB",
              measured_GB=measured / 1e9, said_GB=said / 1e9)

    # By train.py's own loop, with a batch as the loader gives it.
    batch = batch | {"pixel_values": batch["pixel_values"].cpu()}
    if DEVICE != "cpu":
        batch = {key: value.pin_memory() if torch.is_tensor(value) else value
                 for key, value in batch.items()}
    device = torch.device(DEVICE)
    autocast = torch.autocast(device.type, torch.bfloat16)
    count = waits(lambda: train.accumulate(vlm, iter([dict(batch)]), 1, None, autocast, device,
                                           False, train.Settings()))
    check(f"stage 1, {normalize}, waits of the CPU in a micro-batch", bar(count <= 1), "at most 1",
          waits=count)

    speed = flops_of(calls["ours"]) / times["ours"]
    mfu = {"MFU": speed / peak for name, peak in PEAK.items() if name in bench.processor()}
    check(f"stage 1, {normalize}, operations a second", None, "", TFLOP=speed / 1e12, **mfu)


def flops_of(call):
    """Return the operations of a call in products, convolutions and attention."""
    def addmm(total, a, b, *args, **kwargs):
        return 2 * a[0] * a[1] * b[1]

    # torch's own formula fails if addmm gets out_dtype, as from support/device.py on a GPU.
    formulas = {torch.ops.aten.addmm: addmm}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        call()
    return counter.get_total_flops()


def dry_run_bytes(normalize, images):
    """Return the memory that `train.py --dry_run` says for a step of stage 1."""
    _, output = run("train.py", "--dry_run", f"--batch_size={images}", f"--normalize={normalize}",
                    "--llm=Qwen/Qwen2-0.5B-Instruct",
                    "--vision_tower=openai/clip-vit-large-patch14-336")
    return float(re.search(r"^sum +([\d.]+)", output, re.M)[1]) * 2 ** 30


def waits(call):
    """Return how often the CPU waits for the GPU in a call; 0 on a CPU."""
    call()
    if DEVICE == "cpu":
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def loader(folder):
    """Measure how many JPEG pictures a second the loader's processes make."""
    from PIL import Image
    count = 16 if SMALL else 512
    os.makedirs(f"{folder}/jpeg")
    generator = torch.Generator().manual_seed(0)
    for i in range(16):
        noise = torch.randint(0, 256, (30, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).resize((640, 480)).save(f"{folder}/jpeg/{i}.jpg")
    conversation = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
    common.write_json([{"image": f"{i % 16}.jpg", "conversations": conversation}
                       for i in range(count)], f"{folder}/jpeg.json")
    image = {"size": 336, "mean": [0.5] * 3, "std": [0.5] * 3, "mode": "pad"}
    dataset = data.Conversations(f"{folder}/jpeg.json", f"{folder}/jpeg", None, 576, image)
    speeds = {}
    for workers in (2,) if SMALL else (2, 8, 16):
        batches = torch.utils.data.DataLoader(dataset, batch_size=8, num_workers=workers,
                                              collate_fn=lambda samples: data.collate(samples, 0))
        start = time.perf_counter()
        images = sum(len(batch["pixel_values"]) for batch in batches)
        speeds[f"{workers}_workers"] = images / (time.perf_counter() - start)
    check("loader alone, images a second", images == count, "each picture comes", **speeds)


# ---- 4. SFT

def sft(folder):
    reference = []
    for attention, is_compiled in [*((attention, False) for attention in ATTENTION),
                                   *[("sdpa", True)] * (not SMALL)]:
        name = f"SFT, {attention}{', compiled' * is_compiled}"
        attempt(name, sft_step, name, attention, is_compiled, reference)
    attempt("SFT, torchrun --shard", sharded, folder)


def sft_step(name, attention, is_compiled, reference):
    """Train connector and LLM for five steps: bf16 autocast over float32 weights, checkpointing.

    reference: losses to compare with; the first call fills it.
    """
    vlm, images = random_vlm("softmax")
    vlm.llm.float().requires_grad_(True)
    vlm.llm.gradient_checkpointing_enable({"use_reentrant": False})
    if is_compiled:
        for block in sharding.transformer_blocks(vlm.llm):
            block.compile(dynamic=True)
    # A quarter of 32 images are 8 samples, as in config/paper/sft.py.
    batch = bench.captions(vlm, max(1, images // 4), 8 if SMALL else 448)
    calls, losses = bench.steps(vlm, batch, "bfloat16", attention, lr=1e-4), []
    vlm.llm.train()                     # only then the library checkpoints

    def step():
        losses.append(calls["ours"]())

    start = time.perf_counter()
    memory = peak_bytes(step)
    first = time.perf_counter() - start
    took = median_seconds({"step": step})["step"]
    if not reference:
        reference.extend(losses)
    off = max(abs(a - b) for a, b in zip(losses, reference))
    check(name, off < 2e-2 and losses[-1] < losses[0], "loss falls; within 0.02 of sdpa's",
          tokens_a_second=batch["input_ids"].numel() / took, first_step_s=first,
          extra_memory_GB=memory / 1e9, losses=[round(loss, 4) for loss in losses], off=off)


def tiny_arguments(folder, out, *more):
    """Return the arguments of train.py for the models and pictures of make_world."""
    return [f"--llm={folder}/llm", f"--vision_tower={folder}/tower", f"--words={folder}/words.json",
            "--hidden=64", f"--images={folder}/images", f"--data={folder}/data.json",
            f"--out={folder}/{out}", "--stage=sft", "--template=chat", "--global_batch=8",
            "--batch_size=4", "--workers=1", "--probe_every=0", f"--device={DEVICE}", *more]


def tiny_run(folder, out, *more, launcher=()):
    """Return the output of train.py on the models and pictures of make_world."""
    return run(*launcher, "train.py", *tiny_arguments(folder, out, *more))[1]


def make_world(folder):
    """Write a small LLM, a tower, 64 pictures and conversations, and words, all random."""
    if os.path.isdir(f"{folder}/llm"):
        return
    from PIL import Image
    from conftest import PROCESSOR, byte_level
    side, patch_size, D, layers = (24, 8, 32, 2) if SMALL else (336, 14, 256, 4)
    byte_level(f"{folder}/llm")
    torch.manual_seed(0)
    # Heads of 32 numbers, which every kind of attention takes. No position is beyond the context.
    llm = transformers.Qwen2Config(
        hidden_size=D, intermediate_size=2 * D, num_hidden_layers=layers,
        num_attention_heads=D // 32, num_key_value_heads=D // 32, vocab_size=500, eos_token_id=2,
        pad_token_id=0, bos_token_id=None, initializer_range=0.1)
    transformers.Qwen2ForCausalLM(llm).save_pretrained(f"{folder}/llm")
    tower = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2,
        image_size=side, patch_size=patch_size)
    transformers.CLIPVisionModel(tower).save_pretrained(f"{folder}/tower")
    common.write_json(PROCESSOR, f"{folder}/tower/preprocessor_config.json")
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{folder}/llm")
    vocab.save_words(sorted(vocab.shared_words([tokenizer])), f"{folder}/words.json")
    os.makedirs(f"{folder}/images")
    records, colours = [], ("red", "green", "blue", "white")
    for i in range(64):
        Image.new("RGB", (side, side), colours[i % 4]).save(f"{folder}/images/{i}.png")
        records.append({"id": str(i), "image": f"{i}.png", "conversations": [
            {"from": "human", "value": "<image>\nwhat colour is it?"},
            {"from": "gpt", "value": f"a {colours[i % 4]} square" + " and a star" * (i % 5)}]})
    common.write_json(records, f"{folder}/data.json")


def log_of(out):
    """Return [(loss, gradient norm)] of the steps of a run."""
    with open(f"{out}/log.jsonl") as file:
        return [(row["loss"], row["grad_norm"]) for row in map(json.loads, file)]


def difference(out, other):
    """Return the largest difference of two runs' losses."""
    return max(abs(a - b) for (a, _), (b, _) in zip(log_of(out), log_of(other), strict=True))


def sharded(folder):
    """Compare a run of train.py alone with one under torchrun with --shard (NCCL on CUDA)."""
    make_world(folder)
    more = ["--max_steps=4", "--llm_lr=1e-3"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
    tiny_run(folder, "alone", *more)
    output = tiny_run(folder, "sharded", *more, "--shard", launcher=torchrun)
    off = difference(f"{folder}/alone", f"{folder}/sharded")
    check("SFT, torchrun --nproc_per_node=1 --shard, losses", ", sharded" in output and off < 2e-2,
          "within 0.02 of one process", off=off,
          losses=[round(loss, 4) for loss, _ in log_of(f"{folder}/sharded")])
    for attention in ATTENTION:
        tiny_run(folder, f"packed-{attention}", *more, "--pack", f"--attention={attention}")
        off = difference(f"{folder}/alone", f"{folder}/packed-{attention}")
        check(f"SFT, --pack, {attention}, losses", off < 2e-2, "within 0.02 of padded rows",
              off=off)


# ---- 5. exact resume

def exact_resume(folder):
    attempt("resume with --deterministic", resume, folder)
    attempt("drift without --deterministic", drift, folder)


def resume(folder):
    """Kill a run after its state of step 2, start it again, and compare with a whole run."""
    make_world(folder)
    more = ["--max_steps=6", "--save_every=2", "--deterministic", "--checkpointing"]
    start = time.perf_counter()
    tiny_run(folder, "calm", *more)
    took = time.perf_counter() - start
    job = subprocess.Popen([sys.executable, "train.py", *tiny_arguments(folder, "killed", *more)],
                           cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    state, until = f"{folder}/killed/state/step-00000002", time.time() + 200
    while not os.path.isdir(state) and job.poll() is None and time.time() < until:
        time.sleep(0.005)
    job.kill()
    job.wait()
    steps_at_kill = len(log_of(f"{folder}/killed"))
    resumed = "going on at step" in tiny_run(folder, "killed", *more)
    same_log = log_of(f"{folder}/calm") == log_of(f"{folder}/killed")
    calm, killed = (open(f"{folder}/{name}/connector.safetensors", "rb").read()
                    for name in ("calm", "killed"))
    check("resume with --deterministic, killed once", resumed and same_log and calm == killed,
          "losses, norms and weights to the bit", resumed=resumed, same_log=same_log,
          same_weights=calm == killed, steps_at_kill=steps_at_kill, calm_run_s=took)


def drift(folder):
    """Measure how far two runs of one command come apart."""
    make_world(folder)
    steps, times = 4 if SMALL else 50, {}
    for name in ("one", "two", "deterministic"):
        start = time.perf_counter()
        tiny_run(folder, name, "--checkpointing", f"--max_steps={steps}", "--epochs=8",
                 "--llm_lr=1e-4", *["--deterministic"] * (name == "deterministic"))
        times[name] = time.perf_counter() - start
    off = difference(f"{folder}/one", f"{folder}/two")
    check("drift of two runs without --deterministic", off < 0.1, "losses within 0.1", steps=steps,
          off=off, seconds=times["one"], seconds_deterministic=times["deterministic"])


# ---- 6. generation

def generation(folder):
    attempt("tokens a second", generation_speed)
    attempt("answers by batch", answers_by_batch)


def generation_speed():
    vlm, _ = random_vlm("softmax")
    set_precision(torch.bfloat16)
    count, tokens = (2, 4) if SMALL else (16, 64)
    prompts, pixels, index = bench.pope_prompts(vlm, count, 1)

    def answer(cudnn):
        generate.CUDNN_ATTENTION = cudnn
        generate.generate(vlm, prompts, pixels, tokens, image_index=index)

    times = median_seconds({"with_cudnn": lambda: answer(True),
                            "without_cudnn": lambda: answer(False)}, most=2)
    speeds = {name: count * tokens / seconds for name, seconds in times.items()}
    check("generation, tokens a second",
          bar(speeds["without_cudnn"] >= 0.9 * speeds["with_cudnn"]),
          "without cuDNN attention >= 0.9 x with", batch=count, **speeds)


def answers_by_batch():
    """Count the answers that differ between batches of one prompt and one batch of all."""
    count, tokens = (3, 4) if SMALL else (24, 16)
    for dtype in ("float32", "bfloat16"):
        vlm, _ = random_vlm("softmax", dtype)
        set_precision(getattr(torch, dtype))
        prompts, pixels, index = bench.pope_prompts(vlm, count, 1, shortest=8, longest=40)
        together = generate.generate(vlm, prompts, pixels, tokens, image_index=index)
        alone = [generate.generate(vlm, [prompt], pixels[i:i + 1], tokens, image_index=[0])[0]
                 for prompt, i in zip(prompts, index)]
        share = sum(a != b for a, b in zip(together, alone)) / count
        check(f"answers that change with the batch, {dtype}",
              share == 0 if dtype == "float32" else None, "none in float32", share=share,
              answers=count, distinct=len({tuple(answer) for answer in alone}))


# ---- 7. the README's first command

def speedrun(folder):
    """Run speedrun.sh and print its table. At tiny sizes: the table of stored results."""
    command = ["bash", "speedrun.sh"]
    if SMALL:
        files = [f"results/pocket/seed1/{name}.json" for name in ("qwen-MLP", "qwen-LB")]
        command = [sys.executable, "eval.py", "--table", *files]
    # Half of it says something, too, so the time box of the section does not cut it off.
    limit = float(os.environ.get("GPU_LIMIT", TOTAL)) - 15
    start = time.perf_counter()
    with open(f"{folder}/speedrun.txt", "w") as file:
        job = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                               env={**os.environ, "PYTHON": sys.executable})
        try:
            job.wait(limit)
        except subprocess.TimeoutExpired:
            job.terminate()                             # it stops what it has started
    minutes = (time.perf_counter() - start) / 60
    with open(f"{folder}/speedrun.txt") as file:
        output = file.read()
    if job.returncode is None:                          # no time was left
        check("speedrun.sh", None, "ends with a table", minutes=minutes,
              reached=output.strip().splitlines()[-1:],
              advice="bash tests/gpu.sh --sections 7 gives it all the time")
        return
    if job.returncode:
        print(output[-3000:], flush=True)
    table = [line for line in output.splitlines() if line.startswith("|")]
    print("here:", *table, "on a CPU: results/pocket/table.md", sep="\n")
    check("speedrun.sh", job.returncode == 0 and len(table) > 2, "ends with a table",
          minutes=minutes, table=table)


# ---- all sections

# Each with its time box in seconds, of which no more is given than what is left of TOTAL.
SECTIONS = {1: (parts, 70), 2: (combination, 90), 3: (stage1, 80), 4: (sft, 90),
            5: (exact_resume, 110), 6: (generation, 60), 7: (speedrun, TOTAL)}


def run_section(number, limit):
    """Run a section in a process of its own. Return its results as the JSON file has them."""
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        lines = f"{folder}/results.jsonl"
        open(lines, "w").close()
        command = [sys.executable, __file__, f"--section={number}", f"--folder={folder}"]
        job = subprocess.Popen(command, cwd=ROOT, start_new_session=True,
                               env={**os.environ, "GPU_RESULTS": lines, "GPU_LIMIT": str(limit)})
        try:
            status = job.wait(limit)
        except subprocess.TimeoutExpired:
            status = "cut off by its time box"
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)      # with all that the section has started
                job.wait()
        with open(lines, encoding="utf-8") as file:
            checks = [json.loads(line) for line in file]
    passed = status == 0 and all(row["verdict"] != "FAIL" for row in checks)
    section = {"name": SECTIONS[number][0].__name__, "verdict": "pass" if passed else "FAIL",
               "status": status, "seconds": round(time.time() - start, 1), "checks": checks}
    print(f"{section['verdict']}  section {number}, {section['name']}: {section['seconds']:.0f} s, "
          f"{status}", flush=True)
    return section


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", help="the JSON file to write")
    add("--sections", nargs="+", type=int, choices=SECTIONS, default=list(SECTIONS))
    add("--section", type=int, help=argparse.SUPPRESS)      # a child: this section alone
    add("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.section:
        SECTIONS[args.section][0](args.folder)
        return
    if DEVICE != "cpu" and not torch.cuda.is_available():
        sys.exit("tests/gpu.py: torch sees no GPU; DEVICE=cpu SMALL=1 runs without one")
    name = torch.cuda.get_device_name() if DEVICE != "cpu" else "cpu"
    path = args.out or f"{ROOT}/results/gpu/{re.sub('[^A-Za-z0-9]+', '-', name)}.json"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True,
                            text=True)
    results = {"device": name, "torch": torch.__version__,
               "transformers": transformers.__version__,
               "commit": commit.stdout.strip() or None, "small": SMALL}
    print(json.dumps(results), flush=True)
    results["sections"] = {}
    start = time.time()
    for number in args.sections:
        limit = SECTIONS[number][1]
        if not SMALL:                               # a CPU may be slow
            limit = max(20, min(limit, TOTAL - (time.time() - start)))
        results["sections"][number] = run_section(number, limit)
        common.write_json(results, path)
    failed = [n for n, section in results["sections"].items() if section["verdict"] == "FAIL"]
    verdict = f"sections {failed} failed" if failed else "all sections passed"
    print(f"{path}: {verdict}, {time.time() - start:.0f} s")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
