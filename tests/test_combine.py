"""The vocabulary combination against float64, written plainly. Alone: python -m pytest tests/test_combine.py"""
import pytest
import torch
import torch.nn.functional as F

import fused
import model
from conftest import DEVICE
from fused import combine
from support import device
from tools.export import fold

H, K, D = 24, 203, 17                                               # K is no multiple of the block


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(fused, "BLOCK", 64)
    monkeypatch.setattr(fused, "CUDA_BLOCK", 64)


def tensors(*leading, dtype=torch.float32, scale=1.0, K=K, H=H, D=D):
    """z, W, b, E, g. Scores have the spread `scale`. Values are precise in bfloat16, so that each dtype computes the same."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, by=1.0):
        return (torch.randn(*shape, generator=generator) * by).bfloat16().to(DEVICE, dtype)
    return (random(*leading, H).requires_grad_(), random(K, H, by=scale / H ** 0.5).requires_grad_(),
            random(K, by=scale).requires_grad_(), random(K, D), random(*leading, D))


def plain(z, W, b, E, normalize):
    scores = F.linear(z, W, b)
    return (scores.softmax(-1) if normalize == "softmax" else scores) @ E


def with_gradients(function, z, W, b, E, g, normalize):
    out = function(z, W, b, E, normalize)
    return out.detach(), *torch.autograd.grad(out, (z, W, b), g.to(out.dtype))


def exact(z, W, b, E, g, normalize):
    """The reference: the same values in float64"""
    z, W, b, E, g = (t.detach().double() for t in (z, W, b, E, g))
    return with_gradients(plain, z.requires_grad_(), W.requires_grad_(), b.requires_grad_(), E, g, normalize)


def off(result, reference):
    """Errors of out, dz, dW, db, each relative to its reference's largest entry"""
    return [((r.double() - e).abs().max() / e.abs().max()).item() for r, e in zip(result, reference)]


@pytest.mark.parametrize("normalize", ("softmax", "none"))
def test_the_readable_formula_in_model_is_the_same_function(normalize):
    """model.combine is what a reader checks by eye; here it is checked against the plain chain and the fused version."""
    *inputs, g = tensors(2, 3, 50)
    result = with_gradients(model.combine, *inputs, g, normalize)
    assert max(off(result, exact(*inputs, g, normalize))) < 3e-6
    assert max(off(with_gradients(combine, *inputs, g, normalize), [t.double() for t in result])) < 3e-6


@pytest.mark.parametrize("normalize", ("softmax", "none"))
@pytest.mark.parametrize("leading", [(1,), (40,), (2, 3, 50)])      # "none" in either order: 40 rows, 300 rows
@pytest.mark.parametrize("dtype, limit", [(torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
def test_equals_float64_forward_and_backward(normalize, leading, dtype, limit):
    *inputs, g = tensors(*leading, dtype=dtype)
    result = with_gradients(combine, *inputs, g, normalize)
    assert [t.shape for t in result] == [g.shape, *(t.shape for t in inputs[:3])]
    assert {t.dtype for t in result} == {dtype}
    assert max(off(result, exact(*inputs, g, normalize))) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalize", ("softmax", "none"))
def test_no_worse_than_the_plain_chain(normalize, dtype):
    """Errors beside those of the plain chain in the same dtype: blocks cost no precision."""
    *inputs, g = tensors(120, dtype=dtype, K=1999)
    reference = exact(*inputs, g, normalize)
    ours, theirs = (off(with_gradients(f, *inputs, g, normalize), reference) for f in (combine, plain))
    assert all(a < 1.5 * b + 1e-6 for a, b in zip(ours, theirs)), (ours, theirs)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_sums_over_blocks_are_float32(dtype, limit):
    """Many blocks of equal weight: a running sum in bfloat16 stops growing at 256."""
    *inputs, g = tensors(8, dtype=dtype, scale=0.0, K=64 * 40)
    inputs[3] = inputs[3].abs()
    out, _, _, db = with_gradients(combine, *inputs, g, "softmax")
    want, _, _, want_db = exact(*inputs, g, "softmax")
    assert ((out.double() - want).abs() / want).max() < limit / 2
    assert max(off([db], [want_db])) < limit


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_extreme_scores(dtype, limit):
    """Scores of +-10,000, once with a rising and once with a falling maximum from block to block"""
    for direction in (1, -1):
        z, W, b, E, g = tensors(5, dtype=dtype, scale=0.0)
        b = (torch.linspace(-1e4, 1e4, K, device=DEVICE) * direction).to(dtype).requires_grad_()
        result = with_gradients(combine, z, W, b, E, g, "softmax")
        assert all(t.isfinite().all() for t in result)
        reference = exact(z, W, b, E, g, "softmax")
        assert off(result[:1], reference[:1])[0] < limit
        b = torch.full((K,), 1e4 * direction, dtype=dtype, device=DEVICE).requires_grad_()
        result = with_gradients(combine, z, W, b, E, g, "softmax")
        assert max(off(result[:3:2], exact(z, W, b, E, g, "softmax")[:3:2])) < limit     # dz is 0 here: W is


@pytest.mark.parametrize("normalize", ("softmax", "none"))
def test_gradcheck(normalize):
    z, W, b, E, _ = tensors(2, 3, dtype=torch.float64, K=131, H=5, D=4)
    assert torch.autograd.gradcheck(lambda *t: combine(*t, E, normalize), (z, W, b))


@pytest.mark.parametrize("normalize", ("softmax", "none"))
@pytest.mark.parametrize("rows", [40, 300])
def test_autocast(normalize, rows):
    """bfloat16 from float32 masters: the result is bfloat16, the gradients are the masters' float32."""
    *inputs, g = tensors(rows)
    inputs[3] = inputs[3].bfloat16()
    with torch.autocast(DEVICE, torch.bfloat16):
        out = combine(*inputs, normalize)
    assert out.dtype == torch.bfloat16
    result = out.detach(), *torch.autograd.grad(out, inputs[:3], g.bfloat16())
    assert {t.dtype for t in result[1:]} == {torch.float32}
    assert max(off(result, exact(*inputs, g, normalize))) < 2e-2


@pytest.mark.parametrize("normalize", ("softmax", "none"))
@pytest.mark.parametrize("z_dtype, E_dtype", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_mixed_dtypes(normalize, z_dtype, E_dtype):
    """Everything is computed in z's dtype, whatever W, b and E are held in."""
    z, W, b, E, g = tensors(40)
    z = z.detach().to(z_dtype).requires_grad_()
    result = with_gradients(combine, z, W, b, E.to(E_dtype), g, normalize)
    assert [t.dtype for t in result] == [z_dtype, z_dtype, torch.float32, torch.float32]
    assert max(off(result, exact(z, W, b, E, g, normalize))) < (3e-6 if z_dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("normalize", ("softmax", "none"))
def test_only_the_gradients_asked_for(normalize):
    z, W, b, E, g = tensors(40)
    full = with_gradients(combine, z, W, b, E, g, normalize)
    for wanted in ([z], [W], [b], [z, b]):
        out = combine(*(t if any(t is w for w in wanted) else t.detach() for t in (z, W, b)), E, normalize)
        for t, grad in zip(wanted, torch.autograd.grad(out, wanted, g)):
            torch.testing.assert_close(grad, full[1 + [i for i, u in enumerate((z, W, b)) if u is t][0]], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(combine(z, W, b, E, normalize), full[0])


def test_no_tensor_of_patches_times_words():
    """Forward and backward make nothing as large as the scores of all words, not even with many blocks."""
    from torch.utils._python_dispatch import TorchDispatchMode
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t))
            return out
    *inputs, g = tensors(500, K=2000)
    with Watch():
        with_gradients(combine, *inputs, g, "softmax")
        with_gradients(combine, *inputs, g, "none")
    assert max(sizes) == max(2000 * H, 500 * 64)                    # W's gradient, or one block of scores


def test_permuting_the_words_changes_nothing():
    z, W, b, E, _ = tensors(30, dtype=torch.float64)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(1))
    for normalize in ("softmax", "none"):
        torch.testing.assert_close(combine(z, W[order], b[order], E[order], normalize), combine(z, W, b, E, normalize))
        assert not torch.allclose(combine(z, W, b, E[order], normalize), combine(z, W, b, E, normalize))


def test_torch_compile_gives_the_same(monkeypatch):
    monkeypatch.setattr(fused, "COMPILE_FROM", 0)
    fused.compiled.cache_clear()
    *inputs, g = tensors(300, dtype=torch.bfloat16)
    result = with_gradients(combine, *inputs, g, "softmax")
    assert max(off(result, exact(*inputs, g, "softmax"))) < 2e-2
    fused.compiled.cache_clear()


def test_no_compiler_is_said_once(monkeypatch, capsys):
    def broken(step, **_):
        def fails(*_):
            raise RuntimeError("no C++ compiler")
        return fails
    monkeypatch.setattr(fused, "COMPILE_FROM", 0)
    monkeypatch.setattr(torch, "compile", broken)
    fused.compiled.cache_clear()
    device.print_once.cache_clear()
    *inputs, g = tensors(40)
    for _ in range(2):
        result = with_gradients(combine, *inputs, g, "softmax")
    assert max(off(result, exact(*inputs, g, "softmax"))) < 3e-6
    assert capsys.readouterr().out.count("uncompiled") == 1
    fused.compiled.cache_clear()


def across_the_border(monkeypatch, normalize, inputs, plain_bytes):
    """-> (which formula LangBridge.forward ran, its result, dz, dW, db)"""
    z, W, b, E, g = inputs
    bridge = model.LangBridge(Dv=H, H=H, K=K, normalize=normalize)
    bridge.mlp = torch.nn.Identity()
    bridge.to_scores.weight, bridge.to_scores.bias = torch.nn.Parameter(W.detach()), torch.nn.Parameter(b.detach())
    bridge.vocab_embeds, bridge.plain_bytes = E, plain_bytes
    ran = []
    with monkeypatch.context() as patch:
        for name, module in (("plain", model), ("fused", fused)):
            patch.setattr(module, "combine", lambda *args, call=module.combine, name=name: ran.append(name) or call(*args))
        out = bridge(z)
    return ran, (out.detach(), *torch.autograd.grad(out, (z, bridge.to_scores.weight, bridge.to_scores.bias), g.to(out.dtype)))


@pytest.mark.parametrize("normalize, below", [("softmax", "plain"), ("none", "fused")])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_both_sides_of_the_border_give_the_same(monkeypatch, normalize, below, dtype, limit, is_compiled):
    """At plain_bytes the plain formula runs, with one byte less the fused one. In bfloat16 as in training, by autocast."""
    if is_compiled:
        if normalize == "none":
            pytest.skip("seconds for each compilation")
        monkeypatch.setattr(fused, "COMPILE_FROM", 0)
        fused.compiled.cache_clear()
    *inputs, g = tensors(2, 150)
    inputs[3] = inputs[3].to(dtype)                                 # E is held in the dtype of frozen weights
    reference = exact(*inputs, g, normalize)
    for plain_bytes, formula in ((4 * 300 * K, below), (4 * 300 * K - 1, "fused")):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
            ran, result = across_the_border(monkeypatch, normalize, (*inputs, g), plain_bytes)
        assert ran == [formula] and max(off(result, reference)) < limit
    fused.compiled.cache_clear()


def test_the_border_is_a_part_of_the_memory():
    limit = fused.plain_limit(torch.device("cpu"))
    assert 1 << 20 < limit < 1 << 40
    assert fused.plain_limit(torch.device("cpu")) == limit


def test_without_autocast_e_of_another_dtype_is_cast(monkeypatch):
    """Evaluation in bfloat16 keeps the connector in float32 and E in bfloat16."""
    *inputs, g = tensors(40)
    inputs[3] = inputs[3].bfloat16()
    ran, result = across_the_border(monkeypatch, "softmax", (*inputs, g), 0)
    assert ran == ["plain"] and max(off(result, exact(*inputs, g, "softmax"))) < 3e-6


@pytest.mark.parametrize("normalize", ("softmax", "none"))
@pytest.mark.parametrize("plain_bytes", [1, 1 << 30])
def test_the_temperature_divides_the_scores_of_the_weights_alone(normalize, plain_bytes):
    """Scores / temperature become the weights, by both formulas; the scores themselves, which the words loss reads, stay."""
    torch.manual_seed(0)
    bridge = model.LangBridge(Dv=12, H=H, K=K, normalize=normalize, temperature=0.25, plain_bytes=plain_bytes)
    bridge.vocab_embeds = torch.randn(K, D)
    patches = torch.randn(2, 9, 12)
    with torch.no_grad():
        scores = bridge.to_scores(bridge.mlp(patches))
        want = 4 * scores
        want = want.exp() / want.exp().sum(-1, keepdim=True) if normalize == "softmax" else want
        assert torch.equal(bridge.scores(patches), scores)
        assert (bridge.weights(patches) - want).abs().max() < 1e-5
        assert (bridge(patches) - want @ bridge.vocab_embeds).abs().max() < 1e-4


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_fold_is_the_same_function(temperature):
    torch.manual_seed(0)
    bridge = model.LangBridge(Dv=12, H=H, K=K, normalize="none", temperature=temperature)
    bridge.vocab_embeds = torch.randn(K, D)
    patches = torch.randn(2, 9, 12)
    folded = fold(bridge)
    assert isinstance(folded, model.MLPConnector)
    with torch.no_grad():
        want, got = bridge(patches), folded(patches)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    with pytest.raises(ValueError, match="softmax"):
        fold(model.LangBridge(Dv=12, H=H, K=K))
