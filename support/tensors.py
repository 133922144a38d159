"""safetensors files: written under a temporary name, and read with a check of what they hold."""
import re
from contextlib import contextmanager

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common import replacing


@contextmanager
def errors_name(path):
    """Turn errors of safetensors (damaged file, full disk) into a ValueError that names `path`."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None


def read_tensors(path, expected):
    """Return {name: tensor} of a safetensors file. ValueError if a name or shape is not expected.

    expected: {name: tensor of the wanted shape}. The numbers must be finite.
    """
    # Older checkpoints call the layer of the scores "words".
    found = {re.sub(r"^words\.", "to_scores.", name): tensor
             for name, tensor in read_safetensors(path).items()}
    for name in sorted(expected.keys() | found.keys()):
        shape, want = (tuple(d[name].shape) if name in d else None for d in (found, expected))
        if shape != want:
            raise ValueError(f"{path}: {name} is {shape}, expected {want}")
        if not found[name].isfinite().all():
            raise ValueError(f"{path}: {name} has numbers that are not finite")
    return found


def write_safetensors(tensors, path):
    """Write {name: tensor} to a temporary name and rename it."""
    with errors_name(path), replacing(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary)


def read_safetensors(path):
    """Return {name: tensor}. ValueError names a file that is not complete."""
    with errors_name(path):
        return load_file(path)
