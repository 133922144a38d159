"""What all scripts share: files, models by name, devices, and printing on the first rank.

torch is imported inside functions, so that --help answers at once.
"""
import json
import os
import re
import sys
from contextlib import contextmanager

OFFLINE = "download nothing: a model is a folder or in the Hugging Face cache, or it is an error"
FOLDERS = ("state", "steps", "llm", "vision_tower")     # that a run writes in its folder
ATTENTION = ("transformers' attn_implementation, such as eager or flash_attention_2; default: "
             "that of the checkpoint, else what the library chooses")


class BadSample(ValueError):
    """A record that cannot be used.

    kind: "malformed", "missing image", "broken image" or "untrainable". --check counts by kind.
    """

    def __init__(self, kind, sentence):
        super().__init__(kind, sentence)
        self.kind = kind

    def __str__(self):
        return self.args[1]


@contextmanager
def replacing(path):
    """Give a temporary name to write to. It becomes `path` if the block ends without an error."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):       # on a full disk half a file takes the rest of the room
            os.remove(temporary)


def write_text(text, path):
    """Write a UTF-8 file of exactly this text. Its folder is made if it does not exist."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)


def write_json(value, path, indent=1):
    """Write a value as JSON."""
    write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", path)


def refuse_inside(out, **paths):
    """End the process if a path is the folder `out` or in a part of it that a checkpoint replaces.

    paths: {what it is: path}. A path may be None or "".
    """
    for kind, path in paths.items():
        place = os.path.relpath(os.path.realpath(path or ""), os.path.realpath(out))
        if path and place.split(os.sep)[0] in (".", *FOLDERS):
            sys.exit(f"{kind} {path} is in {out}, where it would be overwritten: name another out")


def read_json(path):
    """Return the value of a JSON file. ValueError names the file if it is not complete JSON."""
    with open(path, encoding="utf-8-sig") as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a whole JSON file: {error}") from None


def read_records(path):
    """Return the objects of a JSON list, or of a file with an object on each line.

    A list of (place in the file, dict); empty lines are skipped. ValueError names the file, and the
    first line or record that is not complete or no object.
    """
    with open(path, "rb") as file:
        content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[:error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line} is not UTF-8 text") from None
    try:
        value = json.loads(text)
        values = value if isinstance(value, list) else [value]
        places = [f"{path}: record {i}" for i in range(len(values))]
        if isinstance(value, dict):
            places = [f"{path}, line 1"]
    except (ValueError, RecursionError) as error:
        if text.lstrip()[:1] == "[":
            raise ValueError(f"{path} is not a whole JSON file: {error}") from None
        places, values = [], []
        # Only \n ends a line. splitlines() would also cut at \x85 or \u2028 in a text.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                places.append(f"{path}, line {number}")
                try:
                    values.append(json.loads(line))
                except (ValueError, RecursionError):
                    raise ValueError(f"{places[-1]}: not complete JSON") from None
    for place, value in zip(places, values):
        if not isinstance(value, dict):
            raise ValueError(f"{place} is not a JSON object but {str(value)[:60]!r}")
    return list(zip(places, values))


def go_offline():
    """Forbid downloads. Call it before transformers is imported, which reads this only once."""
    os.environ["HF_HUB_OFFLINE"] = "1"


def from_hub(load, name, **kwargs):
    """Return load(name, **kwargs): `load` is a from_pretrained, `name` a folder or a hub name.

    Code that comes with a model is never run. ValueError with one sentence for any failure.
    """
    looks_like_hub_name = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name)
    is_local = os.path.isdir(name.split("/")[0]) or not looks_like_hub_name
    if is_local and not os.path.isdir(name):
        raise ValueError(f"there is no folder {name}")
    try:
        return load(name, trust_remote_code=False, **kwargs)
    except Exception as error:              # the library raises a dozen types, most of many lines
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # A first line that ends with ":" begins a list.
        reason = " ".join(lines if lines[0].rstrip().endswith(":") else lines[:1])
        if os.environ.get("HF_HUB_OFFLINE") == "1" and not os.path.isdir(name):
            reason = ("it is no folder and not in the Hugging Face cache, and nothing is "
                      "downloaded (--offline)")
        raise ValueError(f"{name} cannot be loaded: {reason}") from error


def choose_device(text, most=None):
    """Return the device that --device names; without a name CUDA if there is one, else the CPU.

    "auto" spreads an LLM over all GPUs, unless most=1. ValueError for a device that this machine
    does not have.
    """
    import torch
    if text == "auto" and most != 1:
        return text
    name = text or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"there is no device {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"there is no device {name!r}: torch sees {count} GPUs")
    return name


def choose_dtype(name, device):
    """Return the name of a dtype. "auto" is bfloat16 if the hardware computes in it, else float32.

    A CPU without such instructions takes ten times as long in bfloat16 as in float32.
    """
    import torch
    if name != "auto":
        return name
    device_type = torch.device(device).type
    has_bfloat16 = device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        has_bfloat16 = torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if has_bfloat16 else "float32"


def print_rank0(text):
    """Print on the first rank only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


def run_script(main, *args):
    """Run a script's main function; a user's mistake ends the process with one sentence.

    Functions raise ValueError or OSError for what a user can mend. Other errors keep their
    traceback. If you change this code, set TRACEBACK=1 to see where a ValueError comes from.
    """
    try:
        status = main(*args)
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        sys.exit(f"{os.path.basename(sys.argv[0])}: {lines[0]}")
    except KeyboardInterrupt:
        sys.exit(f"{os.path.basename(sys.argv[0])}: interrupted")
    if status:
        sys.exit(status)
