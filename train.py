"""
Train one stage of a VLM: "pretrain" (the connector alone) or "sft" (connector and LLM).

    python train.py config/pocket/pretrain.py [--key=value ...]
    torchrun --nproc_per_node=8 train.py config/paper/qwen2-0.5b-pretrain.py
    torchrun --nproc_per_node=8 train.py config/paper/qwen2-7b-sft.py                  # shard = True: FSDP2
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
import warnings
from dataclasses import asdict, dataclass, fields
from datetime import timedelta

import common
import vocab
from common import go_offline

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
    compile: bool = False                    # torch.compile the LLM's blocks: faster steps after a slower first one
    shard: bool = False                      # each rank holds its piece of the LLM alone (FSDP2): where it does not fit
    shard_tower: bool = False                # and of the vision tower
    checkpointing: bool = False              # recompute the LLM's activations in the backward pass: slower, smaller
    device: str = ""                         # "" means cuda if there is one; "cuda" is one for each rank
    seed: int = 42
    # log and checkpoint
    log_every: int = 1                       # steps
    probe_every: int = 50                    # steps between looks at the loss without the image; 0 means never
    save_every: int = 500                    # steps between states to resume from
    snapshots: tuple = ()                    # steps at which to keep a checkpoint of the run, such as 100,1000,2000
    overwrite: bool = False                  # train again where a finished run is
    offline: bool = False                    # download nothing: a hub name is an error where the cache lacks it
    dry_run: bool = False                    # print sizes and memory, load and write nothing


Settings.given = {}                          # {name: where it was set}; no field, so in no --help and in no state


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
                sys.exit(f"there is no config file {arg}; a setting is written --key=value")
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
    settings.given = {key: where for key, _, where in given}
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
               "dtype": ("bfloat16", "float32"), "image_mode": ("crop", "pad"), 
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
    if cfg.warmup > 1 or cfg.gain <= 0:
        sys.exit(f"warmup is {cfg.warmup}, gain {cfg.gain}: warmup is a part of all steps, 0 to 1, gain is above 0")
    if cfg.connector == "langbridge" and not (cfg.init or cfg.hidden):
        sys.exit("hidden is 0: as wide as the LLM is for an MLP, a LangBridge knows no LLM")
    if cfg.init and os.path.abspath(cfg.init) == os.path.abspath(cfg.out):
        sys.exit(f"init and out are both {cfg.out}: a run does not write over what it starts from")
    if cfg.shard_tower and not cfg.shard:
        sys.exit("shard_tower is set without shard: the tower is sharded along with the LLM")
    needed = ["out", "data"] + ([] if cfg.init else ["llm", "vision_tower"])
    if not cfg.init and cfg.connector == "langbridge":
        needed.append("words")
    if cfg.dry_run:
        needed = [] if os.path.isfile(f"{cfg.init}/config.json") else ["llm", "vision_tower"]
    for key in needed:
        if not getattr(cfg, key):
            sys.exit(f"{key} is not set: give it in the config file or as --{key}=...")
    if os.path.isfile(f"{cfg.out}/config.json") and not (cfg.overwrite or cfg.dry_run):
        sys.exit(f"{cfg.out} holds a finished run; --overwrite trains it again")


if __name__ == "__main__":                   # before the slow imports: --help and a mistyped setting answer at once
    CFG = read_settings(sys.argv[1:])
    check(CFG)
    if CFG.offline:
        go_offline()

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import checkpoint
import data
import fused
import model
from common import check_restarts, choose_device, print_rank0, write_json

warnings.filterwarnings("ignore", "torch.distributed is disabled")          # dcp says so of every run of one process
FILE = 2 << 30                               # bytes of a state's file, from which on a new one is begun

# ----------------------------------------------------------------------------------------------------------------------
# ranks

def setup_ranks(cfg):
    """-> (rank, number of ranks, device). One process, or one of torchrun's."""
    name = choose_device(cfg.device, most=1)
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    check_restarts()
    # Ranks wait for each other while rank 0 writes and hashes a state: minutes for a large LLM.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    return dist.get_rank(), dist.get_world_size(), device


def reduce_sum(tensor, world):
    """Add `tensor` up over all ranks, in place."""
    if world > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def on_all_ranks(work, world):
    """Every rank's work(), as a list. An OSError of one is raised on all: none waits for a rank that has gone."""
    try:
        answer = (work(), None)
    except OSError as error:
        answer = (None, str(error))
    answers = [answer] * world
    if world > 1:
        dist.all_gather_object(answers, answer)
    for _, error in answers:
        if error:
            raise OSError(error)
    return [result for result, _ in answers]


def local(tensor):
    """This rank's piece of a sharded tensor, in place; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ----------------------------------------------------------------------------------------------------------------------
# model and optimizer

def make_model(cfg, device, world):
    """The VLM of this run, its trained parts in float32 and with gradients, the rest frozen in cfg.dtype."""
    dtype = getattr(torch, cfg.dtype)
    held = torch.float32 if "llm" in STAGES[cfg.stage] else dtype           # master weights of an LLM that trains
    how = {"attention": cfg.attention, "frozen_dtype": dtype}
    if cfg.shard and world > 1:
        how["sharded_parts"] = ("llm", "vision_tower") if cfg.shard_tower else ("llm",)
    torch.manual_seed(cfg.seed)                                             # of the fresh connector
    if cfg.init:
        check_init(cfg, checkpoint.read_config(cfg.init)[0])
        vlm = checkpoint.load(cfg.init, device, held, **how)
    else:
        words = vocab.load_words(cfg.words) if cfg.connector == "langbridge" else None
        if words and len(words) < cfg.num_words:
            sys.exit(f"num_words is {cfg.num_words}, but {cfg.words} has {len(words)}")
        words = words and words[:cfg.num_words or None]
        config = model.Config(**{f.name: getattr(cfg, f.name) for f in fields(model.Config)})
        config.num_words = len(words or ())
        vlm = checkpoint.build(config, words, device, held, gain=cfg.gain, **how)
    for part in STAGES[cfg.stage]:
        getattr(vlm, part).requires_grad_(True).train()
    if cfg.checkpointing:
        vlm.llm.train()                                                     # the library checkpoints in this mode only
        enable = getattr(vlm.llm, "activation_checkpointing_enable", None) or vlm.llm.gradient_checkpointing_enable
        enable({"use_reentrant": False})                                    # the library renamed it
    if cfg.compile:
        if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
            sys.exit("--compile needs a C++ compiler on a CPU, and there is no g++")
        for block in checkpoint.transformer_blocks(vlm.llm):                                 # alike: what is compiled for the first serves all
            block.compile(dynamic=True)
    return vlm


def check_init(cfg, config):
    """SystemExit where a setting asks for another model than `config`, that of the checkpoint cfg.init."""
    for key, value in asdict(config).items():
        print_rank0(f"  {key} = {value} (from {cfg.init})")
        if key in cfg.given and key not in ("llm", "vision_tower") and getattr(cfg, key) != value:
            sys.exit(f"{key} is set to {getattr(cfg, key)!r}, but {cfg.init} has {value!r}")
    for key in ("llm", "vision_tower", "words", "gain"):            # a config file has the first two for its --dry_run
        if cfg.given.get(key) == "the command line":
            sys.exit(f"--{key} does not go with init, which has its own; transfer.py moves a connector to another LLM")


def make_optimizer(vlm, cfg):
    """AdamW with a group for each trained part, the learning rate of the part in `base_lr`."""
    groups = []
    for part in STAGES[cfg.stage]:
        parameters = [p for p in getattr(vlm, part).parameters() if p.requires_grad]
        groups.append({"params": parameters, "base_lr": getattr(cfg, f"{part}_lr"), "part": part})
    optimizer = torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay, fused=True)
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
    """Linear warm-up over ceil(warmup x steps) steps, then a cosine to 0 (transformers' cosine schedule): the
    first step's rate is 0, so that a run of one step learns nothing."""
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
    """This rank's part of one step, cut into what fits in memory: as many for each rank, the last perhaps empty."""
    mine, count = indices[rank::world], math.ceil(len(indices[::world]) / batch_size)
    return [mine[i * batch_size:(i + 1) * batch_size] for i in range(count)]


def leave_group(_):
    """In a loader's process: Ctrl-C and `kill -TERM -GROUP` reach the whole group, and the step in hand still needs its
    data. (Ignoring the signals instead would hang the exit, where Python ends its children with SIGTERM.)"""
    os.setpgid(0, 0)


def make_loader(dataset, batches, vlm, cfg, device):
    """An iterator over this rank's batches, read by cfg.workers processes."""
    return iter(torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=cfg.workers, pin_memory=device.type == "cuda",
        collate_fn=lambda samples: data.collate(samples, vlm.pad_id),
        worker_init_fn=leave_group, multiprocessing_context="fork" if cfg.workers else None))


def inputs_hash(dataset, cfg):
    """SHA-256 of what the run reads: the JSON files, and the sizes of up to 1,000 of the images."""
    digest = hashlib.sha256("".join(sha256(path) for path in cfg.data.split(",")).encode())
    names = [r["image"] for r in dataset.records if isinstance(r.get("image"), str)]
    for name in names[::len(names) // 1000 + 1]:
        path = os.path.join(cfg.images, name)
        digest.update(str(os.path.getsize(path) if os.path.isfile(path) else None).encode())
    return digest.hexdigest()


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}


# ----------------------------------------------------------------------------------------------------------------------
# the state to resume from: out/state/step-00000100, two of them kept

def state_tensors(vlm, optimizer, step, rank):
    """All that a step changes, by name: trained parameters, AdamW's moments (made if need be), this rank's dice."""
    held = {f"rng.{rank}": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        held[f"rng.{rank}.cuda"] = torch.cuda.get_rng_state()
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p not in optimizer.state:
                optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device),
                                      "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    for name, p in vlm.named_parameters():
        if p.requires_grad:
            own = optimizer.state[p]
            held |= {name: p.detach(), f"{name}.exp_avg": own["exp_avg"], f"{name}.exp_avg_sq": own["exp_avg_sq"]}
    return held


def save_state(vlm, optimizer, facts, cfg, rank, world):
    """Write all that a resume needs, each rank its pieces, to a temporary folder, and rename it when it is whole.

    facts: what state.json holds beside the hashes. OSError on every rank if it cannot be written on one."""
    folder, tmp = f"{cfg.out}/state/step-{facts['step']:08d}", f"{cfg.out}/state/tmp"

    def begin():
        if rank == 0:
            shutil.rmtree(tmp, ignore_errors=True)
            os.makedirs(tmp)

    def end():
        if rank == 0:
            sums = {name: digest for part in hashes for name, digest in part.items()}
            write_json({**facts, "world": world, "settings": asdict(cfg), "sha256": sums}, f"{tmp}/state.json")
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(tmp, folder)
            for old in sorted(os.listdir(f"{cfg.out}/state"))[:-2]:
                shutil.rmtree(f"{cfg.out}/state/{old}")

    on_all_ranks(begin, world)
    tensors, files, size = state_tensors(vlm, optimizer, facts["step"], rank), {}, 0
    for name in [*tensors, *(f"rng.{r}{kind}" for r in range(world) for kind in ("", ".cuda"))]:
        files[name] = 1 + size // FILE                              # the library holds one file in memory at a time
        size += local(tensors[name]).nbytes if name in tensors else 0
    try:
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(tmp, files, save_distributed=True))
    except CheckpointException as error:
        raise OSError(f"{tmp} cannot be written: {next(iter(error.failures.values()))[0]}") from None
    mine = f"shard-{rank + 1:05d}-"
    hashes = on_all_ranks(lambda: {n: sha256(f"{tmp}/{n}") for n in os.listdir(tmp) if n.startswith(mine)}, world)
    on_all_ranks(end, world)


def newest_state(cfg, rank, world):
    """The newest whole state's folder and its state.json, or (None, None). A torn one is named and passed over."""
    root = f"{cfg.out}/state"

    def read(name):
        """state.json, or None if a file of this rank's share is not what it says"""
        try:
            with open(f"{root}/{name}/state.json") as f:
                state = json.load(f)
            share = sorted(state["sha256"].items())[rank::world]
            return state if all(sha256(f"{root}/{name}/{file}") == digest for file, digest in share) else None
        except (OSError, ValueError, KeyError):
            return None                                             # said in the next lines

    names = on_all_ranks(lambda: os.listdir(root) if os.path.isdir(root) else [], world)[0]
    for name in sorted((n for n in names if n.startswith("step-")), reverse=True):
        states = on_all_ranks(lambda: read(name), world)
        if all(states):
            return f"{root}/{name}", states[0]
        print_rank0(f"{root}/{name} is not whole; trying the one before")
    return None, None


def resume(vlm, optimizer, inputs, cfg, rank, world):
    """Load the newest state if there is one. -> the step to go on with, samples skipped before it

    A run goes on with the settings and the data that it was started with; SystemExit names those that differ."""
    folder, state = newest_state(cfg, rank, world)
    if not folder:
        return 0, 0
    free = ("log_every", "probe_every", "save_every", "snapshots", "overwrite", "dry_run", "workers", "device",
            "batch_size", "shard", "shard_tower", "on_bad", "bad_limit", "offline")
    differ = [f"{k} was {v!r}, is {getattr(cfg, k, None)!r}" for k, v in state["settings"].items()
              if k not in free and v != getattr(cfg, k, None)]
    if differ:
        sys.exit(f"{folder} has other settings ({'; '.join(differ)}): finish it with them, or use another out")
    changed = [key for key, value in inputs.items() if state["inputs"].get(key) != value]
    if changed:
        sys.exit(f"{' and '.join(changed)} changed since {folder} was written: a run goes on with what it began with")
    if state["world"] != world:
        print_rank0(f"{folder} was written by {state['world']} ranks, now there are {world}: sums are rounded in another order")
    tensors, reader = state_tensors(vlm, optimizer, state["step"], rank), HuggingFaceStorageReader(folder)
    there = reader.read_metadata().state_dict_metadata              # a new rank has no random state in it
    tensors = {name: t for name, t in tensors.items() if name in there or not name.startswith("rng.")}
    dcp.load(tensors, storage_reader=reader)
    if f"rng.{rank}" in tensors:
        torch.set_rng_state(tensors[f"rng.{rank}"])
    if f"rng.{rank}.cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"rng.{rank}.cuda"])
    return state["step"], state["skipped"]


# ----------------------------------------------------------------------------------------------------------------------
# the log

def open_log(path, step):
    """log.jsonl without what a killed run wrote after its last state, open for more."""
    lines = open(path).read().splitlines() if os.path.isfile(path) and step else []
    keep = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < step]
    common.write_text("".join(line + "\n" for line in keep), path)
    return open(path, "a", buffering=1)


def say_step(row, steps, seconds):
    """One line of a step; seconds: what a step of this run takes."""
    print_rank0(f"step {row['step']:5d}/{steps}  loss {row['loss']:7.4f}"
        + (f" (blind {row['blind']:.4f})" if "blind" in row else "")
        + f"  trained {row['trained']:6d} tok  lr {row['lr']:.2e}  grad {row['grad_norm']:8.3f}"
        + f"  {row['tok_s']:7.0f} tok/s" + (f"  skipped {row['skipped']}" if row["skipped"] else "")
        + f"  eta {seconds * (steps - row['step'] - 1) / 60:5.1f} min")


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
    on_all_ranks(lambda: prepare_out(cfg) if rank == 0 else None, world)
    told, stop = [], False                      # a signal reaches one rank; all stop when the sum over ranks says so
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: told.append(True))

    vlm = make_model(cfg, device, world)
    optimizer = make_optimizer(vlm, cfg)
    trained = [(n, p) for n, p in vlm.named_parameters() if p.requires_grad]
    dataset = data.Conversations(cfg.data.split(","), cfg.images, vlm.tokenizer, vlm.num_patches,
                                 {**vlm.image_settings, "mode": cfg.image_mode}, template=cfg.template,
                                 max_length=cfg.max_length)
    inputs = {"data": inputs_hash(dataset, cfg), **vlm.llm_fingerprint}
    start, skipped = resume(vlm, optimizer, inputs, cfg, rank, world)
    print_rank0(parts_table(vlm, cfg))
    steps = plan(dataset, cfg)
    mine = [micro_batches(indices, rank, world, cfg.batch_size) for indices in steps]
    loader = make_loader(dataset, [m for step in mine[start:] for m in step], vlm, cfg, device)
    print_rank0(f"{len(dataset):,} samples, {len(steps):,} steps of {cfg.global_batch}, {world} rank(s) on {device.type}, "
        f"{cfg.dtype}" + (", sharded" if vlm.sharded else "") + (f", going on at step {start}" if start else ""))
    if rank == 0:
        log = open_log(f"{cfg.out}/log.jsonl", start)
        first = dataset[steps[0][0]]
        if not isinstance(first, data.BadSample):
            print_rank0(data.show_sample(first["input_ids"].tolist(), first["labels"].tolist(), vlm.tokenizer))

    amp = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    how = {"trained_parts": STAGES[cfg.stage], "dtype": getattr(torch, cfg.dtype), "template": cfg.template,
           "image_mode": cfg.image_mode}                            # of a checkpoint
    began = time.time()
    for step in range(start, len(steps) + 1):                       # one pass more than steps: the last one only saves
        last = step == len(steps)
        if step in cfg.snapshots:
            checkpoint.save(vlm, f"{cfg.out}/steps/{step:06d}", cfg.stage, **how)
        # The first state comes after one step: a disk that is too small or not ours is found now, not at night.
        if step > start and (last or stop or step == start + 1 or step % cfg.save_every == 0):
            save_state(vlm, optimizer, {"step": step, "skipped": skipped, "inputs": inputs}, cfg, rank, world)
        if last or stop:
            break

        t0 = time.time()
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor(step, len(steps), cfg.warmup)
        probe = cfg.probe_every and step % cfg.probe_every == 0
        sums, bad = accumulate(vlm, loader, len(mine[step]), amp, device, probe)
        sums["stop"] = len(told)
        totals = reduce_sum(torch.tensor([*sums.values()], dtype=torch.float64, device=device), world).tolist()
        sums = dict(zip(sums, totals))
        for sentence in bad if cfg.on_bad == "skip" else ():
            print(f"step {step}: skipped {sentence}", file=sys.stderr, flush=True)
        if skipped + sums["bad"] > (cfg.bad_limit if cfg.on_bad == "skip" else 0):      # on every rank alike
            # Before the update: mended, a run goes on here.
            save_state(vlm, optimizer, {"step": step, "skipped": skipped, "inputs": inputs}, cfg, rank, world)
            why = (f"{skipped + int(sums['bad'])} samples were skipped, more than bad_limit {cfg.bad_limit}; "
                   "data.py --check names them all")
            sys.exit(f"train.py: {why if cfg.on_bad == 'skip' else (bad + ['another rank has a bad sample'])[0]}")
        reduce_gradients(trained, sums["trained"], sums["images"], world)
        norm = clip_gradients(trained, cfg.clip, world)
        if not (math.isfinite(sums["loss"]) and math.isfinite(norm)):   # the same on every rank, so all of them stop
            sys.exit(f"step {step}: the loss is {sums['loss']}, the gradient norm {norm}; nothing was updated. "
                     f"Samples: {[dataset.records[i].get('id') for i in steps[step]]}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        stop, skipped = sums["stop"] > 0, skipped + int(sums["bad"])
        row = {"step": step, "loss": sums["loss"] / max(sums["trained"], 1), "trained": int(sums["trained"]),
               "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm, "tok_s": sums["tokens"] / (time.time() - t0),
               "skipped": skipped}
        if sums["blind_trained"]:
            row["blind"] = sums["blind_loss"] / sums["blind_trained"]
        if rank == 0:
            log.write(json.dumps(row) + "\n")
        if step % cfg.log_every == 0 or step == len(steps) - 1 or "blind" in row:
            say_step(row, len(steps), (time.time() - began) / (step + 1 - start))

    if last:
        checkpoint.save(vlm, cfg.out, cfg.stage, **how, seed=cfg.seed, steps=len(steps))
    if rank == 0:
        log.close()
        plot_loss(f"{cfg.out}/log.jsonl", f"{cfg.out}/loss.png")
        print_rank0(f"wrote {cfg.out}" if last else f"stopped after {step} steps; the same command goes on from there")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    sys.exit(0 if last else STOPPED)


def prepare_out(cfg):
    """Make the folder of the run; --overwrite takes the old run out of it, config.json last: it says that it is one."""
    os.makedirs(cfg.out, exist_ok=True)
    if os.path.isfile(f"{cfg.out}/config.json"):                    # check() has seen to --overwrite
        for old in ("state", "steps", "llm"):
            shutil.rmtree(f"{cfg.out}/{old}", ignore_errors=True)
        os.remove(f"{cfg.out}/config.json")


def accumulate(vlm, loader, count, amp, device, probe):
    """Forward and backward over this rank's `count` micro-batches. -> sums over them, {name: number}; a sentence for
    each sample that could not be used

    Losses are sums; the one division, by the trained tokens of the whole global batch, comes after the last. probe:
    also the first micro-batch's loss with its images hidden from attention. Near the true loss, nobody looks."""
    bad, sums = [], dict.fromkeys(("loss", "trained", "tokens", "bad", "images", "blind_loss", "blind_trained"), 0)
    for i in range(count):
        batch = to_device(next(loader), device)
        images = len(batch["pixel_values"])
        sums["tokens"] += batch["attention_mask"].sum().item()
        sums["bad"] += len(batch["bad"])
        bad += batch["bad"]
        sums["images"] += images
        if not len(batch["ids"]):
            if not vlm.sharded:
                continue
            batch = dummy_batch(batch, device)                          # the other ranks wait for this one's pieces
        with amp:
            loss, trained = vlm(batch)
        if loss.requires_grad:                                      # not for text alone while only the connector trains
            loss.backward()
        sums["loss"] += loss.item()
        sums["trained"] += trained
        if probe and i == 0 and (images or vlm.sharded):
            with torch.no_grad(), amp:
                loss, trained = vlm(data.without_images(batch))
            if vlm.sharded:
                vlm.reshard()                                       # else the update misses what is still gathered
            if images:
                sums["blind_loss"], sums["blind_trained"] = loss.item(), trained
    return sums, bad


def dummy_batch(batch, device):
    """A batch of two tokens, none of them trained, in place of an empty one."""
    two = torch.zeros(1, 2, dtype=torch.int64, device=device)
    return batch | {"input_ids": two, "labels": two + data.IGNORE, "attention_mask": two + 1, "position_ids": two}


def reduce_gradients(trained, tokens, images, world):
    """The gradient of every rank's sums -> that of the mean over the global batch's `tokens`, on every rank.

    What a rank did not see (a step without images) counts as 0; SystemExit names a parameter that no loss reached."""
    reached = torch.tensor([p.grad is not None for _, p in trained], dtype=torch.int32, device=trained[0][1].device)
    for (name, p), ranks in zip(trained, reduce_sum(reached, world).tolist()):
        if not ranks and tokens and (images or not name.startswith("connector.")):
            sys.exit(f"{name} trains, but the loss does not depend on it: it got no gradient; nothing was updated")
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if isinstance(p, DTensor):
            local(p.grad).mul_(world / max(tokens, 1))              # FSDP has taken the mean over ranks
        else:
            reduce_sum(p.grad, world).div_(max(tokens, 1))


def clip_gradients(trained, largest, world):
    """Scale all gradients to a norm of at most `largest` (0: any). -> the norm before, over the pieces of all ranks"""
    pieces = [local(p.grad) for _, p in trained if isinstance(p, DTensor)]
    whole = [p.grad for _, p in trained if not isinstance(p, DTensor)]
    square = torch.nn.utils.get_total_norm(whole).square()
    if pieces:
        square = square + reduce_sum(torch.nn.utils.get_total_norm(pieces).square(), world)
    norm = square.sqrt().item()
    if largest and norm > largest:
        torch._foreach_mul_(whole + pieces, largest / norm)
    return norm


def dry_run(cfg):
    """Print what the run would train and hold in memory, from config files and the meta device."""
    if os.path.isfile(f"{cfg.init}/config.json"):
        for key, value in asdict(checkpoint.read_config(cfg.init)[0]).items():
            setattr(cfg, key, value)
    elif cfg.init:
        print_rank0(f"{cfg.init} is not there yet: sizes as the settings have them")
    with torch.device("meta"):
        tower = AutoModel.from_config(find_config(cfg.vision_tower))
        llm = AutoModelForCausalLM.from_config(find_config(cfg.llm))
        D = llm.get_input_embeddings().embedding_dim
        config = model.Config(**{f.name: getattr(cfg, f.name) for f in fields(model.Config)})
        config.num_words = cfg.num_words or (len(vocab.load_words(cfg.words)) if os.path.isfile(cfg.words) else 19200)
        vlm = torch.nn.Module()
        vlm.vision_tower, vlm.connector, vlm.llm = tower, checkpoint.make_connector(config, tower.config.hidden_size, D), llm
    dtype = getattr(torch, cfg.dtype)
    vlm.to(dtype).requires_grad_(False)
    for part in STAGES[cfg.stage]:
        getattr(vlm, part).float().requires_grad_(True)
    print_rank0(parts_table(vlm, cfg))
    side = cfg.image_size or tower.config.image_size
    P = (side // tower.config.patch_size) ** 2
    T = P + 64 if cfg.stage == "pretrain" else min(cfg.max_length, P + 448)
    ranks = (1, 8, 64)
    tables = [memory(vlm, cfg, config, P, T, n) for n in ranks]
    print_rank0(f"{'GiB on each GPU':44}" + "".join(f"{n:5} GPU{'s' * (n > 1)}".rjust(10) for n in ranks))
    for what in tables[0]:
        print_rank0(f"{what:44}" + "".join(f"{table[what] / 2**30:10.2f}" for table in tables))
    print_rank0(f"{T} tokens a sample ({P} of them patches), {cfg.global_batch} samples a step, at most {cfg.batch_size} at a "
        f"time; from 2 GPUs on the LLM is {'cut into pieces' if cfg.shard else 'whole on each (--shard cuts it)'}")


def find_config(name):
    """A model's config: the sizes in config/paper/sizes.json for the paper's models, else the folder's or the hub's."""
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "config/paper/sizes.json")) as f:
        sizes = json.load(f)
    if name in sizes:
        return AutoConfig.for_model(**sizes[name])
    return checkpoint.vision_config(name)


def memory(vlm, cfg, config, P, T, ranks):
    """Bytes of each kind on one of `ranks` ranks: an estimate for samples of T tokens, P of them patches."""
    llm, shards = vlm.llm.config, ranks if cfg.shard else 1
    half = 2 if cfg.dtype == "bfloat16" else 4
    samples = min(cfg.batch_size, cfg.global_batch // ranks)
    tokens, patches = samples * T, samples * P
    D, inner, layers = llm.hidden_size, llm.intermediate_size, llm.num_hidden_layers
    weights = grown = 0
    for part in ("vision_tower", "connector", "llm"):
        pieces = shards if part == "llm" or part == "vision_tower" and cfg.shard_tower else 1
        for p in getattr(vlm, part).parameters():
            weights += p.numel() * p.element_size() / pieces
            grown += 12 * p.numel() * p.requires_grad / pieces
    # Gathered at one time: what is outside of the blocks, and two blocks, one of them fetched ahead. Where it trains,
    # its gradients come once in this dtype and once in the float32 that they are summed in.
    one = sum(p.numel() for p in checkpoint.transformer_blocks(vlm.llm)[0].parameters())
    rest = sum(p.numel() for p in vlm.llm.parameters()) - layers * one
    trains = next(vlm.llm.parameters()).requires_grad
    gathered = ((rest + 2 * one) * half + (rest + one) * (half + 4) * trains) if shards > 1 else 0
    # What one block keeps for its backward pass: norms in float32, q, k, v and the attention's output, three inner tensors.
    block = tokens * (2 * 4 * D + half * 6 * D + half * 3 * inner)
    kept = layers * tokens * D * (half if shards > 1 else 4) + block if cfg.checkpointing else layers * block
    words = patches * min(config.num_words, fused.BLOCK) * 8 if config.connector == "langbridge" else 0
    rows = min(model.LOSS_ROWS, tokens - patches) * llm.vocab_size * 12
    E = config.num_words * D * half if config.connector == "langbridge" else 0
    parts = {"weights": weights + E, "gradients and AdamW's moments (float32)": grown,
             "gathered from the other ranks": gathered, "activations of the LLM": kept,
             "one block of scores and weights": words, "logits": rows}
    return {**parts, "sum": sum(parts.values())}


if __name__ == "__main__":
    try:
        dry_run(CFG) if CFG.dry_run else main(CFG)
    except (ValueError, OSError) as error:                          # a user's mistake: its first line says which
        sys.exit(f"train.py: {str(error).strip().splitlines()[0]}")
