"""Bring files of other projects here: a published list of words, a connector or a checkpoint.

    python tools/import_official.py FILE --tokenizer A --out words.json [--counts F]
    python tools/import_official.py FILE_OR_FOLDER --llm NAME --words words.json --out DIR

The first line reads a vocabulary file and checks it against the tokenizer it was made for. The
second makes a checkpoint from the release's mm_projector.bin, from a folder of LLaVA-1.5,
LLaVA-NeXT or LangBridge, or from a LLaVA or LLaVA-NeXT folder of transformers. --llm is the LLM
before any visual training: its tokenizer and its E are taken. An MLP needs no --words.
"""
import os
import re
import sys
from collections import Counter
from glob import escape, glob

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common
import vocab
from support.checks import refuse_existing, refuse_files, refuse_inside
from support.hub import load_tokenizer
from support.settings import parse_value

# torch and checkpoint are imported inside functions, because --offline must come before them.

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
    """Return {part: {name here: (name in the file, tensor)}} of a file or of a folder's shards.

    The parts are "connector", "llm", "vision_tower" and "newline". ValueError if a file is torn,
    holds other things than tensors, or if there is no connector.
    """
    files = shards_of(path) if os.path.isdir(path) else [path]
    parts = {"connector": {}, "llm": {}, "vision_tower": {}, "newline": {}}
    for file in files:
        for name, tensor in read_file(file).items():
            if NOT_WEIGHTS.search(name):
                continue
            for pattern, ours in NAMES:
                renamed, count = re.subn("^" + pattern, ours, name, count=1)
                if count:
                    break
            else:
                raise ValueError(f"{file}: {name} is the name of no tensor of a LLaVA")
            part, renamed = renamed.split(".", 1)
            parts[part][renamed] = name, tensor
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
    import pickle
    import torch
    from support.tensors import read_safetensors
    if path.endswith(".safetensors"):
        return read_safetensors(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError):
        raise ValueError(f"{path} is torn, or it holds other things than tensors") from None
    tensors = content if isinstance(content, dict) else {"": content}
    if not all(torch.is_tensor(value) for value in tensors.values()):
        raise ValueError(f"{path} holds other things than tensors")
    return tensors


def read_settings(path):
    """Return what config.json says of the connector; {} without the file. ValueError if it differs.

    It stands in the folder, or beside the file. LLaVA and transformers use different keys.
    """
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    file = os.path.join(folder, "config.json")
    settings = common.read_json(file) if os.path.isfile(file) else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{file} is no config of a model")
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
    from transformers import LlavaNextConfig
    pinpoints = settings.get("image_grid_pinpoints")
    if settings.get("model_type") == "llava_next":      # transformers: (height, width)
        pinpoints = pinpoints or LlavaNextConfig().image_grid_pinpoints
        return tuple((width, height) for height, width in pinpoints)
    # LLaVA-NeXT: (width, height), as a list or as a text
    if isinstance(pinpoints, str):
        pinpoints = parse_value(pinpoints)
    if not isinstance(pinpoints, (list, tuple)):
        raise ValueError(f"{path} has an image_newline, but its config.json has no list "
                         "image_grid_pinpoints that says which tiles it belongs to")
    return tuple(map(tuple, pinpoints))


def fill(module, tensors, path, source):
    """Copy {name: (name in the file, tensor)} into a module. Return whether that changes it.

    ValueError names the first tensor of another shape, as it is called in the file. source: the
    flags that the module was made from.
    """
    import torch
    from support import sharding
    own = module.state_dict()

    def differs(name):
        """Return whether two tensors differ by more than the rounding of one of their dtypes."""
        ours, tensor = own[name], tensors[name][1]
        return not (torch.equal(ours.to(tensor.dtype), tensor)
                    or torch.equal(ours, tensor.to(ours.dtype)))

    # A tied head may be in the file or not.
    for name in sorted(sharding.stored_tensors(module).keys() | tensors.keys()):
        theirs, tensor = tensors.get(name, (name, None))
        found = "missing" if tensor is None else tuple(tensor.shape)
        want = tuple(own[name].shape) if name in own else "no such tensor"
        if found != want:
            raise ValueError(f"{path}: {theirs} is {found}; {source} want {want}")
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {theirs} has numbers that are not finite")
    changes = any(map(differs, tensors))
    module.load_state_dict({name: tensor for name, (_, tensor) in tensors.items()}, strict=False)
    for name in filter(differs, tensors):
        raise ValueError(f"{path}: {tensors[name][0]} differs from the tensor that it is tied to "
                         "in --llm")
    return changes


def fill_llm(vlm, tensors, path):
    """Copy an LLM that was trained, and give the embedding the rows that it has in the file.

    Others add rows for <image> or <pad>, or cut rows that no token uses. ValueError if a token has
    no row, or if the embeddings are not those of --llm after some training.
    """
    import torch.nn.functional as F
    base = vlm.llm.get_input_embeddings().weight
    name, embed = tensors.get("model.embed_tokens.weight", (None, base))
    last_id = max(vlm.tokenizer.get_vocab().values())
    if embed.shape[0] <= last_id or embed.shape[1] != base.shape[1]:
        raise ValueError(f"{path}: {name} is {tuple(embed.shape)}; --llm wants "
                         f"(at least {last_id + 1}, {base.shape[1]})")
    rows = min(len(base), len(embed))
    similarity = F.cosine_similarity(base[:rows].float(), embed[:rows].float()).median()
    if similarity < 0.9:
        raise ValueError(f"{path}: {name} is not a trained copy of the embedding of --llm (median "
                         f"cosine {similarity:.2f}), so this is another LLM")
    if len(embed) != len(base):
        vlm.llm.resize_token_embeddings(len(embed), mean_resizing=False)
    fill(vlm.llm, tensors, path, "the sizes of --llm")


def check_strategy(vlm, strategy, path):
    """Raise ValueError if transformers keeps other rows of the tower than the patches."""
    import torch
    from support.tower import tower_hidden
    side = vlm.image_settings["size"]
    extra = tower_hidden(vlm.vision_tower, torch.zeros(1, 3, side, side))[-1].shape[1]
    extra -= vlm.num_patches                                # CLS and registers
    dropped = {"default": 1, "full": 0}.get(strategy, extra)
    if dropped != extra:
        raise ValueError(f"{path}: vision_feature_select_strategy {strategy!r} drops {dropped} "
                         f"rows of the vision tower, which has {extra} before its patches")


def check_matrix(path, E, words):
    """Raise ValueError if a file, the release's E, is not the E of these words and this LLM."""
    matrix = read_file(path).get("")
    found = "no lone tensor" if matrix is None else tuple(matrix.shape)
    if found != tuple(E.shape):
        raise ValueError(f"{path} is {found}; --words and --llm want {tuple(E.shape)}")
    distance = (matrix.float() - E.float()).norm(dim=1)
    wrong = (distance > 0.02 * E.float().norm(dim=1)).nonzero()         # bfloat16 has 8 bits
    if len(wrong):
        k = int(wrong[0])
        raise ValueError(f"{path}: row {k} is not the embedding of {words[k]!r} in --llm: the "
                         "words are in another order, or the LLM is another one")


def import_checkpoint(args):
    """Write the checkpoint at args.out and print what it is made of."""
    import torch
    import checkpoint
    import model

    tensors, settings = read_tensors(args.file), read_settings(args.file)
    connector = tensors["connector"]
    is_langbridge = "to_scores.weight" in connector
    if is_langbridge and not args.words:
        raise ValueError(f"{args.file} holds a LangBridge: --words, its list of words, is missing")
    words = vocab.load_words(args.words) if is_langbridge else None
    config = model.Config(
        vision_tower=(args.vision_tower or settings.get("mm_vision_tower")
                      or "openai/clip-vit-large-patch14-336"),
        llm=args.llm, connector="langbridge" if is_langbridge else "mlp", normalize="none",
        hidden=len(connector["mlp.0.weight"][1]), num_words=len(words or ()),
        vision_layer=settings["layer"])
    has_llm = bool(tensors["llm"])
    name, newline = tensors["newline"].get("image_newline", (None, None))
    if has_llm and newline is not None:             # it belongs to the LLM's embedding space
        config.tiles = tiles_of(settings, args.file)
    dtype = next(iter(tensors["llm"].values()))[1].dtype if has_llm else torch.bfloat16
    vlm = checkpoint.build(config, words, dtype=dtype)
    check_strategy(vlm, settings.get("vision_feature_select_strategy"), args.file)
    fill(vlm.connector, connector, args.file, "the sizes of --vision_tower, --words and --llm")
    if args.vocab_matrix:
        if not is_langbridge:
            raise ValueError(f"{args.file} holds an MLP: --vocab_matrix, a list of embeddings, "
                             "belongs to a LangBridge")
        check_matrix(args.vocab_matrix, vlm.connector.vocab_embeds, words)
    trained = ["connector"]
    if has_llm:
        fill_llm(vlm, tensors["llm"], args.file)
        trained.append("llm")
    if tensors["vision_tower"]:
        tower = getattr(vlm.vision_tower, "vision_model", vlm.vision_tower)
        # A tower that stayed frozen is not written: it is the one that --vision_tower names.
        if fill(tower, tensors["vision_tower"], args.file, "the sizes of --vision_tower"):
            trained.append("vision_tower")
    if config.tiles:
        found, want = tuple(newline.shape), tuple(vlm.image_newline.shape)
        if found != want:
            raise ValueError(f"{args.file}: {name} is {found}; --llm wants {want}")
        vlm.image_newline.data.copy_(newline)
    pads = settings.get("image_aspect_ratio", "pad" if has_llm else "square") != "square"
    checkpoint.save(vlm, args.out, "sft" if has_llm else "pretrain", trained,
                    template="chat" if has_llm else "plain", image_mode="pad" if pads else "crop")
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
    parts = content if isinstance(content, list) else [content]
    if not parts or not all(isinstance(part, dict) and part for part in parts):
        raise ValueError(f"{path} is not a published vocabulary file: an object of token: id")
    pairs = [pair for part in parts for pair in part.items()]
    if all(isinstance(value, list) and [*map(type, value)] == [int, int] for _, value in pairs):
        pairs = [(token, i) for token, (i, _) in sorted(pairs, key=lambda pair: pair[1][1])]
    numbers = [number for _, number in pairs]
    if not all(type(number) is int for number in numbers):
        raise ValueError(f"{path} is not a published vocabulary file: the value of "
                         f"{pairs[0][0]!r} is not an id")
    never_rise = all(a >= b for a, b in zip(numbers, numbers[1:]))
    size = tokenizer.backend_tokenizer.get_vocab_size()
    cannot_be_ids = len(set(numbers)) < len(numbers) or max(numbers) >= size
    are_counts = never_rise and cannot_be_ids

    table = vocab.tokenizer_words(tokenizer)
    for token, number in pairs:
        if token not in table:
            raise ValueError(f"{path} does not belong to this tokenizer, which has no ordinary "
                             f"token {token!r}")
        if not are_counts and table[token] != number:
            raise ValueError(f"{path} does not belong to this tokenizer: {token!r} has the id "
                             f"{number} in the file and {table[token]} in the tokenizer")
    words = [token for token, _ in pairs]
    word, times = Counter(words).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{path}: the token {word!r} is in the file more than once")
    return words, dict(pairs) if are_counts else None


def write_words(args):
    """Write words.json at args.out, and the counts at args.counts."""
    tokenizer = load_tokenizer(args.tokenizer)
    imported, counts = import_official(args.file, tokenizer)
    if args.counts and not counts:
        raise ValueError(f"{args.file} holds ids and no counts, so --counts has no data")
    words = imported[:args.size]
    vocab.word_ids(words, tokenizer)            # asserts that each id spells its word
    print(f"kept         {len(words):,} of {len(imported):,}, sha256 {vocab.words_hash(words)}")
    if counts:
        vocab.print_coverage(words, counts, sum(counts.values()))
    if args.counts:
        common.write_json({word: counts[word] for word in imported if counts[word]}, args.counts, 0)
    vocab.save_words(words, args.out)


# --------------------------------------------------------------------------------------------------

def main():
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
    if args.offline:
        common.go_offline()
    if args.size is not None and args.size < 1:
        parser.error("--size must be at least 1")
    kind, other = "checkpoint", ("size", "counts")
    if args.tokenizer:
        kind, other = "list of words", ("words", "vision_tower", "vocab_matrix")
    for flag in other:
        if getattr(args, flag):
            parser.error(f"--{flag} does not go with a {kind}")
    if not (os.path.exists if args.llm else os.path.isfile)(args.file):
        raise ValueError(f"there is no file {args.file}")
    if args.llm:
        refuse_existing(args.out, args.overwrite)
    else:
        refuse_files(filter(None, (args.out, args.counts)), args.overwrite)
    refuse_inside(args.out, file=args.file, llm=args.llm, vision_tower=args.vision_tower)
    import_checkpoint(args) if args.llm else write_words(args)
    print(f"wrote        {args.out}")


if __name__ == "__main__":
    common.run_script(main)
