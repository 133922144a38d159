"""The fused vocabulary combination."""
import functools

import torch
import torch.nn.functional as F

BLOCK = 1024           # words whose scores exist at one time
COMPILE = 1 << 23      # patches x words from which on the seconds that torch.compile takes come back


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
