"""What all scripts share: JSON files, printing on the first rank, and a sentence for a mistake."""
import argparse
import json
import os
import sys
from contextlib import contextmanager

OFFLINE = "never download; a model that is no folder and not in the cache is an error"
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


def read_json(path):
    """Return the value of a JSON file. ValueError names the file if it is not complete JSON."""
    with open(path, encoding="utf-8-sig") as file:
        try:
            return json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a whole JSON file: {error}") from None


def argument_parser(description, **options):
    """Return an argparse parser that ends a wrong call with one sentence and status 1."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **options)
    parser.error = lambda message: sys.exit(f"{os.path.basename(sys.argv[0])}: {message}")
    return parser


def go_offline():
    """Forbid downloads. Call it before transformers is imported, which reads this only once."""
    os.environ["HF_HUB_OFFLINE"] = "1"


def print_rank0(text):
    """Print on the first rank only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


@contextmanager
def one_sentence():
    """End the process with one sentence if the block raises ValueError or OSError.

    Functions raise these for what a user can mend. Other errors keep their traceback. If you change
    this code, set TRACEBACK=1 to see where a ValueError comes from.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        sys.exit(f"{os.path.basename(sys.argv[0])}: {lines[0]}")
    except KeyboardInterrupt:
        sys.exit(f"{os.path.basename(sys.argv[0])}: interrupted")


def run_script(main, *args):
    """Run a script's main function. What it returns is the exit status, if it is not None."""
    with one_sentence():
        status = main(*args)
    if status:
        sys.exit(status)
