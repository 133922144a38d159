"""
Train one stage of a VLM: "pretrain" (the connector alone) or "sft" (connector and LLM).

    python train.py config/pocket/pretrain.py [--key=value ...]
    torchrun --nproc_per_node=8 train.py config/paper/qwen2-0.5b-pretrain.py
    python train.py config/paper/qwen2.5-14b-sft.py --dry_run

The settings are below; a config file holds those that differ, a `--key=value` overrides both. The same command started
again continues a run that was stopped, to the same bits. What comes out is a checkpoint folder (see model.py).
"""
import ast
import hashlib
import json
import math
import os
import runpy
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from datetime import timedelta

import vocab

STAGES = {"pretrain": ("connector",), "sft": ("connector", "llm")}      # what each stage trains; all else is frozen
STOPPED = 75                                 # exit status of a run that saved itself on SIGTERM or SIGINT (EX_TEMPFAIL)


@dataclass
class Settings:
    stage: str = "pretrain"
    out: str = ""                            # the checkpoint folder to write
    init: str = ""                           # start from this checkpoint: its connector, LLM and vision tower
    # model, where there is no init
    vision_tower: str = ""                   # hub name or folder
    llm: str = ""                            # hub name or folder
    words: str = ""                          # the shared vocabulary, as vocab.py writes it
    num_words: int = 0                       # use only the first so many; 0 means all
    connector: str = "langbridge"            # or "mlp"
    hidden: int = 5120                       # H; for "mlp" 0 means D
    normalize: str = "unit"                  # or "softmax" (the paper's text), "none" (the paper's code)
    gain: float = 1.0                        # initial spread of the scores, in units of torch's default
    vision_layer: int = -2
    image_size: int = 0                      # pixels; 0 means the tower's own
    # data
    data: str = ""                           # LLaVA-format JSON; several with commas between
    images: str = ""                         # the folder that the records' image paths start from
    image_mode: str = "crop"                 # "crop" to the centre, or "pad" to a square with the mean colour
    template: str = "plain"                  # "plain": image, then caption; "prompted"; "chat": the LLM's own template
    mask: str = "answers"                    # or "official": the released code's mask for ChatML
    max_length: int = 2048                   # tokens, image patches included
    group: bool = False                      # batches of one modality and of like length
    on_bad: str = "stop"                     # a sample that cannot be used: "stop", or "skip", name and count it
    bad_limit: int = 100                     # the run stops where more than so many are skipped
    workers: int = 2                         # processes that load data, for each rank
    # optimisation
    global_batch: int = 256                  # samples for each step, whatever the number of ranks
    batch_size: int = 32                     # samples that one rank holds at a time
    epochs: int = 1
    max_steps: int = 0                       # stop earlier; 0 means after the epochs
    connector_lr: float = 1e-3
    llm_lr: float = 2e-5
    warmup: float = 0.03                     # part of all steps
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = 1.0                        # largest gradient norm; 0 means no clipping
    dtype: str = "bfloat16"                  # of activations and frozen weights; trained weights are float32
    attention: str = "sdpa"                  # or "eager", "flash_attention_2": transformers' attn_implementation
    checkpointing: bool = False              # recompute the LLM's activations in the backward pass: slower, smaller
    device: str = ""                         # "" means cuda if there is one
    seed: int = 42
    # log and checkpoint
    log_every: int = 1                       # steps
    probe_every: int = 50                    # steps between looks at the loss without the image; 0 means never
    save_every: int = 500                    # steps between states to resume from
    snapshots: tuple = ()                    # steps at which to keep a checkpoint of the run, such as 100,1000,2000
    overwrite: bool = False                  # train again where a finished run is
    offline: bool = False                    # download nothing: a hub name is an error where the cache lacks it
    dry_run: bool = False                    # print sizes and memory, load and write nothing


def read_settings(argv):
    """Defaults, then a config file, then `--key=value`; SystemExit with a sentence on anything that does not fit."""
    settings, types = Settings(), {f.name: f.type for f in fields(Settings)}
    given = []
    for arg in argv:
        if arg in ("-h", "--help"):
            print(__doc__ + "\n" + open(__file__).read().split("class Settings:\n")[1].split("\n\n\n")[0])
            sys.exit(0)
        key, equals, text = arg.lstrip("-").partition("=")
        if not arg.startswith("--"):
            if not os.path.isfile(arg):
                sys.exit(f"there is no config file {arg}")
            try:
                given += [(k, v, arg) for k, v in runpy.run_path(arg).items() if not k.startswith("_")]
            except Exception as error:                      # a config file is a program: it may raise anything
                sys.exit(f"{arg} is not a config file: {type(error).__name__}: {error}")
        else:
            given.append((key, read_value(text) if equals else True, "the command line"))
    for key, value, where in given:
        kind = types.get(key)
        if kind is None:
            sys.exit(f"{where}: there is no setting {key!r}; train.py --help lists them")
        if kind is float and type(value) is int:
            value = float(value)
        if kind is tuple and type(value) is int:
            value = (value,)
        if type(value) is not kind:
            sys.exit(f"{where}: {key} is {value!r}, it must be of type {kind.__name__}")
        setattr(settings, key, value)
    return settings


def read_value(text):
    """A number, True or False where `text` is one, else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):       # "{[]: 1}", a thousand brackets
        return text


def check(cfg):
    """What can be said of the settings before anything is loaded."""
    choices = {"stage": tuple(STAGES), "connector": ("langbridge", "mlp"), "normalize": ("unit", "softmax", "none"),
               "dtype": ("bfloat16", "float32"), "image_mode": ("crop", "pad"), "mask": ("answers", "official"),
               "template": ("plain", "prompted", "chat"), "on_bad": ("stop", "skip")}
    for key, allowed in choices.items():
        if getattr(cfg, key) not in allowed:
            sys.exit(f"{key} is {getattr(cfg, key)!r}, it must be one of {', '.join(allowed)}")
    for key in ("global_batch", "batch_size", "epochs", "log_every", "save_every", "max_length"):
        if getattr(cfg, key) < 1:
            sys.exit(f"{key} is {getattr(cfg, key)}, it must be at least 1")
    for key in ("max_steps", "num_words", "probe_every", "workers", "clip", "connector_lr", "llm_lr", "weight_decay",
                "hidden", "image_size", "warmup", "bad_limit"):
        if getattr(cfg, key) < 0:
            sys.exit(f"{key} is {getattr(cfg, key)}, it must not be negative")
    needed = ["out", "data"] + ([] if cfg.init else ["llm", "vision_tower"])
    if not cfg.init and cfg.connector == "langbridge":
        needed.append("words")
    for key in needed if not cfg.dry_run else ():
        if not getattr(cfg, key):
            sys.exit(f"{key} is not set: give it in the config file or as --{key}=...")
    if os.path.isfile(f"{cfg.out}/config.json") and not (cfg.overwrite or cfg.dry_run):
        sys.exit(f"{cfg.out} holds a finished run; --overwrite trains it again")


if __name__ == "__main__":                   # before the slow imports: --help and a mistyped setting answer at once
    CFG = read_settings(sys.argv[1:])
    check(CFG)
    if CFG.offline:
        vocab.offline()

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import data
import model

# ----------------------------------------------------------------------------------------------------------------------
# ranks

def setup_ranks(cfg):
    """-> (rank, number of ranks, device). One process, or one of torchrun's."""
    cuda = torch.cuda.is_available() and cfg.device in ("", "cuda")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device(cfg.device or "cpu")
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Ranks wait for each other while rank 0 writes and hashes a state: minutes for a large LLM.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    return dist.get_rank(), dist.get_world_size(), device


def reduce_sum(tensor, world):
    """Add `tensor` up over all ranks, in place."""
    if world > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


# ----------------------------------------------------------------------------------------------------------------------
# model and optimizer

def make_model(cfg, device):
    """The VLM of this run, its trained parts in float32 and with gradients, the rest frozen in cfg.dtype."""
    dtype = getattr(torch, cfg.dtype)
    held = torch.float32 if "llm" in STAGES[cfg.stage] else dtype           # master weights of an LLM that trains
    torch.manual_seed(cfg.seed)                                             # of the fresh connector
    if cfg.init:
        vlm = model.load(cfg.init, device, held, cfg.attention)
        for key in ("connector", "hidden", "normalize", "vision_layer", "llm", "vision_tower"):
            say(f"  {key} = {getattr(vlm.config, key)} (from {cfg.init})")
            if key not in ("llm", "vision_tower") and getattr(cfg, key) not in (getattr(vlm.config, key), getattr(Settings, key)):
                sys.exit(f"{key} is set to {getattr(cfg, key)!r}, but {cfg.init} has {getattr(vlm.config, key)!r}")
    else:
        words = vocab.load_words(cfg.words)[:cfg.num_words or None] if cfg.connector == "langbridge" else None
        config = model.Config(**{f.name: getattr(cfg, f.name) for f in fields(model.Config)})
        config.num_words = len(words or ())
        vlm = model.build(config, words, device, held, gain=cfg.gain, attention=cfg.attention)
    vlm.vision_tower.to(dtype)
    if vlm.words:
        vlm.connector.vocab_embeds = vlm.connector.vocab_embeds.to(dtype)
    for part in STAGES[cfg.stage]:
        getattr(vlm, part).requires_grad_(True).train()
    if cfg.checkpointing:
        vlm.llm.train()                                                     # the library checkpoints in this mode only
        vlm.llm.gradient_checkpointing_enable({"use_reentrant": False})
    return vlm


def make_optimizer(vlm, cfg):
    """AdamW with a group for each trained part, the learning rate of the part in `base_lr`."""
    groups = []
    for part in STAGES[cfg.stage]:
        parameters = [p for p in getattr(vlm, part).parameters() if p.requires_grad]
        groups.append({"params": parameters, "base_lr": getattr(cfg, f"{part}_lr"), "part": part})
    fused = groups[0]["params"][0].device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay, fused=fused)
    held = [p for g in optimizer.param_groups for p in g["params"]]
    trained = [p for p in vlm.parameters() if p.requires_grad]
    assert {id(p) for p in held} == {id(p) for p in trained} and len(held) == len(trained)   # each one, each once
    return optimizer


def parts_table(vlm, cfg):
    """Which part trains, as text: the one table that answers "what is frozen?" """
    lines = [f"{'part':14}{'parameters':>16}  {'':8}{'dtype':10}{'lr':>8}"]
    for part in ("vision_tower", "connector", "llm"):
        p = list(getattr(vlm, part).parameters())
        trained = part in STAGES[cfg.stage]
        assert all(x.requires_grad == trained for x in p), part
        lines.append(f"{part:14}{sum(x.numel() for x in p):16,}  {'trained' if trained else 'frozen':8}"
                     f"{str(p[0].dtype)[6:]:10}{getattr(cfg, part + '_lr') if trained else 0:8.1e}")
    return "\n".join(lines)


def lr_factor(step, steps, warmup):
    """Linear warm-up over ceil(warmup x steps) steps, then a cosine to 0 (transformers' cosine schedule)."""
    rise = math.ceil(warmup * steps)
    if step < rise:
        return step / max(1, rise)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


# ----------------------------------------------------------------------------------------------------------------------
# data

def plan(dataset, cfg):
    """Every step of the run as a list of sample indices: a pure function of data and seed, so a step is a position."""
    steps, epoch = [], 0
    while epoch < cfg.epochs and not (cfg.max_steps and len(steps) >= cfg.max_steps):
        steps += data.global_batches(dataset, cfg.global_batch, epoch, cfg.seed, cfg.group)
        epoch += 1
    return steps[:cfg.max_steps or None]


def micro_batches(indices, rank, world, batch_size):
    """This rank's part of one step, cut into what fits in memory."""
    mine = indices[rank::world]
    return [mine[i:i + batch_size] for i in range(0, len(mine), batch_size)]


def leave_group(_):
    """In a loader's process: Ctrl-C and `kill -TERM -GROUP` reach the whole group, and the step in hand still needs its
    data. (Ignoring the signals instead would hang the exit, where Python ends its children with SIGTERM.)"""
    os.setpgid(0, 0)


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


# ----------------------------------------------------------------------------------------------------------------------
# the state to resume from: out/state/step-00000100, two of them kept

def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def save_state(vlm, optimizer, step, cfg, rank, world):
    """Write all that a resume needs to a temporary folder and rename it; rank 0 writes, the others wait."""
    folder, tmp = f"{cfg.out}/state/step-{step:08d}", f"{cfg.out}/state/tmp"
    if rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        os.makedirs(tmp)
        names = {p: n for n, p in vlm.named_parameters()}
        trained = {n: p for p, n in names.items() if p.requires_grad}
        moments = {f"{names[p]}.{k}": v for p, s in optimizer.state.items() for k, v in s.items()}
        model.write_safetensors(trained, f"{tmp}/trained.safetensors")
        model.write_safetensors({**moments, "rng": torch.get_rng_state()}, f"{tmp}/optimizer.safetensors")
        hashes = {name: sha256(f"{tmp}/{name}") for name in sorted(os.listdir(tmp))}
        model.write_json({"step": step, "settings": asdict(cfg), "sha256": hashes}, f"{tmp}/state.json")
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(tmp, folder)
        for old in sorted(os.listdir(f"{cfg.out}/state"))[:-2]:
            shutil.rmtree(f"{cfg.out}/state/{old}")
    if world > 1:
        dist.barrier()


def newest_state(cfg):
    """The newest whole state's folder and its state.json, or (None, None). A torn one is named and passed over."""
    root = f"{cfg.out}/state"
    names = [n for n in sorted(os.listdir(root), reverse=True) if n.startswith("step-")] if os.path.isdir(root) else []
    for name in names:
        try:
            with open(f"{root}/{name}/state.json") as f:
                state = json.load(f)
            if all(sha256(f"{root}/{name}/{file}") == digest for file, digest in state["sha256"].items()):
                return f"{root}/{name}", state
        except (OSError, ValueError, KeyError):
            pass                                                            # said in the next line
        say(f"{root}/{name} is not whole; trying the one before")
    return None, None


def resume(vlm, optimizer, cfg):
    """Load the newest state if there is one. -> the step to go on with

    A run goes on with the settings that it was started with; SystemExit names those that differ."""
    folder, state = newest_state(cfg)
    if not folder:
        return 0
    free = ("log_every", "probe_every", "save_every", "snapshots", "overwrite", "dry_run", "workers", "device",
            "batch_size", "on_bad", "bad_limit", "offline")
    differ = [f"{k} was {v!r}, is {getattr(cfg, k, None)!r}" for k, v in state["settings"].items()
              if k not in free and v != getattr(cfg, k, None)]
    if differ:
        sys.exit(f"{folder} was made with other settings ({'; '.join(differ)}): finish it with its own, or use another out")
    tensors, moments = load_file(f"{folder}/trained.safetensors"), load_file(f"{folder}/optimizer.safetensors")
    torch.set_rng_state(moments.pop("rng"))
    for name, p in vlm.named_parameters():
        if p.requires_grad:
            with torch.no_grad():
                p.copy_(tensors[name])
            own = {k[len(name) + 1:]: v for k, v in moments.items() if k.rpartition(".")[0] == name}
            optimizer.state[p] = {k: v.to(p.device) for k, v in own.items()}
    return state["step"]


# ----------------------------------------------------------------------------------------------------------------------
# the log

def say(text):
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


def open_log(path, step):
    """log.jsonl without what a killed run wrote after its last state, open for more."""
    lines = open(path).read().splitlines() if os.path.isfile(path) and step else []
    keep = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < step]
    with open(path + ".tmp", "w") as f:
        f.writelines(line + "\n" for line in keep)
    os.replace(path + ".tmp", path)
    return open(path, "a", buffering=1)


def plot_loss(path, out):
    """loss.png from log.jsonl: the loss, and the same batch's loss without its images"""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = [json.loads(line) for line in open(path)]
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], lw=1, label="loss")
    probes = [r for r in rows if "blind" in r]
    if probes:
        axes.plot([r["step"] for r in probes], [r["blind"] for r in probes], "o-", lw=1, ms=3, label="without the image")
    axes.set(xlabel="step", ylabel="nats per trained token", yscale="log")
    axes.legend()
    figure.savefig(out, dpi=120, bbox_inches="tight")
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------------
# the run

def main(cfg):
    rank, world, device = setup_ranks(cfg)
    torch.backends.cuda.matmul.allow_tf32 = True
    if cfg.global_batch % world:
        sys.exit(f"global_batch {cfg.global_batch} does not divide by {world} ranks")
    os.makedirs(cfg.out, exist_ok=True)
    if rank == 0 and os.path.isfile(f"{cfg.out}/config.json"):      # --overwrite: check() has seen to that
        os.remove(f"{cfg.out}/config.json")
        for old in ("state", "steps"):
            shutil.rmtree(f"{cfg.out}/{old}", ignore_errors=True)
    if world > 1:
        dist.barrier()
    told, stop = [], False                      # a signal reaches one rank; all stop when the sum over ranks says so
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: told.append(True))

    vlm = make_model(cfg, device)
    optimizer = make_optimizer(vlm, cfg)
    start = resume(vlm, optimizer, cfg)
    say(parts_table(vlm, cfg))

    dataset = data.Conversations(cfg.data.split(","), cfg.images, vlm.tokenizer, vlm.num_patches,
                                 {**vlm.image, "mode": cfg.image_mode}, template=cfg.template, mask=cfg.mask,
                                 max_length=cfg.max_length)
    steps = plan(dataset, cfg)
    mine = [micro_batches(indices, rank, world, cfg.batch_size) for indices in steps]
    loader = iter(torch.utils.data.DataLoader(
        dataset, batch_sampler=[m for step in mine[start:] for m in step], num_workers=cfg.workers,
        collate_fn=lambda samples: data.collate(samples, vlm.pad_id), pin_memory=device.type == "cuda",
        worker_init_fn=leave_group, multiprocessing_context="fork" if cfg.workers else None))
    say(f"{len(dataset):,} samples, {len(steps):,} steps of {cfg.global_batch}, "
        f"{world} rank(s) on {device.type}, {cfg.dtype}" + (f", going on at step {start}" if start else ""))
    if rank == 0:
        log = open_log(f"{cfg.out}/log.jsonl", start)
        first = dataset[steps[0][0]]
        if not isinstance(first, data.Bad):
            say(data.show(first["input_ids"].tolist(), first["labels"].tolist(), vlm.tokenizer))

    amp = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    trained = [(n, p) for n, p in vlm.named_parameters() if p.requires_grad]
    skipped, began = 0, time.time()
    for step in range(start, len(steps) + 1):                       # one pass more than steps: the last one only saves
        last = step == len(steps)
        if rank == 0 and step in cfg.snapshots:
            model.save(vlm, f"{cfg.out}/steps/{step:06d}", cfg.stage, "llm" in STAGES[cfg.stage], template=cfg.template,
                       image_mode=cfg.image_mode)
        if last or stop or (step > start and step % cfg.save_every == 0):
            save_state(vlm, optimizer, step, cfg, rank, world)
        if last or stop:
            break

        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor(step, len(steps), cfg.warmup)

        # Losses are sums; the one division, by the trained tokens of the whole global batch, comes after the last.
        t0, totals, blind, bad = time.time(), torch.zeros(5, dtype=torch.float64), None, []
        # totals: loss, trained, tokens, samples that cannot be used, told to stop
        for i in range(len(mine[step])):
            batch = to_device(next(loader), device)
            totals[3] += len(batch["bad"])
            bad += batch["bad"]
            if not len(batch["ids"]):
                continue
            with amp:
                loss, count = vlm(batch)
            if loss.requires_grad:                                  # not so for text alone while only the connector trains
                loss.backward()
            totals += torch.tensor([loss.item(), count, batch["attention_mask"].sum().item(), 0, 0], dtype=torch.float64)
            if i == 0 and cfg.probe_every and step % cfg.probe_every == 0 and len(batch["pixel_values"]):
                blind = blind_loss(vlm, batch, amp)
        totals[4] = len(told)
        totals = reduce_sum(totals.to(device if world > 1 and device.type == "cuda" else "cpu"), world).cpu()
        loss, count, tokens, unusable, stopped = totals.tolist()
        stop, skipped = stopped > 0, skipped + int(unusable)
        for sentence in bad if cfg.on_bad == "skip" else ():
            print(f"step {step}: skipped {sentence}", file=sys.stderr, flush=True)
        if skipped > (cfg.bad_limit if cfg.on_bad == "skip" else 0):      # on every rank alike
            save_state(vlm, optimizer, step, cfg, rank, world)      # before the update: mended, a run goes on here
            why = f"{skipped} samples were skipped, more than bad_limit {cfg.bad_limit}; data.py --check names them all"
            sys.exit(f"train.py: {why if cfg.on_bad == 'skip' else (bad + ['another rank has a bad sample'])[0]}")
        for name, p in trained:
            if p.grad is None:                                      # a step without images, or with nothing to train
                p.grad = torch.zeros_like(p)
            reduce_sum(p.grad, world).div_(max(count, 1))
        norm = torch.nn.utils.clip_grad_norm_([p for _, p in trained], cfg.clip or math.inf, foreach=True).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):       # the same on every rank, so all of them stop
            sys.exit(f"step {step}: the loss is {loss}, the gradient norm {norm}; nothing was updated. Samples: "
                     f"{[dataset.records[i].get('id') for i in steps[step]]}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        seconds = time.time() - t0
        row = {"step": step, "loss": loss / max(count, 1), "trained": int(count), "lr": optimizer.param_groups[0]["lr"],
               "grad_norm": norm, "tok_s": tokens / seconds, "skipped": skipped}
        if blind is not None:
            row["blind"] = blind
        if rank == 0:
            log.write(json.dumps(row) + "\n")
        if step % cfg.log_every == 0 or blind is not None:
            eta = (time.time() - began) / (step + 1 - start) * (len(steps) - step - 1)
            say(f"step {step:5d}/{len(steps)}  loss {row['loss']:7.4f}" + (f" (blind {blind:.4f})" if blind else "")
                + f"  trained {int(count):6d} tok  lr {row['lr']:.2e}  grad {norm:8.3f}  {row['tok_s']:7.0f} tok/s"
                + (f"  skipped {skipped}" if cfg.on_bad == "skip" else "") + f"  eta {eta / 60:5.1f} min")

    if rank == 0:
        log.close()
        plot_loss(f"{cfg.out}/log.jsonl", f"{cfg.out}/loss.png")
        if last:
            vlm.llm.to(getattr(torch, cfg.dtype))
            model.save(vlm, cfg.out, cfg.stage, with_llm="llm" in STAGES[cfg.stage], seed=cfg.seed, steps=len(steps),
                       template=cfg.template, image_mode=cfg.image_mode)
            say(f"wrote {cfg.out}")
        else:
            say(f"stopped after step {step}; the same command goes on from there")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    sys.exit(0 if last else STOPPED)


def blind_loss(vlm, batch, amp):
    """The batch's loss with its images hidden from attention: near the true loss means that nobody looks."""
    with torch.no_grad(), amp:
        loss, count = vlm(data.without_images(batch))
    return loss.item() / max(count, 1)


def dry_run(cfg):
    """Print what the run would train and hold in memory, from config files and the meta device: nothing is allocated."""
    if cfg.init:                                        # sizes of what an earlier stage writes are those of its own settings
        say(f"sizes as if {cfg.init} were made from the settings below")
    with torch.device("meta"):
        tower = AutoModel.from_config(find_config(cfg.vision_tower))
        llm = AutoModelForCausalLM.from_config(find_config(cfg.llm))
        D = llm.get_input_embeddings().embedding_dim
        config = model.Config(**{f.name: getattr(cfg, f.name) for f in fields(model.Config)})
        config.num_words = cfg.num_words or (len(vocab.load_words(cfg.words)) if os.path.isfile(cfg.words) else 19200)
        vlm = torch.nn.Module()
        vlm.vision_tower, vlm.connector, vlm.llm = tower, model.make_connector(config, tower.config.hidden_size, D), llm
    dtype = getattr(torch, cfg.dtype)
    vlm.to(dtype).requires_grad_(False)
    for part in STAGES[cfg.stage]:
        getattr(vlm, part).float().requires_grad_(True)
    say(parts_table(vlm, cfg))
    side = cfg.image_size or tower.config.image_size
    P = (side // tower.config.patch_size) ** 2
    T = P + 64 if cfg.stage == "pretrain" else min(cfg.max_length, P + 448)
    for what, size in memory(vlm, cfg, config, P, T).items():
        say(f"{what:44}{size / 2**30:9.2f} GiB")
    say(f"for {cfg.batch_size} samples of {T} tokens ({P} of them patches) on each of the ranks, weights not sharded")


def find_config(name):
    """A model's config: the sizes in config/paper/sizes.json for the paper's models, else the folder's or the hub's."""
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "config/paper/sizes.json")) as f:
        sizes = json.load(f)
    if name in sizes:
        return AutoConfig.for_model(**sizes[name])
    return model.vision_config(name)


def memory(vlm, cfg, config, P, T):
    """Bytes of each kind on one rank: an estimate for a micro-batch of cfg.batch_size samples of T tokens, P of them patches."""
    llm = vlm.llm.config
    half = 2 if cfg.dtype == "bfloat16" else 4
    weights = sum(p.numel() * p.element_size() for p in vlm.parameters())
    trained = sum(p.numel() for p in vlm.parameters() if p.requires_grad)
    tokens, patches = cfg.batch_size * T, cfg.batch_size * P
    D, inner, layers = llm.hidden_size, llm.intermediate_size, llm.num_hidden_layers
    # What one block keeps for its backward pass: norms in float32, q, k, v and the attention's output, three inner tensors.
    block = tokens * (2 * 4 * D + half * 6 * D + half * 3 * inner)
    kept = layers * tokens * D * 4 + block if cfg.checkpointing else layers * block
    words = patches * min(config.num_words, model.BLOCK) * 8 if config.connector == "langbridge" else 0
    rows = min(model.LOSS_ROWS, tokens - patches) * llm.vocab_size * 12
    E = config.num_words * D * half if config.connector == "langbridge" else 0
    parts = {"weights": weights + E, "gradients and AdamW's moments (float32)": 12 * trained,
             "activations of the LLM": kept, "one block of scores and weights": words, "logits": rows}
    return {**parts, "sum": sum(parts.values())}


if __name__ == "__main__":
    try:
        dry_run(CFG) if CFG.dry_run else main(CFG)
    except (ValueError, OSError) as error:                          # a user's mistake: its first line says which
        sys.exit(f"train.py: {str(error).strip().splitlines()[0]}")
