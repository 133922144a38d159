"""
LangBridge: a vision-language connector that writes every image patch as a combination of an LLM's own word embeddings.
(Interpreting Image as a Combination of Language Embeddings, ICCV 2025, arXiv 2503.19404)

    z = MLP(vision_tower(image))             (B, P, H)
    s = z @ W.T + b                          (B, P, K)   one score for each word of a shared vocabulary
    w = softmax(s)  or  w = s                (B, P, K)   "softmax": the paper's text; "none": its released code
    image_embeds = w @ E                     (B, P, D)   E: the LLM's own input embeddings of those K words

The default here is a third way, "unit": w = softmax(s), image_embeds = w / |w| @ (E - mean of E). See `combine`. The
MLP, W and b are trained and know nothing of the LLM; E is the LLM's and is never trained. Another LLM means another E.

Letters used everywhere in this project:
    B samples in a batch     P patches of an image    H connector width      Dv vision width   T tokens
    N images in a batch      K shared words           D LLM width            V LLM vocabulary  S image side in pixels
"""
import functools
import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import zlib
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from glob import escape, glob

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers.utils import logging
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache, GenerationConfig
from transformers.image_processing_base import ImageProcessingMixin

from data import IGNORE, IMAGE_ID
from vocab import fetch, load_tokenizer, load_words, read_json, replacing, save_words, word_ids, words_hash, write_json

logging.disable_progress_bar()      # of loading weights: it buries the tables that the scripts print

FORMAT = 1             # of the checkpoint folder
NORMALIZE = ("unit", "softmax", "none")
BLOCK = 1024           # words whose scores exist at one time
COMPILE = 1 << 23      # patches x words from which on the seconds that torch.compile takes come back
LOSS_ROWS = 2048       # trained tokens whose logits exist at one time: 2048 x 151,936 in float32 is 1.2 GB


# ----------------------------------------------------------------------------------------------------------------------
# the connectors

class LangBridge(nn.Module):
    """Linear, GELU, Linear, then one score for each word, and the words' embeddings added up by these scores.

    normalize "softmax": a probability distribution, as the paper says; "none": raw scores of any sign, as its code does;
    "unit": a distribution whose result is as long as a word (see `combine`). gain: spread of W at the start, in units of
    torch's default. At the paper's sizes 129,790,720 parameters, none with a dimension of the LLM.
    """

    def __init__(self, Dv, H=5120, K=19200, normalize="unit", gain=1.0):
        super().__init__()
        if normalize not in NORMALIZE:
            raise ValueError(f"normalize is one of {', '.join(NORMALIZE)}, not {normalize!r}")
        self.normalize = normalize
        self.mlp = nn.Sequential(nn.Linear(Dv, H), nn.GELU(), nn.Linear(H, H))
        self.words = nn.Linear(H, K)                                # W [K, H] and b [K]
        with torch.no_grad():
            self.words.weight.mul_(gain)
        # What belongs to the LLM is a buffer that no state dict holds: it is what a transfer replaces.
        self.register_buffer("vocab_embeds", None, persistent=False)  # E float[K, D]

    def forward(self, patches):
        """patches float[N, P, Dv] -> image embeds float[N, P, D]"""
        return combine(self.mlp(patches), self.words.weight, self.words.bias, self.vocab_embeds, self.normalize)

    def weights(self, patches):
        """patches float[N, P, Dv] -> float32[N, P, K], what each word contributes to each patch"""
        return word_weights(self.mlp(patches), self.words.weight, self.words.bias, self.normalize)

    @torch.no_grad()
    def fold(self):
        """The same function as a two-layer MLP, for deployment: -> MLPConnector with W' = E^T W W2, b' = E^T (W b2 + b)

        Only for normalize "none", where nothing but the GELU is not linear, else ValueError. One-way: the result
        belongs to this LLM and its words can no longer be told. Made in float64, returned in the connector's dtype.
        """
        if self.normalize != "none":
            raise ValueError("only a connector with normalize=none folds into an MLP: a softmax is not linear")
        first, _, second = self.mlp
        E, W = self.vocab_embeds.double(), self.words.weight.double()   # (K, D), (K, H)
        EW = E.T @ W                                                    # (D, K) x (K, H) -> (D, H)
        folded = MLPConnector(first.in_features, E.shape[1], first.out_features).to(first.weight)
        folded.mlp[0].load_state_dict(first.state_dict())
        folded.mlp[2].weight.copy_(EW @ second.weight.double())         # (D, H) x (H, H) -> (D, H)
        folded.mlp[2].bias.copy_(EW @ second.bias.double() + self.words.bias.double() @ E)
        return folded


class MLPConnector(nn.Module):
    """LLaVA-1.5's mlp2x_gelu, the baseline. H defaults to D; the fair match of raw LangBridge is H = its width.
    (haotian-liu/LLaVA, multimodal_projector)"""

    def __init__(self, Dv, D, H=None):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(Dv, H or D), nn.GELU(), nn.Linear(H or D, D))

    def forward(self, patches):
        """patches float[N, P, Dv] -> image embeds float[N, P, D]"""
        return self.mlp(patches)


# ----------------------------------------------------------------------------------------------------------------------
# the combination

def combine(z, W, b, E, normalize):
    """The vocabulary combination: each row of z becomes a weighted sum of the rows of E.

    z float[..., H], W float[K, H], b float[K], E float[K, D] -> [..., D]. With s = z W^T + b and p = softmax(s):
        "none"      s E
        "softmax"   p E
        "unit"      p (E - mean of E) / |p|
    The last is ours. An average of many words lies close to the mean word and is short: at the start, when all weights
    are alike, every patch looks the same to the LLM, and hardly anything is learned. So "unit" weights the deviations
    from the mean word and divides by the Euclidean norm of p, which makes the result about as long as one word's
    deviation.

    Computed and returned in autocast's dtype, else in z's; W, b and E may have another one. Sums over blocks of words
    run in float32 (float64 for float64). Gradients for z, W and b, none for E. No tensor of the size patches x words is
    ever made, unless normalize is "none" and there are so few patches that it is the small way.
    """
    device = z.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else z.dtype
    rows = z.reshape(-1, z.shape[-1]).to(dtype)                     # (..., H) -> (P, H); the P of all images together
    with torch.autocast(device, enabled=False):                     # from here on each cast is written out
        if normalize == "none":
            out = raw_combine(rows, W, b, E)
        else:
            out = SoftmaxCombine.apply(rows, W, b, E, normalize == "unit")
    return out.view(*z.shape[:-1], E.shape[1])                      # (P, D) -> (..., D)


def word_weights(z, W, b, normalize):
    """The share of each word in each patch, z [..., H] -> float32 [..., K]: p, of "unit", too, or the raw scores of
    "none". For looking at, not for training."""
    scores = F.linear(z, W, b).float()                              # (..., H) x (H, K) -> (..., K)
    return scores if normalize == "none" else scores.softmax(-1)


def raw_combine(z, W, b, E):
    """(z W^T + b) E in the cheaper of its two orders: float[P, H] -> float[P, D]

    The product is associative, so E^T W [D, H] can be made first: K is summed away before a patch is seen. With E a
    constant autograd keeps to this order (dW = E (g^T z)), so the gradients are the same and as cheap.
    """
    (K, H), (P, D) = W.shape, (len(z), E.shape[1])
    W, b, E = W.to(z.dtype), b.to(z.dtype), E.to(z.dtype)
    # Multiply-adds. Training needs 3 products of each factor with z's rows and 2 of the others; inference 1 of each.
    # At 896 x 5120 x 19200 folding pays from 559 patches in training, from 795 in inference.
    z_products, others = (3, 2) if torch.is_grad_enabled() and W.requires_grad else (1, 1)
    folded = others * K * H * D + z_products * P * H * D
    if folded < z_products * P * K * H + others * P * K * D:
        return F.linear(z, E.T @ W, b @ E)                          # (P, H) x (H, D) -> (P, D)
    return F.linear(z, W, b) @ E                                    # (P, H) x (H, K) x (K, D) -> (P, D)


class SoftmaxCombine(torch.autograd.Function):
    """softmax(z W^T + b) E without the matrix of all scores: attention with the words as keys and E as values.

    Online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867; Rabe and Staats 2021, arXiv 2112.05682). For one patch

        out = sum_k exp(s_k) e_k / sum_k exp(s_k)

    where exp overflows from s = 89 on. Numerator and denominator may both be multiplied by exp(-top) for any `top`; the
    largest score makes every exponent <= 0. But the largest score is known only at the end. So walk over the words in
    blocks with the largest score *so far*, and when a block raises it from `top` to `new`, multiply what has been added
    up by exp(top - new): each term then stands as if `new` had been there from the start.

    The backward pass makes the scores of a block again (one product more than keeping them) and needs no second walk to
    normalise them: p_k = exp(s_k - lse), where lse = top + log(sum_k exp(s_k - top)) was saved for each patch; as its two
    terms, because at a top of 1e4 their float32 sum is off by 5e-4, and so would be every p_k. With g = dL/dout,

        dL/dp_k = g . e_k        dL/ds_k = p_k (g . e_k - sum_j p_j g . e_j) = p_k (g . e_k - g . out)

    and the sum over all words inside the softmax's gradient is again one number for each patch.

    "unit" is out / |p| with E's mean taken off. |p|^2 = sum_k p_k^2 is one sum more on the same walk, and since a factor
    common to all p_k changes nothing, sum_j p_j dL/dp_j is 0: dL/ds_k = p_k (g . e_k / |p| - p_k (g . out) / |p|^2).
    """

    @staticmethod
    def forward(ctx, z, W, b, E, unit):
        """z float[P, H], W float[K, H], b float[K], E float[K, D] -> float[P, D] in z's dtype"""
        wide = torch.promote_types(z.dtype, torch.float32)          # of all that is added up over blocks
        top = torch.full((len(z), 1), torch.finfo(wide).min, dtype=wide, device=z.device)
        total = torch.zeros_like(top)                               # (P, 1) sum of exp(s - top)
        squares = torch.zeros_like(top)                             # (P, 1) sum of exp(s - top)^2
        out = torch.zeros(len(z), E.shape[1], dtype=wide, device=z.device)  # (P, D) sum of exp(s - top) e
        mean = torch.zeros(E.shape[1], dtype=wide, device=z.device)
        step = compiled(softmax_step) if len(z) * len(W) >= COMPILE else softmax_step
        for Wk, bk, Ek in zip(W.split(BLOCK), b.split(BLOCK), E.split(BLOCK)):
            s = F.linear(z, Wk.to(z.dtype), bk.to(z.dtype))         # (P, H) x (H, block) -> (P, block)
            p, top, total, squares, shrink = step(s, top, total, squares)
            add_product(out.mul_(shrink), p, Ek.to(z.dtype))        # (P, block) x (block, D) -> (P, D)
            if unit:
                mean += Ek.sum(0, dtype=wide) / len(E)              # by blocks: on a CPU this is a copy in `wide`
        out, norm = out.div_(total), torch.ones_like(total)
        if unit:
            norm = squares.sqrt() / total                           # (P, 1) |p|
            out = out.sub_(mean).div_(norm)
        out = out.to(z.dtype)
        ctx.save_for_backward(z, W, b, E, out, top, total.log(), mean, norm)
        ctx.unit = unit
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        """g float[P, D] -> gradients of z, W and b, each in its tensor's dtype, where they are asked for"""
        z, W, b, E, out, top, log_total, mean, norm = ctx.saved_tensors
        needs_z, needs_W, needs_b, _, _ = ctx.needs_input_grad
        g_out = (g.to(top.dtype) * out).sum(1, keepdim=True)        # (P, 1)
        # Both kinds are dL/ds_k = p_k ((g . e_k - shift) / norm - p_k curve). For "unit" e_k is less the mean word, which
        # is the shift, and the derivative of 1 / |p| is the curve.
        shift, curve = g_out, torch.zeros_like(g_out)
        if ctx.unit:
            shift, curve = g.to(top.dtype) @ mean[:, None], g_out / norm.square()   # (P, 1)
        dz = torch.zeros(z.shape, dtype=top.dtype, device=z.device) if needs_z else None
        dW = torch.empty_like(W) if needs_W else None
        db = torch.empty_like(b) if needs_b else None
        step = compiled(softmax_step_backward) if len(z) * len(W) >= COMPILE else softmax_step_backward
        for k in range(0, len(W), BLOCK):
            block = slice(k, k + BLOCK)
            Wk = W[block].to(z.dtype)
            s = F.linear(z, Wk, b[block].to(z.dtype))               # as in the forward pass, to the bit
            dp = g @ E[block].to(z.dtype).T                         # (P, D) x (D, block) -> (P, block)
            ds, ds_sum = step(s, dp, top, log_total, shift, norm, curve)
            if needs_z:
                add_product(dz, ds, Wk)                             # (P, block) x (block, H) -> (P, H)
            if needs_W and dW.dtype == ds.dtype:
                torch.mm(ds.T, z, out=dW[block])                    # (block, P) x (P, H) -> (block, H)
            elif needs_W:
                dW[block] = ds.T @ z                                # float32 masters
            if needs_b:
                db[block] = ds_sum
        return dz.to(z.dtype) if needs_z else None, dW, db, None, None


def add_product(total, a, b):
    """total += a @ b in place, where `total` may be wider than a and b: then by quarters, for the product is a copy"""
    if total.dtype == a.dtype:
        return total.addmm_(a, b)
    for part, rows in zip(total.chunk(4), a.chunk(4)):
        part.add_(rows @ b)


@functools.cache
def compiled(step):
    """`step` through torch.compile, one pass over memory instead of six; as it is, said once, where that fails."""
    fast = torch.compile(step, dynamic=True)

    def run(*args):
        nonlocal fast
        try:
            return fast(*args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:                                  # no C++ compiler, no Triton: no common name
            if fast is step:
                raise
            say_once(f"the combination runs as plain torch, slower: torch.compile fails here ({type(error).__name__})")
            fast = step
            return step(*args)
    return run


@functools.cache
def say_once(text):
    print(text)


def softmax_step(s, top, total, squares):
    """One block of the online softmax: scores float[P, block]; top, total, squares float[P, 1] so far
    -> exp(s - new top) in s's dtype, new top, total, squares, and what everything added up before must be multiplied by"""
    s_wide = s.to(top.dtype)
    new = torch.maximum(top, s_wide.amax(1, keepdim=True))          # (P, 1)
    shrink = (top - new).exp()                                      # 1 where the block brought no larger score
    p = (s_wide - new).exp()                                        # (P, block)
    total = total * shrink + p.sum(1, keepdim=True)
    squares = squares * shrink.square() + p.square().sum(1, keepdim=True)
    return p.to(s.dtype), new, total, squares, shrink


def softmax_step_backward(s, dp, top, log_total, shift, norm, curve):
    """One block of the gradient: s, g . e float[P, block], the terms of lse, and the rest float[P, 1]
    -> dL/ds in s's dtype, and its sum over the patches, float[block]"""
    p = (s.to(top.dtype) - top - log_total).exp()
    ds = p * ((dp.to(top.dtype) - shift) / norm - p * curve)
    return ds.to(s.dtype), ds.sum(0)


# ----------------------------------------------------------------------------------------------------------------------
# vision tower + connector + LLM

@dataclass
class Config:
    """What a VLM is made of; the first part of a checkpoint's config.json."""
    vision_tower: str                   # hub name or folder
    llm: str                            # hub name or folder
    connector: str = "langbridge"       # or "mlp"
    hidden: int = 5120                  # H; for "mlp" 0 means D, as in LLaVA-1.5
    num_words: int = 19200              # K
    normalize: str = "unit"             # or "softmax", "none"
    vision_layer: int = -2              # which hidden state of the tower; the CLS token is never used
    image_size: int = 0                 # S in pixels; 0 means the tower's own


class VLM(nn.Module):
    """A vision tower, a connector and an LLM. Build one with `build`, read one with `load`."""

    def __init__(self, config, vision_tower, connector, llm, tokenizer, words, image):
        super().__init__()
        self.config, self.tokenizer, self.words, self.image = config, tokenizer, words, image
        self.vision_tower, self.connector, self.llm = vision_tower, connector, llm
        self.sharded = False                                        # see shard_vlm
        self.num_patches = (image["size"] // vision_tower.config.patch_size) ** 2
        if not self.num_patches:
            raise ValueError(f"image_size {image['size']} is less than a patch, {vision_tower.config.patch_size} pixels")
        eos = llm.generation_config.eos_token_id if llm.generation_config else None
        eos = eos if isinstance(eos, list) else [eos]
        self.eos_ids = {i for i in [*eos, tokenizer.eos_token_id] if i is not None}
        # Masks come from lengths, so any id will do to pad with. Not 0: that is a "!" in many LLMs, and puzzles a reader.
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self.eos_ids, default=0)
        text = llm.config.get_text_config()
        if getattr(text, "logit_scale", None) or getattr(text, "logits_scaling", None):
            raise ValueError(f"{config.llm} scales its logits in a way that the loss here does not know")
        self.softcap = getattr(text, "final_logit_softcapping", None)

    def patch_features(self, pixel_values):
        """float32[N, 3, S, S] -> float[N, P, Dv], the tower's hidden state `vision_layer` without CLS and registers"""
        tower = self.vision_tower
        kwargs = {}
        if self.image["size"] != tower.config.image_size and tower.config.model_type != "dinov2":
            kwargs["interpolate_pos_encoding"] = True               # DINOv2 always does
        with torch.set_grad_enabled(torch.is_grad_enabled() and next(tower.parameters()).requires_grad):
            # The one place where pictures move to the device: whoever calls need not know where the tower is.
            out = tower(pixel_values.to(tower.device, tower.dtype), output_hidden_states=True, **kwargs)
        return out.hidden_states[self.config.vision_layer][:, -self.num_patches:]   # CLS and registers come first

    def encode(self, pixel_values):
        """float32[N, 3, S, S] -> image embeds float[N, P, D]"""
        patches = self.patch_features(pixel_values)                 # (N, P, Dv)
        return self.connector(patches.to(next(self.connector.parameters()).dtype))

    def splice(self, input_ids, pixel_values, which=None):
        """Text embeddings with the images in their places: int64[B, T], float32[N, 3, S, S] or None -> float[B, T, D]

        Images fill the runs of IMAGE_ID in reading order: row after row, left to right. which: the number of the image
        for each run, where they are not 0, 1, 2, ...: an image that comes twice is encoded once.
        """
        input_ids = input_ids.to(self.llm.device)
        is_image = input_ids == IMAGE_ID                            # (B, T)
        # The module, not its weight: Gemma's multiplies by sqrt(D).
        embeds = self.llm.get_input_embeddings()(input_ids.masked_fill(is_image, 0))   # (B, T, D)
        if pixel_values is None or len(pixel_values) == 0:
            if self.sharded:
                # Another rank may have images, and waits for this one's pieces: look at nothing, times 0.
                S = self.image["size"]
                embeds = embeds + 0 * self.encode(torch.zeros(1, 3, S, S, device=embeds.device)).sum().to(embeds.dtype)
            return embeds
        image_embeds = self.encode(pixel_values)                    # (N, P, D)
        if which is not None:
            image_embeds = image_embeds[which]                      # (runs, P, D)
        if is_image.sum() != image_embeds.shape[0] * image_embeds.shape[1]:
            raise ValueError(f"{is_image.sum()} image positions for {tuple(image_embeds.shape[:2])} images x patches")
        return embeds.masked_scatter(is_image[..., None], image_embeds.to(embeds.dtype))

    def forward(self, batch):
        """Summed cross-entropy over the trained tokens and their number.

        batch: as data.collate makes it. -> (float32 scalar, int). Dividing is left to the caller, who knows the number
        of trained tokens in the whole global batch (pytorch/torchtitan does the same).
        """
        embeds = self.splice(batch["input_ids"], batch["pixel_values"])              # (B, T, D)
        # What follows a row's last token is seen by none of its tokens, so padding on the right needs no mask, and without
        # one attention does half the work. Images that are hidden (data.without_images) do need it.
        mask = batch["attention_mask"]
        mask = None if (mask.diff(dim=1) <= 0).all() else mask
        hidden = self.llm.get_decoder()(inputs_embeds=embeds, attention_mask=mask, position_ids=batch["position_ids"],
                                        use_cache=False).last_hidden_state
        targets = batch["labels"][:, 1:]                            # position t predicts token t + 1
        trained = targets != IGNORE                                 # (B, T-1)
        # Logits only where a token is trained: over all positions they would be the largest tensor of the run.
        return self.token_loss(hidden[:, :-1][trained], targets[trained]), int(trained.sum())

    def logits(self, hidden):
        """float[n, D] -> float32[n, V]"""
        logits = self.llm.get_output_embeddings()(hidden).float()   # (n, D) x (D, V) -> (n, V)
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def token_loss(self, hidden, targets):
        """hidden float[n, D], targets int64[n] -> float32 scalar, summed over n"""
        def rows_loss(hidden, targets):
            return F.cross_entropy(self.logits(hidden), targets, reduction="sum")
        if len(targets) <= LOSS_ROWS:
            return rows_loss(hidden, targets)
        return sum(checkpoint(rows_loss, h, t, use_reentrant=False)
                   for h, t in zip(hidden.split(LOSS_ROWS), targets.split(LOSS_ROWS)))

    @torch.no_grad()
    def generate(self, ids, pixel_values=None, max_new_tokens=128, temperature=0.0, seed=0, which=None):
        """Continue each prompt, greedily (temperature 0) or by sampling. An answer does not depend on its batch.

        ids: prompts as lists of ids with runs of IMAGE_ID; pixel_values float32[N, 3, S, S], or None; which: the row of
        pixel_values for each image of the prompts in reading order, None for 0, 1, 2, ...
        -> lists of new ids, without the eos.
        """
        device = self.llm.device
        T = max(map(len, ids))
        # Left padding: the last column is the newest token of every row.
        input_ids = torch.tensor([[self.pad_id] * (T - len(row)) + row for row in ids], device=device)             # (B, T)
        mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in ids], device=device)         # (B, T)
        position = (mask.cumsum(1) - 1).clamp(min=0)
        # A row draws from a generator of its own, seeded by its prompt, so that its neighbours do not matter.
        dice = [torch.Generator().manual_seed(seed + zlib.crc32(repr(row).encode())) for row in ids]
        which = range(len(pixel_values) if pixel_values is not None else 0) if which is None else which
        embeds = self.splice(input_ids, pixel_values, list(which))  # (B, T, D)
        cache = self.prefill(ids, embeds, mask, position, which)    # of the first columns
        start = cache.get_seq_length() if cache else 0
        decode = self.llm.get_decoder()
        name = cache_name(decode)
        out = decode(inputs_embeds=embeds[:, start:], attention_mask=mask, position_ids=position[:, start:],
                     use_cache=True, **{name: cache})
        answers, done = [[] for _ in ids], [False] * len(ids)
        for _ in range(max_new_tokens):
            tokens = pick(self.logits(out.last_hidden_state[:, -1]), temperature, dice)           # B ints
            for row, token in enumerate(tokens):
                done[row] = done[row] or token in self.eos_ids
                if not done[row]:
                    answers[row].append(token)
            if all(done) or max(map(len, answers)) == max_new_tokens:
                break
            position = position[:, -1:] + 1
            mask = F.pad(mask, (0, 1), value=1)
            out = decode(input_ids=torch.tensor(tokens, device=device)[:, None], attention_mask=mask,
                         position_ids=position, use_cache=True, **{name: getattr(out, name)})
        return answers

    def prefill(self, ids, embeds, mask, position, which):
        """Keys and values of what prompts begin with alike, the same ids and images up to the last patch, made once.

        As `generate` has them: ids, B prompts; embeds float[B, T, D]; mask and position int64[B, T]; which.
        -> a cache of the first T - S columns, S the most tokens that a prompt has after its last patch; None where no
        two prompts share an image, or where the LLM remembers otherwise than by attention.
        """
        T, images, begins, longest = mask.shape[1], iter(which), [], {}    # longest: beginning -> its longest prompt
        for b, row in enumerate(ids):
            end = len(row) - row[::-1].index(IMAGE_ID) if IMAGE_ID in row else 0
            begins.append((tuple(row[:end]), *(next(images) for _ in range(row.count(IMAGE_ID) // self.num_patches))))
            if len(row) > len(ids[longest.setdefault(begins[b], b)]):
                longest[begins[b]] = b
        shared = T - max(len(row) - len(begin[0]) for row, begin in zip(ids, begins))                # T - S
        kinds = getattr(self.llm.config.get_text_config(), "layer_types", None) or ()
        if shared == 0 or len(longest) == len(ids) or not {*kinds} <= {"full_attention", "sliding_attention"}:
            return None
        rows, cache = list(longest.values()), DynamicCache()        # given a config it forgets what leaves a window
        decode = self.llm.get_decoder()
        decode(inputs_embeds=embeds[rows, :shared], attention_mask=mask[rows, :shared],
               position_ids=position[rows, :shared], use_cache=True, **{cache_name(decode): cache})
        # A shorter prompt begins further right, and the last S columns hold some of its patches, which are made again.
        # The price of a few patches buys that no row has a gap between its tokens, which windows count by columns.
        source = torch.tensor([rows.index(longest[begin]) for begin in begins], device=mask.device)[:, None]  # (B, 1)
        shift = torch.tensor([[len(row) - len(ids[longest[begin]])] for row, begin in zip(ids, begins)], device=mask.device)
        column = (torch.arange(shared, device=mask.device) + shift).clamp(min=0)                            # (B, T-S)
        for layer in cache.layers:                                  # keys and values float[B, heads, T-S, d]
            b, t = (index.to(layer.keys.device) for index in (source, column))
            layer.keys = layer.keys[b, :, t].transpose(1, 2)
            layer.values = layer.values[b, :, t].transpose(1, 2)
        return cache


def cache_name(decoder):
    """The name that a decoder gives its cache of keys and values: transformers renames it, and drops the old name in 5.40."""
    return "cache" if "cache" in inspect.signature(type(decoder).forward).parameters else "past_key_values"


def pick(logits, temperature, dice):
    """The next token of each row: float32[B, V] -> list of B ints"""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    probs = (logits / temperature).softmax(-1).cpu()
    return [int(torch.multinomial(p, 1, generator=g)) for p, g in zip(probs, dice)]


# ----------------------------------------------------------------------------------------------------------------------
# building

def vocab_embeds(llm, tokenizer, words):
    """E: the LLM's own input embedding of each word. -> float32[K, D]

    A word that is not one token of this tokenizer gets the mean of its pieces' embeddings. The module is called, its
    weight is not indexed: Gemma's scales by sqrt(D).
    """
    pieces = word_ids(words, tokenizer)                             # K lists of ids
    embed = llm.get_input_embeddings()
    flat = torch.tensor([i for ids in pieces for i in ids], device=embed.weight.device)
    word = torch.tensor([k for k, ids in enumerate(pieces) for _ in ids], device=embed.weight.device)
    with torch.no_grad():
        rows = embed(flat).float()                                  # (number of pieces, D)
        count = torch.bincount(word, minlength=len(words))          # (K,)
        E = torch.zeros(len(words), rows.shape[1], device=rows.device).index_add_(0, word, rows) / count[:, None]
    if not E.isfinite().all():
        raise ValueError(f"the embedding of {words[int((~E.isfinite()).any(1).nonzero()[0])]!r} is not finite")
    return E


def make_connector(config, Dv, D, gain=1.0):
    """The connector that `config` names, freshly initialised."""
    if config.connector == "langbridge":
        return LangBridge(Dv, config.hidden, config.num_words, config.normalize, gain)
    if config.connector == "mlp":
        return MLPConnector(Dv, D, config.hidden)
    raise ValueError(f'connector is "langbridge" or "mlp", not {config.connector!r}')


def vision_config(name):
    """The config of the vision half of whatever `name` is: CLIP and SigLIP checkpoints hold a text half, too."""
    config = fetch(AutoConfig.from_pretrained, name)
    return getattr(config, "vision_config", config)


def image_settings(name, image_size):
    """{"size", "mean", "std"} of the tower's images: S in pixels and three numbers each for R, G, B"""
    processor, _ = fetch(ImageProcessingMixin.get_image_processor_dict, name)
    size = image_size or vision_config(name).image_size
    if not {"image_mean", "image_std"} <= processor.keys():
        raise ValueError(f"{name}: its preprocessor_config.json lacks image_mean or image_std")
    return {"size": size, "mean": processor["image_mean"], "std": processor["image_std"]}


def load_weights(kind, name, **kwargs):
    """A model by hub name or folder, kind being one of transformers' Auto classes. ValueError where weights are torn,
    or lack a tensor: the library would draw it at random and say so in a warning."""
    for path in sorted(glob(f"{escape(name)}/*.safetensors")):      # names the shard; the library does not
        with named(path), safe_open(path, "pt"):
            pass
    model, info = fetch(kind.from_pretrained, name, output_loading_info=True, **kwargs)
    lacks = [k for k in sorted(info["missing_keys"]) if re.search(r"\.\d+\.|embed|lm_head", k)]   # a pooler is not used
    if lacks:
        raise ValueError(f"{name} has no weights for {lacks[0]}" + (f" and {len(lacks) - 1} more" if lacks[1:] else ""))
    return model


def load_llm(name, dtype, device, attention="sdpa", meta=False):
    """-> (LLM, tokenizer), every model by its config and none by its name. device: one, or several with commas between
    (see `spread`). attention: the library's attn_implementation, such as "flash_attention_2" where it is installed, or
    "eager", which is faster for the pocket's models on a CPU. meta: the weights are shapes alone, for `shard_vlm`."""
    if meta:
        config = fetch(AutoConfig.from_pretrained, name)
        with torch.device("meta"):
            llm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        if os.path.isfile(f"{weights_folder(name)}/generation_config.json"):
            llm.generation_config = fetch(GenerationConfig.from_pretrained, name)
    else:
        llm = load_weights(AutoModelForCausalLM, name, dtype=dtype, attn_implementation=attention)
        spread(llm, str(device).split(","))
    tokenizer, rows = load_tokenizer(name), llm.get_input_embeddings().num_embeddings
    last = max(tokenizer.get_vocab().values())
    if last >= rows:                                                # fewer tokens than rows: padding, as Qwen has it
        raise ValueError(f"{name}: the tokenizer has ids up to {last}, the embedding {rows} rows")
    return llm, tokenizer


def devices(text, most=None):
    """What --device names, checked: one device or several with commas between. "" or None: CUDA where there is one, else
    the CPU. ValueError where there are more than `most`, or one that this machine lacks."""
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


def spread(llm, devices):
    """Put the LLM's blocks on `devices`, the first ones on the first, and all else on the first as well. In place.

    One process then holds an LLM larger than a device, for eval.py and transfer.py. Devices take turns, which training
    cannot afford (there, see `shard_vlm`). What a block is given follows it to its device; the last one's output comes
    back to the first."""
    stack = blocks(llm)
    here = list(stack)
    for i in range(len(here)):                                      # take the blocks out, move the rest, put them back
        stack[i] = nn.Identity()
    llm.to(devices[0])
    for i, block in enumerate(here):
        stack[i] = block.to(device := devices[i * len(devices) // len(here)])
        if len(devices) > 1:
            block.register_forward_pre_hook(lambda _, args, kwargs, device=device: follow((args, kwargs), device),
                                            with_kwargs=True)
    if len(devices) > 1:
        stack[-1].register_forward_hook(lambda _, args, out: follow(out, devices[0]))


def follow(x, device):
    """x with every tensor in it on the device. A cache of keys and values is none of these: it stays where it was made"""
    if torch.is_tensor(x):
        return x.to(device)
    if isinstance(x, (tuple, list)):
        return type(x)(follow(y, device) for y in x)
    return {key: follow(y, device) for key, y in x.items()} if isinstance(x, dict) else x


def build(config, words, device="cpu", dtype=torch.float32, llm=None, gain=1.0, attention="sdpa", frozen=None,
          shard=()):
    """A VLM with a fresh connector from the parts that `config` names. `llm`: (LLM, tokenizer) if they are loaded.

    device: one, or several with commas between, each with a part of the LLM. dtype: of the LLM.
    frozen: of the tower, of E, and of a sharded LLM's computation; None means dtype.
    shard: the parts of which each rank holds a piece, ("llm",) or ("llm", "vision_tower"); then every rank calls.
    """
    frozen = frozen or dtype
    tower = vision_config(config.vision_tower)
    if not hasattr(tower, "patch_size"):
        raise ValueError(f"{config.vision_tower} is no vision transformer: its config has no patch_size")
    if not -tower.num_hidden_layers <= config.vision_layer + 1 <= tower.num_hidden_layers + 1:
        raise ValueError(f"{config.vision_tower} has {tower.num_hidden_layers} layers, no layer {config.vision_layer}")
    tower = load_weights(AutoModel, config.vision_tower, config=tower, dtype=frozen)
    llm, tokenizer = llm or load_llm(config.llm, dtype, device, attention, meta=bool(shard))
    device = str(device).split(",")[0]
    image = image_settings(config.vision_tower, config.image_size)
    connector = make_connector(config, tower.config.hidden_size, llm.get_input_embeddings().embedding_dim, gain)
    vlm = VLM(config, tower.to(device), connector.to(device), llm, tokenizer, words, image).requires_grad_(False).eval()
    if shard:
        shard_vlm(vlm, shard, device, frozen)
        vlm.unshard()                                               # what is outside of the blocks: the embedding
    if words:
        connector.vocab_embeds = vocab_embeds(llm, tokenizer, words).to(device, frozen)
    vlm.origin = fingerprint(vlm)
    if shard:
        vlm.reshard()
    return vlm


# ----------------------------------------------------------------------------------------------------------------------
# an LLM that is larger than one device: FSDP2

def shard_vlm(vlm, parts, device, dtype):
    """Cut `parts` of the VLM into a piece for each rank (FSDP2), and read this rank's piece of the LLM, now on meta.

    A block is a group: gathered in `dtype` when it runs, freed after it, its gradients summed in float32. All else is
    one more group, which is whole from the forward to the backward pass: the embedding may be the head as well, and
    the loss calls the head in pieces. The connector and what is not in `parts` stay as they are.
    """
    half = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for part in parts:
        for block in blocks(getattr(vlm, part)):
            fully_shard(block, mesh=mesh, mp_policy=half)
    alone = {p for name, p in vlm.named_parameters() if name.split(".")[0] not in parts}
    fully_shard(vlm, mesh=mesh, mp_policy=half, ignored_params=alone)
    vlm.sharded = True

    vlm.llm.to_empty(device=device)
    vlm.llm.tie_weights()                                           # to_empty has made two of a tied head and embedding
    for p in vlm.llm.parameters():
        p._is_hf_initialized = True                                 # transformers' mark: _init_weights leaves it alone
    for module in vlm.llm.modules():
        if any(True for _ in module.buffers(recurse=False)):        # rotary frequencies, Gemma's scale: in no file
            vlm.llm._init_weights(module)
    folder = weights_folder(vlm.llm.config.name_or_path)
    reader = HuggingFaceStorageReader(folder)
    own = stored_tensors(vlm.llm)
    missing = sorted(own.keys() - reader.read_metadata().state_dict_metadata.keys())
    if missing:
        raise ValueError(f"{folder}: no safetensors file holds {missing[0]}; a sharded LLM is read from these alone")
    dcp.load({name: t.detach() for name, t in own.items()}, storage_reader=reader)


def blocks(part):
    """The list of a transformer's blocks: of all its lists the one with the most parameters."""
    lists = [m for m in part.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def weights_folder(name):
    """The folder of a model's files; those of a hub name are fetched first."""
    return name if os.path.isdir(name) else snapshot_download(name, allow_patterns=["*.safetensors", "*.json"])


def stored_tensors(llm):
    """Each parameter and persistent buffer by the name that a file has for it, tied ones once."""
    once = {}
    for name, tensor in llm.state_dict(keep_vars=True).items():
        once.setdefault(id(tensor), (name, tensor))
    return dict(once.values())


# ----------------------------------------------------------------------------------------------------------------------
# a checkpoint is a folder

def embeddings_hash(llm):
    """SHA-256 over 1,000 rows of the input embedding, as bfloat16: tells Qwen2 from Qwen2.5, base from Instruct"""
    weight = llm.get_input_embeddings().weight.detach()
    rows = weight[torch.linspace(0, len(weight) - 1, 1000).long()].to("cpu", torch.bfloat16)
    return hashlib.sha256(rows.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def tokenizer_hash(tokenizer):
    """SHA-256 over every token and its id"""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def git_commit():
    """The commit of this code, or None outside of a checkout and where there is no git"""
    try:
        run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=os.path.dirname(os.path.abspath(__file__)),
                             capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return run.stdout.strip() or None


def portable(name, folder):
    """A model's name as a checkpoint in `folder` stores it: a hub name as it is, a local folder relative to `folder`"""
    return os.path.relpath(name, folder) if os.path.isdir(name) else name


def resolve(name, folder):
    """The other way round. ValueError for an absolute path: save never writes one."""
    if os.path.isabs(name):
        raise ValueError(f"{folder}/config.json names the absolute path {name}, which is nobody else's")
    local = os.path.normpath(os.path.join(folder, name))
    return local if name.startswith("..") or os.path.isdir(local) else name


def save(vlm, folder, stage, with_llm, dtype=None, **extra):
    """Write a checkpoint into `folder` (made if need be), config.json last: with it the checkpoint is complete.

    with_llm: after SFT the LLM goes along, in `dtype` or its own, with the frozen E that the connector was trained
    against. Where the LLM is sharded every rank calls this; rank 0 writes.
    """
    writes = not dist.is_initialized() or dist.get_rank() == 0
    if with_llm:
        save_llm(vlm.llm, f"{folder}/llm", dtype or vlm.llm.dtype, writes)
    if not writes:
        return
    os.makedirs(folder, exist_ok=True)
    if not with_llm and os.path.isfile(f"{folder}/config.json") and os.path.isdir(f"{folder}/llm"):
        shutil.rmtree(f"{folder}/llm")                              # of the checkpoint whose place this takes: load would
                                                                    # take it for ours
    write_safetensors({k: v.float() for k, v in vlm.connector.state_dict().items()}, f"{folder}/connector.safetensors")
    if vlm.words:
        save_words(vlm.words, f"{folder}/words.json")
    if with_llm:
        vlm.tokenizer.save_pretrained(f"{folder}/llm")
        if vlm.words:
            write_safetensors({"vocab_embeds": vlm.connector.vocab_embeds}, f"{folder}/llm/vocab_embeds.safetensors")
    names = {"vision_tower": portable(vlm.config.vision_tower, folder), "llm": portable(vlm.config.llm, folder)}
    write_json({"format": FORMAT, "stage": stage, **asdict(vlm.config), **names, **vlm.origin,
                "num_patches": vlm.num_patches,
                "words_hash": words_hash(vlm.words) if vlm.words else None, "git_commit": git_commit(), **extra},
               f"{folder}/config.json")


def save_llm(llm, folder, dtype, writes, limit=4 << 30):
    """The LLM as a Hugging Face folder, in `dtype`, in files of at most `limit` bytes and a tensor.

    Ranks put one tensor together at a time; the one that `writes` holds a file's worth of them on the CPU, never all.
    """
    tensors = stored_tensors(llm)
    files, size = [[]], 0
    for name, tensor in tensors.items():
        if size >= limit:
            files, size = files + [[]], 0
        files[-1].append(name)
        size += tensor.numel() * dtype.itemsize
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    names = names if len(files) > 1 else ["model.safetensors"]
    if writes:
        os.makedirs(folder, exist_ok=True)
    for path, group in zip(names, files):
        held = {}
        for name in group:
            whole = tensors[name].detach()
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            if writes:
                held[name] = whole.to("cpu", dtype)
        if writes:
            write_safetensors(held, f"{folder}/{path}", {"format": "pt"})
    if writes:
        llm.config.architectures, llm.config.dtype = [type(llm).__name__], dtype
        llm.config.save_pretrained(folder)
        llm.generation_config.save_pretrained(folder)
        if len(files) > 1:
            total = sum(t.numel() for t in tensors.values())
            write_json({"metadata": {"total_parameters": total, "total_size": total * dtype.itemsize},
                        "weight_map": {name: path for path, group in zip(names, files) for name in group}},
                       f"{folder}/model.safetensors.index.json")


def fingerprint(vlm):
    """What ties a checkpoint to the LLM that it was trained on."""
    return {"tokenizer_hash": tokenizer_hash(vlm.tokenizer), "embeddings_hash": embeddings_hash(vlm.llm)}


@contextmanager
def named(path):
    """What safetensors has to say (torn, a header that lies, a full disk) as a ValueError that names the path"""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None


def write_safetensors(tensors, path, metadata=None):
    with named(path), replacing(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata)


def read_safetensors(path):
    """-> {name: tensor}"""
    with named(path):
        return load_file(path)


def read_config(folder):
    """A checkpoint's config.json. -> (Config with the names resolved, the whole dict)

    ValueError where `folder` is no checkpoint, or one of another format."""
    path = f"{folder}/config.json"
    if not os.path.isfile(path):
        raise ValueError(f"{folder} is no checkpoint: it has no config.json (a run writes it when it ends)")
    whole = read_json(path)
    if not isinstance(whole, dict) or whole.get("format") != FORMAT:
        found = whole.get("format") if isinstance(whole, dict) else whole
        raise ValueError(f"{path}: format {str(found)[:60]!r}; this code reads format {FORMAT}")
    kinds = {f.name: f.type for f in fields(Config)} | {"stage": str, "tokenizer_hash": str, "embeddings_hash": str}
    for name, kind in kinds.items():
        if type(whole.get(name)) is not kind:
            raise ValueError(f"{path}: {name} is {str(whole.get(name))[:60]!r}, it must be of type {kind.__name__}")
    config = Config(**{f.name: whole[f.name] for f in fields(Config)})
    config.vision_tower, config.llm = resolve(config.vision_tower, folder), resolve(config.llm, folder)
    return config, whole


def load(folder, device="cpu", dtype=torch.float32, attention="sdpa", frozen=None, shard=()):
    """Read a checkpoint. -> VLM in evaluation mode, nothing of it trained; frozen, shard: see `build`

    ValueError where its parts do not belong together: another word list, another LLM than it was trained on, a vision
    tower that cuts an image into another number of patches."""
    config, whole = read_config(folder)
    own_llm = f"{folder}/llm"
    if os.path.isdir(own_llm) and not glob(f"{escape(own_llm)}/model*.safetensors"):    # a .bin is read where you name it
        raise ValueError(f"{own_llm} holds no model*.safetensors, which is all that a checkpoint of ours is read from")
    llm = load_llm(own_llm if os.path.isdir(own_llm) else config.llm, dtype, device, attention, meta=bool(shard))
    words = load_words(f"{folder}/words.json") if config.connector == "langbridge" else None
    if words and (words_hash(words) != whole.get("words_hash") or len(words) != config.num_words):
        raise ValueError(f"{folder}/words.json is not the word list that this connector was trained with")
    vlm = build(config, words, device, dtype, llm, frozen=frozen, shard=shard)
    if vlm.num_patches != whole.get("num_patches", vlm.num_patches):
        raise ValueError(f"{folder} was trained on {whole['num_patches']} patches of an image, "
                         f"{config.vision_tower} gives {vlm.num_patches}")
    load_connector(vlm.connector, folder)
    origin = {k: whole[k] for k in vlm.origin}
    if os.path.isdir(own_llm):
        if words:                                                   # the E of training, which the LLM has moved away from
            path = f"{own_llm}/vocab_embeds.safetensors"
            E = read_safetensors(path).get("vocab_embeds", torch.empty(0))
            if E.shape != vlm.connector.vocab_embeds.shape or not E.isfinite().all():
                raise ValueError(f"{path} is not E: {tuple(E.shape)} instead of "
                                 f"{tuple(vlm.connector.vocab_embeds.shape)}, {(~E.isfinite()).sum()} numbers not finite")
            vlm.connector.vocab_embeds = E.to(vlm.connector.vocab_embeds)
    elif vlm.origin != origin:
        raise ValueError(f"{folder} was trained on another LLM than what {config.llm} is now; transfer.py moves it")
    vlm.origin = origin                                             # E's LLM, also where SFT has changed the LLM since
    return vlm


def load_connector(connector, folder):
    """Read connector.safetensors into `connector`; ValueError names the first tensor that does not fit."""
    path = f"{folder}/connector.safetensors"
    state, own = read_safetensors(path), connector.state_dict()
    for name in own.keys() | state.keys():
        have, want = (tuple(d[name].shape) if name in d else None for d in (state, own))
        if have != want:
            raise ValueError(f"{path}: {name} is {have}, this connector wants {want}")
        if not state[name].isfinite().all():
            raise ValueError(f"{path}: {name} has numbers that are not finite")
    connector.load_state_dict(state)
