"""
Train one stage of a VLM. "words" trains the connector with no LLM in the loss, "pretrain" it on
a frozen LLM, "sft" connector and LLM, and "sft_tower" the vision tower, too.

    python train.py config/pocket/words.py [--key=value ...]
    torchrun --nproc_per_node=8 train.py config/paper/pretrain.py --out=out/pretrain
    torchrun --nproc_per_node=8 train.py config/paper/sft.py --init=out/moved --out=out/sft
    python train.py config/paper/sft.py --llm=Qwen/Qwen2.5-14B-Instruct --dry_run

The settings are below. A config file holds those that differ, and `--key=value` overrides both. To
go on with a stopped run, start the same command again. On a CPU the result is the same to the bit.
On CUDA it should be with --deterministic (not run). A run writes a checkpoint, see checkpoint.py.
"""
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields

import common
from common import print_rank0
from support import settings
from support.checks import check, check_init, needs_words
from support.settings import setting
from support.templates import TEMPLATES

# What each stage trains. All other parts are frozen. The learning rate of a part is the setting
# PART_lr.
STAGES = {
    "words": ("connector",),            # by the words loss alone: the LLM gives its tokenizer and E
    "pretrain": ("connector",),
    "sft": ("connector", "llm"),
    "sft_tower": ("connector", "llm", "vision_tower"),
}
STOPPED = 75        # exit status of a run that saved itself after SIGTERM or SIGINT (EX_TEMPFAIL)


# --------------------------------------------------------------------------------------------------
# settings

@dataclass
class Settings:
    stage: str = setting("pretrain", "what trains, see above", choices=tuple(STAGES))
    out: str = setting("", "the checkpoint folder to write", free=True)
    init: str = setting("", "start from this checkpoint's connector, LLM and vision tower")
    # The model. With init these settings come from the checkpoint. Only tiles may differ.
    vision_tower: str = setting("", "hub name or folder")
    llm: str = setting("", "hub name or folder")
    words: str = setting("", "the shared vocabulary, as vocab.py writes it")
    num_words: int = setting(0, "use only this many words, the first; 0 means all", low=0)
    connector: str = setting("langbridge", "the kind of connector", choices=("langbridge", "mlp"))
    hidden: int = setting(5120, "H; 0 means D, for mlp only", low=0)
    normalize: str = setting("softmax", "how scores become weights: softmax, none, or a name that "
                                        "you give to word_weights in model.py")
    temperature: float = setting(1.0, "divides the scores before they become weights", low=1e-3)
    words_init: str = setting("random", "W starts at random, or from the words' own embeddings",
                              choices=("random", "embeds"))
    vision_layer: int = setting(-2, "the hidden state of the tower that the connector reads")
    image_size: int = setting(0, "pixels; 0 means the tower's own", low=0)
    pool: int = setting(1, "pool x pool patches become one before the connector", low=1)
    tiles: tuple = setting((), "LLaVA-NeXT: grids of tiles, ((width, height), ...) in pixels")
    # The data.
    data: str = setting("", "LLaVA-format JSON; several files with commas between them")
    images: str = setting("", "the folder that the records' image paths start from")
    image_mode: str = setting("crop", "crop to the centre, or pad to a square",
                              choices=("crop", "pad"))
    template: str = setting("plain", "plain: image and caption; prompted: the texts with newlines; "
                                     "chat: the LLM's own template", choices=tuple(TEMPLATES))
    max_length: int = setting(2048, "tokens of a sample, image patches included", low=1)
    group: bool = setting(False, "batches of one modality, sorted by length; LLaVA's")
    group_batches: int = setting(1, "with group: steps that are sorted by length together; more "
                                    "leave less padding", low=1)
    pack: bool = setting(False, "the samples of a micro-batch form one row without padding; "
                                "fast with an attention such as flash_attention_2")
    on_bad: str = setting("stop", "stop at a sample that cannot be used, or skip and count it",
                          choices=("stop", "skip"), free=True)
    bad_limit: int = setting(100, "stop if more samples than this are skipped", low=0, free=True)
    workers: int = setting(2, "processes that load data, for each rank", low=0, free=True)
    features: str = setting("", "folder to keep a frozen tower's patches in, 2 P Dv bytes each")
    # The optimisation.
    global_batch: int = setting(256, "samples of a step, over all ranks", low=1)
    batch_size: int = setting(32, "samples that one rank computes at a time", low=1, free=True)
    epochs: int = setting(1, "passes over the data", low=1)
    max_steps: int = setting(0, "at most so many steps of the epochs; 0 means all", low=0)
    connector_lr: float = setting(1e-3, "learning rate of the connector", low=0)
    llm_lr: float = setting(2e-5, "learning rate of the LLM", low=0)
    vision_tower_lr: float = setting(2e-6, "learning rate of the vision tower", low=0)
    words_loss: float = setting(0.0, "weight of the words loss in the stages after words", low=0)
    words_background: float = setting(0.9, "how much of a word's probability is its frequency; "
                                           "high: frequent words need no patch", low=0, high=0.99)
    words_patch_weight: float = setting(0.0, "weight of the part of the words loss that asks each "
                                             "patch for a word", low=0)
    warmup: float = setting(0.03, "part of the steps in which the rate rises", low=0, high=1)
    weight_decay: float = setting(0.0, "AdamW's", low=0)
    clip: float = setting(1.0, "largest gradient norm; 0 means no clipping", low=0)
    dtype: str = setting("bfloat16", "of activations and frozen weights; trained ones are float32; "
                                     "auto: bfloat16 if the hardware has it, else float32",
                         choices=("bfloat16", "float32", "auto"))
    attention: str = setting("", common.ATTENTION)
    plain_bytes: int = setting(0, "if the scores take more bytes, fused.py computes the softmax in "
                                  "blocks, slower; 0 means 1/32 of the memory", low=0)
    compile: bool = setting(False, "torch.compile the LLM's blocks: faster after a slow first "
                                   "step; on a CPU in bfloat16 attention=eager is faster still")
    shard: bool = setting(False, "with torchrun: each rank holds a piece of the LLM", free=True)
    checkpointing: bool = setting(False, "recompute the LLM's activations: slower, less memory")
    device: str = setting("", "default: cuda if there is one; under torchrun one GPU for each rank",
                          free=True)
    deterministic: bool = setting(False, "a resumed run has the same bits on CUDA, too; slower")
    pad_to: int = setting(0, "pad batches to a multiple of this; 0 means 64 on CUDA, where a new "
                             "length is slow the first time, and else 1", low=0)
    seed: int = setting(42, "of a new connector and of the order of the data", low=0, high=10**9)
    # The log and the checkpoints.
    log_every: int = setting(1, "steps between two printed lines", low=1, free=True)
    probe_every: int = setting(50, "steps between two losses without the image; 0: never, as "
                               "with pack and in stage words", low=0, free=True)
    save_every: int = setting(500, "steps between two states to resume from", low=1, free=True)
    snapshots: tuple = setting((), "keep a checkpoint before these steps, such as 100,1000",
                               free=True)
    overwrite: bool = setting(False, "train again where a finished run is", free=True)
    offline: bool = setting(False, common.OFFLINE, free=True)
    dry_run: bool = setting(False, "print sizes and memory, allocate and write nothing", free=True)

    def trained_parts(self):
        """Return the names of the parts that this stage trains."""
        return STAGES[self.stage]


Settings.given = {}     # {name: where it was set}; not a field, so that no state contains it


def read_settings(argv):
    """Return Settings from the arguments of the command line."""
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        settings.print_help(Settings)
        sys.exit(0)
    cfg, given = settings.read(Settings, argv)
    cfg.given = given
    return cfg


if __name__ == "__main__":      # before the slow imports: a mistyped setting answers at once
    with common.one_sentence():
        CFG = read_settings(sys.argv[1:])
        check(CFG)
    if CFG.offline:
        common.go_offline()
    print_rank0(f"stage {CFG.stage}: {CFG.init or CFG.llm}, {CFG.data} -> {CFG.out}")

import torch

import checkpoint
import data
import model
import vocab
from support import features, fingerprint, pretrained, ranks, sharding
from support.device import check_compiler
from support.log import averages, log_step, open_log, parts_table, plot_loss, show_sample
from support.ranks import (check_shared_memory, clip_gradients, leave, on_rank0, reduce_gradients,
                           setup_ranks, sharing_errors, sum_up, wait_for_all)
from support.resume import lock, remove_old_run, resume, save_state
from support.tower import freeze_unreached


# --------------------------------------------------------------------------------------------------
# model and optimizer

def new_model(cfg, device, llm_dtype, options):
    """Return a VLM with a new connector. options: of checkpoint.build."""
    words = None
    if cfg.connector == "langbridge":
        words = vocab.load_words(cfg.words)
        if len(words) < cfg.num_words:
            raise ValueError(f"num_words is {cfg.num_words}, but {cfg.words} has {len(words)}")
        words = words[:cfg.num_words or None]
    config = model.Config(**{f.name: getattr(cfg, f.name) for f in fields(model.Config)})
    config.num_words = len(words or ())
    vlm = checkpoint.build(config, words, device, llm_dtype, **options)
    if cfg.words_init == "embeds":
        W = model.initial_W(vlm.connector.vocab_embeds, cfg.hidden)
        vlm.connector.to_scores.weight.data.copy_(W)
        vlm.connector.to_scores.bias.data.zero_()
    return vlm


def make_model(cfg, device):
    """Return the VLM of this run: trained parts in float32, frozen parts in cfg.dtype."""
    dtype = getattr(torch, cfg.dtype)
    trained_parts = cfg.trained_parts()
    llm_dtype = torch.float32 if "llm" in trained_parts else dtype
    options = {"attention": cfg.attention, "frozen_dtype": dtype,
               "tower_dtype": torch.float32 if "vision_tower" in trained_parts else dtype,
               "shard": cfg.shard and "RANK" in os.environ}
    torch.manual_seed(cfg.seed)                     # of a new connector
    if cfg.init:
        check_init(cfg, checkpoint.read_config(cfg.init)[0])
        options["tiles"] = cfg.tiles if "tiles" in cfg.given else None
        vlm = checkpoint.load(cfg.init, device, llm_dtype, **options)
    else:
        vlm = new_model(cfg, device, llm_dtype, options)
    if vlm.image_newline is not None:
        vlm.image_newline.requires_grad_(True)
    if cfg.pack:
        pretrained.check_packing(vlm, dtype)
    vlm.connector.plain_bytes = cfg.plain_bytes
    for part in trained_parts:
        getattr(vlm, part).requires_grad_(True).train()
    if "vision_tower" in trained_parts:
        freeze_unreached(vlm, device)
    if cfg.checkpointing:
        vlm.llm.gradient_checkpointing_enable({"use_reentrant": False})
        # The library checkpoints blocks in training mode. The parts of a frozen block stay in
        # evaluation mode, or its dropout would begin.
        for block in sharding.transformer_blocks(vlm.llm):
            block.training = True
    if cfg.compile:
        check_compiler(device)
        for block in sharding.transformer_blocks(vlm.llm):
            block.compile(dynamic=True)             # all blocks are alike and share one compilation
    return vlm


def make_optimizer(vlm, cfg):
    """Return AdamW over all parameters that require a gradient, one group for each part."""
    groups = []
    for part in ("connector", "llm", "vision_tower"):
        parameters = [p for p in getattr(vlm, part).parameters() if p.requires_grad]
        if part == "llm" and vlm.image_newline is not None:
            parameters.append(vlm.image_newline)
        if parameters:
            groups.append({"params": parameters, "base_lr": getattr(cfg, f"{part}_lr")})
    # The betas are torch's defaults, which LLaVA uses, too.
    return torch.optim.AdamW(groups, weight_decay=cfg.weight_decay, fused=True)


def lr_factor(step, steps, warmup):
    """Return the factor on the learning rate at a step: linear warm-up, then a cosine to 0.

    The same as transformers' cosine schedule. With a warm-up the factor of the first step is 0.
    """
    rise = math.ceil(warmup * steps)
    if step < rise:
        return step / max(1, rise)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


# --------------------------------------------------------------------------------------------------
# the run

def make_dataset(vlm, cfg):
    """Return (dataset, hashes of all that the run depends on), see support/fingerprint.py."""
    word_of_id = {}
    if needs_words(cfg):
        pieces = vocab.word_ids(vlm.words, vlm.tokenizer)
        word_of_id = {ids[0]: k for k, ids in enumerate(pieces) if len(ids) == 1}
    paths = [path for path in cfg.data.split(",") if path]
    dataset = data.Conversations(
        paths, cfg.images, vlm.tokenizer, vlm.num_patches,
        {**vlm.image_settings, "mode": cfg.image_mode}, cfg.template, cfg.max_length,
        word_of_id, cfg.features, vlm.config.tiles)
    if "llm" not in cfg.trained_parts() and not any(dataset.image_names):
        dataset.sample(0)                           # a bad record may be the reason
        raise ValueError(f"no record of {cfg.data} has an image, and stage {cfg.stage} trains the "
                         "connector on images alone")
    hashes = {**vlm.fingerprint, **fingerprint.of_dataset(dataset, paths),
              "words": {"words": fingerprint.value_hash(vlm.words)}}
    if cfg.init:                                    # its config is among the settings otherwise
        hashes["init"] = {"config.json": fingerprint.value_hash(asdict(vlm.config))}
    return dataset, hashes


def main(cfg):
    device = setup_ranks(cfg)
    if cfg.global_batch % ranks.world:
        raise ValueError(f"global_batch {cfg.global_batch} does not divide by {ranks.world} ranks")
    set_signal_handler(lambda *_: sys.exit(STOPPED))    # before the first step nothing can be lost

    # The model.
    vlm = make_model(cfg, device)
    pretrained.check_length(cfg.max_length, vlm.llm.config, vlm.config.llm)
    # For LoRA: vlm.llm = peft.get_peft_model(vlm.llm, LoraConfig(...)).train() here. The optimizer
    # takes what requires a gradient. Without train() lora_dropout does nothing. Use a higher
    # llm_lr and --stage=pretrain --shard=False, so that the frozen weights stay in `dtype`.
    if vlm.sharded and hasattr(vlm.llm, "merge_and_unload"):
        raise ValueError("shard does not go with LoRA: a sharded adapter cannot be merged")
    optimizer = make_optimizer(vlm, cfg)
    trainable = [(name, p) for name, p in vlm.named_parameters() if p.requires_grad]

    # The data.
    dataset, hashes = make_dataset(vlm, cfg)
    steps = data.plan(dataset, cfg)
    if not all(step in range(len(steps)) for step in cfg.snapshots):
        raise ValueError(f"snapshots {cfg.snapshots}: the last step is {len(steps) - 1}")
    frequencies = None                              # of the words, for the words loss
    if needs_words(cfg):
        frequencies = dataset.word_frequencies(len(vlm.words)).to(device)
        if not frequencies.any():
            dataset.sample(0)                       # a bad record may be the reason
            raise ValueError(f"no answer of {cfg.data} has a word of the word list")
    check_shared_memory(cfg.workers, cfg.batch_size, vlm.image_settings["size"], vlm.config.tiles)
    if cfg.features:
        on_rank0(lambda: features.write_missing(vlm, dataset, cfg.features, cfg.batch_size))

    # The folder of the run. It comes late, so that a mistake until here leaves no trace.
    on_rank0(lambda: lock(cfg.out))
    first = dataset[steps[0][0]] if ranks.rank == 0 else None
    on_rank0(lambda: remove_old_run(cfg, first))    # a mistake costs no old run either
    start, skipped = resume(vlm, optimizer, hashes, cfg)
    print_start(vlm, dataset, first, len(steps), start, device, cfg)
    batches = [data.micro_batches(indices, ranks.rank, ranks.world, cfg.batch_size)
               for indices in steps]
    loader = data.make_loader(dataset, sum(batches[start:], []), vlm, cfg, device)
    log = open_log(f"{cfg.out}/log.jsonl", start) if ranks.rank == 0 else None
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")
    # A part was trained if anything in it was, such as LoRA's weights in stage "pretrain".
    trained_parts = {name.split(".")[0] for name, _ in trainable}
    save_kwargs = {"trained_parts": trained_parts, "dtype": getattr(torch, cfg.dtype),
                   "template": cfg.template, "image_mode": cfg.image_mode}
    # A signal may reach one rank only. Each step adds the signals of all ranks up.
    signals_received = []
    set_signal_handler(lambda *_: signals_received.append(True))
    start_time = time.time()
    done = start                                    # the number of complete steps
    for step in range(start, len(steps)):
        if step in cfg.snapshots:
            checkpoint.save(vlm, f"{cfg.out}/steps/{step:06d}", cfg.stage, **save_kwargs)
            wait_for_all()

        # 1. Set the learning rates. Seed by step and rank, so that dropout repeats after a resume.
        step_time = time.time()
        torch.manual_seed((cfg.seed * 1_000_003 + step) * 1009 + ranks.rank)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor(step, len(steps), cfg.warmup)

        # 2. Compute the gradients of the summed loss, and add the sums up over all ranks.
        probe = cfg.probe_every and step % cfg.probe_every == 0
        sums, bad = accumulate(vlm, loader, len(batches[step]), frequencies, autocast, device,
                               probe, cfg)
        sums["stop"] = len(signals_received)
        sums, grad_counts = sum_up(sums, trainable)
        new_bad = int(sums["bad"])
        reason = report_bad(bad, new_bad, skipped, step, cfg)
        if reason:                                  # on every rank
            # Save without the hash of the data, or the resume would refuse the repaired file. The
            # number of records must stay the same: the order of the data depends on it.
            repairable = hashes | {"data": {"number of records": len(dataset)}, "images": {}}
            progress = {"step": step, "skipped": skipped, "fingerprint": repairable}
            save_state(vlm, optimizer, progress, cfg)
            raise ValueError(reason)
        skipped += new_bad

        # 3. Divide once by the number of trained tokens, clip, and update.
        reduce_gradients(trainable, grad_counts, sums["trained"], sums["images"])
        norm = clip_gradients(trainable, cfg.clip)
        if not (math.isfinite(sums["loss"]) and math.isfinite(norm)):       # the same on every rank
            ids = [dataset.records[i].get("id") for i in steps[step]]
            raise ValueError(f"step {step}: the loss is {sums['loss']}, the gradient norm {norm}; "
                             f"nothing was updated. Samples: {ids}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # 4. Log.
        if log:
            row = {"step": step, **averages(sums), "lr": optimizer.param_groups[0]["lr"],
                   "grad_norm": norm, "tok_s": sums["tokens"] / (time.time() - step_time),
                   "skipped": skipped}
            seconds = (time.time() - start_time) / (step + 1 - start)
            log_step(log, row, len(steps), seconds, cfg)

        # 5. Save.
        done = step + 1
        # The first state comes after one step, so that a full disk is found now and not at night.
        is_due = step == start or done % cfg.save_every == 0 or done == len(steps)
        should_stop = sums["stop"] > 0
        if is_due or should_stop:
            progress = {"step": done, "skipped": skipped, "fingerprint": hashes}
            save_state(vlm, optimizer, progress, cfg)
        if should_stop:
            break

    is_complete = done == len(steps)
    if is_complete and skipped == sum(map(len, steps)):
        raise ValueError(f"all {skipped} samples were skipped, so nothing was trained")
    with sharing_errors():
        if is_complete:
            checkpoint.save(vlm, cfg.out, cfg.stage, **save_kwargs, seed=cfg.seed, steps=len(steps))
        if log:
            log.close()
            plot_loss(f"{cfg.out}/log.jsonl", f"{cfg.out}/loss.png")
    stopped = f"stopped after {done} steps; the same command goes on from there"
    print_rank0(f"wrote {cfg.out}" if is_complete else stopped)
    leave()
    sys.exit(0 if is_complete else STOPPED)


def print_start(vlm, dataset, first, steps, start, device, cfg):
    """Print what trains, the size of the run, and its first sample with its trained tokens."""
    print_rank0(parts_table(vlm, cfg))
    resumed = f", going on at step {start}" if start else ""
    print_rank0(f"{len(dataset):,} samples, {steps:,} steps of {cfg.global_batch}, "
                f"{ranks.world} rank(s) on {device.type}, {cfg.dtype}{', sharded' * vlm.sharded}"
                f"{resumed}")
    if isinstance(first, dict):                     # on rank 0, and no BadSample
        print(show_sample(first["input_ids"], first["labels"], vlm.tokenizer), flush=True)


def report_bad(bad, new_bad, skipped, step, cfg):
    """Print the samples of a step that cannot be used. Return why the run stops, "" if it goes on.

    bad: this rank's sentences. new_bad: the number of such samples on all ranks. skipped: the
    number of those in earlier steps.
    """
    if cfg.on_bad == "stop":
        return (bad + ["another rank has a bad sample"])[0] if new_bad else ""
    for sentence in bad:
        print(f"step {step}: skipped {sentence}", file=sys.stderr, flush=True)
    if skipped + new_bad <= cfg.bad_limit:
        return ""
    return (f"{skipped + new_bad} samples were skipped, more than bad_limit {cfg.bad_limit}; "
            "data.py --check names them all")


def set_signal_handler(handler):
    """Call `handler` on SIGTERM, with which a scheduler ends a job, and on Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, handler)


def accumulate(vlm, loader, count, frequencies, autocast, device, probe, cfg):
    """Compute forward and backward of this rank's `count` micro-batches.

    -> (sums over them, {name: number}; one sentence for each sample that cannot be used). The loss
    is summed and not averaged; main divides once, by the trained tokens of the whole global batch.
    frequencies: see model.words_loss. probe: compute blind_loss, too.
    """
    names = ("loss", "trained", "words_loss", "num_words", "tokens", "bad", "images", "blind_loss",
             "blind_trained")
    sums, bad = dict.fromkeys(names, 0), []

    def add(name, value):
        # In float64, and on the device: .item() would make the CPU wait for the device.
        sums[name] += value.detach().double() if torch.is_tensor(value) else value

    for _ in range(count):
        batch = next(loader)
        # The integers stay on the CPU: model.py says why.
        batch["pixel_values"] = batch["pixel_values"].to(device, non_blocking=True)
        images = len(batch["pixel_values"])
        add("tokens", int(batch["attention_mask"].sum()))
        add("images", images)
        add("bad", len(batch["bad"]))
        bad += batch["bad"]
        if not len(batch["ids"]):
            if not vlm.sharded:
                continue
            batch = data.dummy_batch(batch)         # other ranks wait for this rank's pieces
        with autocast:
            results = losses(vlm, batch, frequencies, cfg)
        total = results["loss"] + cfg.words_loss * results.get("words_loss", 0)
        if total.requires_grad:                     # text alone does not reach the connector
            total.backward()
        for name, value in results.items():
            add(name, value)
        if probe and not cfg.pack and cfg.stage != "words" and (images or vlm.sharded):
            loss, trained = blind_loss(vlm, batch, autocast, device)
            if images:
                add("blind_loss", loss)
                add("blind_trained", trained)
    return sums, bad


def losses(vlm, batch, frequencies, cfg):
    """Return {"loss", "trained"[, "words_loss", "num_words"]}: summed losses and their counts.

    Stage "words" returns the words loss as "loss", and its number of words as "trained". In other
    stages main divides both losses by the tokens. The log gives the words loss per word.
    """
    of_words = frequencies, cfg.words_background, cfg.words_patch_weight
    if cfg.stage == "words":
        loss, num_words = vlm.sum_words_loss(batch, *of_words)
        return {"loss": loss, "trained": num_words}
    has_words_loss = cfg.words_loss and len(batch["pixel_values"])
    if has_words_loss:                              # both losses need the patches: computed once
        batch = batch | {"pixel_values": vlm.patch_features(batch["pixel_values"])}
    loss, trained = vlm(batch)
    results = {"loss": loss, "trained": trained}
    if has_words_loss:
        results["words_loss"], results["num_words"] = vlm.sum_words_loss(batch, *of_words)
    return results


@torch.no_grad()
def blind_loss(vlm, batch, autocast, device):
    """Return (summed loss, number of trained tokens) of a batch whose images are hidden."""
    # If this loss is close to the real one, the model ignores the images.
    # The probe must not change what dropout draws next.
    devices = [device] if device.type == "cuda" else []
    with autocast, torch.random.fork_rng(devices):
        results = vlm(data.without_images(batch))
    if vlm.sharded:
        vlm.reshard()                               # the optimizer updates pieces only
    return results


if __name__ == "__main__":
    if CFG.dry_run:
        from tools.memory import print_estimate         # imported late: needed here only
        common.run_script(print_estimate, CFG)
    else:
        common.run_script(main, CFG)
