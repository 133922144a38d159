"""
Measure speed and memory on this machine against what a user would write otherwise.

    python bench.py all --json results/bench.json     # continues where it stopped
    python bench.py combine|step|eval [--json FILE]   # the vocabulary combination, a training step,
                                                      # answers to questions
    python bench.py --table results/bench.json        # the results as a markdown table

Weights and data are random, so no files are needed. What is compared runs in one process on the
same tensors, in turns. A ratio is the median of the rounds' ratios.
"""
import collections
import copy
import itertools
import os
import platform
import re
import statistics
import tempfile
import time
import types

import common


def read_arguments(argv=None):
    parser = common.argument_parser(__doc__)
    add = parser.add_argument
    add("what", nargs="?", choices=("combine", "step", "eval", "all"))
    add("--json", metavar="FILE", help="write the results to FILE, too, and skip those that it has")
    add("--table", metavar="FILE", help="print the results in FILE as markdown, measure nothing")
    args = parser.parse_args(argv)
    if not args.what and not args.table:
        parser.error("say what to measure: combine, step, eval or all")
    return args


if __name__ == "__main__":                  # before the slow imports, so that --help is quick
    ARGS = read_arguments()

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, LlavaConfig,
                          LlavaForConditionalGeneration)

import conversation
import data
import fused
import model
from generate import generate
from support import sharding
from support.device import choose_dtype, own_device

# Two images of 576 patches, the paper's number of words, and the width of Qwen2-0.5B.
P, K, D = 1152, 19200, 896
SECONDS = 20                                # for the timed rounds of one comparison
HERE = os.path.dirname(os.path.abspath(__file__))


# --------------------------------------------------------------------------------------------------
# measuring

def seconds(call):
    """Return the seconds that a call takes, with all that it starts on a GPU."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def take_turns(calls, warm_up=True):
    """Return the seconds of each call in each round: {name: list of seconds}.

    calls: {name: function without arguments}. One round runs each of them once. A first round,
    which is not counted, warms up and compiles. Rounds follow until SECONDS are over, 2 to 7.
    """
    if warm_up:
        for call in calls.values():
            call()
    times, start = {name: [] for name in calls}, time.perf_counter()
    for i in range(7):
        if i < 2 or time.perf_counter() - start < SECONDS:
            for name, call in calls.items():
                times[name].append(seconds(call))
    return times


def ratio(times, a, b):
    """Return the median over the rounds of a's time divided by b's."""
    return statistics.median(x / y for x, y in zip(times[a], times[b]))


def medians(times):
    return {f"{name}, s": statistics.median(values) for name, values in times.items()}


def extra_memory(call):
    """Return the bytes that `call` holds at its worst moment.

    What existed before and the tensors that it returns do not count. The count replays every
    allocation and release that torch's profiler saw, so it is exact and the same in each run. It
    lacks the scratch memory of the BLAS. `call` must have run before, because what is made only
    once does not count either.
    """
    if torch.cuda.is_available():                   # torch counts there; what is returned counts
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        results = call()
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        profile.export_chrome_trace(trace.name)
        events = [e for e in common.read_json(trace.name)["traceEvents"] if e["name"] == "[memory]"]
    events.sort(key=lambda e: e["ts"])
    returned = {t.untyped_storage().data_ptr() for t in tree_leaves(results) if torch.is_tensor(t)}
    sizes = []
    for event in reversed(events):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        # An address is used again and again. Its last allocation is that of the returned tensor.
        if size > 0 and address in returned:
            returned.remove(address)
        else:
            sizes.append(size)
    return max(itertools.accumulate(reversed(sizes), initial=0))


def floor_of(step):
    """Return a function that makes only the products and attention calls of `step`, in order.

    One tensor stands for all tensors of the same shape, strides and dtype. So the calls can be
    made again without the memory of the whole step.
    """
    products = re.compile("(mm|addmm|bmm|baddbmm|convolution|_scaled_dot_product.*)(_backward)?")
    calls, tensors = [], {}

    def stand_in(value):
        if not torch.is_tensor(value):
            return value
        key = value.shape, value.stride(), value.dtype
        return tensors.setdefault(key, value.detach())

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if products.fullmatch(operator.overloadpacket.__name__):
                calls.append((operator, *tree_map(stand_in, (args, kwargs))))
            return operator(*args, **kwargs)

    @torch.no_grad()
    def replay():
        for operator, args, kwargs in calls:
            operator(*args, **kwargs)

    with Recorder():
        step()
    return replay


def processor():
    """Return the GPU's name, or the CPU's name and the number of threads that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            found = re.search(r"^model name\s*:(.*)", file.read(), re.M)
        name = found[1].strip() if found else name
    return f"{name}, {torch.get_num_threads()} threads"


# --------------------------------------------------------------------------------------------------
# python bench.py combine

def combination(P, H, K, D, dtype, normalize="softmax"):
    """Return the ways to combine random tensors of one shape and dtype: {way: function}.

    A way returns what a training step gets: image embeds, and the gradients of z, W and b. "fused"
    is fused.combine. "plain" is model.combine, which a user would write. "compiled" is the same
    under torch.compile. "below" is the connector as training calls it, where all scores fit into
    plain_bytes. "six products" computes the matrix products of "fused" and returns nothing.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape, scale=1.0):
        tensor = torch.randn(*shape, generator=generator) * scale
        return tensor.bfloat16().to(own_device(""), dtype)          # the same numbers in each dtype

    z = random(P, H).requires_grad_()
    W = torch.nn.Parameter(random(K, H, scale=H ** -0.5))           # the scores have spread 1
    b = torch.nn.Parameter(random(K))
    E, gradient = random(K, D), random(P, D)
    bridge = model.LangBridge(1, 1, 1, normalize, plain_bytes=4 * P * K)
    bridge.mlp = torch.nn.Identity()
    bridge.to_scores.weight, bridge.to_scores.bias, bridge.vocab_embeds = W, b, E

    @torch.no_grad()
    def six_products():
        # The scores stand in for the weights and for their gradient, because the speed of a
        # product does not depend on the numbers in it.
        scores = z @ W.T                                            # forward: scores (P, K)
        scores @ E                                                  # forward: image embeds (P, D)
        z @ W.T                                                     # backward: scores, once more
        gradient @ E.T                                              # backward: of the weights
        scores @ W                                                  # backward: of z (P, H)
        scores.T @ z                                                # backward: of W (K, H)

    def with_gradients(combine):
        def run():
            out = combine(z, W, b, E, normalize)
            return out.detach(), *torch.autograd.grad(out, (z, W, b), gradient)

        return run

    return {"six products": six_products, "fused": with_gradients(fused.combine),
            "plain": with_gradients(model.combine),
            "compiled": with_gradients(torch.compile(model.combine)),
            "below": with_gradients(lambda *_: bridge(z))}


def bench_combine(H, dtype):
    calls = combination(P, H, K, D, getattr(torch, dtype))
    t = take_turns(calls)
    t["faster"] = [min(pair) for pair in zip(t["plain"], t["compiled"])]
    is_half = dtype == "bfloat16"
    yield ("softmax up to plain_bytes: time / the faster plain formula's",
           ratio(t, "below", "faster"), "<= 1.03", medians(t))
    yield ("fused softmax: time / its six products'",
           ratio(t, "fused", "six products"), "<= 1.15" if is_half else "<= 1.1")
    ours, plain = extra_memory(calls["fused"]), extra_memory(calls["plain"])
    yield ("fused softmax: extra memory / the plain formula's", ours / plain,
           "<= 0.125" if not is_half else "<= 0.15" if H == 1024 else "<= 0.3",
           {"ours, MB": ours / 1e6, "plain, MB": plain / 1e6})
    calls = combination(P, H, K, D, getattr(torch, dtype), "none")
    t = take_turns({"ours": calls["fused"], "plain": calls["plain"]})
    yield ("raw scores: time / the plain formula's", ratio(t, "ours", "plain"),
           # With H = 5,120 the products alone take 0.506.
           "<= 0.45" if H == 1024 else "<= 0.531", medians(t))


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
    sizes = common.read_json(f"{HERE}/config/paper/sizes.json") | SIZES
    return AutoConfig.for_model(**sizes[name])


def random_vlm(tower, llm, side, dtype, pool=1):
    """Return a VLM of two configs with LLaVA's MLP as connector.

    Frozen parts have the given dtype. The connector is float32 and trains.
    """
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
    return vlm.to(own_device("")).eval()


def random_bridge(vlm, normalize, H=5120, K=K):
    """Return a LangBridge for a VLM, whose words are the first K tokens of its LLM."""
    embed = vlm.llm.get_input_embeddings().weight
    bridge = model.LangBridge(vlm.vision_tower.config.hidden_size, H, K, normalize)
    bridge.vocab_embeds = embed.detach()[:K].clone()
    return bridge.to(embed.device)


def as_llava(vlm):
    """Return transformers' LLaVA around the same modules."""
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
    """Return a batch with captions of lengths from `tokens` down to a quarter, spread evenly."""
    return make_batch(vlm, torch.linspace(tokens, tokens // 4, images).int())


def make_batch(vlm, lengths):
    """Return a batch as data.collate makes it: one image and one text a sample.

    lengths: the number of tokens of each text. All of them are random and trained.
    """
    generator = torch.Generator().manual_seed(0)
    side = vlm.image_settings["size"]
    samples = []
    for i, length in enumerate(lengths):
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

def adamw(module, lr=0.0):
    """Return the optimizer of train.py. With rate 0 every round computes the same."""
    trained = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)


def make_step(loss_and_count, optimizer, dtype):
    """Return a function that makes one training step and returns its mean loss.

    loss_and_count: function that returns a loss, and the number that divides it.
    """
    trained = optimizer.param_groups[0]["params"]

    def step():
        with torch.autocast(trained[0].device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss, count = loss_and_count()
        loss.backward()
        for p in trained:
            p.grad.div_(count)
        torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item() / count

    return step


def steps(vlm, batch, dtype, attention="sdpa", lr=0.0):
    """Return one training step over the batch in both ways: {name: function, see make_step}.

    "LLaVA" is the class of transformers in a plain loop. attention: of the LLM.
    """
    llava, optimizer = as_llava(vlm), adamw(vlm, lr)
    vlm.llm.set_attn_implementation(attention)      # after as_llava, which sets it, too
    is_image = batch["input_ids"] == conversation.IMAGE_ID
    inputs = {name: batch[name] for name in ("labels", "attention_mask", "pixel_values")}
    inputs["input_ids"] = batch["input_ids"].masked_fill(is_image, llava.config.image_token_index)
    inputs = {name: tensor.to(vlm.llm.device) for name, tensor in inputs.items()}
    losses = {"ours": lambda: vlm(batch),
              "LLaVA": lambda: (llava(**inputs, use_cache=False).loss, 1)}
    return {way: make_step(loss, optimizer, dtype) for way, loss in losses.items()}


def compiled(vlm):
    """Return a copy of a VLM with its LLM compiled, as train.py --compile does it."""
    vlm = copy.deepcopy(vlm)            # LLaVA shares blocks with its VLM
    for block in sharding.transformer_blocks(vlm.llm):
        block.compile(dynamic=True)
    return vlm


def bench_llava_step(tower, llm, side, images, dtype, stage):
    vlm = random_vlm(tower, llm, side, getattr(torch, dtype))
    if stage == "sft":
        vlm.llm.float().requires_grad_(True)                # the weights of train.py's AdamW
    batch = captions(vlm, images, 32)
    calls = steps(vlm, batch, dtype)
    torch._dynamo.reset()               # else an earlier part uses up its eight compilations
    for attention in ("sdpa", "eager"):
        calls |= {f"{way}, compiled, {attention}": call
                  for way, call in steps(compiled(vlm), batch, dtype, attention).items()}
    losses = {way: call() for way, call in calls.items()}
    if max(losses.values()) - min(losses.values()) > 1e-2 * losses["LLaVA"]:
        raise ValueError(f"the two steps do not compute the same: {losses}")
    calls["floor"] = floor_of(calls["ours"])
    t = take_turns(calls, warm_up=False)
    yield ("time / that of its products and attention", ratio(t, "ours", "floor"), "<= 1.12",
           {"images": images, **medians(t)})
    for way in ("ours", "LLaVA"):       # each with the attention that is faster for it
        both = t[f"{way}, compiled, sdpa"], t[f"{way}, compiled, eager"]
        t[f"{way}, compiled"] = min(both, key=statistics.median)
    yield "the same with --compile", ratio(t, "ours, compiled", "floor"), "<= 1.06"
    yield "images a second / LLaVA's", ratio(t, "LLaVA", "ours")
    yield "the same, both compiled", ratio(t, "LLaVA, compiled", "ours, compiled"), ">= 1.7"
    yield "with --compile / LLaVA's plain loop", ratio(t, "LLaVA", "ours, compiled")
    memory = {f"{way}, MB": extra_memory(calls[way]) / 1e6
              for way in ("ours", "LLaVA", "ours, compiled, sdpa", "ours, compiled, eager")}
    yield "extra memory / LLaVA's", memory["ours, MB"] / memory["LLaVA, MB"], "", memory


def bench_lengths(tower, llm, side, images=4, ranks=32):
    """Measure stage 2 on texts as long as those of mix665k, see results/padding.py.

    LLaVA has its own order of the data, and ours has --group_batches=64 and --compile. Each side
    computes two micro-batches of one of `ranks` ranks. Only tokens that are no padding count.
    """
    from results.padding import simulate
    tokens, lengths = simulate(part=64)
    vlm = random_vlm(tower, llm, side, torch.bfloat16)
    vlm.llm.float().requires_grad_(True)
    torch._dynamo.reset()
    vlms = {"": vlm, ", compiled": compiled(vlm)}
    counts, times = collections.Counter(), collections.Counter()
    for i in range(2):                  # one after the other, because AdamW's moments take memory
        calls = {}
        for whose, group_batches in (("LLaVA", 1), ("ours", 64)):
            order = data.global_batches(types.SimpleNamespace(lengths=lengths), images * ranks, 0,
                                        1, True, group_batches)
            with_image = [step for step in order if lengths[step[0]] > 0]
            sizes = [tokens[index] for index in with_image[i][::ranks]]
            batch = make_batch(vlm, [size - vlm.num_patches for size in sizes])
            for kind, own_vlm in vlms.items():
                counts[whose + kind] += sum(sizes)
                calls[whose + kind] = steps(own_vlm, batch, "bfloat16")[whose]
        times.update({way: statistics.median(t) for way, t in take_turns(calls).items()})
    speed = {way: counts[way] / times[way] for way in counts}
    yield ("tokens a second, ours with --compile / LLaVA's plain loop",
           speed["ours, compiled"] / speed["LLaVA"], ">= 2.5",
           {f"tokens a second, {way}": value for way, value in speed.items()})
    yield "tokens a second, both compiled", speed["ours, compiled"] / speed["LLaVA, compiled"]
    yield "tokens a second, none compiled", speed["ours"] / speed["LLaVA"]


def bench_pool():
    """Measure what it brings to pool 24 x 24 patches before the connector."""
    calls = {}
    for pool in (1, 2, 3):
        vlm = random_vlm(config_of("DINOv2-small"), config_of("SmolLM2-135M"), 336, torch.bfloat16,
                         pool)
        calls[f"{vlm.num_patches} tokens"] = steps(vlm, captions(vlm, 2, 32), "bfloat16")["ours"]
    t = take_turns(calls)
    for fewer in (144, 64):
        yield (f"images a second with {fewer} / with 576 tokens",
               ratio(t, "576 tokens", f"{fewer} tokens"), "", medians(t))


def bench_connectors(tower, llm, side, images, H=5120, K=K):
    """Measure what a LangBridge adds to a step with LLaVA's MLP.

    A step takes nearly a minute, and the difference of two steps would be mostly noise. So the
    forward, backward and update of each connector are timed alone, and whole steps with the MLP.
    """
    vlm = random_vlm(tower, llm, side, torch.bfloat16)
    patches = torch.randn(images, vlm.num_patches, vlm.vision_tower.config.hidden_size)
    patches = patches.to(vlm.llm.device, torch.bfloat16)
    connectors = {"mlp": vlm.connector, "softmax": random_bridge(vlm, "softmax", H, K),
                  "raw": random_bridge(vlm, "none", H, K)}
    calls = {kind: make_step(lambda connector=connector: (connector(patches).sum(), 1),
                             adamw(connector), "bfloat16")
             for kind, connector in connectors.items()}
    calls["whole step, mlp"] = steps(vlm, captions(vlm, images, 64), "bfloat16")["ours"]
    t = take_turns(calls, warm_up=images == 1)
    for kind in ("softmax", "raw"):
        added = statistics.median((a - m) / step for a, m, step
                                  in zip(t[kind], t["mlp"], t["whole step, mlp"]))
        goal = "<= 3" if kind == "raw" and images == 8 else ""
        yield f"{kind}, overhead in %", 100 * added, goal, medians(t)


# --------------------------------------------------------------------------------------------------
# python bench.py eval

def pope_prompts(vlm, images, each):
    """Return prompts shaped like POPE's: the opening of a template, an image, a question.

    -> (lists of ids, `each` of them about each image; pixels float32[images, 3, S, S])
    """
    generator = torch.Generator().manual_seed(0)

    def random_ids(n):
        return torch.randint(1, vlm.llm.config.vocab_size - 1, (n,), generator=generator).tolist()

    opening = random_ids(12) + [conversation.IMAGE_ID] * vlm.num_patches
    lengths = torch.randint(24, 33, (images * each,), generator=generator).tolist()
    prompts = [opening + random_ids(length) for length in lengths]
    side = vlm.image_settings["size"]
    pixels = torch.randn(images, 3, side, side, generator=generator)
    return prompts, pixels.to(vlm.llm.device)


def bench_eval(tower, llm, side, images=4, each=18, alone=4):
    """Measure questions a second, with `each` questions about each image.

    The loop asks one question at a time, as LLaVA's scripts do. It gets `alone` of them a round.
    """
    vlm = random_vlm(tower, llm, side, torch.float32)
    llava = as_llava(vlm)
    prompts, pixels = pope_prompts(vlm, images, each)
    answers, alone_answers, asked = [], {}, itertools.count(step=7)

    def ours():
        answers.clear()
        for i in range(images):
            answers.extend(generate(vlm, prompts[i * each:(i + 1) * each], pixels[i:i + 1], 2,
                                    image_index=[0] * each))

    def loop():
        for _ in range(alone):
            i = next(asked) % len(prompts)          # another image and question each time
            ids = torch.tensor([prompts[i]], device=vlm.llm.device)
            ids = ids.masked_fill(ids == conversation.IMAGE_ID, llava.config.image_token_index)
            out = llava.generate(input_ids=ids, attention_mask=torch.ones_like(ids),
                                 pixel_values=pixels[i // each][None], do_sample=False,
                                 max_new_tokens=2)
            alone_answers[i] = out[0, ids.shape[1]:].tolist()

    t = take_turns({"ours": ours, "one each": lambda: generate(vlm, prompts[::each], pixels, 2),
                    "loop": loop})
    yield ("questions a second / LLaVA's loop's",
           ratio(t, "loop", "ours") * len(prompts) / alone, ">= 10",
           {"a second, ours": len(prompts) / statistics.median(t["ours"]),
            "a second, loop": alone / statistics.median(t["loop"])})
    yield ("the same, one question about each image",
           ratio(t, "loop", "one each") * images / alone, ">= 4")
    same = sum(answers[i] == answer for i, answer in alone_answers.items())
    yield ("answers equal to the loop's", same / len(alone_answers), ">= 1",
           {"compared": len(alone_answers), "distinct": len({tuple(a) for a in answers})})


# --------------------------------------------------------------------------------------------------
# results

def parts():
    """Return {name: (function, its arguments)} of all that can be measured.

    Each function yields results: what was measured, its value, the goal, and {name: number} of what
    the value was computed from. The last two may be absent.
    """
    dtypes = "float32", "bfloat16"
    small = config_of("DINOv2-small"), config_of("SmolLM2-135M")
    paper = config_of("openai/clip-vit-large-patch14-336"), config_of("Qwen/Qwen2-0.5B-Instruct")
    found = {f"combine, H {H}, {dtype}": (bench_combine, H, dtype)
             for H, dtype in itertools.product((1024, 5120), dtypes)}
    for stage, (side, images), dtype in itertools.product(
            ("pretrain", "sft"), ((112, 8), (336, 2)), dtypes):
        name = f"step, {stage}, SmolLM2-135M, {(side // 14) ** 2} patches, {dtype}"
        found[name] = bench_llava_step, *small, side, images, dtype, stage
    found["step, pretrain, SmolLM2-135M, 336 pixels, pooled, bfloat16"] = (bench_pool,)
    for images in (1, 8):
        name = f"step, Qwen2-0.5B, {images} x 576 patches, bfloat16"
        found[name] = bench_connectors, *paper, 336, images
    found["eval, SmolLM2-135M, 576 patches, float32"] = bench_eval, *small, 336
    found["step, sft, SmolLM2-135M, lengths of mix665k, bfloat16"] = bench_lengths, *small, 336
    return found


def rounded(numbers):
    """Return {name: value} with four digits of each float."""
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value
            for name, value in numbers.items()}


def make_row(what, value, goal="", detail=None):
    """Return a result as the --json file has it. goal: such as "<= 1.15", "" if there is none."""
    reached = ""
    if goal:
        sign, bound = goal.split()
        is_reached = value <= float(bound) if sign == "<=" else value >= float(bound)
        reached = "reached" if is_reached else "MISSED"
    return rounded({"what": what, "value": float(value), "bar": goal, "reached": reached,
                    "detail": rounded(detail or {})})


def print_row(row):
    goal = row["bar"].replace("<=", "at most").replace(">=", "at least")
    missed = ", **missed**" if row["reached"] == "MISSED" else ""
    detail = "; ".join(f"{name} {number:,}" for name, number in row["detail"].items())
    print(f"| {row['what']} | {row['value']:g} | {goal}{missed} | {detail} |", flush=True)


def main(args):
    results = {"processor": processor(), "torch": torch.__version__, "parts": {}}
    if args.table or args.json and os.path.exists(args.json):
        path = args.table or args.json
        stored = common.read_json(path)             # now, not after the minutes of measuring
        if not isinstance(stored, dict) or stored.keys() != results.keys():
            raise ValueError(f"{path} is no file of bench.py --json; give another file")
        if not args.table and stored != results | {"parts": stored["parts"]}:
            raise ValueError(f"{args.json} was measured on another machine or torch; give another "
                             "file")
        results = stored
    print(f"{results['processor']}, torch {results['torch']}\n\n"
          "| what | measured | to reach | behind it |\n|---|---:|---|---|", flush=True)
    for row in itertools.chain(*results["parts"].values()):
        print_row(row)
    if args.table:
        return
    for name, (measure, *arguments) in parts().items():
        if args.what not in ("all", name.split(",")[0]) or name in results["parts"]:
            continue
        if "bfloat16" in name and choose_dtype("auto", own_device("")) != "bfloat16":
            print(f"{name}: left out, because this processor does not compute in bfloat16")
            continue
        rows = results["parts"][name] = []
        for what, *numbers in measure(*arguments):
            rows.append(make_row(f"{name}: {what}", *numbers))
            print_row(rows[-1])
        if args.json:
            common.write_json(results, args.json)


if __name__ == "__main__":
    common.run_script(main, ARGS)
