"""bench.py with tiny models: what it compares must compute the same."""
import json

import pytest
import torch
from transformers import AutoConfig

import bench
import model

TOWER = dict(model_type="clip_vision_model", hidden_size=32, intermediate_size=48,
             num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=8)
LLM = dict(model_type="qwen2", hidden_size=48, intermediate_size=64, num_hidden_layers=2,
           num_attention_heads=2, num_key_value_heads=1, vocab_size=300, tie_word_embeddings=True)


@pytest.fixture(autouse=True)
def two_rounds(monkeypatch):
    monkeypatch.setattr(bench, "SECONDS", 0)


def configs():
    return AutoConfig.for_model(**TOWER), AutoConfig.for_model(**LLM)


def test_a_step_is_llavas_step():
    """Loss and gradients are equal for captions of different lengths."""
    vlm = bench.random_vlm(*configs(), side=24, dtype=torch.float32)
    seen = {}
    for name, step in bench.steps(vlm, bench.captions(vlm, 3, 12), "float32").items():
        # `update` would clip and drop the gradients, so a function that keeps them replaces it.
        with pytest.MonkeyPatch.context() as m:
            m.setattr(bench, "update", lambda optimizer, count=1: seen.setdefault(
                name, [p.grad / count for p in vlm.connector.parameters()]))
            loss = step()
        seen[name].append(torch.tensor(loss))
        vlm.zero_grad()
    assert all(g.abs().sum() > 0 for g in seen["ours"])
    torch.testing.assert_close(seen["ours"], seen["LLaVA"], atol=1e-6, rtol=1e-4)


def test_the_ways_of_the_combination_compute_the_same():
    """And ours is the fused one: it holds less than the plain chain."""
    at = bench.Combination(P=48, H=16, K=8192, dtype=torch.float64)
    for normalize in ("softmax", "none"):
        results = [way(normalize) for way in (at.ours, at.plain)]
        for ours, plain in zip(*results, strict=True):
            torch.testing.assert_close(ours, plain)
    half = bench.Combination(P=48, H=16, K=8192, dtype=torch.bfloat16)
    wide = bench.Combination(P=48, H=1024, K=8192, dtype=torch.float32)
    for new in (half, wide):
        new.ours()
        new.plain()
    # half: no copies of output and gradient in float32. wide: the gradient of W is made in place.
    for each in (at, half, wide):
        assert bench.extra_memory(each.ours) < 0.5 * bench.extra_memory(each.plain)


def test_eval_answers_as_the_loop_does(capsys):
    speed, single, same = bench.bench_eval("eval", *configs(), side=24, images=3, each=4)
    assert same["value"] == 1 and same["reached"] == "reached" and same["detail"]["compared"] == 12
    assert same["detail"]["distinct"] > 6 and speed["value"] > 0 and single["value"] > 0
    assert "equal to the loop's" in capsys.readouterr().out


def test_flops_are_those_that_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode
    n, Dv, H, K, D = 7, 16, 24, 40, 8
    for kind, needed in (("mlp", False), ("softmax", True), ("none", False)):
        z = torch.randn(n, Dv)
        connector = model.MLPConnector(Dv, D) if kind == "mlp" else model.LangBridge(Dv, H, K, kind)
        with FlopCounterMode(display=False) as counter:
            if kind == "softmax":           # torch does not count the fused backward pass
                scores = connector.to_scores(connector.mlp(z))
                out = scores.softmax(-1) @ torch.randn(K, D)
            else:
                connector.vocab_embeds = torch.randn(K, D)
                out = connector(z)
            out.sum().backward()
        # The estimate leaves out b E and its gradient, which are products of a vector.
        small = 4 * K * D if kind == "none" else 0
        flops = bench.connector_flops(kind, n, Dv, H, K, D, needed)
        assert abs(counter.get_total_flops() - flops) <= small, kind
    made, needed = (bench.connector_flops("softmax", n, Dv, H, K, D, needed)
                    for needed in (False, True))
    assert made - needed == 2 * n * K * H


def test_connectors_and_their_overhead(monkeypatch):
    monkeypatch.setattr(bench, "dry_run_bytes", lambda kind, images: 1e6)
    tower, llm = configs()
    rows = bench.bench_connectors("step", 1, H=40, K=64, tower=tower, llm=llm, side=24)
    assert [r["what"].split(": ")[1] for r in rows] == [
        "softmax, overhead by the FLOPs'", "raw, overhead in %",
        "memory that --dry_run says by measured, mlp",
        "memory that --dry_run says by measured, softmax"]
    mlp, softmax = (r["detail"]["measured, GB"] for r in rows[2:])
    parameters = 32 * 40 + 40 + 40 * 40 + 40 + 40 * 64 + 64 - (32 * 48 + 48 + 48 * 48 + 48)
    # A parameter has a weight and two moments. Its gradient fits below the peak of the LLM.
    assert softmax - mlp > 12e-9 * parameters


def test_dry_run_is_read():
    assert bench.dry_run_bytes("softmax", 1) > 16 * 129_790_720


def test_memory_is_counted_to_the_byte():
    x = torch.ones(1000)
    # The third of the tensors is returned, so it does not count.
    assert bench.extra_memory(lambda: [x.exp().exp().exp()]) == 2 * 4000
    assert bench.extra_memory(lambda: None) == 0


def test_results_are_kept_and_not_measured_twice(tmp_path, monkeypatch, capsys):
    file, calls = tmp_path / "bench.json", []

    def measure(name):
        calls.append(name)
        return [bench.row(f"{name}: time", 1.234567, "<= 1.15", seconds=0.123456)]
    parts = {"step": lambda: {"one": measure, "two": measure}, "eval": lambda: {"three": measure}}
    monkeypatch.setattr(bench, "PARTS", parts)
    bench.main(bench.read_arguments(["step", "--json", str(file)]))
    bench.main(bench.read_arguments(["all", "--json", str(file)]))
    assert calls == ["one", "two", "three"]
    assert "MISSED" in capsys.readouterr().out
    bench.main(bench.read_arguments(["eval", "--json", str(file), "--overwrite"]))
    assert calls[3:] == ["three"]
    capsys.readouterr()
    bench.main(bench.read_arguments(["--table", str(file)]))
    printed = capsys.readouterr().out
    assert "| two: time | 1.235 | at most 1.15, **missed** | seconds 0.1235 |" in printed
    assert bench.processor() in printed
    file.write_text(json.dumps({**json.loads(file.read_text()), "processor": "another"}))
    with pytest.raises(ValueError, match="another machine"):
        bench.main(bench.read_arguments(["all", "--json", str(file)]))


def test_the_floor_has_all_operations_that_torch_counts():
    """Products and attention of a step, forward and backward: as many as the step itself has."""
    from torch.utils.flop_counter import FlopCounterMode
    vlm = bench.random_vlm(*configs(), side=24, dtype=torch.float32)
    step = bench.steps(vlm, bench.captions(vlm, 3, 12), "float32")["ours"]
    floor, counts = bench.floor_of(step), []
    for call in (step, floor):
        with FlopCounterMode(display=False) as counter:
            call()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("dtype, stage", [("float32", "pretrain"), ("bfloat16", "sft")])
def test_llava_step_reports_speed_and_memory(dtype, stage, monkeypatch):
    made = []
    # Compilation takes seconds and is tested with train.py.
    monkeypatch.setattr("torch.nn.Module.compile", lambda block, **options: made.append(block))
    rows = bench.bench_llava_step(*configs(), 24, 3, dtype, stage, "step")
    floor, _, _, speed, _, memory = rows
    assert floor["detail"]["images"] == 3 and speed["bar"] == ">= 1.7" and len(made) > 1
    # LLaVA has the logits of 60 positions in memory, and this code those of 24.
    assert 0 < memory["value"] < 1
