"""What all scripts share: files, models by name, devices, printing on the first rank."""
import json
import os
import re
from contextlib import contextmanager

# torch is imported where it is used, so that --help does not wait for it.


@contextmanager
def replacing(path):
    """A temporary name to write to; it becomes `path` where the block ends well: a file is whole or it is not there."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):                   # on a full disk, half a file takes what room is left
            os.remove(temporary)


def write_text(text: str, path) -> None:
    """A UTF-8 file of exactly this text; its folder is made if need be."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as f:
        f.write(text)


def write_json(value, path, indent: int = 1) -> None:
    write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", path)


def read_json(path):
    """ValueError names the file where it is not whole."""
    with open(path, encoding="utf-8") as f:
        try:
            return json.load(f)
        except (ValueError, RecursionError) as error:   # cut off, not UTF-8, nested too deeply
            raise ValueError(f"{path} is not a whole JSON file: {error}") from None


OFFLINE = "download nothing: a model is a folder or in the Hugging Face cache, or it is an error"


def go_offline() -> None:
    """What --offline does in every script. Before transformers is imported, which looks only once."""
    os.environ["HF_HUB_OFFLINE"] = "1"


def from_hub(load, name: str, **kwargs):
    """load(name, ...), where `load` is a from_pretrained of transformers and `name` a folder or a hub name.

    Never runs code that comes with a model. ValueError of one sentence for whatever goes wrong in there.
    """
    local = os.path.isdir(name.split("/")[0]) or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name)     # not a hub name
    if local and not os.path.isdir(name):
        raise ValueError(f"there is no folder {name}")
    try:
        return load(name, trust_remote_code=False, **kwargs)
    except Exception as error:                          # a dozen kinds, most of them many lines long
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        if os.environ.get("HF_HUB_OFFLINE") == "1" and not os.path.isdir(name):
            why = "it is no folder and not in the Hugging Face cache, and nothing is downloaded (--offline)"
        raise ValueError(f"{name} cannot be loaded: {why}") from error


def load_tokenizer(name: str):
    """A tokenizer by hub name or folder."""
    from transformers import AutoTokenizer
    return from_hub(AutoTokenizer.from_pretrained, name)


def choose_device(text, most=None):
    """What --device names, checked: one device or several with commas between. "" or None: CUDA where there is one, else
    the CPU. ValueError where there are more than `most`, or one that this machine lacks."""
    import torch
    names = (text or ("cuda" if torch.cuda.is_available() else "cpu")).split(",")
    if most and len(names) > most:
        raise ValueError(f"--device={text} names {len(names)} devices, here it can be {most}")
    for name in names:
        try:
            device = torch.device(name)
        except RuntimeError:
            raise ValueError(f"there is no device {name!r}") from None
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"there is no device {name!r}: torch sees {torch.cuda.device_count()} GPUs")
    return ",".join(names)


def check_restarts():
    """ValueError where torchrun keeps one store over its restarts: a new rank finds a dead one's address in it, and waits
    for that for hours."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("TORCHELASTIC_MAX_RESTARTS") != "0":
        raise ValueError("torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment and "
                         "--rdzv_backend=c10d, or restarted ranks wait for dead ones (pytorch issue 135712)")


def print_rank0(text):
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)
