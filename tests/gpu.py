"""
The checks of tests/gpu.sh. Each prints one line with its pass criterion, and all go into one JSON file.

    python tests/gpu.py [--out FILE.json] [--sections 1 4 ...]

Each section runs in a process of its own with a time box, so that a failure or a crash ends that section alone.
DEVICE and SMALL come from the environment, see gpu.sh.
"""
import argparse
import importlib.util
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

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
DEVICE = os.environ.get("DEVICE", "cuda")
SMALL = bool(os.environ.get("SMALL"))
TOTAL = 470             # seconds for all sections; the last one gets what is left
# Operations a second of dense bfloat16 products, by the data sheets.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


# ---- results

def check(name, passed, criterion, **numbers):
    """Print one line and add it to the results. passed: None where nothing is required of the numbers."""
    verdict = {True: "pass", False: "FAIL", None: "note"}[passed]
    shown = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in numbers.items()}
    text = "  ".join(f"{key} {value}" for key, value in shown.items())
    print(f"{verdict}  {name:58} {criterion:42} {text}", flush=True)
    with open(os.environ["GPU_RESULTS"], "a", encoding="utf-8") as file:
        file.write(json.dumps({"name": name, "verdict": verdict, "criterion": criterion, **shown}) + "\n")


def attempt(name, work, *args):
    """Run a part of a section. An error fails this part alone."""
    try:
        work(*args)
    except Exception as error:          # whatever goes wrong here is a result, and the next part still runs
        traceback.print_exc()
        check(name, False, "runs", error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def synchronize():
    import torch
    if DEVICE != "cpu":
        torch.cuda.synchronize()


def seconds(call, rounds=3, warm_up=1):
    """Return the median of the seconds that a call takes."""
    times = []
    for i in range(warm_up + rounds):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warm_up:])


def peak_bytes(call):
    """Return the bytes that a call holds at its worst moment beside those that were there before; 0 on a CPU."""
    import torch
    if DEVICE == "cpu":
        call()
        return 0
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


def bar(passed):
    """Return whether a bar of speed or memory is reached, or None at tiny sizes, where it says nothing."""
    return None if SMALL or DEVICE == "cpu" else bool(passed)


def run(*command, env=None, limit=600):
    """Return (exit status, output) of a command in the repository's folder."""
    job = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, text=True, timeout=limit,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})})
    return job.returncode, job.stdout


# ---- 1. the parts of the project, against float64

def parts(folder):
    files = ["tests/test_device.py"] + ["tests/test_combine.py"] * (not SMALL)
    status, output = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
    failed = re.findall(r"^FAILED (\S+)", output, re.M)
    if status:
        print(output[-3000:], flush=True)
    check("device-independent tests", status == 0, "all pass", summary=output.strip().splitlines()[-1], failed=failed)


# ---- 2. the vocabulary combination

def combination(folder):
    for normalize in ("softmax", "none"):
        attempt(f"combination, {normalize}, errors", combination_errors, normalize)
    widths = (24,) if SMALL else (896, 3584)
    for D in widths:
        attempt(f"combination, D {D}, speed", combination_speed, D)


def combination_errors(normalize):
    """Compare fused.py with the plain formula in float64: one patch, K not divisible, scores up to 1e4."""
    import torch
    import fused
    import model
    H, K, D = (16, 203, 12) if SMALL else (256, 19203, 896)
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        worst = {}
        for P in (1, 577):
            for spread in (1.0, 1e4):
                if spread > 1 and normalize == "none":
                    continue                            # without a softmax no score overflows
                generator = torch.Generator().manual_seed(P)

                def random(*shape, scale=1.0):
                    return (torch.randn(*shape, generator=generator) * scale).bfloat16().to(DEVICE)
                z, W, b, E, g = (random(P, H), random(K, H, scale=H ** -0.5), random(K, scale=spread), random(K, D),
                                 random(P, D))
                results = []
                for kind, combine in ((dtype, fused.combine), (torch.float64, model.combine)):
                    leaves = [t.to(kind).requires_grad_() for t in (z, W, b)]
                    out = combine(*leaves, E.to(kind), normalize)
                    results.append((out.detach(), *torch.autograd.grad(out, leaves, g.to(kind))))
                finite = all(t.isfinite().all() for t in results[0])
                # Near one-hot weights the gradients nearly vanish, so they are compared by the output's scale.
                floor = 1e-3 if spread > 1 else 0.0
                errors = [float((a.double() - e).abs().max() / e.abs().max().clamp(min=floor)) for a, e in zip(*results)]
                worst[f"P {P}, spread {spread:g}"] = max(errors[:1] if spread > 1 else errors) if finite else float("inf")
        check(f"combination, {normalize}, {str(dtype)[6:]}, error by float64's", max(worst.values()) < limit,
              f"largest relative error < {limit:g}", **worst)


def combination_speed(D):
    """Measure time and memory at the paper's sizes: 32 pictures of 576 patches."""
    import torch
    import bench
    P, H, K = (50, 16, 203) if SMALL else (18432, 5120, 19200)
    bench.D = D
    at = bench.Combination(P, H, K, torch.bfloat16)
    calls = {"products": at.six_products, "fused": at.ours, "eager": at.plain, "raw": lambda: at.ours("none")}
    if not SMALL:
        calls["compiled"] = at.compiled
    times = {name: seconds(call) for name, call in calls.items()}
    ratio = times["fused"] / times["products"]
    check(f"combination, D {D}, time by its six products'", bar(ratio <= 1.25), "fused <= 1.25",
          fused_by_products=ratio, **{f"{name}_s": value for name, value in times.items()})
    memory = {name: peak_bytes(calls[name]) / 1e9 for name in ("fused", "eager")}
    ratio = memory["fused"] / max(memory["eager"], 1e-9)
    check(f"combination, D {D}, extra memory by the plain chain's", bar(ratio <= 0.3), "fused <= 0.3",
          fused_by_eager=ratio, fused_GB=memory["fused"], eager_GB=memory["eager"])


# ---- 3. stage 1

def sizes():
    """Return (config of the tower, config of the LLM, pixels of a side, H, K, images of a batch)."""
    import bench
    if not SMALL:
        return bench.config_of("openai/clip-vit-large-patch14-336"), bench.config_of("Qwen/Qwen2-0.5B-Instruct"), \
            336, 5120, 19200, 32
    from transformers import AutoConfig
    tower = AutoConfig.for_model("clip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                 num_attention_heads=2, image_size=24, patch_size=8)
    llm = AutoConfig.for_model("qwen2", hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                               num_attention_heads=2, num_key_value_heads=1, vocab_size=300, tie_word_embeddings=True)
    return tower, llm, 24, 24, 200, 2


def random_vlm(kind, dtype="bfloat16", attention="sdpa"):
    """Return (VLM with random weights and a LangBridge of this normalize, or an MLP; images of a batch)."""
    import torch
    import bench
    import model
    tower, llm, side, H, K, images = sizes()
    llm._attn_implementation = attention
    with torch.device(DEVICE):                          # draws the weights there, which is much faster
        vlm = bench.random_vlm(tower, llm, side, getattr(torch, dtype))
    if kind != "mlp":
        embed = vlm.llm.get_input_embeddings().weight
        vlm.connector = model.LangBridge(tower.hidden_size, H, K, kind).to(embed.device)
        vlm.connector.vocab_embeds = embed.detach()[:K].clone()
    return vlm, images


def stage1(folder):
    for kind in ("none", "softmax"):
        attempt(f"stage 1, {kind}", stage1_step, kind)
    attempt("loader", loader, folder)


def stage1_step(kind):
    import torch
    import bench
    import train
    vlm, images = random_vlm(kind)
    batch = bench.captions(vlm, images, 64)
    device = torch.device(DEVICE).type
    calls = bench.steps(vlm, batch, "bfloat16")
    losses = {name: call() for name, call in calls.items()}
    error = abs(losses["ours"] - losses["LLaVA"]) / losses["LLaVA"]
    check(f"stage 1, {kind}, loss by transformers' LLaVA's", error < 2e-2, "relative difference < 0.02", **losses)
    times = {name: seconds(call) for name, call in calls.items()}
    n = images * vlm.num_patches
    D = vlm.llm.get_input_embeddings().embedding_dim
    Dv, (H, K) = vlm.vision_tower.config.hidden_size, sizes()[3:5]
    flops = bench.rest_flops(vlm, batch) + bench.connector_flops(kind, n, Dv, H, K, D)
    peak = next((PEAK[name] for name in PEAK if name in bench.processor()), None)
    mfu = {"MFU": flops / times["ours"] / peak} if peak and DEVICE != "cpu" else {}
    check(f"stage 1, {kind}, a step by transformers' LLaVA's", bar(times["ours"] <= 1.02 * times["LLaVA"]),
          "ours <= 1.02", images_a_second=images / times["ours"], LLaVA_images_a_second=images / times["LLaVA"],
          TFLOP_a_second=flops / times["ours"] / 1e12, **mfu)
    if not SMALL:
        held = sum(t.numel() * t.element_size() for t in [*vlm.parameters(), *vlm.buffers()])
        moments = 8 * sum(p.numel() for p in vlm.connector.parameters())
        measured, said = held + moments + peak_bytes(calls["ours"]), bench.dry_run_bytes(kind, images)
        check(f"stage 1, {kind}, memory by what --dry_run says", bar(0.6 * said < measured < said + (5 << 30)),
              "0.6 x said < measured < said + 5 GiB", measured_GB=measured / 1e9, said_GB=said / 1e9)

    # By train.py's own loop, with a batch as the loader gives it.
    batch = {key: value.cpu() if torch.is_tensor(value) else value for key, value in batch.items()}
    if DEVICE != "cpu":
        batch = {key: value.pin_memory() if torch.is_tensor(value) else value for key, value in batch.items()}
    autocast = torch.autocast(device, torch.bfloat16)

    def micro_batch():
        train.accumulate(vlm, iter([dict(batch)]), 1, autocast, torch.device(DEVICE), False, train.Settings())
    count = waits(micro_batch)
    check(f"stage 1, {kind}, waits of the CPU in a micro-batch", bar(count <= 1), "at most 1", waits=count)


def waits(call):
    """Return how often the CPU waits for the GPU in a call; 0 on a CPU."""
    import torch
    if DEVICE == "cpu":
        call()
        return 0
    call()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def loader(folder):
    """Measure how many JPEG pictures a second the loader's processes make."""
    import torch
    import data
    from PIL import Image
    count = 16 if SMALL else 512
    os.makedirs(f"{folder}/jpeg")
    generator = torch.Generator().manual_seed(0)
    for i in range(16):
        noise = torch.randint(0, 256, (30, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).resize((640, 480)).save(f"{folder}/jpeg/{i}.jpg")
    records = [{"image": f"{i % 16}.jpg", "conversations": [{"from": "human", "value": "<image>"},
                                                            {"from": "gpt", "value": "a"}]} for i in range(count)]
    with open(f"{folder}/jpeg.json", "w") as file:
        json.dump(records, file)
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
    ways = [("sdpa", False)] + [("sdpa", True)] * (not SMALL)
    if importlib.util.find_spec("flash_attn"):
        ways.append(("flash_attention_2", False))
    found = {}
    for attention, is_compiled in ways:
        attempt(f"SFT, {attention}{', compiled' * is_compiled}", sft_step, attention, is_compiled, found)
    attempt("SFT, torchrun --shard", sharded, folder)


def sft_step(attention, is_compiled, found):
    """Train connector and LLM for three steps: bf16 autocast over float32 weights, checkpointing, AdamW."""
    import torch
    import bench
    from support import sharding
    vlm, images = random_vlm("softmax", attention=attention)
    vlm.llm.float().requires_grad_(True).train()
    vlm.llm.gradient_checkpointing_enable({"use_reentrant": False})
    if is_compiled:
        for block in sharding.transformer_blocks(vlm.llm):
            block.compile(dynamic=True)
    images = max(1, images // 4)                        # 8 samples, as in config/paper/sft.py
    batch = bench.captions(vlm, images, 448 if not SMALL else 8)
    trained = [p for p in vlm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    losses = []

    def step():
        with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):
            loss, count = vlm(batch)
        loss.backward()
        for p in trained:
            p.grad.div_(count)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item() / count)
    first = time.perf_counter()
    memory = peak_bytes(step)
    first = time.perf_counter() - first
    took = seconds(step, warm_up=1)
    reference = found.setdefault("losses", losses)
    off = max(abs(a - b) for a, b in zip(losses, reference))
    tokens = batch["input_ids"].numel()
    check(f"SFT, {attention}{', compiled' * is_compiled}", off < 2e-2 and losses[-1] < losses[0],
          "loss falls; within 0.02 of sdpa's", tokens_a_second=tokens / took, first_step_s=first,
          extra_memory_GB=memory / 1e9, losses=[round(loss, 4) for loss in losses], off=off)


def tiny_arguments(folder, out, *more):
    """Return the arguments of train.py for the models and pictures of make_world."""
    return [f"--llm={folder}/llm", f"--vision_tower={folder}/tower", f"--words={folder}/words.json", "--hidden=64",
            f"--images={folder}/images", f"--data={folder}/data.json", f"--out={out}", "--template=chat",
            "--global_batch=8", "--batch_size=4", "--workers=1", "--probe_every=0", f"--device={DEVICE}", *more]


def tiny_run(folder, out, *more, launcher=()):
    """Return (exit status, output) of train.py on the models and pictures of make_world."""
    status, output = run(*launcher, "train.py", *tiny_arguments(folder, out, *more))
    if status:
        print(output[-3000:], flush=True)
    return status, output


def make_world(folder):
    """Write a small LLM, a tower, 64 pictures and conversations, and words, all random. Return the folder."""
    if os.path.isdir(f"{folder}/llm"):
        return folder
    import torch
    from PIL import Image
    from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen2ForCausalLM
    import vocab
    from conftest import PROCESSOR, byte_level
    side, D, layers = (24, 32, 2) if SMALL else (336, 256, 4)
    patch_size = 8 if SMALL else 14
    byte_level(f"{folder}/llm")
    torch.manual_seed(0)
    # Heads of 32 or 64 numbers, which every kind of attention takes. No position is beyond the context.
    Qwen2ForCausalLM(Qwen2Config(
        hidden_size=D, intermediate_size=2 * D, num_hidden_layers=layers, num_attention_heads=D // 32,
        num_key_value_heads=D // 32, vocab_size=500, eos_token_id=2, pad_token_id=0, bos_token_id=None,
        initializer_range=0.1)).save_pretrained(f"{folder}/llm")
    CLIPVisionModel(CLIPVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3,
                                     num_attention_heads=2, image_size=side,
                                     patch_size=patch_size)).save_pretrained(f"{folder}/tower")
    with open(f"{folder}/tower/preprocessor_config.json", "w") as file:
        json.dump(PROCESSOR, file)
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/llm")
    vocab.save_words(sorted(vocab.shared_words([tokenizer])), f"{folder}/words.json")
    os.makedirs(f"{folder}/images")
    records, colours = [], ("red", "green", "blue", "white")
    for i in range(64):
        Image.new("RGB", (side, side), colours[i % 4]).save(f"{folder}/images/{i}.png")
        records.append({"id": str(i), "image": f"{i}.png", "conversations": [
            {"from": "human", "value": "<image>\nwhat colour is it?"},
            {"from": "gpt", "value": f"a {colours[i % 4]} square" + " and a star" * (i % 5)}]})
    with open(f"{folder}/data.json", "w") as file:
        json.dump(records, file)
    return folder


def log_of(out):
    """Return [(loss, gradient norm)] of the steps of a run."""
    with open(f"{out}/log.jsonl") as file:
        return [(row["loss"], row["grad_norm"]) for row in map(json.loads, file)]


def sharded(folder):
    """Compare a run of train.py alone with one under torchrun with --shard (NCCL on CUDA)."""
    world = make_world(folder)
    more = ["--stage=sft", "--max_steps=4", "--llm_lr=1e-3"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
    tiny_run(world, f"{folder}/alone", *more)
    _, output = tiny_run(world, f"{folder}/sharded", *more, "--shard", launcher=torchrun)
    a, b = log_of(f"{folder}/alone"), log_of(f"{folder}/sharded")
    off = max(abs(x[0] - y[0]) for x, y in zip(a, b, strict=True))
    check("SFT, torchrun --nproc_per_node=1 --shard, losses", ", sharded" in output and off < 2e-2,
          "within 0.02 of one process", off=off,
          losses=[round(loss, 4) for loss, _ in b])
    for attention in ("sdpa", *["flash_attention_2"] * bool(importlib.util.find_spec("flash_attn"))):
        out = f"{folder}/packed-{attention}"
        tiny_run(world, out, *more, "--pack", f"--attention={attention}")
        off = max(abs(x[0] - y[0]) for x, y in zip(a, log_of(out), strict=True))
        check(f"SFT, --pack, {attention}, losses", off < 2e-2, "within 0.02 of padded rows", off=off)


# ---- 5. exact resume

def exact_resume(folder):
    attempt("resume with --deterministic", resume, folder)
    attempt("drift without --deterministic", drift, folder)


def resume(folder):
    """Kill a run after its state of step 2, start it again, and compare with a run that nobody killed."""
    world = make_world(folder)
    more = ["--stage=sft", "--max_steps=6", "--save_every=2", "--deterministic", "--checkpointing"]
    start = time.perf_counter()
    tiny_run(world, f"{folder}/calm", *more)
    took = time.perf_counter() - start
    argv = tiny_arguments(world, f"{folder}/killed", *more)
    job = subprocess.Popen([sys.executable, "train.py", *argv], cwd=ROOT, start_new_session=True,
                           stdout=subprocess.DEVNULL)
    until = time.time() + 200
    while not os.path.isdir(f"{folder}/killed/state/step-00000002") and job.poll() is None and time.time() < until:
        time.sleep(0.005)
    job.kill()
    job.wait()
    steps_at_kill = len(log_of(f"{folder}/killed"))
    _, output = tiny_run(world, f"{folder}/killed", *more)
    resumed = "going on at step" in output
    same_log = log_of(f"{folder}/calm") == log_of(f"{folder}/killed")
    contents = [open(f"{folder}/{name}/connector.safetensors", "rb").read() for name in ("calm", "killed")]
    check("resume with --deterministic, killed once", resumed and same_log and contents[0] == contents[1],
          "losses, norms and weights to the bit", resumed=resumed, same_log=same_log,
          same_weights=contents[0] == contents[1], steps_at_kill=steps_at_kill, calm_run_s=took)


def drift(folder):
    """Measure how far two runs of one command come apart."""
    world = make_world(folder)
    more = ["--stage=sft", "--checkpointing", f"--max_steps={4 if SMALL else 50}", "--epochs=8", "--llm_lr=1e-4"]
    times = {}
    for name, flags in (("one", []), ("two", []), ("exact", ["--deterministic"])):
        start = time.perf_counter()
        tiny_run(world, f"{folder}/{name}", *more, *flags)
        times[name] = time.perf_counter() - start
    one, two = log_of(f"{folder}/one"), log_of(f"{folder}/two")
    off = max(abs(a[0] - b[0]) for a, b in zip(one, two, strict=True))
    check("drift of two runs without --deterministic", off < 0.1, "losses within 0.1", steps=len(one), off=off,
          seconds=times["one"], seconds_deterministic=times["exact"])


# ---- 6. generation

def generation(folder):
    attempt("tokens a second", generation_speed)
    attempt("answers by batch", answers_by_batch)


def generation_speed():
    import torch
    import bench
    import generate
    from support.device import set_precision
    vlm, _ = random_vlm("softmax")
    set_precision(torch.bfloat16)
    count, tokens = (2, 4) if SMALL else (16, 64)
    prompts, pixels, index = bench.pope_prompts(vlm, count, 1)
    speeds = {}
    for name, enabled in (("without_cudnn", False), ("with_cudnn", True)):
        generate.CUDNN_ATTENTION = enabled
        took = seconds(lambda: generate.generate(vlm, prompts, pixels, tokens, image_index=index), rounds=1)
        speeds[name] = count * tokens / took
    generate.CUDNN_ATTENTION = False
    check("generation, tokens a second", bar(speeds["without_cudnn"] >= 0.9 * speeds["with_cudnn"]),
          "without cuDNN attention >= 0.9 x with", batch=count, **speeds)


def answers_by_batch():
    """Count the answers that differ between batches of one prompt and one batch of all."""
    import bench
    from generate import generate
    from support.device import set_precision
    count, tokens = (3, 4) if SMALL else (24, 16)
    for dtype in ("float32", "bfloat16"):
        vlm, _ = random_vlm("softmax", dtype)
        set_precision(next(vlm.llm.parameters()).dtype)
        prompts, pixels, index = bench.pope_prompts(vlm, count, 1, shortest=8, longest=40)
        together = generate(vlm, prompts, pixels, tokens, image_index=index)
        alone = [generate(vlm, [p], pixels[i:i + 1], tokens, image_index=[0])[0] for p, i in zip(prompts, index)]
        share = sum(a != b for a, b in zip(together, alone)) / count
        distinct = len({tuple(answer) for answer in alone})
        check(f"answers that change with the batch, {dtype}", share == 0 if dtype == "float32" else None,
              "none in float32", share=share, answers=count, distinct=distinct)


# ---- 7. the README's first command

def speedrun(folder):
    """Run speedrun.sh and print its table beside the CPU's. At tiny sizes: a tiny world, and the stored results."""
    start = time.perf_counter()
    cpu = cells(open(f"{ROOT}/results/pocket/table.md", encoding="utf-8").read())
    if SMALL:
        status, output = run("pocket.py", "--tiny", "--out", f"{folder}/pocket")
        stored = f"{ROOT}/results/pocket/seed1"
        files = [f"{stored}/{name}.json" for name in ("qwen-MLP", "qwen-LB", "qwen-LB-pretrain")]
        second, table = run("eval.py", "--table", *files)
        status, output = status or second, output + table
    else:
        # Half of it says something, too, so the time box of the section does not cut it off.
        limit = float(os.environ["GPU_LIMIT"]) - 15
        with open(f"{folder}/speedrun.txt", "w") as file:
            job = subprocess.Popen(["bash", "speedrun.sh"], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                                   env={**os.environ, "PYTHON": sys.executable})
            try:
                status = job.wait(limit)
            except subprocess.TimeoutExpired:
                job.terminate()                             # it stops what it has started
                status = "no time left"
        with open(f"{folder}/speedrun.txt") as file:
            output = file.read()
    if status == "no time left":
        check("speedrun.sh", None, "ends with a table", minutes=limit / 60, reached=output.strip().splitlines()[-1:],
              advice="bash tests/gpu.sh --sections 7 gives it all the time")
        return
    minutes = (time.perf_counter() - start) / 60
    if status:
        print(output[-3000:], flush=True)
    for name, row in cells(output).items():
        print(f"      {name:40} {'stored' if SMALL else 'here'} {row}  CPU {cpu.get(name)}")
    check("speedrun.sh", status == 0 and len(cells(output)) > 0, "ends with a table", minutes=minutes,
          rows=cells(output))


def cells(text):
    """Return {first cell: other cells} of the rows of numbers of all markdown tables in a text."""
    rows = {}
    for line in text.splitlines():
        row = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and len(row) > 2 and re.search(r"\d", "".join(row[1:])):
            rows[row[0]] = row[1:]
    return rows


# ---- all sections

# Each with its time box in seconds, of which no more is given than what is left of TOTAL.
SECTIONS = {1: (parts, 70), 2: (combination, 90), 3: (stage1, 80), 4: (sft, 90), 5: (exact_resume, 110),
            6: (generation, 60), 7: (speedrun, TOTAL)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="the JSON file to write")
    parser.add_argument("--sections", nargs="+", type=int, choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--section", type=int, help=argparse.SUPPRESS)      # a child: this section alone
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.section:
        SECTIONS[args.section][0](args.folder)
        return
    import torch
    import transformers
    if DEVICE != "cpu" and not torch.cuda.is_available():
        sys.exit("tests/gpu.py: torch sees no GPU; DEVICE=cpu SMALL=1 runs without one")
    name = torch.cuda.get_device_name() if DEVICE != "cpu" else "cpu"
    path = args.out or f"{ROOT}/results/gpu/{re.sub('[^A-Za-z0-9]+', '-', name)}.json"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    results = {"device": name, "torch": torch.__version__, "transformers": transformers.__version__,
               "commit": commit.stdout.strip() or None, "small": SMALL, "sections": {}}
    print(json.dumps({key: value for key, value in results.items() if key != "sections"}), flush=True)
    begin = time.time()
    for number in args.sections:
        function, limit = SECTIONS[number]
        if not SMALL:                               # a CPU may be slow, and nothing is measured there
            limit = max(20, min(limit, TOTAL - (time.time() - begin)))
        start = time.time()
        with tempfile.TemporaryDirectory() as folder:
            lines = f"{folder}/results.jsonl"
            open(lines, "w").close()
            command = [sys.executable, os.path.abspath(__file__), f"--section={number}", f"--folder={folder}"]
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
            rows = [json.loads(line) for line in open(lines, encoding="utf-8")]
        took = time.time() - start
        verdict = "pass" if status == 0 and all(row["verdict"] != "FAIL" for row in rows) else "FAIL"
        print(f"{verdict}  section {number}, {function.__name__}: {took:.0f} s, {status}", flush=True)
        results["sections"][number] = {"name": function.__name__, "verdict": verdict, "status": status,
                                       "seconds": round(took, 1), "checks": rows}
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)
    failed = [number for number, section in results["sections"].items() if section["verdict"] == "FAIL"]
    print(f"{path}: {f'sections {failed} failed' if failed else 'all sections passed'}, {time.time() - begin:.0f} s")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
