"""
The patches of a frozen vision tower, kept in files, so that each picture goes through it only once.

train.py --features=DIR writes the files, and data.py reads them instead of the pictures.
"""
import os

import torch
from tqdm import tqdm

import common
from support import pictures
from support.tensors import write_safetensors


def is_newer(path, made):
    """Return whether the file `path` has changed since the file `made` was made from it."""
    status = os.stat(path)              # ctime changes when a file gets another name
    return (not os.path.isfile(made)
            or max(status.st_mtime, status.st_ctime) > os.path.getmtime(made))


@torch.no_grad()
def write_missing(vlm, dataset, folder, batch_size):
    """Write the patches of every picture of a dataset that `folder` does not hold yet, in float16.

    Runs of any dtype share them. They are computed in the dtype of the run that needs them first.
    The folder belongs to one tower, layer, size, pool and number of patches. ValueError for others.
    """
    settings = {"layer": vlm.config.vision_layer, "pool": vlm.config.pool,
                "patches": vlm.num_patches, **dataset.image}
    for part, value in vlm.fingerprint["vision_tower"].items():
        settings[f"tower's {part}"] = value
    path = f"{folder}/settings.json"
    stored = common.read_json(path) if os.path.isfile(path) else settings
    if not isinstance(stored, dict):
        raise ValueError(f"{path} was not written by train.py: name another folder")
    other = [key for key, value in settings.items() if stored.get(key, ...) != value]
    if other:
        raise ValueError(f"{folder} holds the patches of {stored}, and this run has another "
                         f"{', '.join(other)}: name another folder")
    os.makedirs(folder, exist_ok=True)
    common.write_json(settings, path)
    names = sorted({name for names in dataset.image_names for name in names})
    for i in tqdm(range(0, len(names), batch_size), "features", unit=" batches"):
        batch = {}                                                  # {path: pixels}
        for name in names[i:i + batch_size]:
            try:
                p = pictures.image_path(dataset.image_folder, name)
                if is_newer(p, pictures.features_path(folder, p)):
                    batch[p] = pictures.transform(pictures.open_image(p), **dataset.image)
            except common.BadSample:    # data.py reports it when its record is used
                continue
        if batch:
            found = vlm.patch_features(torch.stack([*batch.values()]))      # (N, P, Dv)
            for p, patches in zip(batch, found.to("cpu", torch.float16)):
                file = pictures.features_path(folder, p)
                os.makedirs(os.path.dirname(file), exist_ok=True)
                write_safetensors({"patches": patches}, file)
