"""
Hashes of everything that a result depends on, one for each part, so that a changed part has a name.

A fingerprint is {source: {part: hash}}, for example {"llm": {"weights": ..., "chat template": ...},
"words": {"words": ...}}. A source is a setting of train.py. docs/promises.md says what is covered.
"""
import hashlib
import json
import os
import subprocess
from glob import escape, glob

from transformers.utils import cached_file

import common
from support import pictures, records

# A tensor or a picture of up to 64 blocks is read completely. Of a larger one, 64 blocks are read.
BLOCK, BLOCKS = 1 << 14, 64
MAX_IMAGES = 4000
# Libraries write these into a config. They do not change what is computed.
IGNORED = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
# Settings beside a tokenizer's files, and the library, decide about spaces, case and accents.
TEXT = "The cat's  2 hats,\n\tÉté ﬁn e\u0301 漢字: `a_b`.\n"
# Templates differ in what they do with a system turn, with thoughts, and with the last turn.
TALK = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"},
        {"role": "assistant", "content": "<think>\nc\n</think>\n\nd"},
        {"role": "user", "content": "e"}, {"role": "assistant", "content": "f"}]


def of_llm(name, tokenizer):
    """Return {part: hash} of an LLM by hub name or folder. Call it after the LLM was loaded."""
    folder = os.path.dirname(cached_file(name, "config.json", local_files_only=True))
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
    vocabulary = [file_hash(f"{folder}/{file}") for file in files]
    return {"weights": weights_hash(folder),
            "config.json": json_hash(f"{folder}/config.json"),
            "generation_config.json": json_hash(f"{folder}/generation_config.json"),
            "tokenizer": value_hash([vocabulary, tokenizer.special_tokens_map]),
            "tokens of a text": value_hash(tokenizer(TEXT).input_ids),
            "chat template": template_hash(tokenizer)}


def of_vision_tower(name):
    """Return {part: hash} of a vision tower. Call it after the tower was loaded."""
    folder = os.path.dirname(cached_file(name, "config.json", local_files_only=True))
    files = ("config.json", "preprocessor_config.json", "processor_config.json")
    return {"weights": weights_hash(folder),
            **{file: json_hash(f"{folder}/{file}") for file in files}}


def of_connector(folder):
    """Return the hash of a checkpoint's connector, words and config."""
    files = ("connector.safetensors", "words.json", "config.json")
    return value_hash([file_hash(f"{folder}/{file}", complete=True) for file in files])


def of_dataset(dataset, paths):
    """Return {source: {part: hash}} of a data.Conversations. paths: of its JSON files."""
    images = []
    for record in dataset.records[::len(dataset) // MAX_IMAGES + 1]:
        try:
            names = records.messages_of(record)[1]
            images += [pictures.image_path(dataset.image_folder, name) for name in names]
        except common.BadSample:
            images.append("")                       # it changes the hash when it is repaired
    return {"data": {"data": value_hash([file_hash(path, complete=True) for path in paths]),
                     "number of records": len(dataset)},
            "images": {"images of the data": images_hash(images)}}


def changes(stored, now):
    """Return [(source, part), ...] of all that differs. What `stored` lacks is not compared."""
    return [(source, part) for source, parts in now.items() for part, value in parts.items()
            if stored.get(source, {}).get(part, value) != value]


def check(vlm, folder, metadata, sources=("llm", "vision_tower")):
    """Raise a ValueError that names what has changed of the LLM or the tower of a checkpoint."""
    stored = metadata.get("fingerprint", {})
    for source in sources:
        changed = [part for _, part in changes(stored, {source: vlm.fingerprint[source]})]
        if changed:
            name = f"{folder}/{source}" if source in vlm.own_parts else getattr(vlm.config, source)
            label = {"llm": "LLM", "vision_tower": "vision tower"}[source]
            move = "transfer.py moves it to another LLM; " if source == "llm" else ""
            raise ValueError(f"{folder} was trained on another {label} than what {name} is now "
                             f"({', '.join(changed)} changed): {move}to accept the change, remove "
                             f"\"fingerprint\" from {folder}/config.json")


def git_commit():
    """Return the commit of this code; None outside of a git checkout."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return run.stdout.strip() or None


def value_hash(value):
    """Return the hash of a value that JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def blocks_hash(file, start, size, complete=False):
    """Return the hash of `size` bytes of an open file, or of 64 blocks of them."""
    digest = hashlib.sha256(str(size).encode())
    step = BLOCK if complete else max(BLOCK, size // BLOCKS)
    for offset in range(0, size, step):
        file.seek(start + offset)
        digest.update(file.read(min(BLOCK, size - offset)))
    return digest.hexdigest()[:16]


def file_hash(path, complete=False):
    """Return the hash of a file, None if there is no such file."""
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        return blocks_hash(file, 0, os.path.getsize(path), complete)


def json_hash(path):
    """Return the hash of a config, None if there is no such file."""
    if not os.path.isfile(path):
        return None
    config = common.read_json(path)
    return value_hash({key: value for key, value in config.items() if key not in IGNORED})


def weights_hash(folder):
    """Return the hash of all tensors of a model. It does not depend on their order in files."""
    tensors = {}
    paths = glob(f"{escape(folder)}/model*.safetensors")
    for path in paths + glob(f"{escape(folder)}/vocab_embeds.safetensors"):     # E, in a checkpoint
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, tensor in header.items():
                start, end = tensor["data_offsets"]
                numbers = blocks_hash(file, 8 + length + start, end - start)
                tensors[name] = [tensor["dtype"], tensor["shape"], numbers]
    if not tensors:                                 # an old model of somebody else's
        paths = glob(f"{escape(folder)}/pytorch_model*.bin")
        tensors = {os.path.basename(path): file_hash(path) for path in paths}
    return value_hash(tensors)


def template_hash(tokenizer):
    """Return the hash of what the chat template writes around the turns of a few conversations."""
    texts = []
    for messages in (TALK, TALK[1:], TALK[:2], TALK[1:2], TALK[1:3], TALK[1:4]):
        options = {"tokenize": False, "add_generation_prompt": messages[-1]["role"] == "user"}
        try:
            texts.append(tokenizer.apply_chat_template(messages, **options))
        except Exception:               # a template is a program; one refuses a system turn
            texts.append(None)
    return value_hash(texts)


def images_hash(images):
    """Return the hash of up to 4,000 pictures, evenly spread over a list of paths."""
    spread = images[::len(images) // MAX_IMAGES + 1]
    return value_hash([len(images), *[file_hash(path) for path in spread]])
