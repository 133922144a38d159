"""
The fused vocabulary combination: the same function as `combine` in model.py, with less memory.

The plain formula keeps several tensors with a score for each patch and word. Each takes 1.4 GB for
32 pictures at the paper's sizes in float32. The fused version has the scores of one block of words
at a time. For two pictures at the paper's sizes it takes 1/14 of the plain formula's extra memory
in float32 and 1/3 in bfloat16. It costs one matrix product more in the backward pass. Therefore
`choose` takes it for the softmax only if the scores would take more than 1/32 of the device's
memory (`plain_limit`). Raw scores ("none") are linear, so the products can be made in another
order. `combine_raw` takes the cheaper one.

This is the one file with a hand-made backward pass. You need not read it to understand the method.
Letters as in model.py, but P counts the patches of all images of a batch together.
"""
import functools
import os

import torch
import torch.nn.functional as F

from support.device import add_product, compiled

BLOCK = 1024            # words whose scores exist at one time; on a CPU they stay in its cache
CUDA_BLOCK = 4096       # on a GPU larger blocks mean fewer passes over memory
# torch.compile takes seconds. With fewer scores (patches x words) than this it does not pay.
COMPILE_FROM = 1 << 23


@functools.cache
def plain_limit(device):
    """Return how many bytes of float32 scores the plain formula may make: 1/32 of the memory.

    Forward and backward keep several tensors of this size.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 32
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 32


def choose(plain, z, K, normalize, plain_bytes):
    """Return the function that computes the combination best here: `plain` or `combine` below.

    plain: model.combine; it is compiled if that pays. plain_bytes: see model.LangBridge.
    """
    num_scores = z[..., 0].numel() * K
    is_small = 4 * num_scores <= (plain_bytes or plain_limit(z.device))
    if normalize == "none" or normalize == "softmax" and not is_small:
        return combine
    return compiled(plain) if num_scores >= COMPILE_FROM else plain


def combine(z, W, b, E, normalize):
    """Return what model.combine returns: z float[..., H], W [K, H], b [K], E [K, D] -> [..., D].

    The dtype of computation and result is autocast's, or z's without autocast; W, b and E may have
    other dtypes. Sums over blocks are float32 (float64 for float64). z, W and b get gradients, E
    gets none.
    """
    device = z.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else z.dtype
    rows = z.reshape(-1, z.shape[-1]).to(dtype)                     # (..., H) -> (P, H)
    with torch.autocast(device, enabled=False):                     # every cast below is explicit
        if normalize == "none":
            out = combine_raw(rows, W, b, E)
        else:
            out = SoftmaxCombine.apply(rows, W, b, E)
    return out.view(*z.shape[:-1], E.shape[1])                      # (P, D) -> (..., D)


def combine_raw(z, W, b, E):
    """Return (z W^T + b) E in the cheaper of its two orders: z float[P, H] -> float[P, D].

    The product is associative. W^T E [H, D] can be made first, and then no score is ever made.
    """
    trains = torch.is_grad_enabled() and W.requires_grad
    W, b, E = W.to(z.dtype), b.to(z.dtype), E.to(z.dtype)
    if without_scores(len(z), *W.shape, E.shape[1], trains):
        return F.linear(z, E.T @ W, b @ E)                          # (P, H) x (H, D) -> (P, D)
    return F.linear(z, W, b) @ E                                    # (P, H) x (H, K) x (K, D)


def without_scores(P, K, H, D, trains):
    """Return whether the order without scores needs fewer multiplications."""
    # In training z W^T is made three times (forward, and two gradients), and a product with E
    # twice, because E gets no gradient. multi_dot of torch would count the forward only.
    cost, cost_E = (3, 2) if trains else (1, 1)
    return cost_E * K * H * D + cost * P * H * D < cost * P * K * H + cost_E * P * K * D


class SoftmaxCombine(torch.autograd.Function):
    """softmax(z W^T + b) E: like attention with the words as keys.

    Forward is the online softmax of arXiv 1805.02867 and 2112.05682. For one patch

        out = sum_k exp(s_k) e_k / sum_k exp(s_k)

    exp overflows in float32 for s above 88, so top, the largest score so far, is subtracted from s.
    Where a block raises it to new_top, the sums so far are multiplied by exp(top - new_top).

    Backward makes the scores of each block again. With g = dL/dout

        p_k = exp(s_k - top - log_total)        dL/ds_k = p_k (g . e_k - g . out)

    so the sum over all words is one number for each patch. The code computes (s - top) - log_total.
    In s - (top + log_total) the sum would be rounded: at top = 1e4 by 5e-4, 0.05 % of p_k.
    """

    @staticmethod
    def forward(ctx, z, W, b, E):
        """z float[P, H], W [K, H], b [K], E [K, D] -> out [P, D] in z's dtype."""
        P, D = len(z), E.shape[1]
        dtype = torch.promote_types(z.dtype, torch.float32)
        top = z.new_full((P, 1), torch.finfo(dtype).min, dtype=dtype)
        total = torch.zeros_like(top)                               # (P, 1) sum of exp(s - top)
        out = z.new_zeros(P, D, dtype=dtype)                        # sum of exp(s - top) e
        step = compiled(forward_step) if P * len(W) >= COMPILE_FROM else forward_step
        block = block_size(z.device)
        for Wk, bk, Ek in zip(W.split(block), b.split(block), E.split(block)):
            s = F.linear(z, Wk.to(z.dtype), bk.to(z.dtype))         # (P, H) -> (P, block)
            p, top, total, rescale = step(s, top, total)
            add_product(out.mul_(rescale), p, Ek.to(z.dtype))       # (P, block) x (block, D)
        out = out.div_(total).to(z.dtype)                           # as attention kernels keep it
        ctx.save_for_backward(z, W, b, E, out, top, total.log())
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        """g float[P, D] -> gradients of z, W and b, each in the dtype of its tensor."""
        z, W, b, E, out, top, log_total = ctx.saved_tensors
        shift = (g.to(top.dtype) * out).sum(dim=1, keepdim=True)    # (P, 1) g . out
        dz, dW, db = torch.zeros_like(z, dtype=top.dtype), torch.zeros_like(W), torch.empty_like(b)
        step = compiled(backward_step) if len(z) * len(W) >= COMPILE_FROM else backward_step
        for start in range(0, len(W), block_size(z.device)):
            block = slice(start, start + block_size(z.device))
            Wk = W[block].to(z.dtype)
            s = F.linear(z, Wk, b[block].to(z.dtype))               # the same bits as in forward
            dp = g @ E[block].to(z.dtype).T                         # (P, D) x (D, block)
            ds, db[block] = step(s, dp, top, log_total, shift)
            add_product(dW[block], ds.T, z)                         # (block, P) x (P, H)
            add_product(dz, ds, Wk)                                 # (P, block) x (block, H)
        return dz.to(z.dtype), dW, db, None


def forward_step(s, top, total):
    """Add one block of scores, float[P, block], to the online softmax's sum, float[P, 1].

    -> exp(s - new_top) in s's dtype, new_top, total, and the factor for earlier sums.
    """
    s_wide = s.to(top.dtype)
    new_top = torch.maximum(top, s_wide.amax(1, keepdim=True))      # (P, 1)
    rescale = (top - new_top).exp()                                 # 1 if the top did not change
    p = (s_wide - new_top).exp()                                    # (P, block)
    return p.to(s.dtype), new_top, total * rescale + p.sum(1, keepdim=True), rescale


def backward_step(s, dp, top, log_total, shift):
    """Return dL/ds of one block, float[P, block] in s's dtype, and its sum over patches, [block].

    s and dp = g . e are float[P, block], the other arguments float[P, 1].
    """
    p = (s.to(top.dtype) - top - log_total).exp()
    ds = p * (dp.to(top.dtype) - shift)
    return ds.to(s.dtype), ds.sum(0)


def block_size(device):
    """Return how many words' scores exist at one time."""
    return CUDA_BLOCK if device.type == "cuda" else BLOCK
