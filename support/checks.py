"""Settings and folders that do not fit together, refused before a model is loaded."""
import os
from dataclasses import asdict, replace

from common import print_rank0

FOLDERS = ("state", "steps", "llm", "vision_tower")     # that a run writes in its folder


def needs_words(cfg):
    """Return whether the settings ask for the words loss, which needs the words of a LangBridge."""
    return cfg.words_loss > 0 or cfg.stage == "words"


def check_model(cfg, model):
    """Raise ValueError if the stage or its loss does not go with `model`: cfg, or init's config."""
    holder = cfg.init or "this run"
    if model.connector == "mlp" and (needs_words(cfg) or cfg.words_init == "embeds"):
        raise ValueError("the words loss and words_init need the words of a LangBridge, and "
                         f"{holder} has an MLP")
    if model.normalize == "none" and needs_words(cfg):
        raise ValueError("the words loss trains probabilities, a softmax of the scores, and "
                         f"{holder} uses the scores themselves (normalize none)")
    if model.tiles and (cfg.features or cfg.words_loss or "llm" not in cfg.trained_parts()):
        raise ValueError(f"{holder} has tiles, which are for stages that train the LLM, without "
                         "words_loss and features: set tiles to (), or change these")


def check(cfg):
    """Raise ValueError if the settings cannot work. Nothing is loaded for this."""
    if not cfg.init:
        check_model(cfg, cfg)
    if cfg.group_batches > 1 and not cfg.group:
        raise ValueError("group_batches is how many steps group sorts together: set group to True")
    if cfg.group and cfg.stage == "words":
        raise ValueError("group makes steps of text alone, and stage words learns from pictures: "
                         "set group to False")
    if cfg.pack and needs_words(cfg):
        raise ValueError("pack puts samples into one row, and the words loss needs them apart: set "
                         "pack to False")
    if cfg.features and "vision_tower" in cfg.trained_parts():
        raise ValueError(f"features are those of a frozen tower, and stage {cfg.stage} trains it")
    if cfg.connector == "langbridge" and not (cfg.init or cfg.hidden):
        raise ValueError("hidden is 0, the LLM's width, but a LangBridge does not know its LLM")
    if cfg.out:
        refuse_inside(cfg.out, init=cfg.init, llm=cfg.llm, vision_tower=cfg.vision_tower)
    required = [] if cfg.dry_run else ["out", "data"]
    if not os.path.isfile(f"{cfg.init}/config.json"):
        if cfg.init and not cfg.dry_run:
            raise ValueError(f"init {cfg.init} is no checkpoint: it has no config.json. Train it "
                             "first, or name another --init")
        required += ["llm", "vision_tower"]
        if cfg.connector == "langbridge" and not cfg.dry_run:
            required.append("words")
    for key in required:
        if not getattr(cfg, key).strip(","):
            raise ValueError(f"{key} is not set: give it in the config file or as --{key}=...")
    if os.path.isfile(f"{cfg.out}/config.json") and not (cfg.overwrite or cfg.dry_run):
        raise ValueError(f"{cfg.out} holds a finished run; --overwrite trains it again")
    if cfg.dry_run:
        return
    if not os.path.isdir(f"{cfg.out}/state"):
        refuse_existing(cfg.out, cfg.overwrite)
    words = cfg.words if cfg.connector == "langbridge" and not cfg.init else ""
    for path in [*cfg.data.split(","), cfg.images, words]:
        if path and not os.path.exists(path):
            raise ValueError(f"there is no file or folder {path}")


def check_init(cfg, config):
    """Raise ValueError if a setting asks for another model than `config` of the checkpoint init."""
    # A config file may name these for its --dry_run. On the command line they are a mistake.
    for key in ("llm", "vision_tower", "words", "words_init"):
        if cfg.given.get(key) == "the command line":
            raise ValueError(f"--{key} does not go with init, which has its own; transfer.py moves "
                             "a connector to another LLM")
    for key, value in asdict(config).items():
        now, where = getattr(cfg, key), cfg.given.get(key)
        if not where or now == value or key == "tiles":
            continue
        if key not in ("llm", "vision_tower", "normalize") or where == "the command line":
            raise ValueError(f"{key} is set to {now!r}, but {cfg.init} has {value!r}")
        print_rank0(f"note: {key} of the config file is not used: {cfg.init} has {value}")
    check_model(cfg, replace(config, tiles=cfg.tiles) if "tiles" in cfg.given else config)


def refuse_existing(out, overwrite):
    """Raise ValueError if `out` has what a checkpoint replaces, unless `overwrite` allows it."""
    names = ("config.json", "llm", "vision_tower", "words.json", "connector.safetensors",
             "transfer.json")
    refuse_files([f"{out}/{name}" for name in names], overwrite)


def refuse_files(paths, overwrite):
    """Raise ValueError if one of the files or folders exists, unless `overwrite` allows it."""
    for path in paths:
        if os.path.exists(path) and not overwrite:
            raise ValueError(f"{path} exists; --overwrite replaces it, or name another --out")


def refuse_inside(out, **paths):
    """Raise ValueError if a save to `out` would replace one of the paths, {what it is: path}."""
    for kind, path in paths.items():
        there, here = os.path.realpath(path or ""), os.path.realpath(out)
        if path and os.path.relpath(there, here).split(os.sep)[0] in (".", *FOLDERS):
            raise ValueError(f"{kind} {path} is in {out}, where it would be overwritten: name "
                             "another out")
        if path and os.path.relpath(here, there).split(os.sep)[0] in FOLDERS:
            raise ValueError(f"{out} is a part of {kind} {path}: name another out")
