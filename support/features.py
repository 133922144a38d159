"""Patches of a frozen vision tower in files, which train.py --features writes and data.py reads."""
import os

import torch
from tqdm import tqdm

import common
from support import pictures
from support.tensors import write_safetensors


@torch.no_grad()
def write_missing(vlm, dataset, folder, batch_size):
    """Write the patches of every picture of a dataset that `folder` does not hold yet, in float16.

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
    common.write_json(settings, path)
    names = sorted({name for names in dataset.image_names for name in names})
    for i in tqdm(range(0, len(names), batch_size), "features", unit=" batches"):
        batch = {}                                                  # {file to write: pixels}
        for name in names[i:i + batch_size]:
            try:
                picture = pictures.image_path(dataset.image_folder, name)
                file = pictures.features_path(folder, picture)
                status = os.stat(picture)           # ctime changes when a file gets another name
                changed = max(status.st_mtime, status.st_ctime)
                if not os.path.isfile(file) or changed > os.path.getmtime(file):
                    image = pictures.open_image(picture)
                    batch[file] = pictures.transform(image, **dataset.image)
            except common.BadSample:    # data.py reports it when its record is used
                continue
        if batch:
            found = vlm.patch_features(torch.stack([*batch.values()]))      # (N, P, Dv)
            for file, patches in zip(batch, found.to("cpu", torch.float16)):
                os.makedirs(os.path.dirname(file), exist_ok=True)
                write_safetensors({"patches": patches}, file)
