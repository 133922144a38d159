"""
What does not fit together is refused here, before a model is loaded: settings of train.py, folders.
"""
import os
import sys
from dataclasses import asdict

from common import print_rank0
from support import settings

FOLDERS = ("state", "steps", "llm", "vision_tower")     # that a run writes in its folder


def needs_words(cfg):
    """Return whether the settings ask for the words loss, which needs the words of a LangBridge."""
    return cfg.words_loss > 0 or cfg.stage == "words"


def needs_squares(cfg):
    """Return whether the settings work only with pictures that are one square each."""
    return bool(cfg.features or cfg.words_loss) or "llm" not in cfg.trained_parts()


def check(cfg):
    """End the process with one sentence if the settings cannot work. Nothing is loaded for this."""
    settings.check_ranges(cfg)
    if cfg.connector == "mlp" and (needs_words(cfg) or cfg.words_init == "embeds"):
        sys.exit("the words loss and words_init need the words of a LangBridge, and connector is "
                 "mlp")
    if needs_words(cfg) and cfg.normalize == "none" and not cfg.init:
        sys.exit("the words loss is for probabilities of words, and normalize is none: set "
                 "words_loss to 0, or normalize to softmax")
    if cfg.tiles and needs_squares(cfg):
        sys.exit("tiles are for stages that train the LLM, without words_loss and features")
    if cfg.pack and needs_words(cfg):
        sys.exit("pack puts samples into one row, and the words loss needs them apart: set pack to "
                 "False, or words_loss to 0")
    if cfg.features and "vision_tower" in cfg.trained_parts():
        sys.exit(f"features are those of a frozen tower, and stage {cfg.stage} trains it")
    if cfg.connector == "langbridge" and not (cfg.init or cfg.hidden):
        sys.exit("hidden is 0, the width of the LLM, but a LangBridge does not know its LLM")
    if cfg.out:
        refuse_inside(cfg.out, init=cfg.init, llm=cfg.llm, vision_tower=cfg.vision_tower)
    required = ["out", "data"]
    if cfg.dry_run:
        required = []
    if not os.path.isfile(f"{cfg.init}/config.json") and (cfg.dry_run or not cfg.init):
        required += ["llm", "vision_tower"]
        if cfg.connector == "langbridge" and not cfg.dry_run:
            required.append("words")
    for key in required:
        if not getattr(cfg, key):
            sys.exit(f"{key} is not set: give it in the config file or as --{key}=...")
    if os.path.isfile(f"{cfg.out}/config.json") and not (cfg.overwrite or cfg.dry_run):
        sys.exit(f"{cfg.out} holds a finished run; --overwrite trains it again")
    if not (cfg.dry_run or os.path.isdir(f"{cfg.out}/state")):
        refuse_existing(cfg.out, cfg.overwrite)


def check_init(cfg, config):
    """End the process if a setting asks for another model than `config` of the checkpoint init."""
    for key, value in asdict(config).items():
        is_free = key in ("llm", "vision_tower", "tiles")
        if key in cfg.given and not is_free and getattr(cfg, key) != value:
            sys.exit(f"{key} is set to {getattr(cfg, key)!r}, but {cfg.init} has {value!r}")
    for key in ("llm", "vision_tower"):
        if key in cfg.given and getattr(cfg, key) != getattr(config, key):
            print_rank0(f"note: {key} of the config file is not used: {cfg.init} has "
                        f"{getattr(config, key)}")
    if needs_words(cfg) and config.connector == "mlp":
        sys.exit(f"the words loss needs the words of a LangBridge, and {cfg.init} has an MLP")
    if needs_words(cfg) and config.normalize == "none":
        sys.exit(f"the words loss is for probabilities of words, and {cfg.init} has normalize none")
    if config.tiles and "tiles" not in cfg.given and needs_squares(cfg):
        sys.exit(f"{cfg.init} has tiles: set tiles to (), or train the LLM without words_loss and "
                 "features")
    # A config file may name these for its --dry_run. On the command line they are a mistake.
    for key in ("llm", "vision_tower", "words", "words_init"):
        if cfg.given.get(key) == "the command line":
            sys.exit(f"--{key} does not go with init, which has its own; transfer.py moves a "
                     "connector to another LLM")


def refuse_existing(out, overwrite):
    """End the process if `out` has what a checkpoint replaces, unless `overwrite` allows it.

    A save that was killed leaves an llm/ without config.json. A user's folder may have one, too.
    """
    for name in ("config.json", "llm", "vision_tower"):
        if os.path.exists(f"{out}/{name}") and not overwrite:
            sys.exit(f"{out}/{name} exists; name another --out or say --overwrite")


def refuse_inside(out, **paths):
    """End the process if a path is `out`, or lies in a subfolder of it that a run replaces.

    paths: {what it is: path}. A path may be None or "".
    """
    for kind, path in paths.items():
        place = os.path.relpath(os.path.realpath(path or ""), os.path.realpath(out))
        if path and place.split(os.sep)[0] in (".", *FOLDERS):
            sys.exit(f"{kind} {path} is in {out}, where it would be overwritten: name another out")
