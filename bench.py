"""
Measure speed and memory on this machine against what a user would write otherwise.

    python bench.py all --json results/bench.json     # continues where it stopped
    python bench.py combine|step|eval [--json FILE]   # the vocabulary combination, a training step,
                                                      # answers to questions
    python bench.py --table results/bench.json        # the results as a markdown table

Weights and data are random, so no files are needed. What is compared runs in one process on the
same tensors, in turns. A ratio is the median of the rounds' ratios.
"""
import argparse
import copy
import functools
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
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"bench.py: {message}")
    parser.add_argument("what", nargs="?", choices=("combine", "step", "eval", "all"))
    parser.add_argument("--json", metavar="FILE",
                        help="write the results to FILE, too, and skip those that it has")
    parser.add_argument("--overwrite", action="store_true",
                        help="with --json: measure again what FILE has")
    parser.add_argument("--table", metavar="FILE",
                        help="print the results in FILE as markdown and measure nothing")
    args = parser.parse_args(argv)
    if not args.what and not args.table:
        parser.error("say what to measure: combine, step, eval or all")
    return args


if __name__ == "__main__":                  # before the slow imports, so that --help is quick
    ARGS = read_arguments()

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import conversation
import data
import fused
import model
from generate import generate
from support import sharding
from support.device import choose_dtype

# Two images of 576 patches, the paper's number of words, and the width of Qwen2-0.5B.
P, K, D = 1152, 19200, 896
SECONDS = 20                                # for the timed rounds of one comparison
HERE = os.path.dirname(os.path.abspath(__file__))


# --------------------------------------------------------------------------------------------------
# measuring

def take_turns(calls, most=7, warm_up=True):
    """Return the seconds of each call in each round: {name: list of seconds}.

    calls: {name: function without arguments}. One round runs each of them once. A first round,
    which is not counted, warms up and compiles. SECONDS decides how many rounds follow, at least
    2 and at most `most`.
    """
    def timed(call):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    if warm_up:
        for call in calls.values():
            call()
    rounds = [{name: timed(call) for name, call in calls.items()}]
    affordable = int(SECONDS / sum(rounds[0].values()))
    for _ in range(min(most, max(2, affordable)) - 1):
        rounds.append({name: timed(call) for name, call in calls.items()})
    return {name: [r[name] for r in rounds] for name in calls}


def ratio(times, a, b):
    """Return the median over the rounds of a's time divided by b's."""
    return statistics.median(x / y for x, y in zip(times[a], times[b]))


def medians(times):
    return {f"{name}, s": statistics.median(seconds) for name, seconds in times.items()}


def row(what, value, bar="", **detail):
    """Print one result and return it as a dict.

    bar: the goal, such as "<= 1.15" or ">= 8", or "" where there is none. detail: the numbers that
    the value was computed from.
    """
    reached = ""
    if bar:
        sign, bound = bar.split()
        is_reached = value <= float(bound) if sign == "<=" else value >= float(bound)
        reached = "reached" if is_reached else "MISSED"
    numbers = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in detail.items()}
    behind = "  ".join(f"{k} {v:,}" for k, v in numbers.items())
    print(f"{what:64} {value:8.3f} {bar:8} {reached:8} {behind}", flush=True)
    return {"what": what, "value": float(f"{value:.4g}"), "bar": bar, "reached": reached,
            "detail": numbers}


def extra_memory(call):
    """Return the bytes that `call` holds at its worst moment.

    What existed before and the tensors that it returns do not count. The count replays every
    allocation and release that torch's profiler saw, so it is exact and the same in each run. It
    lacks the scratch memory of the BLAS. `call` must have run before, because what is made only
    once does not count either.
    """
    with torch.profiler.profile(profile_memory=True) as profile:
        results = call()
    returned = {t.untyped_storage().data_ptr() for t in results or ()}
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        profile.export_chrome_trace(trace.name)
        events = [e for e in common.read_json(trace.name)["traceEvents"] if e["name"] == "[memory]"]
    events.sort(key=lambda e: e["ts"])
    events = [(e["args"]["Addr"], e["args"]["Bytes"]) for e in events]
    # An address is used again and again. The last allocation there is that of the returned tensor.
    last = {address: i for i, (address, size) in enumerate(events)
            if size > 0 and address in returned}
    live = peak = 0
    for i, (address, size) in enumerate(events):
        if last.get(address) != i:
            live += size
            peak = max(peak, live)
    return peak


class Recorder(TorchDispatchMode):
    """Record every matrix product, convolution and attention call of what runs inside.

    One tensor stands for all tensors of the same shape, strides and dtype. So the calls can be
    made again without the memory of the whole step.
    """

    OPERATORS = re.compile("(mm|addmm|bmm|baddbmm|convolution|_scaled_dot_product.*)(_backward)?")

    def __init__(self):
        super().__init__()
        self.calls, self.tensors = [], {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.OPERATORS.fullmatch(operator.overloadpacket.__name__):
            self.calls.append((operator, *tree_map(self.stand_in, (args, kwargs))))
        return operator(*args, **kwargs)

    def stand_in(self, value):
        if not torch.is_tensor(value):
            return value
        key = value.shape, value.stride(), value.dtype
        return self.tensors.setdefault(key, value.detach())


def floor_of(step):
    """Return a function that makes only the products and attention calls of `step`, in order."""
    with Recorder() as recorder:
        step()

    def replay():
        with torch.no_grad():
            for operator, args, kwargs in recorder.calls:
                operator(*args, **kwargs)

    return replay


def processor():
    """Return the processor's name and the number of threads that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {torch.get_num_threads()} threads"


def default_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


# --------------------------------------------------------------------------------------------------
# python bench.py combine

class Combination:
    """Tensors of one shape and dtype, and a forward and backward pass in each way to compare.

    Each way is a function without arguments. It returns what a training step gets: the image
    embeds and the gradients of z, W and b. "plain" is model.combine, which a user would write.
    """

    def __init__(self, P, H, K, dtype):
        generator = torch.Generator().manual_seed(0)

        def random(*shape, scale=1.0):
            tensor = torch.randn(*shape, generator=generator) * scale
            return tensor.to(default_device(), dtype)

        self.z = random(P, H).requires_grad_()
        self.W = random(K, H, scale=H ** -0.5).requires_grad_()     # the scores have spread 1
        self.b = random(K).requires_grad_()
        self.E = random(K, D)
        self.gradient = random(P, D)
        self.compiled_combine = torch.compile(model.combine)
        self.weights = None
        # The connector as training calls it, with all scores below the border.
        self.bridge = model.LangBridge(1, 1, 1, "softmax", plain_bytes=4 * P * K)
        self.bridge.mlp = torch.nn.Identity()
        self.bridge.to_scores.weight = torch.nn.Parameter(self.W.detach())
        self.bridge.to_scores.bias = torch.nn.Parameter(self.b.detach())
        self.bridge.vocab_embeds = self.E

    def run(self, combine, normalize):
        out = combine(self.z, self.W, self.b, self.E, normalize)
        gradients = torch.autograd.grad(out, (self.z, self.W, self.b), self.gradient)
        return out.detach(), *gradients

    def ours(self, normalize="softmax"):
        return self.run(fused.combine, normalize)

    def below(self):
        out, layer = self.bridge(self.z), self.bridge.to_scores
        gradients = torch.autograd.grad(out, (self.z, layer.weight, layer.bias), self.gradient)
        return out.detach(), *gradients

    def plain(self, normalize="softmax"):
        return self.run(model.combine, normalize)

    def compiled(self, normalize="softmax"):
        return self.run(self.compiled_combine, normalize)

    def floor(self):
        """Compute only the matrix products that every exact method needs.

        Scores stand in for the weights and for their gradient, because the speed of a product
        does not depend on the numbers in it.
        """
        with torch.no_grad():
            if self.weights is None:
                self.weights = self.z @ self.W.T
            self.z @ self.W.T                                       # forward: scores (P, K)
            self.weights @ self.E                                   # forward: image embeds (P, D)
            self.gradient @ self.E.T                                # backward: of the weights
            self.weights @ self.W                                   # backward: of z (P, H)
            self.weights.T @ self.z                                 # backward: of W (K, H)

    def six_products(self):
        """Compute the products of the fused version: it makes the scores again in backward."""
        self.floor()
        with torch.no_grad():
            self.z @ self.W.T


def combine_parts():
    """Return {name: function that takes the name, measures, and returns rows}."""
    parts = {}
    for H in (1024, 5120):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"combine, H {H}, {str(dtype)[6:]}"
            parts[name] = lambda name, H=H, dtype=dtype: bench_combine(name, H, dtype)
    parts["combine, H 1024, bfloat16, 16 x patches"] = bench_many_patches
    return parts


def bench_combine(name, H, dtype):
    at = Combination(P, H, K, dtype)
    t = take_turns({"six products": at.six_products, "fused": at.ours, "below": at.below,
                    "plain": at.plain, "compiled": at.compiled})
    t["faster"] = [min(pair) for pair in zip(t["plain"], t["compiled"])]
    is_half = dtype == torch.bfloat16
    rows = [row(f"{name}: softmax below the border, time by the faster plain chain's",
                ratio(t, "below", "faster"), "<= 1.03", **medians(t)),
            row(f"{name}: softmax above the border, time by its six products'",
                ratio(t, "fused", "six products"), "<= 1.15" if is_half else "<= 1.1")]
    ours, plain = extra_memory(at.ours), extra_memory(at.plain)
    bar = "<= 0.125" if not is_half else "<= 0.15" if H == 1024 else "<= 0.3"
    rows.append(row(f"{name}: softmax above the border, extra memory by the plain chain's",
                    ours / plain, bar, **{"ours, MB": ours / 1e6, "plain, MB": plain / 1e6}))
    raw = take_turns({"ours": lambda: at.ours("none"), "plain": lambda: at.plain("none")}, most=3)
    rows.append(row(f"{name}: raw, time by the plain chain's", ratio(raw, "ours", "plain"),
                    # With H = 5,120 the products alone take 0.506.
                    "<= 0.45" if H == 1024 else "<= 0.531", **medians(raw)))
    if H == 1024:
        more = Combination(P, H, 4 * K, dtype)
        m = take_turns({"K": at.ours, "4 K": more.ours}, most=3)
        rows.append(row(f"{name}: softmax, time at 4 K by K", ratio(m, "4 K", "K"), "<= 4.2",
                        **medians(m)))
        rows.append(row(f"{name}: softmax, extra memory at 4 K by K",
                        extra_memory(more.ours) / ours, "<= 1.1"))
    return rows


def bench_many_patches(name):
    at = Combination(16 * P, 1024, K, torch.bfloat16)
    t = take_turns({"ours": lambda: at.ours("none"), "plain": lambda: at.plain("none")},
                   warm_up=False)
    return [row(f"{name}: raw, time by the plain chain's", ratio(t, "ours", "plain"), "<= 0.2",
                **medians(t))]


# --------------------------------------------------------------------------------------------------
# models of true sizes with random weights

SIZES = {
    "SmolLM2-135M": dict(model_type="llama", hidden_size=576, intermediate_size=1536,
                         num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                         vocab_size=49152, tie_word_embeddings=True),
    "DINOv2-small": dict(model_type="dinov2", hidden_size=384, num_hidden_layers=12,
                         num_attention_heads=6, image_size=518, patch_size=14),
}


def config_of(name):
    """Return a model's config, from SIZES or from config/paper/sizes.json."""
    from transformers import AutoConfig
    sizes = common.read_json(f"{HERE}/config/paper/sizes.json") | SIZES
    return AutoConfig.for_model(**sizes[name])


def random_vlm(tower, llm, side, dtype, pool=1):
    """Return a VLM of two configs with LLaVA's MLP as connector.

    Frozen parts have the given dtype. The connector is float32 and trains.
    """
    from transformers import AutoModel, AutoModelForCausalLM
    torch.manual_seed(0)
    # Without these ids no answer ends before its last token.
    llm.bos_token_id = llm.eos_token_id = llm.pad_token_id = None
    tower = AutoModel.from_config(tower).to(dtype)
    llm = AutoModelForCausalLM.from_config(llm).to(dtype)
    embed = llm.get_input_embeddings()
    # With fresh embeddings nearly all scores are alike, and so would be all answers.
    torch.nn.init.normal_(embed.weight, std=0.1)
    connector = model.MLPConnector(tower.config.hidden_size, embed.embedding_dim)
    tokenizer = types.SimpleNamespace(eos_token_id=None, pad_token_id=0, chat_template=None)
    config = model.Config(vision_tower="", llm="", connector="mlp", image_size=side, pool=pool)
    vlm = model.VLM(config, tower, connector, llm, tokenizer, None, {"size": side})
    vlm.requires_grad_(False).connector.requires_grad_(True)
    return vlm.to(default_device()).eval()


def as_llava(vlm):
    """Return transformers' LLaVA around the same modules."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    config = LlavaConfig(
        vision_config=vlm.vision_tower.config, text_config=vlm.llm.config, vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=vlm.num_patches,
        image_token_index=vlm.llm.config.vocab_size - 1)
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(config)
    llava.model.vision_tower = vlm.vision_tower
    llava.model.multi_modal_projector = vlm.connector
    llava.model.language_model = vlm.llm.get_decoder()
    llava.lm_head = vlm.llm.get_output_embeddings()
    return llava.eval()


def captions(vlm, images, tokens):
    """Return a batch of stage 1 as data.collate makes it: one image and one caption a sample.

    All tokens of a caption are random and trained. The lengths are spread evenly between a
    quarter of `tokens` and `tokens`.
    """
    generator = torch.Generator().manual_seed(0)
    side = vlm.image_settings["size"]
    samples = []
    for i in range(images):
        length = tokens
        if images > 1:
            length = tokens // 4 + (tokens - tokens // 4) * i // (images - 1)
        text = torch.randint(1, vlm.llm.config.vocab_size - 1, (length,), generator=generator)
        image = torch.full((vlm.num_patches,), conversation.IMAGE_ID)
        samples.append({"id": str(i), "input_ids": torch.cat([image, text]),
                        "labels": torch.cat([torch.full_like(image, conversation.IGNORE), text]),
                        "images": torch.randn(1, 3, side, side, generator=generator)})
    batch = data.collate(samples, pad_id=0)
    batch["pixel_values"] = batch["pixel_values"].to(vlm.llm.device)    # as train.py does
    return batch


# --------------------------------------------------------------------------------------------------
# python bench.py step

def step_parts():
    """Return {name: function that takes the name, measures, and returns rows}."""
    parts = {}
    for stage in ("pretrain", "sft"):
        for side, images in ((112, 8), (336, 2)):
            for dtype in ("float32", "bfloat16"):
                name = f"step, {stage}, SmolLM2-135M, {(side // 14) ** 2} patches, {dtype}"
                sizes = config_of("DINOv2-small"), config_of("SmolLM2-135M"), side, images
                parts[name] = functools.partial(bench_llava_step, *sizes, dtype, stage)
    parts["step, pretrain, SmolLM2-135M, 336 pixels, pooled, bfloat16"] = bench_pool
    for images in (1, 8):
        name = f"step, Qwen2-0.5B, {images} x 576 patches, bfloat16"
        parts[name] = lambda name, images=images: bench_connectors(name, images)
    return parts


def adamw(module):
    """Return the optimizer of train.py with rate 0, so that every round computes the same."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True)


def update(optimizer, count=1):
    """Divide the gradients by `count`, clip them and update, as the end of a training step does."""
    trained = optimizer.param_groups[0]["params"]
    for p in trained:
        p.grad.div_(count)
    torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def steps(vlm, batch, dtype, attention="sdpa"):
    """Return one training step over the batch in both ways: {name: function, returns mean loss}.

    "LLaVA" is the class of transformers in a plain loop. attention: of the LLM.
    """
    llava, optimizer = as_llava(vlm), adamw(vlm)
    vlm.llm.set_attn_implementation(attention)      # after as_llava, which sets it, too
    pixels = batch["pixel_values"].to(vlm.vision_tower.dtype)
    is_image = batch["input_ids"] == conversation.IMAGE_ID
    ids = batch["input_ids"].masked_fill(is_image, llava.config.image_token_index)
    device = vlm.llm.device
    ids, labels, mask = (t.to(device) for t in (ids, batch["labels"], batch["attention_mask"]))

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")

    def ours():
        with autocast():
            loss, count = vlm(batch)
        loss.backward()
        update(optimizer, count)
        return loss.item() / count

    def theirs():
        with autocast():
            loss = llava(input_ids=ids, pixel_values=pixels, labels=labels,
                         attention_mask=mask, use_cache=False).loss
        loss.backward()
        update(optimizer)
        return loss.item()

    return {"ours": ours, "LLaVA": theirs}


def bench_llava_step(tower, llm, side, images, dtype, stage, name):
    vlm = random_vlm(tower, llm, side, getattr(torch, dtype))
    if stage == "sft":
        vlm.llm.float().requires_grad_(True)                # the weights of train.py's AdamW
    batch = captions(vlm, images, 32)
    calls = steps(vlm, batch, dtype)
    torch._dynamo.reset()               # else an earlier part uses up its eight compilations
    for attention in ("sdpa", "eager"):
        compiled = copy.deepcopy(vlm)                             # LLaVA shares blocks with its VLM
        for block in sharding.transformer_blocks(compiled.llm):   # what train.py --compile does
            block.compile(dynamic=True)
        calls |= {f"{way}, compiled, {attention}": call
                  for way, call in steps(compiled, batch, dtype, attention).items()}
    losses = {way: call() for way, call in calls.items()}
    if max(losses.values()) - min(losses.values()) > 1e-2 * losses["LLaVA"]:
        raise ValueError(f"the two steps do not compute the same: {losses}")
    calls["floor"] = floor_of(calls["ours"])
    t = take_turns(calls, warm_up=False)
    rows = [row(f"{name}: time by that of its products and attention", ratio(t, "ours", "floor"),
                "<= 1.12", images=images, **medians(t))]
    for way in ("ours", "LLaVA"):       # each with the attention that is faster for it
        both = t[f"{way}, compiled, sdpa"], t[f"{way}, compiled, eager"]
        t[f"{way}, compiled"] = min(both, key=statistics.median)
    held = {way: extra_memory(lambda: calls[way]() and None) / 1e6
            for way in ("ours", "LLaVA", "ours, compiled, sdpa", "ours, compiled, eager")}
    return rows + [
        row(f"{name}: the same with --compile", ratio(t, "ours, compiled", "floor"), "<= 1.06"),
        row(f"{name}: images a second by LLaVA's", ratio(t, "LLaVA", "ours")),
        row(f"{name}: the same, both compiled", ratio(t, "LLaVA, compiled", "ours, compiled"),
            ">= 1.7"),
        row(f"{name}: with --compile by LLaVA's plain loop", ratio(t, "LLaVA", "ours, compiled")),
        row(f"{name}: extra memory by LLaVA's", held["ours"] / held["LLaVA"],
            **{f"{way}, MB": megabytes for way, megabytes in held.items()})]


def bench_pool(name):
    """Measure what it brings to pool 24 x 24 patches before the connector."""
    calls = {}
    for pool in (1, 2, 3):
        vlm = random_vlm(config_of("DINOv2-small"), config_of("SmolLM2-135M"), 336, torch.bfloat16,
                         pool)
        calls[f"{vlm.num_patches} tokens"] = steps(vlm, captions(vlm, 2, 32), "bfloat16")["ours"]
    t = take_turns(calls)
    return [row(f"{name}: images a second with {fewer} by 576 tokens",
                ratio(t, "576 tokens", f"{fewer} tokens"), **medians(t)) for fewer in (144, 64)]


def connector_flops(kind, n, Dv, H, K, D, needed=False):
    """Return the operations of a connector in one training step over n patches.

    A product takes 2 x rows x inner x columns. The output of a layer, the gradient of its weights
    and that of its input take one product each; the first layer does not need the last. needed:
    without the scores, which the fused softmax computes again in its backward pass.
    """
    if kind == "mlp":
        return 2 * n * (2 * Dv * D + 3 * D * D)
    mlp = 2 * n * (2 * Dv * H + 3 * H * H)
    if kind == "none":
        # Raw scores may multiply W and E first, which takes less for many patches.
        return mlp + 2 * min(2 * K * H * D + 3 * n * H * D, 3 * n * K * H + 2 * n * K * D)
    return mlp + 2 * n * ((3 if needed else 4) * K * H + 2 * K * D)


def rest_flops(vlm, batch):
    """Return the operations of one training step without the connector.

    These are the vision tower forward, and the LLM forward and backward to its input.
    """
    llm, tower = vlm.llm.config, vlm.vision_tower
    B, T = batch["input_ids"].shape
    body = sum(p.numel() for p in vlm.llm.get_decoder().layers.parameters())
    trained = int((batch["labels"] != conversation.IGNORE).sum())
    head_size = llm.hidden_size // llm.num_attention_heads
    attention = 4 * T * llm.num_attention_heads * head_size * llm.num_hidden_layers
    logits = 2 * trained * llm.hidden_size * llm.vocab_size
    n = vlm.num_patches + 1
    tower_attention = 4 * n * tower.config.hidden_size * tower.config.num_hidden_layers
    tower_flops = B * n * (2 * sum(p.numel() for p in tower.parameters()) + tower_attention)
    return tower_flops + 2 * (B * T * 2 * body + logits) + 3 * B * T * attention


def dry_run_bytes(kind, images):
    """Return the memory that `train.py --dry_run` estimates for this step."""
    connector = ["--connector=mlp", "--hidden=0"] if kind == "mlp" else [f"--normalize={kind}"]
    command = [sys.executable, f"{HERE}/train.py", "--dry_run", f"--batch_size={images}",
               "--llm=Qwen/Qwen2-0.5B-Instruct",
               "--vision_tower=openai/clip-vit-large-patch14-336", *connector]
    run = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"^sum +([\d.]+)", run.stdout, re.M)
    if not found:
        raise ValueError(f"train.py --dry_run prints no sum: {run.stdout}{run.stderr}")
    return float(found[1]) * 2 ** 30


def peak_memory(vlm, batch, connector):
    """Return the bytes of weights, AdamW's moments, and what a step holds at its worst moment."""
    vlm.connector = connector
    weights = sum(t.numel() * t.element_size() for t in [*vlm.parameters(), *vlm.buffers()])
    moments = 8 * sum(p.numel() for p in connector.parameters())
    step = steps(vlm, batch, "bfloat16")["ours"]
    step()
    return weights + moments + extra_memory(lambda: step() and None)


def bench_connectors(name, images, H=5120, K=19200, tower=None, llm=None, side=336):
    """Measure what a LangBridge adds to a step with LLaVA's MLP.

    A step takes nearly a minute, and the difference of two steps would be mostly noise. So the
    forward, backward and update of each connector are timed alone, and whole steps with the MLP.
    """
    vlm = random_vlm(tower or config_of("openai/clip-vit-large-patch14-336"),
                     llm or config_of("Qwen/Qwen2-0.5B-Instruct"), side, torch.bfloat16)
    batch = captions(vlm, images, 64)
    embed = vlm.llm.get_input_embeddings().weight
    D, Dv, device = embed.shape[1], vlm.vision_tower.config.hidden_size, embed.device
    n = images * vlm.num_patches
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
        update(optimizers[kind])

    calls = {kind: lambda kind=kind: share(kind) for kind in connectors}
    calls["whole step, mlp"] = steps(vlm, batch, "bfloat16")["ours"]
    t = take_turns(calls, most=3, warm_up=images == 1)
    mlp_flops = connector_flops("mlp", n, Dv, H, K, D)
    step_flops = rest_flops(vlm, batch) + mlp_flops
    rows = []
    for kind in ("softmax", "none"):
        added = statistics.median((a - m) / s for a, m, s
                                  in zip(t[kind], t["mlp"], t["whole step, mlp"]))
        more, needed = ((connector_flops(kind, n, Dv, H, K, D, only) - mlp_flops) / step_flops
                        for only in (False, True))
        detail = {"overhead, %": 100 * added, "FLOPs say, %": 100 * more,
                  "needed FLOPs, %": 100 * needed}
        if kind == "softmax":
            rows.append(row(f"{name}: softmax, overhead by the FLOPs'", added / more, "<= 1.15",
                            **detail, **medians(t)))
        else:
            bar = "<= 3" if images == 8 else ""
            rows.append(row(f"{name}: raw, overhead in %", 100 * added, bar, **detail))
    if images == 1:
        for kind in ("mlp", "softmax"):             # raw scores hold what softmax holds
            said = dry_run_bytes(kind, images)
            measured = peak_memory(vlm, batch, connectors[kind])
            rows.append(row(f"{name}: memory that --dry_run says by measured, {kind}",
                            said / measured,
                            **{"says, GB": said / 1e9, "measured, GB": measured / 1e9}))
    return rows


# --------------------------------------------------------------------------------------------------
# python bench.py eval

def eval_parts():
    """Return {name: function that takes the name, measures, and returns rows}."""
    return {"eval, SmolLM2-135M, 576 patches, float32": lambda name: bench_eval(
        name, config_of("DINOv2-small"), config_of("SmolLM2-135M"), 336)}


def pope_prompts(vlm, images, each, shortest=24, longest=32):
    """Return prompts shaped like POPE's: the opening of a template, an image, a question.

    -> (prompts, lists of ids; pixels float32[images, 3, S, S]; the row of pixels of each prompt)
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = vlm.llm.config.vocab_size - 1

    def random_ids(n):
        return torch.randint(1, vocabulary, (n,), generator=generator).tolist()

    opening = random_ids(12)
    side = vlm.image_settings["size"]
    lengths = torch.randint(shortest, longest + 1, (images * each,), generator=generator).tolist()
    prompts = [opening + [conversation.IMAGE_ID] * vlm.num_patches + random_ids(length)
               for length in lengths]
    pixels = torch.randn(images, 3, side, side, generator=generator).to(vlm.llm.device)
    return prompts, pixels, [i // each for i in range(images * each)]


def bench_eval(name, tower, llm, side, images=4, each=18, alone=4):
    """Measure questions a second, with `each` questions about each image.

    The loop asks one question at a time, as LLaVA's scripts do. It gets `alone` of them a round.
    """
    vlm = random_vlm(tower, llm, side, torch.float32)
    llava = as_llava(vlm)
    prompts, pixels, image_index = pope_prompts(vlm, images, each)
    answers, alone_answers, asked = [], {}, 0

    def ours():
        answers.clear()
        for i in range(images):
            answers.extend(generate(vlm, prompts[i * each:(i + 1) * each], pixels[i:i + 1], 2,
                                    image_index=[0] * each))

    def one_each():
        generate(vlm, prompts[::each], pixels, 2)

    def loop():
        nonlocal asked
        for _ in range(alone):
            i = asked * 7 % len(prompts)            # another image and question each time
            asked += 1
            ids = torch.tensor([prompts[i]], device=vlm.llm.device)
            ids = ids.masked_fill(ids == conversation.IMAGE_ID, llava.config.image_token_index)
            out = llava.generate(input_ids=ids, attention_mask=torch.ones_like(ids),
                                 pixel_values=pixels[image_index[i]][None], do_sample=False,
                                 max_new_tokens=2)
            alone_answers[i] = out[0, ids.shape[1]:].tolist()

    t = take_turns({"ours": ours, "one each": one_each, "loop": loop}, most=3)
    same = sum(answers[i] == answer for i, answer in alone_answers.items())
    speeds = {"a second, ours": len(prompts) / statistics.median(t["ours"]),
              "a second, loop": alone / statistics.median(t["loop"])}
    return [row(f"{name}: questions a second by LLaVA's loop's",
                ratio(t, "loop", "ours") * len(prompts) / alone, ">= 10", **speeds),
            row(f"{name}: the same, one question about each image",
                ratio(t, "loop", "one each") * images / alone, ">= 4"),
            row(f"{name}: answers equal to the loop's", same / len(alone_answers), ">= 1",
                compared=len(alone_answers), distinct=len({tuple(a) for a in answers}))]


# --------------------------------------------------------------------------------------------------
# results

PARTS = {"combine": combine_parts, "step": step_parts, "eval": eval_parts}


def table(results):
    """Return the results of a --json file as a markdown table."""
    lines = [f"{results['processor']}, torch {results['torch']}", "",
             "| what | measured | to reach | behind it |", "|---|---:|---|---|"]
    for r in (r for rows in results["parts"].values() for r in rows):
        bar = r["bar"].replace("<=", "at most").replace(">=", "at least")
        bar += ", **missed**" if r["reached"] == "MISSED" else ""
        detail = "; ".join(f"{k} {v:,}" for k, v in r["detail"].items())
        lines.append(f"| {r['what']} | {r['value']:g} | {bar} | {detail} |")
    return "\n".join(lines)


def main(args):
    if args.table:
        try:
            print(table(common.read_json(args.table)))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{args.table} is no file of bench.py --json: {error!r}") from None
        return
    machine = {"processor": processor(), "torch": torch.__version__}
    results = {}
    if args.json and os.path.exists(args.json):
        results = common.read_json(args.json)       # now, and not after the minutes of measuring
        if not isinstance(results, dict) or not isinstance(results.get("parts"), dict):
            raise ValueError(f"{args.json} is no file of bench.py --json; give another file")
    if any(results.get(k, v) != v for k, v in machine.items()):
        raise ValueError(f"{args.json} was measured on another machine or torch; give another file")
    print(f"{machine['processor']}, torch {machine['torch']}", flush=True)
    has_bfloat16 = choose_dtype("auto", default_device()) == "bfloat16"
    if not has_bfloat16:
        print("bfloat16 is left out: this processor does not compute in it", flush=True)
    results = {**machine, "parts": results.get("parts", {})}
    for what in PARTS if args.what == "all" else [args.what]:
        for name, measure in PARTS[what]().items():
            if name in results["parts"] and not args.overwrite:
                print(f"{name}: is in {args.json}")
                continue
            if "bfloat16" in name and not has_bfloat16:
                continue
            results["parts"][name] = measure(name)
            if args.json:
                common.write_json(results, args.json)


if __name__ == "__main__":
    common.run_script(main, ARGS)
