"""
Speed and memory on this machine, against what a user would write otherwise. Random weights and data, no files needed.

    python bench.py all --json results/bench.json     # goes on where it stopped
    python bench.py combine|step|eval [--json FILE]   # the vocabulary combination, a training step, answering questions
    python bench.py --table results/bench.json        # the results as a markdown table

What is compared runs in one process on the same tensors, in turns; a ratio is the median of the rounds' ratios.
"""
import argparse
import copy
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import types

import common


def read_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"bench.py: {message}")
    parser.add_argument("what", nargs="?", choices=("combine", "step", "eval", "all"))
    parser.add_argument("--json", metavar="FILE", help="put the results into FILE, too, and skip those that it has")
    parser.add_argument("--overwrite", action="store_true", help="with --json: measure again what FILE has")
    parser.add_argument("--table", metavar="FILE", help="print the results in FILE as markdown, measure nothing")
    args = parser.parse_args(argv)
    if not args.what and not args.table:
        parser.error("say what to measure: combine, step, eval or all")
    return args


if __name__ == "__main__":                          # before the slow imports, so that --help is quick
    ARGS = read_arguments()

import torch

import checkpoint
import data
import model
from generate import generate

P, K, D = 1152, 19200, 896                          # two images of 576 patches, the paper's vocabulary, Qwen2-0.5B
SECONDS = 20                                        # for the timed rounds of one comparison
HERE = os.path.dirname(os.path.abspath(__file__))


# ----------------------------------------------------------------------------------------------------------------------
# measuring

def take_turns(calls, most=7, warm_up=True):
    """Seconds of each call in each round. calls: {name: function without arguments}; one round runs each of them once.

    A first round, not counted, warms up (and compiles); from the second follows how many SECONDS allow, 2 to `most`.
    """
    def timed(call):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for call in calls.values() if warm_up else ():
        call()
    rounds = [{name: timed(call) for name, call in calls.items()}]
    for _ in range(min(most, max(2, int(SECONDS / sum(rounds[0].values())))) - 1):
        rounds.append({name: timed(call) for name, call in calls.items()})
    return {name: [r[name] for r in rounds] for name in calls}


def ratio(times, a, b):
    """Median over the rounds of a's time by b's"""
    return statistics.median(x / y for x, y in zip(times[a], times[b]))


def medians(times):
    return {f"{name}, s": statistics.median(seconds) for name, seconds in times.items()}


def row(what, value, bar="", **detail):
    """One line of the results. bar: "<= 1.15" or ">= 8" where there is one to reach; detail: the numbers behind it"""
    bound = float(bar.split()[1]) if bar else 0.0
    reached = "" if not bar else "reached" if (value <= bound if bar[0] == "<" else value >= bound) else "MISSED"
    numbers = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in detail.items()}
    behind = "  ".join(f"{k} {v:,}" for k, v in numbers.items())
    print(f"{what:64} {value:8.3f} {bar:8} {reached:8} {behind}", flush=True)
    return {"what": what, "value": float(f"{value:.4g}"), "bar": bar, "reached": reached, "detail": numbers}


def extra_memory(call):
    """Bytes that `call` holds at its worst moment, without what was there before and without the tensors it returns.

    Replays every allocation and release that torch's profiler has seen, so it is exact and the same in each run; the
    scratch memory of the BLAS is not in it. What is only made once does not count: `call` must have run before.
    """
    with torch.profiler.profile(profile_memory=True) as profile:
        results = call()
    returned = {t.untyped_storage().data_ptr() for t in results or ()}
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        profile.export_chrome_trace(trace.name)
        with open(trace.name, encoding="utf-8") as f:
            events = [e for e in json.load(f)["traceEvents"] if e["name"] == "[memory]"]
    events = [(e["args"]["Addr"], e["args"]["Bytes"]) for e in sorted(events, key=lambda e: e["ts"])]
    # An address is used again and again: the last allocation there is the returned tensor's.
    last = {addr: i for i, (addr, size) in enumerate(events) if size > 0 and addr in returned}
    live = peak = 0
    for i, (addr, size) in enumerate(events):
        if last.get(addr) != i:
            live += size
            peak = max(peak, live)
    return peak


def processor():
    """The processor's name, and how many threads torch uses of it"""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            name = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), name)
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{name}, {torch.get_num_threads()} threads"


# ----------------------------------------------------------------------------------------------------------------------
# python bench.py combine

class Combination:
    """Tensors of one shape and dtype, and forward + backward over them in each way that is compared.

    Each way is a function without arguments. It returns what a training step gets: the image embeds and the gradients of
    z, W and b.
    """

    def __init__(self, P, H, K, dtype):
        import model
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator().manual_seed(0)

        def random(*shape, scale=1.0):
            return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)
        self.z, self.W = random(P, H).requires_grad_(), random(K, H, scale=H ** -0.5).requires_grad_()  # scores spread by 1
        self.b, self.E, self.g = random(K).requires_grad_(), random(K, D), random(P, D)
        self.weights = None
        self.combine = model.combine
        self.compiled_chain = torch.compile(self.chain)

    @staticmethod
    def chain(z, W, b, E, normalize):
        """What a user would write."""
        scores = z @ W.T + b
        return (scores.softmax(-1) if normalize == "softmax" else scores) @ E

    def run(self, function, normalize):
        out = function(self.z, self.W, self.b, self.E, normalize)
        return out.detach(), *torch.autograd.grad(out, (self.z, self.W, self.b), self.g)

    def ours(self, normalize="softmax"):
        return self.run(self.combine, normalize)

    def plain(self, normalize="softmax"):
        return self.run(self.chain, normalize)

    def compiled(self, normalize="softmax"):
        return self.run(self.compiled_chain, normalize)

    def floor(self):
        """The matrix products that every exact method needs, and nothing else. Where weights or their gradient are a
        factor, scores from the warm-up stand in: what is in a matrix does not matter to the speed of its product."""
        with torch.no_grad():
            if self.weights is None:
                self.weights = self.z @ self.W.T
            self.z @ self.W.T                                       # forward: scores (P, K)
            self.weights @ self.E                                   # forward: image embeds (P, D)
            self.g @ self.E.T                                       # backward: of the weights (P, K)
            self.weights @ self.W                                   # backward: of z (P, H)
            self.weights.T @ self.z                                 # backward: of W (K, H)


def combine_parts():
    """-> {name: function that measures it and returns rows}"""
    parts = {}
    for H in (1024, 5120):
        for dtype in (torch.float32, torch.bfloat16):
            parts[f"combine, H {H}, {str(dtype)[6:]}"] = lambda name, H=H, dtype=dtype: bench_combine(name, H, dtype)
    parts["combine, H 1024, bfloat16, 16 x patches"] = bench_many_patches
    return parts


def bench_combine(name, H, dtype):
    at = Combination(P, H, K, dtype)
    t = take_turns({"floor": at.floor, "ours": at.ours, "plain": at.plain, "compiled": at.compiled})
    rows = [row(f"{name}: softmax, time by the floor's", ratio(t, "ours", "floor"), "<= 1.15", **medians(t)),
            row(f"{name}: softmax, time by the plain chain's", ratio(t, "ours", "plain"), "<= 0.9"),
            row(f"{name}: softmax, time by the compiled chain's", ratio(t, "ours", "compiled"), "<= 1")]
    ours, plain = extra_memory(at.ours), extra_memory(at.plain)
    rows.append(row(f"{name}: softmax, extra memory by the plain chain's", ours / plain, "<= 0.125",
                    **{"ours, MB": ours / 1e6, "plain, MB": plain / 1e6}))
    raw = take_turns({"ours": lambda: at.ours("none"), "plain": lambda: at.plain("none")}, most=3)
    rows.append(row(f"{name}: raw, time by the plain chain's", ratio(raw, "ours", "plain"), "<= 0.45", **medians(raw)))
    if H == 1024:
        more = Combination(P, H, 4 * K, dtype)
        m = take_turns({"K": at.ours, "4 K": more.ours}, most=3)
        rows += [row(f"{name}: softmax, time at 4 K by K", ratio(m, "4 K", "K"), "<= 4.2", **medians(m)),
                 row(f"{name}: softmax, extra memory at 4 K by K", extra_memory(more.ours) / ours, "<= 1.1")]
    return rows


def bench_many_patches(name):
    at = Combination(16 * P, 1024, K, torch.bfloat16)
    t = take_turns({"ours": lambda: at.ours("none"), "plain": lambda: at.plain("none")}, warm_up=False)
    return [row(f"{name}: raw, time by the plain chain's", ratio(t, "ours", "plain"), "<= 0.2", **medians(t))]


# ----------------------------------------------------------------------------------------------------------------------
# models of true sizes with random weights

SIZES = {
    "SmolLM2-135M": dict(model_type="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                         num_attention_heads=9, num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True),
    "DINOv2-small": dict(model_type="dinov2", hidden_size=384, num_hidden_layers=12, num_attention_heads=6,
                         image_size=518, patch_size=14),
}


def sizes(name):
    """A model's config: from SIZES, or as config/paper/sizes.json has it"""
    from transformers import AutoConfig
    with open(f"{HERE}/config/paper/sizes.json", encoding="utf-8") as f:
        return AutoConfig.for_model(**{**json.load(f), **SIZES}[name])


def random_vlm(tower, llm, side, dtype):
    """A VLM of these configs with LLaVA's MLP as connector; frozen parts in dtype, the connector float32 and trained"""
    from transformers import AutoModel, AutoModelForCausalLM


    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    llm.bos_token_id = llm.eos_token_id = llm.pad_token_id = None      # no answer ends before its last token
    tower, llm = AutoModel.from_config(tower).to(dtype), AutoModelForCausalLM.from_config(llm).to(dtype)
    D = llm.get_input_embeddings().embedding_dim
    # Answers that differ from question to question need scores that do: a fresh embedding's are nearly all alike.
    torch.nn.init.normal_(llm.get_input_embeddings().weight, std=0.1)
    connector = model.MLPConnector(tower.config.hidden_size, D)
    tokenizer = types.SimpleNamespace(eos_token_id=None, pad_token_id=0)
    config = model.Config(vision_tower="", llm="", connector="mlp", image_size=side)
    vlm = model.VLM(config, tower, connector, llm, tokenizer, None, {"size": side}).to(device).eval()
    vlm.requires_grad_(False).connector.requires_grad_(True)
    return vlm


def as_llava(vlm):
    """transformers' LLaVA around the very same modules"""
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(LlavaConfig(
            vision_config=vlm.vision_tower.config, text_config=vlm.llm.config, vision_feature_layer=-2,
            vision_feature_select_strategy="default", image_seq_length=vlm.num_patches,
            image_token_index=vlm.llm.config.vocab_size - 1))
    llava.model.vision_tower, llava.model.multi_modal_projector = vlm.vision_tower, vlm.connector
    llava.model.language_model, llava.lm_head = vlm.llm.get_decoder(), vlm.llm.get_output_embeddings()
    return llava.eval()


def captions(vlm, images, tokens):
    """A batch of stage 1 as data.collate makes it: one image each and a caption of up to `tokens` random tokens, all of
    them trained. The captions' lengths are spread evenly from a quarter of it."""
    generator, samples = torch.Generator().manual_seed(0), []
    for i in range(images):
        length = tokens if images == 1 else tokens // 4 + (tokens - tokens // 4) * i // (images - 1)
        text = torch.randint(1, vlm.llm.config.vocab_size - 1, (length,), generator=generator)
        image = torch.full((vlm.num_patches,), data.IMAGE_ID)
        samples.append({"id": str(i), "input_ids": torch.cat([image, text]),
                        "labels": torch.cat([torch.full_like(image, data.IGNORE), text]),
                        "images": torch.randn(1, 3, vlm.image_settings["size"], vlm.image_settings["size"], generator=generator)})
    batch = data.collate(samples, pad_id=0)
    return {k: v.to(vlm.llm.device) if torch.is_tensor(v) else v for k, v in batch.items()}


# ----------------------------------------------------------------------------------------------------------------------
# python bench.py step

def step_parts():
    parts = {}
    for side, images in ((112, 8), (336, 2)):
        for dtype in ("float32", "bfloat16"):
            parts[f"step, SmolLM2-135M, {(side // 14) ** 2} patches, {dtype}"] = (
                lambda name, side=side, images=images, dtype=dtype: bench_llava_step(
                    name, sizes("DINOv2-small"), sizes("SmolLM2-135M"), side, images, dtype))
    for images in (1, 8):
        parts[f"step, Qwen2-0.5B, {images} x 576 patches, bfloat16"] = (
            lambda name, images=images: bench_connectors(name, images))
    return parts


def adamw(connector):
    """As train.py makes it; the rate is 0, so that every round computes the same"""
    return torch.optim.AdamW(connector.parameters(), lr=0.0, weight_decay=0.0, fused=True)


def update(connector, optimizer, count=1):
    """The end of train.py's step"""
    for p in connector.parameters():
        p.grad.div_(count)
    torch.nn.utils.clip_grad_norm_(connector.parameters(), 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def steps(vlm, batch, dtype):
    """One training step over the batch, ours and with transformers' LLaVA. -> {name: function that returns its mean loss}"""
    llava, optimizer = as_llava(vlm), adamw(vlm.connector)
    pixels = batch["pixel_values"].to(vlm.vision_tower.dtype)
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == data.IMAGE_ID, llava.config.image_token_index)

    def amp():
        return torch.autocast(vlm.llm.device.type, torch.bfloat16, enabled=dtype == "bfloat16")

    def ours():
        with amp():
            loss, count = vlm(batch)
        loss.backward()
        update(vlm.connector, optimizer, count)
        return loss.item() / count

    def theirs():
        with amp():
            loss = llava(input_ids=ids, pixel_values=pixels, attention_mask=batch["attention_mask"],
                         labels=batch["labels"]).loss
        loss.backward()
        update(vlm.connector, optimizer)
        return loss.item()
    return {"ours": ours, "LLaVA": theirs}


def bench_llava_step(name, tower, llm, side, images, dtype="float32"):

    vlm = random_vlm(tower, llm, side, getattr(torch, dtype))
    batch, compiled = captions(vlm, images, 32), copy.deepcopy(vlm)     # LLaVA's blocks are vlm's, and stay as they are
    for block in checkpoint.transformer_blocks(compiled.llm):                            # as train.py's --compile does
        block.compile(dynamic=True)
    calls = {**steps(vlm, batch, dtype), "ours, compiled": steps(compiled, batch, dtype)["ours"]}
    losses = {which: call() for which, call in calls.items()}
    if max(losses.values()) - min(losses.values()) > 1e-2 * losses["LLaVA"]:
        raise ValueError(f"the two steps do not compute the same: {losses}")
    t = take_turns(calls, warm_up=False)
    ours, theirs = (extra_memory(lambda: calls[which]() and None) for which in ("ours", "LLaVA"))
    memory = {"ours, MB": ours / 1e6, "LLaVA, MB": theirs / 1e6}
    return [row(f"{name}: images a second by LLaVA's", ratio(t, "LLaVA", "ours"), "", images=images, **medians(t)),
            row(f"{name}: the same with --compile", ratio(t, "LLaVA", "ours, compiled"), ">= 1.5"),
            row(f"{name}: extra memory by LLaVA's", ours / theirs, **memory)]


def connector_flops(kind, n, Dv, H, K, D, needed=False):
    """Of one training step over n patches; a product is 2 x rows x inner x columns. A layer's output, the gradient of its
    weights and that of its input take one product each; the first layer does not need the last. needed: without the
    scores that softmax makes again in its backward pass."""
    if kind == "mlp":
        return 2 * n * (2 * Dv * D + 3 * D * D)
    mlp = 2 * n * (2 * Dv * H + 3 * H * H)
    if kind == "none":
        return mlp + 2 * min(2 * K * H * D + 3 * n * H * D, 3 * n * K * H + 2 * n * K * D)
    return mlp + 2 * n * ((3 if needed else 4) * K * H + 2 * K * D)


def rest_flops(vlm, batch):
    """Of one training step without the connector: vision tower forward, LLM forward and backward to its input"""
    llm, tower = vlm.llm.config, vlm.vision_tower
    B, T = batch["input_ids"].shape
    body = sum(p.numel() for p in vlm.llm.get_decoder().layers.parameters())
    trained = int((batch["labels"] != -100).sum())
    attention = 4 * T * llm.num_attention_heads * (llm.hidden_size // llm.num_attention_heads) * llm.num_hidden_layers
    logits = 2 * trained * llm.hidden_size * llm.vocab_size
    n = vlm.num_patches + 1
    seen = B * n * (2 * sum(p.numel() for p in tower.parameters())
                    + 4 * n * tower.config.hidden_size * tower.config.num_hidden_layers)
    return seen + 2 * (B * T * 2 * body + logits) + 3 * B * T * attention


def dry_run_bytes(kind, images):
    """What `train.py --dry_run` says for this step"""
    run = subprocess.run([sys.executable, f"{HERE}/train.py", "--dry_run", "--llm=Qwen/Qwen2-0.5B-Instruct",
                          "--vision_tower=openai/clip-vit-large-patch14-336", f"--batch_size={images}",
                          *(["--connector=mlp", "--hidden=0"] if kind == "mlp" else [f"--normalize={kind}"])],
                         capture_output=True, text=True)
    found = re.search(r"^sum +([\d.]+)", run.stdout, re.M)
    if not found:
        raise ValueError(f"train.py --dry_run prints no sum: {run.stdout}{run.stderr}")
    return float(found[1]) * 2 ** 30


def peak_memory(vlm, batch, connector):
    """Bytes of weights, AdamW's moments, and all that a step holds at its worst moment"""
    vlm.connector = connector
    held = sum(t.numel() * t.element_size() for t in [*vlm.parameters(), *vlm.buffers()])
    moments = 8 * sum(p.numel() for p in connector.parameters())
    step = steps(vlm, batch, "bfloat16")["ours"]
    step()
    return held + moments + extra_memory(lambda: step() and None)


def bench_connectors(name, images, H=5120, K=19200, tower=None, llm=None, side=336):
    """What a LangBridge adds to a step with LLaVA's MLP. The difference of two steps of nearly a minute would drown in
    noise, so each connector's share (forward, backward, update) is timed alone, beside whole steps with the MLP."""

    tower = tower or sizes("openai/clip-vit-large-patch14-336")
    vlm = random_vlm(tower, llm or sizes("Qwen/Qwen2-0.5B-Instruct"), side, torch.bfloat16)
    batch = captions(vlm, images, 64)
    embed = vlm.llm.get_input_embeddings().weight
    D, Dv, n, device = embed.shape[1], vlm.vision_tower.config.hidden_size, images * vlm.num_patches, embed.device
    patches = torch.randn(images, vlm.num_patches, Dv).to(device, torch.bfloat16)
    connectors = {"mlp": vlm.connector}
    for kind in ("softmax", "none"):
        connectors[kind] = model.LangBridge(Dv, H, K, kind).to(device)
        connectors[kind].vocab_embeds = embed[:K].clone()
    optimizers = {kind: adamw(c) for kind, c in connectors.items()}

    def share(kind):
        with torch.autocast(device.type, torch.bfloat16):
            out = connectors[kind](patches)
        out.backward(torch.ones_like(out))
        update(connectors[kind], optimizers[kind])

    calls = {kind: lambda kind=kind: share(kind) for kind in connectors}
    calls["whole step, mlp"] = steps(vlm, batch, "bfloat16")["ours"]
    t = take_turns(calls, most=3, warm_up=images == 1)
    rest = rest_flops(vlm, batch)
    base = rest + connector_flops("mlp", n, Dv, H, K, D)
    rows = []
    for kind in ("softmax", "none"):
        added = statistics.median((a - m) / s for a, m, s in zip(t[kind], t["mlp"], t["whole step, mlp"]))
        more, needed = (connector_flops(kind, n, Dv, H, K, D, needed) - connector_flops("mlp", n, Dv, H, K, D)
                        for needed in (False, True))
        detail = {"overhead, %": 100 * added, "FLOPs say, %": 100 * more / base, "needed FLOPs, %": 100 * needed / base}
        if kind == "softmax":
            rows.append(row(f"{name}: softmax, overhead by the FLOPs'", added / (more / base), "<= 1.15",
                            **detail, **medians(t)))
        else:
            rows.append(row(f"{name}: raw, overhead in %", 100 * added, "<= 3" if images == 8 else "", **detail))
    if images == 1:
        for kind, connector in list(connectors.items())[:2]:        # raw scores hold what softmax does
            said, measured = dry_run_bytes(kind, images), peak_memory(vlm, batch, connector)
            rows.append(row(f"{name}: memory that --dry_run says by measured, {kind}", said / measured,
                            **{"says, GB": said / 1e9, "measured, GB": measured / 1e9}))
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# python bench.py eval

def eval_parts():
    return {"eval, SmolLM2-135M, 576 patches, float32": lambda name: bench_eval(
        name, sizes("DINOv2-small"), sizes("SmolLM2-135M"), 336)}


def pope(vlm, images, each, shortest=24, longest=32):
    """Prompts shaped like POPE's: a template's opening, an image, a question. -> prompts, pixels, each prompt's image"""
    from data import IMAGE_ID
    generator = torch.Generator().manual_seed(0)

    def some(n):
        return torch.randint(1, vlm.llm.config.vocab_size - 1, (n,), generator=generator).tolist()
    opening, side = some(12), vlm.image_settings["size"]
    lengths = torch.randint(shortest, longest + 1, (images * each,), generator=generator).tolist()
    prompts = [opening + [IMAGE_ID] * vlm.num_patches + some(length) for length in lengths]
    pixels = torch.randn(images, 3, side, side, generator=generator).to(vlm.llm.device)
    return prompts, pixels, [i // each for i in range(images * each)]


def bench_eval(name, tower, llm, side, images=4, each=18, alone=4):
    """Questions a second: ours with `each` questions about each image, LLaVA's loop with `alone` of them a round"""
    from data import IMAGE_ID
    vlm = random_vlm(tower, llm, side, torch.float32)
    llava = as_llava(vlm)
    prompts, pixels, which = pope(vlm, images, each)
    answers, alone_answers, number = [], {}, 0

    def ours():
        answers[:] = [a for i in range(images) for a in generate(vlm,
            prompts[i * each:(i + 1) * each], pixels[i:i + 1], 2, image_index=[0] * each)]

    def loop():                                                     # as LLaVA's scripts do: one question at a time
        nonlocal number
        for _ in range(alone):
            i = number * 7 % len(prompts)                           # another image and question each time
            number += 1
            ids = torch.tensor([prompts[i]], device=vlm.llm.device)
            ids = ids.masked_fill(ids == IMAGE_ID, llava.config.image_token_index)
            out = llava.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels[which[i]][None],
                                 do_sample=False, max_new_tokens=2)
            alone_answers[i] = out[0, ids.shape[1]:].tolist()

    t = take_turns({"ours": ours, "loop": loop}, most=3)
    same = sum(answers[i] == a for i, a in alone_answers.items())
    speeds = {"a second, ours": len(prompts) / statistics.median(t["ours"]),
              "a second, loop": alone / statistics.median(t["loop"])}
    return [row(f"{name}: questions a second by LLaVA's loop's", ratio(t, "loop", "ours") * len(prompts) / alone, ">= 8",
                **speeds),
            row(f"{name}: answers equal to the loop's", same / len(alone_answers), ">= 1", compared=len(alone_answers),
                distinct=len({tuple(a) for a in answers}))]


# ----------------------------------------------------------------------------------------------------------------------
# results

PARTS = {"combine": combine_parts, "step": step_parts, "eval": eval_parts}


def table(results):
    """results.json as markdown"""
    lines = [f"{results['processor']}, torch {results['torch']}", "", "| what | measured | to reach | behind it |",
             "|---|---:|---|---|"]
    for rows in results["parts"].values():
        for r in rows:
            bar = r["bar"].replace("<=", "at most").replace(">=", "at least")
            bar += ", **missed**" if r["reached"] == "MISSED" else ""
            lines.append(f"| {r['what']} | {r['value']:g} | {bar} | "
                         + "; ".join(f"{k} {v:,}" for k, v in r["detail"].items()) + " |")
    return "\n".join(lines)


def main(args):
    if args.table:
        try:
            return print(table(common.read_json(args.table)))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{args.table} was not written by bench.py --json: {error!r}") from None
    results = {}
    if args.json and os.path.exists(args.json):
        results = common.read_json(args.json)                        # before the minutes of measuring, not after
    machine = {"processor": processor(), "torch": torch.__version__}
    if any(results.get(k, v) != v for k, v in machine.items()):
        raise ValueError(f"{args.json} was measured on another machine or torch; give another file")
    print(f"{machine['processor']}, torch {machine['torch']}", flush=True)
    results = {**machine, "parts": results.get("parts", {})}
    for what in PARTS if args.what == "all" else [args.what]:
        for name, measure in PARTS[what]().items():
            if name in results["parts"] and not args.overwrite:
                print(f"{name}: is in {args.json}")
                continue
            results["parts"][name] = measure(name)
            if args.json:
                common.write_json(results, args.json)


if __name__ == "__main__":
    common.run_script(main, ARGS)
