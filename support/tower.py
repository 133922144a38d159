"""The vision tower: its sizes, its hidden states, and which of its parameters a loss needs."""
import inspect

import torch

from common import print_rank0


def side_of(config, key):
    """Return "image_size" or "patch_size" of a tower's config: an int where it is [224, 224]."""
    value = getattr(config, key, None)
    is_square = isinstance(value, (list, tuple)) and len(set(value)) == 1
    return value[0] if is_square else value


def pooled_side(config, size, pool):
    """Return how many patches, after pooling, a picture of `size` pixels has along its side."""
    patch_size = side_of(config, "patch_size")
    side = size // patch_size
    if side == 0 or side % pool:
        raise ValueError(f"image_size {size} gives {side} x {side} patches of {patch_size} pixels, "
                         f"which pool {pool} does not divide")
    return side // pool


def tower_hidden(tower, pixel_values):
    """Return the tower's hidden states: float32[N, 3, S, S] -> many float[N, extra + P, Dv]."""
    # Pictures move to the device here and nowhere else, so callers need not know it.
    pixel_values = pixel_values.to(tower.device, tower.dtype)
    options = {}
    if pixel_values.shape[-1] != side_of(tower.config, "image_size"):
        # Some towers (DINOv2) always interpolate their position embeddings and lack the argument.
        if "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters:
            options["interpolate_pos_encoding"] = True
    return tower(pixel_values, output_hidden_states=True, **options).hidden_states


def freeze_unreached(vlm, device):
    """Freeze the tower's parameters that the loss does not reach: the layers after vision_layer."""
    side = vlm.image_settings["size"]
    features = vlm.patch_features(torch.zeros(1, 3, side, side, device=device))
    names, parameters = zip(*vlm.vision_tower.named_parameters())
    gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients):
        parameter.requires_grad_(gradient is not None)
    frozen = [name for name, gradient in zip(names, gradients) if gradient is None]
    if frozen:
        print_rank0(f"vision_tower: {len(frozen)} of {len(names)} tensors stay frozen, because the "
                    f"loss does not depend on them ({frozen[0]} ... {frozen[-1]})")
