"""
The checks of tests/gpu.sh. Each prints one line with its criterion, and all go into one JSON file.

    python tests/gpu.py [--out FILE.json] [--sections 1 4 ...]

Each section runs in a process of its own with a time box, so that a failure or a crash ends that
section alone. DEVICE and SMALL come from the environment, see gpu.sh.
"""
import filecmp
import importlib.util
import json
import os
import pathlib
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
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
import bench  # noqa: E402
import common  # noqa: E402
import data  # noqa: E402
import generate  # noqa: E402
import train  # noqa: E402
import vocab  # noqa: E402
from support.device import set_precision  # noqa: E402

DEVICE = os.environ.get("DEVICE", "cuda")
SMALL = bool(os.environ.get("SMALL"))
# In the process of a section: the folder of its files, and its time box in seconds.
FOLDER, LIMIT = os.environ.get("GPU_FOLDER"), os.environ.get("GPU_LIMIT")
TOTAL = 470             # seconds for all sections; the last one gets what is left
# Operations a second of dense bfloat16 products, by the data sheets.
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
ATTENTION = ["sdpa"] + ["flash_attention_2"] * bool(importlib.util.find_spec("flash_attn"))


# ---- results

def check(name, passed, criterion, **numbers):
    """Print one line and add it to the results. passed: None where the numbers have no bar."""
    verdict = {True: "pass", False: "FAIL", None: "note"}[passed]
    numbers = bench.rounded(numbers)
    text = "  ".join(f"{key} {value}" for key, value in numbers.items())
    print(f"{verdict}  {name:58} {criterion:42} {text}", flush=True)
    row = {"name": name, "verdict": verdict, "criterion": criterion, **numbers}
    with open(f"{FOLDER}/results.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def attempt(work, *args):
    """Run a part of a section. An error fails this part alone."""
    try:
        work(*args)
    except Exception as error:          # whatever goes wrong here is a result
        traceback.print_exc()
        lines = str(error).splitlines() or [""]
        check(" ".join(map(str, (work.__name__, *args))), False, "runs",
              error=f"{type(error).__name__}: {lines[0]}")


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

def parts():
    files = ["tests/test_device.py"] + ["tests/test_combine.py"] * (not SMALL)
    status, output = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
    failed = re.findall(r"^FAILED (\S+)", output, re.M)
    check("device-independent tests", status == 0, "all pass",
          summary=output.strip().splitlines()[-1], failed=failed)


# ---- 2. the vocabulary combination

def combination_errors(normalize):
    """Compare fused.py with the plain formula in float64, with a K that no block size divides."""
    P, H, K, D = (577, 16, 203, 12) if SMALL else (577, 256, 19203, 896)
    set_precision(torch.float32)
    expected = bench.combination(P, H, K, D, torch.float64, normalize)["plain"]()
    for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        results = bench.combination(P, H, K, D, dtype, normalize)["fused"]()
        errors = {name: float((result.double() - e).abs().max() / e.abs().max())
                  for name, result, e in zip(("embeds", "dz", "dW", "db"), results, expected)}
        check(f"combination, {normalize}, {str(dtype)[6:]}, error by float64's",
              all(error < limit for error in errors.values()),
              f"largest relative error < {limit:g}", **errors)


def combination_speed(D):
    """Measure time and memory at the paper's sizes: 32 pictures of 576 patches."""
    P, H, K, D = (50, 16, 203, 24) if SMALL else (18432, 5120, 19200, D)
    ways = bench.combination(P, H, K, D, torch.bfloat16)
    compared = ("six products", "fused", "plain", *["compiled"] * (not SMALL))
    t = bench.take_turns({way: ways[way] for way in compared})
    ratio = bench.ratio(t, "fused", "six products")
    check(f"combination, D {D}, time by its six products'", bar(ratio <= 1.25), "fused <= 1.25",
          fused_by_products=ratio, **bench.medians(t))
    fused, plain = (bench.extra_memory(ways[way]) / 1e9 for way in ("fused", "plain"))
    check(f"combination, D {D}, extra memory / the plain formula's", bar(fused / plain <= 0.3),
          "fused <= 0.3", fused_by_plain=fused / plain, fused_GB=fused, plain_GB=plain)


# ---- 3. stage 1

def random_vlm(normalize, dtype="bfloat16"):
    """Return (VLM with random weights and a LangBridge, images of a batch)."""
    if SMALL:
        from test_bench import configs
        (tower, llm), side, H, K, images = configs(), 24, 24, 200, 2
    else:
        tower = bench.config_of("openai/clip-vit-large-patch14-336")
        llm = bench.config_of("Qwen/Qwen2-0.5B-Instruct")
        side, H, K, images = 336, 5120, 19200, 32
    with torch.device(DEVICE):                          # draws the weights there, which is faster
        vlm = bench.random_vlm(tower, llm, side, getattr(torch, dtype))
        vlm.connector = bench.random_bridge(vlm, normalize, H, K)
    return vlm, images


def stage1_step(normalize):
    vlm, images = random_vlm(normalize)
    batch = bench.captions(vlm, images, 64)
    calls = bench.steps(vlm, batch, "bfloat16")
    losses = {name: call() for name, call in calls.items()}
    error = abs(losses["ours"] - losses["LLaVA"]) / losses["LLaVA"]
    check(f"stage 1, {normalize}, loss by transformers' LLaVA's", error < 2e-2,
          "relative difference < 0.02", **losses)

    t = bench.take_turns(calls)
    ratio = bench.ratio(t, "ours", "LLaVA")
    check(f"stage 1, {normalize}, a step by transformers' LLaVA's", bar(ratio <= 1.02),
          "ours <= 1.02", ours_by_LLaVA=ratio, images=images, **bench.medians(t))

    if not SMALL:
        weights = sum(t.numel() * t.element_size() for t in [*vlm.parameters(), *vlm.buffers()])
        moments = 8 * sum(p.numel() for p in vlm.connector.parameters())
        measured = weights + moments + bench.extra_memory(calls["ours"])
        said = dry_run_bytes(normalize, images)
        check(f"stage 1, {normalize}, memory by what --dry_run says",
              bar(0.6 * said < measured < said + (5 << 30)), "0.6 x said < measured < said + 5 GiB",
              measured_GB=measured / 1e9, said_GB=said / 1e9)

    count = waits(vlm, batch)
    check(f"stage 1, {normalize}, waits of the CPU in a micro-batch", bar(count <= 1), "at most 1",
          waits=count)

    speed = flops_of(calls["ours"]) / statistics.median(t["ours"])
    mfu = {"MFU": speed / peak for name, peak in PEAK.items() if name in bench.processor()}
    check(f"stage 1, {normalize}, operations a second", None, "", TFLOP=speed / 1e12, **mfu)


def flops_of(call):
    """Return the operations of a call in products, convolutions and attention."""
    def addmm(total, a, b, *args, **kwargs):
        return 2 * a[0] * a[1] * b[1]

    # torch's own formula fails if addmm gets out_dtype, as from support/device.py on a GPU.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm: addmm}) as counter:
        call()
    return counter.get_total_flops()


def loader():
    """Measure how many JPEG pictures of 640 x 480 a second the loader's processes make."""
    count = 16 if SMALL else 512
    os.makedirs(f"{FOLDER}/jpeg")
    generator = torch.Generator().manual_seed(0)
    for i in range(16):
        noise = torch.randint(0, 256, (30, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).resize((640, 480)).save(f"{FOLDER}/jpeg/{i}.jpg")
    conversation = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a"}]
    common.write_json([{"image": f"{i % 16}.jpg", "conversations": conversation}
                       for i in range(count)], f"{FOLDER}/jpeg.json")
    image = {"size": 336, "mean": [0.5] * 3, "std": [0.5] * 3, "mode": "pad"}
    dataset = data.Conversations(f"{FOLDER}/jpeg.json", f"{FOLDER}/jpeg", None, 576, image)
    speeds, images = {}, 0
    for workers in (2,) if SMALL else (2, 8, 16):
        batches = torch.utils.data.DataLoader(dataset, batch_size=8, num_workers=workers,
                                              collate_fn=lambda samples: data.collate(samples, 0))
        start = time.perf_counter()
        images = sum(len(batch["pixel_values"]) for batch in batches)
        speeds[f"{workers}_workers"] = images / (time.perf_counter() - start)
    check("loader alone, images a second", images == count, "each picture comes", **speeds)


def dry_run_bytes(normalize, images):
    """Return the memory that `train.py --dry_run` says for a step of stage 1."""
    _, output = run("train.py", "--dry_run", f"--batch_size={images}", f"--normalize={normalize}",
                    "--llm=Qwen/Qwen2-0.5B-Instruct",
                    "--vision_tower=openai/clip-vit-large-patch14-336")
    return float(re.search(r"^sum +([\d.]+)", output, re.M)[1]) * 2 ** 30


def waits(vlm, batch):
    """Return how often the CPU waits for the GPU in a micro-batch of train.py; 0 on a CPU."""
    device = torch.device(DEVICE)
    batch = batch | {"pixel_values": batch["pixel_values"].cpu()}       # as the loader gives it
    if DEVICE != "cpu":
        batch = {key: value.pin_memory() if torch.is_tensor(value) else value
                 for key, value in batch.items()}
        torch.cuda.set_sync_debug_mode("warn")
    autocast = torch.autocast(device.type, torch.bfloat16)
    for _ in range(2):                                  # the first time warms up
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train.accumulate(vlm, iter([dict(batch)]), 1, None, autocast, device, False,
                             train.Settings())
    if DEVICE != "cpu":
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


# ---- 4. SFT

FIRST_LOSSES = []       # of the first sft_step of this process


def sft_step(attention, kind="plain"):
    """Train connector and LLM for five steps: bf16 autocast over float32 weights, checkpointing.

    kind: "plain" or "compiled". The losses are compared with FIRST_LOSSES.
    """
    vlm, images = random_vlm("softmax")
    vlm.llm.float().requires_grad_(True)
    vlm.llm.gradient_checkpointing_enable({"use_reentrant": False})
    if kind == "compiled":
        vlm = bench.compiled(vlm)
    # A quarter of 32 images are 8 samples, as in config/paper/sft.py.
    batch = bench.captions(vlm, max(1, images // 4), 8 if SMALL else 448)
    step, losses = bench.steps(vlm, batch, "bfloat16", attention, lr=1e-4)["ours"], []
    vlm.llm.train()                     # only then the library checkpoints
    times = [bench.seconds(lambda: losses.append(step())) for _ in range(5)]
    FIRST_LOSSES[:] = FIRST_LOSSES or losses
    off = max(abs(a - b) for a, b in zip(losses, FIRST_LOSSES))
    check(f"SFT, {attention}, {kind}", off < 2e-2 and losses[-1] < losses[0],
          "loss falls; within 0.02 of sdpa's",
          tokens_a_second=batch["input_ids"].numel() / statistics.median(times[1:]),
          first_step_s=times[0], extra_memory_GB=bench.extra_memory(step) / 1e9,
          losses=[round(loss, 4) for loss in losses], off=off)


def tiny_train(out, *more):
    """Return the words of a train.py command on the models and pictures of make_world."""
    return ["train.py", f"--llm={FOLDER}/llm", f"--vision_tower={FOLDER}/tower",
            f"--words={FOLDER}/words.json", f"--images={FOLDER}/images",
            f"--data={FOLDER}/data.json", f"--out={FOLDER}/{out}", f"--device={DEVICE}",
            "--hidden=64", "--stage=sft", "--template=chat", "--global_batch=8", "--batch_size=4",
            "--workers=1", "--probe_every=0", *more]


def make_world():
    """Write a small LLM, a tower, 64 pictures and conversations, and words, all random."""
    from conftest import PROCESSOR, byte_level
    side, patch_size, D, layers = (24, 8, 32, 2) if SMALL else (336, 14, 256, 4)
    byte_level(f"{FOLDER}/llm")
    torch.manual_seed(0)
    # Heads of 32 numbers, which every kind of attention takes. No position is beyond the context.
    llm = transformers.Qwen2Config(
        hidden_size=D, intermediate_size=2 * D, num_hidden_layers=layers,
        num_attention_heads=D // 32, num_key_value_heads=D // 32, vocab_size=500, eos_token_id=2,
        pad_token_id=0, bos_token_id=None, initializer_range=0.1)
    transformers.Qwen2ForCausalLM(llm).save_pretrained(f"{FOLDER}/llm")
    tower = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2,
        image_size=side, patch_size=patch_size)
    transformers.CLIPVisionModel(tower).save_pretrained(f"{FOLDER}/tower")
    common.write_json(PROCESSOR, f"{FOLDER}/tower/preprocessor_config.json")
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{FOLDER}/llm")
    vocab.save_words(sorted(vocab.shared_words([tokenizer])), f"{FOLDER}/words.json")
    os.makedirs(f"{FOLDER}/images")
    records, colours = [], ("red", "green", "blue", "white")
    for i in range(64):
        Image.new("RGB", (side, side), colours[i % 4]).save(f"{FOLDER}/images/{i}.png")
        records.append({"id": str(i), "image": f"{i}.png", "conversations": [
            {"from": "human", "value": "<image>\nwhat colour is it?"},
            {"from": "gpt", "value": f"a {colours[i % 4]} square" + " and a star" * (i % 5)}]})
    common.write_json(records, f"{FOLDER}/data.json")


def log_of(out):
    """Return [(loss, gradient norm)] of the steps of a run."""
    with open(f"{FOLDER}/{out}/log.jsonl") as file:
        return [(row["loss"], row["grad_norm"]) for row in map(json.loads, file)]


def difference(out, other):
    """Return the largest difference of two runs' losses."""
    return max(abs(a - b) for (a, _), (b, _) in zip(log_of(out), log_of(other), strict=True))


def sharded():
    """Compare a run of train.py alone with one under torchrun with --shard (NCCL on CUDA)."""
    more = ["--max_steps=4", "--llm_lr=1e-3"]
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
    run(*tiny_train("alone", *more))
    _, output = run(*torchrun, *tiny_train("sharded", *more, "--shard"))
    off = difference("alone", "sharded")
    check("SFT, torchrun --nproc_per_node=1 --shard, losses", ", sharded" in output and off < 2e-2,
          "within 0.02 of one process", off=off,
          losses=[round(loss, 4) for loss, _ in log_of("sharded")])
    for attention in ATTENTION:
        out = f"packed-{attention}"
        run(*tiny_train(out, *more, "--pack", f"--attention={attention}"))
        off = difference("alone", out)
        check(f"SFT, --pack, {attention}, losses", off < 2e-2, "within 0.02 of padded rows",
              off=off)


# ---- 5. exact resume

def resume():
    """Kill a run after its state of step 2, start it again, and compare with a whole run."""
    more = ["--max_steps=6", "--save_every=2", "--deterministic", "--checkpointing"]
    run(*tiny_train("calm", *more))
    command = tiny_train("killed", *more)
    job = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    state, until = f"{FOLDER}/killed/state/step-00000002", time.time() + 200
    while not os.path.isdir(state) and job.poll() is None and time.time() < until:
        time.sleep(0.005)
    job.kill()
    job.wait()
    steps_at_kill = len(log_of("killed"))
    resumed = "going on at step" in run(*command)[1]
    same_log = log_of("calm") == log_of("killed")
    same_weights = filecmp.cmp(f"{FOLDER}/calm/connector.safetensors",
                               f"{FOLDER}/killed/connector.safetensors", shallow=False)
    check("resume with --deterministic, killed once", resumed and same_log and same_weights,
          "losses, norms and weights to the bit", resumed=resumed, same_log=same_log,
          same_weights=same_weights, steps_at_kill=steps_at_kill)


def drift():
    """Measure how far two runs of one command come apart."""
    steps, times = 4 if SMALL else 50, {}
    for name, more in (("one", []), ("two", []), ("deterministic", ["--deterministic"])):
        command = tiny_train(name, "--checkpointing", f"--max_steps={steps}", "--epochs=8",
                             "--llm_lr=1e-4", *more)
        times[f"{name}, s"] = bench.seconds(lambda: run(*command))
    off = difference("one", "two")
    check("drift of two runs without --deterministic", off < 0.1, "losses within 0.1", steps=steps,
          off=off, **times)


# ---- 6. generation

def generation_speed():
    vlm, _ = random_vlm("softmax")
    set_precision(torch.bfloat16)
    count, tokens = (2, 4) if SMALL else (16, 64)
    prompts, pixels = bench.pope_prompts(vlm, count, 1)

    def answer(cudnn):
        generate.CUDNN_ATTENTION = cudnn
        generate.generate(vlm, prompts, pixels, tokens)

    t = bench.take_turns({"with cuDNN": lambda: answer(True), "without": lambda: answer(False)})
    ratio = bench.ratio(t, "with cuDNN", "without")
    check("generation, tokens a second", bar(ratio >= 0.9),
          "without cuDNN attention >= 0.9 x with", without_by_with=ratio,
          without=count * tokens / statistics.median(t["without"]), batch=count)


def answers_by_batch():
    """Count the answers that differ between batches of one prompt and one batch of all."""
    count, tokens = (3, 4) if SMALL else (24, 16)
    for dtype in ("float32", "bfloat16"):
        vlm, _ = random_vlm("softmax", dtype)
        set_precision(getattr(torch, dtype))
        prompts, pixels = bench.pope_prompts(vlm, count, 1)
        prompts = [prompt[:len(prompt) - i] for i, prompt in enumerate(prompts)]
        together = generate.generate(vlm, prompts, pixels, tokens)
        alone = [generate.generate(vlm, [prompt], pixels[i:i + 1], tokens)[0]
                 for i, prompt in enumerate(prompts)]
        share = sum(a != b for a, b in zip(together, alone)) / count
        check(f"answers that change with the batch, {dtype}",
              share == 0 if dtype == "float32" else None, "none in float32", share=share,
              answers=count, distinct=len({tuple(answer) for answer in alone}))


# ---- 7. the README's first command

def speedrun():
    """Run speedrun.sh and print its table. At tiny sizes: the table of stored results."""
    command = ["bash", "speedrun.sh"]
    if SMALL:
        files = [f"results/pocket/seed1/{name}.json" for name in ("qwen-MLP", "qwen-LB")]
        command = [sys.executable, "eval.py", "--table", *files]
    # Half of it says something, too, so the time box of the section does not cut it off.
    limit = float(LIMIT or TOTAL) - 15
    start = time.perf_counter()
    with open(f"{FOLDER}/speedrun.txt", "w+") as file:
        job = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                               env={**os.environ, "PYTHON": sys.executable})
        try:
            job.wait(limit)
        except subprocess.TimeoutExpired:
            job.terminate()                             # it stops what it has started
        minutes = (time.perf_counter() - start) / 60
        file.seek(0)
        lines = file.read().splitlines()
    table = [line for line in lines if line.startswith("|")]
    print("here:", *(table or lines[-30:]), "on a CPU: results/pocket/table.md", sep="\n")
    # Without a status no time was left.
    passed = None if job.returncode is None else job.returncode == 0 and len(table) > 2
    check("speedrun.sh", passed, "ends with a table", minutes=minutes, table=table,
          reached=lines[-1:])


# ---- all sections

# number: (name, time box in seconds, parts). A part is a function with its arguments. No section
# gets more seconds than what is left of TOTAL.
SECTIONS = {
    1: ("parts", 70, [(parts,)]),
    2: ("combination", 90, [(combination_errors, "softmax"), (combination_errors, "none"),
                            (combination_speed, 896), (combination_speed, 3584)]),
    3: ("stage1", 80, [(stage1_step, "none"), (stage1_step, "softmax"), (loader,)]),
    4: ("sft", 90, [*((sft_step, attention) for attention in ATTENTION),
                    *[(sft_step, "sdpa", "compiled")] * (not SMALL), (make_world,), (sharded,)]),
    5: ("exact_resume", 110, [(make_world,), (resume,), (drift,)]),
    6: ("generation", 60, [(generation_speed,), (answers_by_batch,)]),
    7: ("speedrun", TOTAL, [(speedrun,)])}


def run_section(number, limit):
    """Run a section in a process of its own. Return its results as the JSON file has them."""
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        results = pathlib.Path(folder, "results.jsonl")
        results.touch()
        job = subprocess.Popen([sys.executable, __file__, f"--sections={number}"], cwd=ROOT,
                               env={**os.environ, "GPU_FOLDER": folder, "GPU_LIMIT": str(limit)},
                               start_new_session=True)
        try:
            status = job.wait(limit)
        except subprocess.TimeoutExpired:
            status = "cut off by its time box"
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)      # with all that the section has started
                job.wait()
        checks = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    passed = status == 0 and all(row["verdict"] != "FAIL" for row in checks)
    section = {"name": SECTIONS[number][0], "verdict": "pass" if passed else "FAIL",
               "status": status, "seconds": round(time.time() - start, 1), "checks": checks}
    print(f"{section['verdict']}  section {number}, {section['name']}: {section['seconds']:.0f} s, "
          f"{status}", flush=True)
    return section


def main():
    parser = common.argument_parser(__doc__)
    add = parser.add_argument
    add("--out", help="the JSON file to write")
    add("--sections", nargs="+", type=int, choices=SECTIONS, default=list(SECTIONS),
        help="7 alone gives speedrun.sh all the time")
    args = parser.parse_args()
    if FOLDER:                                      # this is the process of one section
        bench.SECONDS = 5                           # the time boxes are short
        for part in SECTIONS[args.sections[0]][2]:
            attempt(*part)
        return
    if DEVICE != "cpu" and not torch.cuda.is_available():
        sys.exit("tests/gpu.py: torch sees no GPU; DEVICE=cpu SMALL=1 runs without one")
    name = torch.cuda.get_device_name() if DEVICE != "cpu" else "cpu"
    path = args.out or f"{ROOT}/results/gpu/{re.sub('[^A-Za-z0-9]+', '-', name)}.json"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True,
                            text=True)
    results = {"device": name, "torch": torch.__version__,
               "transformers": transformers.__version__,
               "commit": commit.stdout.strip() or None, "small": SMALL, "sections": {}}
    print(json.dumps(results), flush=True)
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
