"""Bring files of other projects here: a published list of words, a connector or a checkpoint.

    python tools/import_official.py FILE --tokenizer A --out words.json [--counts F]
    python tools/import_official.py FILE_OR_FOLDER --llm NAME --words words.json --out DIR

The first line reads a vocabulary file and checks it against the tokenizer it was made for. The
second makes a checkpoint from the release's mm_projector.bin, from a folder of LLaVA-1.5,
LLaVA-NeXT or LangBridge, or from a LLaVA or LLaVA-NeXT folder of transformers. --llm is the LLM
before any visual training: its tokenizer and its E are taken. An MLP needs no --words.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common


def read_arguments():
    parser = common.argument_parser(__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("file", metavar="FILE_OR_FOLDER", help="what to read")
    add("--out", required=True, help="words.json, or the folder of the checkpoint")
    add_kind = parser.add_mutually_exclusive_group(required=True).add_argument
    add_kind("--tokenizer", help="a list of words: the tokenizer that it was made for")
    add_kind("--llm", help="a checkpoint: the LLM before visual training, hub name or folder")
    add("--size", type=int, help="a list of words: how many (default: all)")
    add("--counts", metavar="FILE", help="a list of words: also write {word: count}")
    add("--words", metavar="words.json", help="a checkpoint: the words of a LangBridge")
    add("--vision_tower", help="a checkpoint: default what its config names, else CLIP-L/14-336")
    add("--vocab_matrix", metavar="FILE.pt", help="a checkpoint: the release's E, to check --words")
    add("--overwrite", action="store_true", help="replace existing files")
    add("--offline", action="store_true", help=common.OFFLINE)
    args = parser.parse_args()
    if args.size is not None and args.size < 1:
        parser.error("--size must be at least 1")
    kind, others = "checkpoint", ("size", "counts")
    if args.tokenizer:
        kind, others = "list of words", ("words", "vision_tower", "vocab_matrix")
    for flag in others:
        if getattr(args, flag):
            parser.error(f"--{flag} does not go with a {kind}")
    return args


if __name__ == "__main__":                   # before the slow imports, so that --help is quick
    ARGS = read_arguments()
    if ARGS.offline:
        common.go_offline()

import pickle
import re
from glob import escape, glob

import torch
from transformers import LlavaNextConfig

import checkpoint
import model
import vocab
from support import sharding
from support.checks import refuse_existing, refuse_files, refuse_inside
from support.hub import load_tokenizer
from support.settings import parse_value
from support.tensors import read_safetensors
from tools.export import rows_before_patches

# What a tensor's name starts with in other projects, and here. The first pattern that fits counts.
NAMES = [
    (r".*mm_projector\.([02])\.", r"connector.mlp.\1."),
    (r".*mm_projector\.3\.", "connector.to_scores."),
    (r".*(mm_projector|multi_modal_projector|vision_resampler)(?!\.linear_)\.", "connector.other."),
    (r"(model\.)?multi_modal_projector\.linear_1\.", "connector.mlp.0."),
    (r"(model\.)?multi_modal_projector\.linear_2\.", "connector.mlp.2."),
    (r"(model\.)?image_newline$", "newline.image_newline"),
    (r"(model\.)?(vision_tower\.)+(vision_model\.)?", "vision_tower."),
    (r"language_model\.(?=model\.|lm_head\.)", "llm."),         # transformers, on disk
    (r"model\.language_model\.", "llm.model."),                 # transformers, in memory
    (r"(?=model\.|lm_head\.)", "llm."),                         # LLaVA
]
NOT_WEIGHTS = re.compile(r"rotary_emb\.inv_freq$|position_ids$")    # old files hold these constants


# --------------------------------------------------------------------------------------------------
# a connector or a checkpoint

def read_tensors(path):
    """Return {part: {name here: tensor}} of a file or of a folder's shards.

    The parts are "connector", "llm", "vision_tower" and "newline". ValueError if a file is torn,
    holds other things than tensors, or if there is no connector.
    """
    parts = {"connector": {}, "llm": {}, "vision_tower": {}, "newline": {}}
    for file in shards_of(path) if os.path.isdir(path) else [path]:
        for name, tensor in read_file(file).items():
            if NOT_WEIGHTS.search(name):
                continue
            for pattern, ours in NAMES:
                start = re.match(pattern, name)
                if start:
                    break
            else:
                raise ValueError(f"{file}: {name} is the name of no tensor of a LLaVA")
            part, renamed = (start.expand(ours) + name[start.end():]).split(".", 1)
            parts[part][renamed] = tensor
    if "mlp.0.weight" not in parts["connector"]:
        raise ValueError(f"{path} holds no connector: no tensor mm_projector.0.weight or "
                         "multi_modal_projector.linear_1.weight")
    return parts


def shards_of(folder):
    """Return the files of a folder's weights. ValueError names one that is missing.

    Without this check a part whose shard was not downloaded would be taken from --llm or
    --vision_tower, untrained.
    """
    patterns = ("*.safetensors", "pytorch_model*.bin", "mm_projector.bin")
    found = (sorted(glob(f"{escape(folder)}/{pattern}")) for pattern in patterns)
    files = next(filter(None, found), [])
    there = {os.path.basename(file) for file in files}
    named = set()
    for name in there:
        shard = re.fullmatch(r"(.*-)\d{5}(-of-(\d{5})\..*)", name)      # model-00001-of-00003.bin
        if shard:
            named |= {f"{shard[1]}{i:05d}{shard[2]}" for i in range(1, int(shard[3]) + 1)}
    kind = os.path.splitext(files[0])[1] if files else ""   # an index of the other kind is not read
    for index in glob(f"{escape(folder)}/*{kind}.index.json"):
        content = common.read_json(index)
        if not isinstance(content, dict) or not isinstance(content.get("weight_map"), dict):
            raise ValueError(f"{index} is no index of weights: it has no weight_map")
        named |= set(map(str, content["weight_map"].values()))
    missing = sorted(named - there)
    if missing:
        raise ValueError(f"{folder} lacks {missing[0]}, one of its {len(named)} files of weights")
    return files


def read_file(path):
    """Return {name: tensor} of a file; a lone tensor has the name "". A pickle may hold no more."""
    if path.endswith(".safetensors"):
        return read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError):
        content = None
    tensors = content if isinstance(content, dict) else {"": content}
    if not all(map(torch.is_tensor, tensors.values())):
        raise ValueError(f"{path} is torn, or it holds other things than tensors")
    return tensors


def read_settings(path):
    """Return what config.json says of the connector; {} without the file. ValueError if it differs.

    It stands in the folder, or beside the file. LLaVA and transformers use different keys.
    """
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    file = os.path.join(folder, "config.json")
    settings = common.read_json(file) if os.path.isfile(file) else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{file} is no config of a model: it is not an object")
    known = {"mm_vision_select_feature": ("patch",), "mm_use_im_start_end": (False,),
             "vision_feature_select_strategy": ("default", "full"),
             "projector_hidden_act": ("gelu",), "multimodal_projector_bias": (True,),
             "image_aspect_ratio": ("square", "pad", "anyres")}
    if "text_config" in settings:                       # of transformers
        known["model_type"] = ("llava", "llava_next")
    if settings.get("image_aspect_ratio") == "anyres":
        known["mm_patch_merge_type"] = ("spatial_unpad",)
    for key, allowed in known.items():
        if settings.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{file}: {key} is {settings[key]!r}, and this code knows "
                             f"{' and '.join(map(repr, allowed))} only")
    layer = settings.get("mm_vision_select_layer", settings.get("vision_feature_layer", -2))
    if type(layer) is not int:
        raise ValueError(f"{file}: the connector reads the layers {layer}, and this code reads one")
    return {**settings, "layer": layer}


def tiles_of(settings, path):
    """Return the tiles of config.json, as model.Config has them. ValueError if it names none."""
    pinpoints = settings.get("image_grid_pinpoints")
    if settings.get("model_type") == "llava_next":      # of transformers: (height, width)
        pinpoints = pinpoints or LlavaNextConfig().image_grid_pinpoints     # it omits its default
        return tuple((width, height) for height, width in pinpoints)
    if not pinpoints:
        raise ValueError(f"{path} has an image_newline, but its config.json has no "
                         "image_grid_pinpoints that say which tiles it belongs to")
    # LLaVA-NeXT writes (width, height), as a list or as a text.
    return tuple(map(tuple, parse_value(str(pinpoints))))


def fill(module, tensors, place):
    """Copy {name: tensor} into a module. Return whether that changes it.

    ValueError names the first tensor that does not fit. place: "FILE: PART" for this sentence.
    """
    own = module.state_dict()

    def differs(name):
        """Return whether two tensors differ by more than the rounding of one of their dtypes."""
        ours, tensor = own[name], tensors[name]
        return not (ours.to(tensor.dtype).equal(tensor) or ours.equal(tensor.to(ours.dtype)))

    # A tied head may be in the file or not.
    for name in sorted(sharding.stored_tensors(module).keys() | tensors.keys()):
        found, want = (tuple(d[name].shape) if name in d else "missing" for d in (tensors, own))
        if found != want:
            raise ValueError(f"{place}.{name} is {found} in the file and {want} in what --llm, "
                             "--vision_tower and --words ask for")
        if not tensors[name].isfinite().all():
            raise ValueError(f"{place}.{name} has numbers that are not finite")
    changes = any(map(differs, tensors))
    module.load_state_dict(tensors, strict=False)
    for name in filter(differs, tensors):
        raise ValueError(f"{place}.{name} differs from the tensor that it is tied to in --llm")
    return changes


def fill_llm(vlm, tensors, path):
    """Copy an LLM that was trained, and give the embedding the rows that it has in the file.

    Others add rows for <image> or <pad>, or cut rows that no token uses. ValueError if a token has
    no row, or for another LLM than --llm after some training.
    """
    base = vlm.llm.get_input_embeddings().weight
    embed = tensors.get("model.embed_tokens.weight", base)
    has_all_rows = len(embed) > max(vlm.tokenizer.get_vocab().values())
    if has_all_rows and embed.shape[1] == base.shape[1]:        # else `fill` says what differs
        rows = min(len(base), len(embed))
        similarity = torch.cosine_similarity(base[:rows].float(), embed[:rows].float()).median()
        if similarity < 0.9:
            raise ValueError(f"{path}: the embedding is not a trained copy of that of --llm "
                             f"(median cosine {similarity:.2f}), so this is another LLM")
        vlm.llm.resize_token_embeddings(len(embed), mean_resizing=False)
    fill(vlm.llm, tensors, f"{path}: llm")


def check_matrix(path, E, words):
    """Raise ValueError if a file, the release's E, is not the E of these words and this LLM."""
    matrix = read_file(path).get("")
    if matrix is None or matrix.shape != E.shape:
        raise ValueError(f"{path} is no lone tensor {tuple(E.shape)}, as --words and --llm want")
    distance = (matrix.float() - E.float()).norm(dim=1)
    wrong = (distance > 0.02 * E.float().norm(dim=1)).nonzero()         # bfloat16 has 8 bits
    if len(wrong):
        k = int(wrong[0])
        raise ValueError(f"{path}: row {k} is not the embedding of {words[k]!r} in --llm: the "
                         "words are in another order, or the LLM is another one")


def import_checkpoint(args):
    """Write the checkpoint at args.out and print what it is made of."""
    tensors, settings = read_tensors(args.file), read_settings(args.file)
    connector, llm, tower = (tensors[part] for part in ("connector", "llm", "vision_tower"))
    is_langbridge = "to_scores.weight" in connector
    if is_langbridge and not args.words:
        raise ValueError(f"{args.file} holds a LangBridge: --words, its list of words, is missing")
    if args.vocab_matrix and not is_langbridge:
        raise ValueError(f"{args.file} holds an MLP: --vocab_matrix, a list of embeddings, "
                         "belongs to a LangBridge")
    words = vocab.load_words(args.words) if is_langbridge else None
    config = model.Config(
        vision_tower=(args.vision_tower or settings.get("mm_vision_tower")
                      or "openai/clip-vit-large-patch14-336"),
        llm=args.llm, connector="langbridge" if is_langbridge else "mlp", normalize="none",
        hidden=len(connector["mlp.0.weight"]), num_words=len(words or ()),
        vision_layer=settings["layer"])
    if llm and tensors["newline"]:                  # it belongs to the LLM's embedding space
        config.tiles = tiles_of(settings, args.file)
    dtype = next(iter(llm.values())).dtype if llm else torch.bfloat16
    vlm = checkpoint.build(config, words, dtype=dtype)
    extra = rows_before_patches(vlm)
    strategy = settings.get("vision_feature_select_strategy")
    dropped = {"default": 1, "full": 0}.get(strategy, extra)
    if dropped != extra:
        raise ValueError(f"{args.file}: vision_feature_select_strategy {strategy!r} drops "
                         f"{dropped} rows of the vision tower, which has {extra} before its "
                         "patches")
    fill(vlm.connector, connector, f"{args.file}: connector")
    if args.vocab_matrix:
        check_matrix(args.vocab_matrix, vlm.connector.vocab_embeds, words)
    trained = ["connector"]
    if llm:
        fill_llm(vlm, llm, args.file)
        trained.append("llm")
    if tower:
        module = getattr(vlm.vision_tower, "vision_model", vlm.vision_tower)
        # A tower that stayed frozen is not written: it is the one that --vision_tower names.
        if fill(module, tower, f"{args.file}: vision_tower"):
            trained.append("vision_tower")
    if config.tiles:
        vlm.image_newline.data.copy_(tensors["newline"]["image_newline"])
    pads = settings.get("image_aspect_ratio", "pad" if llm else "square") != "square"
    checkpoint.save(vlm, args.out, "sft" if llm else "pretrain", trained,
                    template="chat" if llm else "plain", image_mode="pad" if pads else "crop")
    print(f"connector    {config.connector}, H = {config.hidden}"
          + (f", {len(words):,} words, raw scores" if words else ""))
    print(f"written      {', '.join(trained)}")
    if words and not args.vocab_matrix:
        print("note         no tensor tells the order of the words: it is that of --words; "
              "--vocab_matrix checks it by the release's file of E")


# --------------------------------------------------------------------------------------------------
# a list of words

def import_official(path, tokenizer):
    """Return (words in order, {word: count} or None) of a published file.

    The file is {token: id}, {token: [id, rank]}, a list of such objects, or the count table
    {token: count}. Numbers that never rise and that cannot be ids (equal ones, or beyond the
    vocabulary) are counts. ValueError names the first token that is not the tokenizer's.
    """
    content = common.read_json(path)
    size = tokenizer.backend_tokenizer.get_vocab_size()
    try:
        parts = content if isinstance(content, list) else [content]
        pairs = [pair for part in parts for pair in part.items()]
        if isinstance(pairs[0][1], list):
            pairs = [(token, i) for token, (i, _) in sorted(pairs, key=lambda pair: pair[1][1])]
        numbers = [number for _, number in pairs]
        cannot_be_ids = len(set(numbers)) < len(numbers) or max(numbers) >= size
        are_counts = cannot_be_ids and numbers == sorted(numbers, reverse=True)
    except (AttributeError, IndexError, TypeError, ValueError):
        raise ValueError(f"{path} is not a published vocabulary file: {{token: id}}") from None
    table = vocab.tokenizer_words(tokenizer)
    for token, number in pairs:
        if token not in table or not are_counts and table[token] != number:
            raise ValueError(f"{path} does not belong to this tokenizer, in which the word "
                             f"{token!r} has the id {table.get(token)}")
    return [token for token, _ in pairs], dict(pairs) if are_counts else None


def write_words(args):
    """Write words.json at args.out, and the counts at args.counts."""
    tokenizer = load_tokenizer(args.tokenizer)
    imported, counts = import_official(args.file, tokenizer)
    if args.counts and not counts:
        raise ValueError(f"{args.file} holds ids and no counts, so --counts has no data")
    words = imported[:args.size]
    print(f"kept         {len(words):,} of {len(imported):,}, sha256 {vocab.words_hash(words)}")
    if counts:
        vocab.print_coverage(words, counts, sum(counts.values()))
    if args.counts:
        common.write_json({word: counts[word] for word in imported if counts[word]}, args.counts, 0)
    vocab.save_words(words, args.out)


# --------------------------------------------------------------------------------------------------

def main(args):
    if not os.path.exists(args.file):
        raise ValueError(f"there is no file {args.file}")
    refuse_inside(args.out, file=args.file, llm=args.llm, vision_tower=args.vision_tower)
    if args.llm:
        refuse_existing(args.out, args.overwrite)
        import_checkpoint(args)
    else:
        refuse_files(filter(None, (args.out, args.counts)), args.overwrite)
        write_words(args)
    print(f"wrote        {args.out}")


if __name__ == "__main__":
    common.run_script(main, ARGS)
