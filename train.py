"""
Train one stage of a VLM. "pretrain" trains the connector, "sft" the connector and the LLM.

    python train.py config/pocket/pretrain.py [--key=value ...]
    torchrun --nproc_per_node=8 train.py config/paper/pretrain.py --out=out/pretrain
    torchrun --nproc_per_node=8 train.py config/paper/sft.py --init=out/moved --out=out/sft
    python train.py config/paper/sft.py --llm=Qwen/Qwen2.5-14B-Instruct --dry_run

The settings are below. A config file holds those that differ, and `--key=value` overrides both. The
same command started again continues a run that was stopped, to the same bits on the same machine.
The result is a checkpoint folder, see checkpoint.py.
"""
import ast
import json
import math
import os
import runpy
import shutil
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta

import common
from common import print_rank0

# What each stage trains. All other parts are frozen. The rate of a part is the setting PART_lr.
STAGES = {
    "words": ("connector",),            # by the words loss alone: the LLM gives its tokenizer and E
    "pretrain": ("connector",),
    "sft": ("connector", "llm"),
    "sft_tower": ("connector", "llm", "vision_tower"),
}
STOPPED = 75        # exit status of a run that saved itself after SIGTERM or SIGINT (EX_TEMPFAIL)


# --------------------------------------------------------------------------------------------------
# settings

def setting(default, text, choices=None, low=None, high=None):
    """Return a dataclass field that knows what it means and which values it may have."""
    metadata = {"help": text, "choices": choices, "low": low, "high": high}
    return field(default=default, metadata=metadata)


@dataclass
class Settings:
    stage: str = setting("pretrain", "what trains, see STAGES", choices=tuple(STAGES))
    out: str = setting("", "the checkpoint folder to write")
    init: str = setting("", "start from this checkpoint's connector, LLM and vision tower")
    # The model. With init these come from the checkpoint.
    vision_tower: str = setting("", "hub name or folder")
    llm: str = setting("", "hub name or folder")
    words: str = setting("", "the shared vocabulary, as vocab.py writes it")
    num_words: int = setting(0, "use only the first so many words; 0 means all", low=0)
    connector: str = setting("langbridge", "the kind of connector", choices=("langbridge", "mlp"))
    hidden: int = setting(5120, "H; 0 means D, for mlp only", low=0)
    normalize: str = setting("unit", "how scores become weights, see model.NORMALIZE")
    gain: float = setting(1.0, "initial spread of the scores; 1 is torch's default")
    words_init: str = setting("random", "W starts at random, or from the words' own embeddings",
                              choices=("random", "embeds"))
    vision_layer: int = setting(-2, "the hidden state of the tower that the connector reads")
    image_size: int = setting(0, "pixels; 0 means the tower's own", low=0)
    pool: int = setting(1, "pool x pool patches become one before the connector", low=1)
    # The data.
    data: str = setting("", "LLaVA-format JSON; several files with commas between them")
    images: str = setting("", "the folder that the records' image paths start from")
    image_mode: str = setting("crop", "crop to the centre, or pad to a square",
                              choices=("crop", "pad"))
    template: str = setting("plain", "plain: image and caption; chat: the LLM's own template",
                            choices=("plain", "prompted", "chat"))
    max_length: int = setting(2048, "tokens of a sample, image patches included", low=1)
    group: bool = setting(False, "batches of one modality and of similar length")
    on_bad: str = setting("stop", "stop at a sample that cannot be used, or skip and count it",
                          choices=("stop", "skip"))
    bad_limit: int = setting(100, "the run stops when more samples than this are skipped", low=0)
    workers: int = setting(2, "processes that load data, for each rank", low=0)
    features: str = setting("", "folder to keep a frozen tower's patches in, 2 P Dv bytes each")
    # The optimisation.
    global_batch: int = setting(256, "samples of a step, over all ranks", low=1)
    batch_size: int = setting(32, "samples that one rank computes at a time", low=1)
    epochs: int = setting(1, "passes over the data", low=1)
    max_steps: int = setting(0, "stop earlier; 0 means after the epochs", low=0)
    connector_lr: float = setting(1e-3, "learning rate of the connector", low=0)
    llm_lr: float = setting(2e-5, "learning rate of the LLM", low=0)
    vision_tower_lr: float = setting(2e-6, "learning rate of the vision tower", low=0)
    words_loss: float = setting(0.0, "weight of the words loss in stages with an LLM", low=0)
    warmup: float = setting(0.03, "part of all steps in which the rate rises", low=0, high=1)
    weight_decay: float = setting(0.0, "AdamW's", low=0)
    beta1: float = setting(0.9, "AdamW's")
    beta2: float = setting(0.999, "AdamW's")
    clip: float = setting(1.0, "largest gradient norm; 0 means no clipping", low=0)
    dtype: str = setting("bfloat16", "of activations and frozen weights; the others are float32",
                         choices=("bfloat16", "float32"))
    attention: str = setting("", common.ATTENTION)
    compile: bool = setting(False, "torch.compile the LLM's blocks: faster after a slow first step")
    shard: bool = setting(False, "each rank holds a piece of the LLM (FSDP2)")
    shard_tower: bool = setting(False, "each rank holds a piece of the vision tower as well")
    checkpointing: bool = setting(False, "recompute the LLM's activations: slower, less memory")
    device: str = setting("", "default: cuda if there is one; under torchrun one GPU for each rank")
    seed: int = setting(42, "of the new connector and of the order of the data")
    # The log and the checkpoints.
    log_every: int = setting(1, "steps between two printed lines", low=1)
    probe_every: int = setting(50, "steps between two losses without the image; 0: never", low=0)
    save_every: int = setting(500, "steps between two states to resume from", low=1)
    snapshots: tuple = setting((), "steps at which a checkpoint is kept, such as 100,1000")
    overwrite: bool = setting(False, "train again where a finished run is")
    offline: bool = setting(False, common.OFFLINE)
    dry_run: bool = setting(False, "print sizes and memory, allocate and write nothing")


Settings.given = {}     # {name: where it was set}. It is not a field, so no state contains it.

# A resumed run may change these, because they do not change what is computed.
FREE_SETTINGS = ("log_every", "probe_every", "save_every", "snapshots", "overwrite", "dry_run",
                 "workers", "device", "batch_size", "shard", "shard_tower", "on_bad", "bad_limit",
                 "offline")


def print_help():
    print(__doc__)
    for f in fields(Settings):
        choices = f" ({', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        print(f"  --{f.name:16} {f.default!r:14} {f.metadata['help']}{choices}")


def read_settings(argv):
    """Return Settings: the defaults, then a config file, then --key=value.

    SystemExit with one sentence for anything that does not fit.
    """
    given = []                                                      # (name, value, where)
    for arg in argv:
        if arg in ("-h", "--help"):
            print_help()
            sys.exit(0)
        if arg.startswith("--"):
            key, equals, text = arg.lstrip("-").partition("=")
            given.append((key, parse_value(text) if equals else True, "the command line"))
            continue
        if not os.path.isfile(arg):
            sys.exit(f"there is no config file {arg}; a setting is written --key=value")
        try:
            values = runpy.run_path(arg)
        except Exception as error:                  # a config file is a program that may raise all
            sys.exit(f"{arg} is not a config file: {type(error).__name__}: {error}")
        given += [(key, value, arg) for key, value in values.items() if not key.startswith("_")]

    settings = Settings()
    types = {f.name: f.type for f in fields(Settings)}
    for key, value, where in given:
        if key not in types:
            sys.exit(f"{where}: there is no setting {key!r}; train.py --help lists them")
        expected = types[key]
        if type(value) is int and expected is float:
            value = float(value)
        if type(value) is int and expected is tuple:
            value = (value,)
        if type(value) is not expected:
            sys.exit(f"{where}: {key} is {value!r}, it must be of type {expected.__name__}")
        setattr(settings, key, value)
    settings.given = {key: where for key, _, where in given}
    return settings


def parse_value(text):
    """Return the Python literal that `text` is, such as a number or True; else `text` itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def check(cfg):
    """End the process with one sentence if the settings cannot work. Nothing is loaded for this."""
    for f in fields(Settings):
        value, allowed = getattr(cfg, f.name), f.metadata
        if allowed["choices"] and value not in allowed["choices"]:
            choices = ", ".join(allowed["choices"])
            sys.exit(f"{f.name} is {value!r}, it must be one of {choices}")
        if allowed["low"] is not None and value < allowed["low"]:
            sys.exit(f"{f.name} is {value}, it must be at least {allowed['low']}")
        if allowed["high"] is not None and value > allowed["high"]:
            sys.exit(f"{f.name} is {value}, it must be at most {allowed['high']}")
    if cfg.gain <= 0:
        sys.exit(f"gain is {cfg.gain}, it must be above 0")
    needs_words = cfg.words_loss or cfg.stage == "words"
    if needs_words and cfg.connector == "mlp":
        sys.exit("the words loss needs the words of a LangBridge, and connector is mlp")
    if cfg.features and "vision_tower" in STAGES[cfg.stage]:
        sys.exit(f"features are those of a frozen tower, and stage {cfg.stage} trains it")
    if cfg.connector == "langbridge" and not (cfg.init or cfg.hidden):
        sys.exit("hidden is 0, the width of the LLM, but a LangBridge does not know its LLM")
    if cfg.init and os.path.abspath(cfg.init) == os.path.abspath(cfg.out):
        sys.exit(f"init and out are both {cfg.out}: a run does not overwrite what it starts from")
    if cfg.shard_tower and not cfg.shard:
        sys.exit("shard_tower is set without shard: the tower is sharded along with the LLM")
    if "RANK" in os.environ and ":" in cfg.device:
        sys.exit(f"device is {cfg.device}, but under torchrun each rank takes its own GPU: cuda")
    for key in required_settings(cfg):
        if not getattr(cfg, key):
            sys.exit(f"{key} is not set: give it in the config file or as --{key}=...")
    if os.path.isfile(f"{cfg.out}/config.json") and not (cfg.overwrite or cfg.dry_run):
        sys.exit(f"{cfg.out} holds a finished run; --overwrite trains it again")


def required_settings(cfg):
    """Return the names of the settings that this run cannot do without."""
    if cfg.dry_run:
        has_checkpoint = os.path.isfile(f"{cfg.init}/config.json")
        return [] if has_checkpoint else ["llm", "vision_tower"]
    if cfg.init:
        return ["out", "data"]
    names = ["out", "data", "llm", "vision_tower"]
    return names + (["words"] if cfg.connector == "langbridge" else [])


if __name__ == "__main__":      # before the slow imports: a mistyped setting answers at once
    CFG = read_settings(sys.argv[1:])
    check(CFG)
    if CFG.offline:
        common.go_offline()

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import (CheckpointException, HuggingFaceStorageReader,
                                          HuggingFaceStorageWriter)
from torch.distributed.tensor import DTensor

import checkpoint
import data
import fingerprint
import model
import pretrained
import sharding
import vocab

# torch.distributed.checkpoint says this in every run of one process.
warnings.filterwarnings("ignore", "torch.distributed is disabled")
FILE_BYTES = 2 << 30        # a file of a state is in memory as a whole while it is written


# --------------------------------------------------------------------------------------------------
# ranks

def setup_ranks(cfg):
    """Return (rank, number of ranks, device) of this process, alone or one of torchrun's."""
    name = common.choose_device(cfg.device, most=1)
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # TF32 rounds float32 factors to 10 bits. Who asks for float32 does not want that.
        torch.backends.cuda.matmul.allow_tf32 = cfg.dtype == "bfloat16"
    if "RANK" not in os.environ:
        return 0, 1, device
    common.check_restarts()
    # Ranks wait while rank 0 writes a checkpoint, which takes minutes for a large LLM.
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=6))
    return dist.get_rank(), dist.get_world_size(), device


def reduce_sum(tensor, world):
    """Add `tensor` up over all ranks, in place, and return it."""
    if world > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def on_all_ranks(work, world):
    """Return the results of work() on all ranks. An OSError of one rank is raised on all of them.

    Otherwise the other ranks would wait for ever for the rank that failed.
    """
    try:
        own = (work(), None)
    except OSError as error:
        own = (None, str(error))
    results = [own] * world
    if world > 1:
        dist.all_gather_object(results, own)
    for _, error in results:
        if error:
            raise OSError(error)
    return [result for result, _ in results]


def local(tensor):
    """Return this rank's piece of a sharded tensor, and any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# --------------------------------------------------------------------------------------------------
# model and optimizer

def make_model(cfg, device, world):
    """Return the VLM of this run: trained parts in float32, frozen parts in cfg.dtype."""
    dtype = getattr(torch, cfg.dtype)
    trained_parts = STAGES[cfg.stage]
    llm_dtype = torch.float32 if "llm" in trained_parts else dtype
    options = {"attention": cfg.attention, "frozen_dtype": dtype}
    if "vision_tower" in trained_parts:
        options["tower_dtype"] = torch.float32
    if cfg.shard and world > 1:
        options["sharded_parts"] = ("llm", "vision_tower") if cfg.shard_tower else ("llm",)
    torch.manual_seed(cfg.seed)                     # of a new connector
    if cfg.init:
        check_init(cfg, checkpoint.read_config(cfg.init)[0])
        vlm = checkpoint.load(cfg.init, device, llm_dtype, **options)
    else:
        words = None
        if cfg.connector == "langbridge":
            words = vocab.load_words(cfg.words)
            if len(words) < cfg.num_words:
                sys.exit(f"num_words is {cfg.num_words}, but {cfg.words} has {len(words)}")
            words = words[:cfg.num_words or None]
        config = model.Config(**{f.name: getattr(cfg, f.name) for f in fields(model.Config)})
        config.num_words = len(words or ())
        vlm = checkpoint.build(config, words, device, llm_dtype, gain=cfg.gain, **options)
        if cfg.words_init == "embeds":
            W = model.initial_scores(vlm.connector.vocab_embeds, cfg.hidden) * cfg.gain
            vlm.connector.to_scores.weight.data.copy_(W)
            vlm.connector.to_scores.bias.data.zero_()
    for part in trained_parts:
        getattr(vlm, part).requires_grad_(True).train()
    if "vision_tower" in trained_parts:
        freeze_unreached(vlm, device)
    if cfg.checkpointing:
        vlm.llm.train()                             # the library checkpoints in this mode only
        vlm.llm.gradient_checkpointing_enable({"use_reentrant": False})
    if cfg.compile:
        compilers = (os.environ.get("CXX", "g++"), "clang++")
        if device.type == "cpu" and not any(shutil.which(name) for name in compilers):
            sys.exit("--compile needs a C++ compiler on a CPU, and there is no g++")
        for block in sharding.transformer_blocks(vlm.llm):
            block.compile(dynamic=True)             # all blocks are alike and share one compilation
    return vlm


def check_init(cfg, config):
    """End the process if a setting asks for another model than `config` of the checkpoint init."""
    for key, value in asdict(config).items():
        print_rank0(f"  {key} = {value} (from {cfg.init})")
        if key in cfg.given and key not in ("llm", "vision_tower") and getattr(cfg, key) != value:
            sys.exit(f"{key} is set to {getattr(cfg, key)!r}, but {cfg.init} has {value!r}")
    # A config file may name these for its --dry_run. On the command line they are a mistake.
    for key in ("llm", "vision_tower", "words", "gain", "words_init"):
        if cfg.given.get(key) == "the command line":
            sys.exit(f"--{key} does not go with init, which has its own; transfer.py moves a "
                     "connector to another LLM")


def freeze_unreached(vlm, device):
    """Freeze the tower's parameters that the loss does not reach, such as the layers after
    vision_layer, and say so. An optimizer must not wait for gradients that never come."""
    side = vlm.image_settings["size"]
    features = vlm.patch_features(torch.zeros(1, 3, side, side, device=device))
    named = list(vlm.vision_tower.named_parameters())
    gradients = torch.autograd.grad(features.sum(), [p for _, p in named], allow_unused=True)
    frozen = [name for (name, _), gradient in zip(named, gradients) if gradient is None]
    for name, parameter in named:
        parameter.requires_grad_(name not in frozen)
    if frozen:
        print_rank0(f"vision_tower: {len(frozen)} of {len(named)} tensors stay frozen, because the "
                    f"loss does not depend on them ({frozen[0]} ... {frozen[-1]})")


def make_optimizer(vlm, cfg):
    """Return AdamW over all parameters that require a gradient, one group for each part."""
    groups = []
    for part in ("connector", "llm", "vision_tower"):
        parameters = [p for p in getattr(vlm, part).parameters() if p.requires_grad]
        if parameters:
            groups.append({"params": parameters, "base_lr": getattr(cfg, f"{part}_lr")})
    return torch.optim.AdamW(groups, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay,
                             fused=True)


def parts_table(vlm, cfg):
    """Return a table as text: the parts, how many of their parameters train, dtype and rate."""
    lines = [f"{'part':14}{'parameters':>16}{'trained':>16}  {'dtype':10}{'lr':>8}"]
    for part in ("vision_tower", "connector", "llm"):
        parameters = list(getattr(vlm, part).parameters())
        total = sum(p.numel() for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        lr = getattr(cfg, f"{part}_lr") if trained else 0
        dtype = str(parameters[0].dtype).removeprefix("torch.")
        lines.append(f"{part:14}{total:16,}{trained:16,}  {dtype:10}{lr:8.1e}")
    return "\n".join(lines)


def lr_factor(step, steps, warmup):
    """Return the factor on the learning rate at a step: linear warm-up, then a cosine to 0.

    The same as transformers' cosine schedule. The factor of the first step is 0.
    """
    rise = math.ceil(warmup * steps)
    if step < rise:
        return step / max(1, rise)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


# --------------------------------------------------------------------------------------------------
# data

def plan(dataset, cfg):
    """Return every step of the run as a list of sample indices.

    It depends only on data and settings, so the number of the step is the position in the data.
    """
    steps, epoch = [], 0
    while epoch < cfg.epochs and not (cfg.max_steps and len(steps) >= cfg.max_steps):
        steps += data.global_batches(dataset, cfg.global_batch, epoch, cfg.seed, cfg.group)
        epoch += 1
    return steps[:cfg.max_steps or None]


def micro_batches(indices, rank, world, batch_size):
    """Return this rank's part of a step in batches of batch_size; all ranks get as many batches."""
    own = indices[rank::world]
    count = math.ceil(len(indices[::world]) / batch_size)
    return [own[i * batch_size:(i + 1) * batch_size] for i in range(count)]


def leave_process_group(_):
    """Keep a loader's process alive after Ctrl-C or `kill -TERM -GROUP`.

    Both reach the whole process group, and the current step still needs its data.
    """
    os.setpgid(0, 0)


def make_loader(dataset, batches, vlm, cfg, device):
    """Return an iterator over this rank's batches, read by cfg.workers processes."""
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=cfg.workers,
        pin_memory=device.type == "cuda", worker_init_fn=leave_process_group,
        collate_fn=lambda samples: data.collate(samples, vlm.pad_id),
        multiprocessing_context="fork" if cfg.workers else None)
    return iter(loader)


def is_newer(path, made):
    """Return whether the file `path` has changed since the file `made` was made from it."""
    status = os.stat(path)              # ctime changes when a file gets another name
    return (not os.path.isfile(made)
            or max(status.st_mtime, status.st_ctime) > os.path.getmtime(made))


@torch.no_grad()
def cache_features(vlm, dataset, cfg):
    """Write the patches of every picture that cfg.features does not hold yet, in float16.

    The folder belongs to one tower, layer, size and pool; SystemExit for another one.
    """
    what = {"layer": vlm.config.vision_layer, "pool": vlm.config.pool, **dataset.image,
            **{f"tower's {part}": value for part, value in vlm.fingerprint["vision_tower"].items()}}
    path = f"{cfg.features}/settings.json"
    stored = common.read_json(path) if os.path.isfile(path) else {}
    other = [key for key in what if stored.get(key, what[key]) != what[key]]
    if other:
        sys.exit(f"{cfg.features} holds the patches of {stored}, and this run has another "
                 f"{', '.join(other)}: name another folder")
    os.makedirs(cfg.features, exist_ok=True)
    common.write_json(what, path)
    names = {name for record in dataset.records for name in data.messages_of(record)[1]}
    paths = sorted(data.image_path(cfg.images, name) for name in names)
    paths = [p for p in paths if is_newer(p, data.features_path(cfg.features, p))]
    start = time.time()
    for i in range(0, len(paths), cfg.batch_size):
        batch = paths[i:i + cfg.batch_size]
        pixels = torch.stack([data.transform(data.open_image(p), **dataset.image) for p in batch])
        for p, patches in zip(batch, vlm.patch_features(pixels).to("cpu", torch.float16)):
            file = data.features_path(cfg.features, p)
            os.makedirs(os.path.dirname(file), exist_ok=True)
            checkpoint.write_safetensors({"patches": patches.contiguous()}, file)
        if i // cfg.batch_size % 10 == 0:
            print(f"features: {i} of {len(paths)} pictures, {time.time() - start:.0f} s",
                  flush=True)


# --------------------------------------------------------------------------------------------------
# states to resume from: out/state/step-00000100, of which two are kept

def state_tensors(vlm, optimizer, step, rank):
    """Return {name: tensor} of all that a step changes: weights, AdamW's moments, random state."""
    tensors = {f"rng.{rank}": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        tensors[f"rng.{rank}.cuda"] = torch.cuda.get_rng_state()
    for name, p in vlm.named_parameters():
        if not p.requires_grad:
            continue
        if p not in optimizer.state:                # before the first step of a resumed run
            optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device),
                                  "exp_avg": torch.zeros_like(p),
                                  "exp_avg_sq": torch.zeros_like(p)}
        moments = optimizer.state[p]
        tensors[name] = p.detach()
        tensors[f"{name}.exp_avg"] = moments["exp_avg"]
        tensors[f"{name}.exp_avg_sq"] = moments["exp_avg_sq"]
    return tensors


def save_state(vlm, optimizer, progress, cfg, rank, world):
    """Write all that a resume needs. Each rank writes its pieces.

    progress: {"step", "skipped", "fingerprint"}. The folder has a temporary name until it is complete.
    OSError on every rank if one rank cannot write.
    """
    folder = f"{cfg.out}/state/step-{progress['step']:08d}"
    temporary = f"{cfg.out}/state/tmp"

    def begin():
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            os.makedirs(temporary)

    def end():
        if rank > 0:
            return
        sizes = {name: os.path.getsize(f"{temporary}/{name}") for name in os.listdir(temporary)}
        common.write_json({**progress, "world": world, "settings": asdict(cfg), "sizes": sizes},
                          f"{temporary}/state.json")
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
        for old in sorted(os.listdir(f"{cfg.out}/state"))[:-2]:
            shutil.rmtree(f"{cfg.out}/state/{old}")

    on_all_ranks(begin, world)
    tensors = state_tensors(vlm, optimizer, progress["step"], rank)
    names = list(tensors)
    names += [f"rng.{r}{kind}" for r in range(world) for kind in ("", ".cuda")]
    file_of, size = {}, 0
    for name in names:
        file_of[name] = 1 + size // FILE_BYTES
        size += local(tensors[name]).nbytes if name in tensors else 0
    writer = HuggingFaceStorageWriter(temporary, file_of, save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise OSError(f"{temporary} cannot be written: {reason}") from None
    on_all_ranks(end, world)


def newest_state(cfg, world):
    """Return (folder, state.json) of the newest complete state, or (None, None).

    A state with a missing or short file is named and passed over.
    """
    root = f"{cfg.out}/state"

    def read(name):
        """Return state.json, or None if a file is not as long as it says."""
        try:
            state = common.read_json(f"{root}/{name}/state.json")
            sizes = state.get("sizes", {})          # a state of an older version has none
            complete = all(os.path.getsize(f"{root}/{name}/{file}") == size
                           for file, size in sizes.items())
            return state if complete else None
        except (OSError, ValueError, AttributeError):
            return None

    names = on_all_ranks(lambda: os.listdir(root) if os.path.isdir(root) else [], world)[0]
    for name in sorted((n for n in names if n.startswith("step-")), reverse=True):
        states = on_all_ranks(lambda: read(name), world)
        if all(states):
            return f"{root}/{name}", states[0]
        print_rank0(f"{root}/{name} is not whole; trying the one before")
    return None, None


def resume(vlm, optimizer, inputs, cfg, rank, world):
    """Load the newest state if there is one. Return (next step, number of samples skipped).

    inputs: the fingerprint of all that the run depends on. A run goes on with the settings and
    inputs of its start. SystemExit names those that differ.
    """
    folder, state = newest_state(cfg, world)
    if not folder:
        return 0, 0
    differ = []
    for key, value in state["settings"].items():
        now = getattr(cfg, key, None)
        # A state of an older version may have settings that are gone.
        if key not in FREE_SETTINGS and hasattr(cfg, key) and value != now:
            differ.append(f"{key} was {value!r}, is {now!r}")
    if differ:
        sys.exit(f"{folder} has other settings ({'; '.join(differ)}): finish it with them, or use "
                 "another out")
    # A state of an older version has no fingerprint.
    changed = fingerprint.changes(state.get("fingerprint", {}), inputs)
    if changed:
        words = cfg.words if not cfg.init else f"{cfg.init}/words.json"
        names = {**asdict(vlm.config), "words": words, "data": cfg.data, "images": cfg.images}
        parts = [f"{names[source]}: {part}" for source, part in changed]
        sys.exit(f"{' and '.join(parts)} changed since {folder} was written: a run goes on with "
                 "what it began with")
    if state["world"] != world:
        print_rank0(f"{folder} was written by {state['world']} ranks, now there are {world}: sums "
                    "are rounded in another order")
    reader = HuggingFaceStorageReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    tensors = state_tensors(vlm, optimizer, state["step"], rank)
    for name in [name for name in tensors if name.startswith("rng.") and name not in stored]:
        del tensors[name]                           # a new rank has no stored random state
    dcp.load(tensors, storage_reader=reader)
    if f"rng.{rank}" in tensors:
        torch.set_rng_state(tensors[f"rng.{rank}"])
    if f"rng.{rank}.cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"rng.{rank}.cuda"])
    return state["step"], state["skipped"]


# --------------------------------------------------------------------------------------------------
# the log

def open_log(path, step):
    """Return log.jsonl, open for more lines, without the lines of `step` and later."""
    kept = []
    if os.path.isfile(path) and step:
        for line in open(path).read().splitlines():
            if line.endswith("}") and json.loads(line)["step"] < step:      # "}": a kill cuts lines
                kept.append(line + "\n")
    common.write_text("".join(kept), path)
    return open(path, "a", buffering=1)


def log_step(log, row, steps, seconds, is_printed):
    """Write one step to log.jsonl and print it. To use another logger, change this function.

    row: {name: number}. seconds: what a step of this run takes on average. Call it on rank 0.
    """
    log.write(json.dumps(row) + "\n")
    if not is_printed:
        return
    blind = f" (blind {row['blind']:.4f})" if "blind" in row else ""
    words = f"  words {row['words_loss']:.4f}" if "words_loss" in row else ""
    skipped = f"  skipped {row['skipped']}" if row["skipped"] else ""
    minutes = seconds * (steps - row["step"] - 1) / 60
    print(f"step {row['step']:5d}/{steps}  loss {row['loss']:7.4f}{blind}{words}"
          f"  trained {row['trained']:6d} tok  lr {row['lr']:.2e}  grad {row['grad_norm']:8.3f}"
          f"  {row['tok_s']:7.0f} tok/s{skipped}  eta {minutes:5.1f} min", flush=True)


def plot_loss(path, out):
    """Draw loss.png from log.jsonl: the loss, and the loss of the same batch without its images."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = [json.loads(line) for line in open(path)]
    probes = [row for row in rows if "blind" in row]
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], lw=1, label="loss")
    if probes:
        steps, losses = [r["step"] for r in probes], [r["blind"] for r in probes]
        axes.plot(steps, losses, "o-", lw=1, ms=3, label="without the image")
    axes.set(xlabel="step", ylabel="nats per trained token", yscale="log")
    axes.legend()
    figure.savefig(out, dpi=120, bbox_inches="tight")
    plt.close(figure)


# --------------------------------------------------------------------------------------------------
# the run

def main(cfg):
    rank, world, device = setup_ranks(cfg)
    if cfg.global_batch % world:
        sys.exit(f"global_batch {cfg.global_batch} does not divide by {world} ranks")
    on_all_ranks(lambda: prepare_out(cfg) if rank == 0 else None, world)
    # A signal reaches one rank. All ranks stop when the sum of these lists' lengths is not 0.
    signals_received = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: signals_received.append(True))

    vlm = make_model(cfg, device, world)
    pretrained.check_length(cfg.max_length, vlm.llm.config, vlm.config.llm)
    # For LoRA: vlm.llm = peft.get_peft_model(vlm.llm, LoraConfig(...)) here. The optimizer takes
    # what requires a gradient.
    optimizer = make_optimizer(vlm, cfg)
    trained = [(name, p) for name, p in vlm.named_parameters() if p.requires_grad]
    word_of_id = {}
    if cfg.words_loss or cfg.stage == "words":
        pieces = vocab.word_ids(vlm.words, vlm.tokenizer)
        word_of_id = {ids[0]: k for k, ids in enumerate(pieces) if len(ids) == 1}
    dataset = data.Conversations(
        cfg.data.split(","), cfg.images, vlm.tokenizer, vlm.num_patches,
        {**vlm.image_settings, "mode": cfg.image_mode}, cfg.template, cfg.max_length,
        word_of_id, cfg.features)
    inputs = {**vlm.fingerprint, **fingerprint.of_dataset(dataset, cfg.data.split(",")),
              "words": {"words": fingerprint.value_hash(vlm.words)}}
    if word_of_id:
        vlm.background = dataset.word_frequencies(len(vlm.words)).to(device)
    if cfg.features:
        on_all_ranks(lambda: cache_features(vlm, dataset, cfg) if rank == 0 else None, world)
    start, skipped = resume(vlm, optimizer, inputs, cfg, rank, world)
    print_rank0(parts_table(vlm, cfg))
    steps = plan(dataset, cfg)
    batches = [micro_batches(indices, rank, world, cfg.batch_size) for indices in steps]
    loader = make_loader(dataset, [b for step in batches[start:] for b in step], vlm, cfg, device)
    resumed = f", going on at step {start}" if start else ""
    print_rank0(f"{len(dataset):,} samples, {len(steps):,} steps of {cfg.global_batch}, {world} "
                f"rank(s) on {device.type}, {cfg.dtype}{', sharded' * vlm.sharded}{resumed}")
    if rank == 0:
        log = open_log(f"{cfg.out}/log.jsonl", start)
        first = dataset[steps[0][0]]
        if not isinstance(first, data.BadSample):
            ids, labels = first["input_ids"].tolist(), first["labels"].tolist()
            print(data.show_sample(ids, labels, vlm.tokenizer), flush=True)

    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    save_kwargs = {"trained_parts": STAGES[cfg.stage], "dtype": getattr(torch, cfg.dtype),
                   "template": cfg.template, "image_mode": cfg.image_mode}
    start_time = time.time()
    should_stop = False
    for step in range(start, len(steps) + 1):       # one pass more than steps, which only saves
        # 1. Save.
        is_last = step == len(steps)
        if step in cfg.snapshots:
            checkpoint.save(vlm, f"{cfg.out}/steps/{step:06d}", cfg.stage, **save_kwargs)
        # The first state comes after one step, so that a full disk is found now and not at night.
        is_due = step == start + 1 or step % cfg.save_every == 0
        progress = {"step": step, "skipped": skipped, "fingerprint": inputs}
        if step > start and (is_last or should_stop or is_due):
            save_state(vlm, optimizer, progress, cfg, rank, world)
        if is_last or should_stop:
            break

        # 2. Set the learning rates.
        step_time = time.time()
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor(step, len(steps), cfg.warmup)

        # 3. Compute the gradients of the summed loss, and add the sums up over all ranks.
        probe = cfg.probe_every and step % cfg.probe_every == 0
        sums, bad = accumulate(vlm, loader, len(batches[step]), autocast, device, probe, cfg)
        sums["stop"] = len(signals_received)
        totals = torch.tensor([*sums.values()], dtype=torch.float64, device=device)
        sums = dict(zip(sums, reduce_sum(totals, world).tolist()))
        limit = cfg.bad_limit if cfg.on_bad == "skip" else 0
        if cfg.on_bad == "skip":
            for sentence in bad:
                print(f"step {step}: skipped {sentence}", file=sys.stderr, flush=True)
        if skipped + sums["bad"] > limit:           # the same on every rank
            # Save before the update, so that the run resumes here after the data is repaired. Only
            # the number of records must stay the same, because their order depends on it.
            records = {"number of records": len(dataset)}
            progress["fingerprint"] = {**inputs, "data": records, "images": {}}
            save_state(vlm, optimizer, progress, cfg, rank, world)
            reason = (bad + ["another rank has a bad sample"])[0]
            if cfg.on_bad == "skip":
                reason = (f"{skipped + int(sums['bad'])} samples were skipped, more than bad_limit "
                          f"{cfg.bad_limit}; data.py --check names them all")
            sys.exit(f"train.py: {reason}")

        # 4. Divide once by the number of trained tokens, clip, and update.
        reduce_gradients(trained, sums["trained"], sums["images"], world)
        norm = clip_gradients(trained, cfg.clip, world)
        if not (math.isfinite(sums["loss"]) and math.isfinite(norm)):       # the same on every rank
            ids = [dataset.records[i].get("id") for i in steps[step]]
            sys.exit(f"step {step}: the loss is {sums['loss']}, the gradient norm {norm}; nothing "
                     f"was updated. Samples: {ids}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # 5. Log.
        should_stop = sums["stop"] > 0
        skipped += int(sums["bad"])
        if rank == 0:
            row = {"step": step, "loss": sums["loss"] / max(sums["trained"], 1),
                   "trained": int(sums["trained"]), "lr": optimizer.param_groups[0]["lr"],
                   "grad_norm": norm, "tok_s": sums["tokens"] / (time.time() - step_time),
                   "skipped": skipped}
            if sums["num_words"]:
                row["words_loss"] = sums["words_loss"] / sums["num_words"]
            if sums["blind_trained"]:
                row["blind"] = sums["blind_loss"] / sums["blind_trained"]
            is_printed = step % cfg.log_every == 0 or step == len(steps) - 1 or "blind" in row
            seconds = (time.time() - start_time) / (step + 1 - start)
            log_step(log, row, len(steps), seconds, is_printed)

    if is_last:
        checkpoint.save(vlm, cfg.out, cfg.stage, **save_kwargs, seed=cfg.seed, steps=len(steps))
    if rank == 0:
        log.close()
        plot_loss(f"{cfg.out}/log.jsonl", f"{cfg.out}/loss.png")
        stopped = f"stopped after {step} steps; the same command goes on from there"
        print(f"wrote {cfg.out}" if is_last else stopped, flush=True)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    sys.exit(0 if is_last else STOPPED)


def prepare_out(cfg):
    """Make the run's folder. With --overwrite, remove the old run from it."""
    os.makedirs(cfg.out, exist_ok=True)
    if os.path.isfile(f"{cfg.out}/config.json"):    # check has made sure of --overwrite
        for old in ("state", "steps", "llm", "vision_tower"):
            shutil.rmtree(f"{cfg.out}/{old}", ignore_errors=True)
        os.remove(f"{cfg.out}/config.json")         # the last one: it says that there is a run


def accumulate(vlm, loader, count, autocast, device, probe, cfg):
    """Compute forward and backward of this rank's `count` micro-batches.

    -> (sums over them, {name: number}; one sentence for each sample that cannot be used). The loss
    is summed and not averaged; main divides once, by the trained tokens of the whole global batch.
    probe: compute the first micro-batch's loss once more without its images. If it is close to the
    real loss, the model ignores the images.
    """
    names = ("loss", "trained", "words_loss", "num_words", "tokens", "bad", "images", "blind_loss",
             "blind_trained")
    sums, bad = dict.fromkeys(names, 0), []
    for i in range(count):
        batch = next(loader)
        sums["tokens"] += int(batch["attention_mask"].sum())
        batch = {key: value.to(device, non_blocking=True) if torch.is_tensor(value) else value
                 for key, value in batch.items()}
        images = len(batch["pixel_values"])
        sums["images"] += images
        sums["bad"] += len(batch["bad"])
        bad += batch["bad"]
        if not len(batch["ids"]):
            if not vlm.sharded:
                continue
            batch = dummy_batch(batch, device)      # other ranks wait for this rank's pieces
        with autocast:
            loss, trained, words_loss, num_words = losses(vlm, batch, cfg)
        total = loss + cfg.words_loss * words_loss
        if total.requires_grad:                     # text alone does not reach the connector
            total.backward()
        sums["loss"] += loss.item()
        sums["trained"] += trained
        sums["words_loss"] += float(torch.as_tensor(words_loss).detach())
        sums["num_words"] += num_words
        if probe and i == 0 and cfg.stage != "words" and (images or vlm.sharded):
            with torch.no_grad(), autocast:
                blind_loss, blind_trained = vlm(data.without_images(batch))
            if vlm.sharded:
                vlm.reshard()                       # the update would miss gathered parameters
            if images:
                sums["blind_loss"] = blind_loss.item()
                sums["blind_trained"] = blind_trained
    return sums, bad


def losses(vlm, batch, cfg):
    """Return (loss, its number of tokens, words loss, its number of words), both losses summed.

    In stage "words" the words loss is the only loss, and its words are the trained tokens.
    """
    if cfg.stage == "words":
        return *vlm.words_loss(batch), 0, 0
    if not (cfg.words_loss and len(batch["pixel_values"])):
        return *vlm(batch), 0, 0
    # Both losses need the patches, so they are computed here, once.
    batch["pixel_values"] = vlm.patch_features(batch["pixel_values"])
    return *vlm(batch), *vlm.words_loss(batch)


def dummy_batch(batch, device):
    """Return a batch of two tokens, none of them trained, in place of an empty batch."""
    two = torch.zeros(1, 2, dtype=torch.int64, device=device)
    return batch | {"input_ids": two, "labels": two + data.IGNORE, "attention_mask": two + 1,
                    "position_ids": two}


def reduce_gradients(trained, tokens, images, world):
    """Turn the gradients of all ranks' sums into that of the mean over `tokens`, on every rank.

    A parameter that a rank's samples did not reach counts as 0 there. SystemExit names a parameter
    that no rank's loss reached.
    """
    has_gradient = [p.grad is not None for _, p in trained]
    reached = torch.tensor(has_gradient, dtype=torch.int32, device=trained[0][1].device)
    for (name, p), ranks in zip(trained, reduce_sum(reached, world).tolist()):
        needs_images = not name.startswith("llm.")  # a step of text alone reaches only the LLM
        if not ranks and tokens and (images or not needs_images):
            sys.exit(f"{name} trains, but the loss does not depend on it: it got no gradient; "
                     "nothing was updated")
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        if isinstance(p, DTensor):
            local(p.grad).mul_(world / max(tokens, 1))              # FSDP has averaged over ranks
        else:
            reduce_sum(p.grad, world).div_(max(tokens, 1))


def clip_gradients(trained, largest, world):
    """Scale all gradients to a norm of at most `largest` (0: no limit). Return the norm before."""
    sharded = [local(p.grad) for _, p in trained if isinstance(p, DTensor)]
    replicated = [p.grad for _, p in trained if not isinstance(p, DTensor)]
    square = torch.nn.utils.get_total_norm(replicated).square()
    if sharded:
        square = square + reduce_sum(torch.nn.utils.get_total_norm(sharded).square(), world)
    norm = square.sqrt().item()
    if largest and norm > largest:
        torch._foreach_mul_(replicated + sharded, largest / norm)
    return norm


def dry_run(cfg):
    """Print what the run would train and how much memory it would take."""
    from tools.memory import print_estimate         # a side room, needed here only
    print_estimate(cfg, STAGES[cfg.stage], parts_table)


if __name__ == "__main__":
    common.run_script(dry_run if CFG.dry_run else main, CFG)
