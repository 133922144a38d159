"""bench.py with tiny models: what it compares must compute the same."""
import json

import pytest
import torch
from transformers import AutoConfig

import bench

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
        # The step drops the gradients. A function that keeps them replaces the clipping.
        with pytest.MonkeyPatch.context() as m:
            m.setattr("torch.nn.utils.clip_grad_norm_", lambda parameters, *_, **__:
                      seen.setdefault(name, [p.grad.clone() for p in parameters]))
            loss = step()
        seen[name].append(torch.tensor(loss))
    assert all(g.abs().sum() > 0 for g in seen["ours"])
    torch.testing.assert_close(seen["ours"], seen["LLaVA"], atol=1e-6, rtol=1e-4)


def test_the_ways_of_the_combination_compute_the_same():
    for normalize, ways in (("softmax", ("fused", "below")), ("none", ("fused",))):
        calls = bench.combination(48, 16, 8192, 896, torch.float64, normalize)
        for way in ways:
            torch.testing.assert_close(calls[way](), calls["plain"]())


@pytest.mark.parametrize("H, dtype", [(16, torch.float64), (16, torch.bfloat16),
                                      (1024, torch.float32)])
def test_the_fused_combination_holds_less_than_the_plain_one(H, dtype):
    """And not more than with a quarter of the words."""
    def memory(way, K):
        call = bench.combination(48, H, K, 896, dtype)[way]
        call()
        return bench.extra_memory(call)
    # bfloat16: no copies of output and gradient in float32. 1024: the gradient of W is made in
    # place.
    fused = memory("fused", 8192)
    assert fused < 0.5 * memory("plain", 8192) and fused < 1.1 * memory("fused", 2048)


def test_eval_answers_as_the_loop_does():
    speed, single, same = bench.bench_eval(*configs(), side=24, images=3, each=4)
    _, equal, goal, detail = same
    assert (equal, goal, detail["compared"]) == (1, ">= 1", 12) and detail["distinct"] > 6
    assert speed[1] > 0 and single[1] > 0


def test_connectors_and_their_overhead():
    softmax, raw = bench.bench_connectors(*configs(), side=24, images=1, H=400, K=200)
    assert (softmax[0], raw[0]) == ("softmax, overhead in %", "raw, overhead in %")
    assert softmax[3] == raw[3] and softmax[3]["softmax, s"] > 0


def test_the_stored_results_are_those_of_this_code():
    with open(f"{bench.HERE}/results/bench.json", encoding="utf-8") as file:
        stored = json.load(file)["parts"]
    assert list(stored) == list(bench.parts())


def test_memory_is_counted_to_the_byte():
    x = torch.ones(1000)
    # The third of the tensors is returned, so it does not count.
    assert bench.extra_memory(lambda: [x.exp().exp().exp()]) == 2 * 4000
    assert bench.extra_memory(lambda: None) == 0


def test_results_are_kept_and_not_measured_twice(tmp_path, monkeypatch, capsys):
    file, calls = tmp_path / "bench.json", []

    def measure(number):
        calls.append(number)
        yield "time", 1.234567, "<= 1.15", {"seconds": 0.123456}
    parts = {"step, a": (measure, "one"), "step, b": (measure, "two"), "eval": (measure, "three")}
    monkeypatch.setattr(bench, "parts", lambda: parts)
    bench.main(bench.read_arguments(["step", "--json", str(file)]))
    bench.main(bench.read_arguments(["all", "--json", str(file)]))
    assert calls == ["one", "two", "three"]
    assert "eval: time | 1.235 | at most 1.15, **missed** |" in capsys.readouterr().out
    bench.main(bench.read_arguments(["--table", str(file)]))
    printed = capsys.readouterr().out
    assert "| step, b: time | 1.235 | at most 1.15, **missed** | seconds 0.1235 |" in printed
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
    floor, _, _, speed, _, memory = bench.bench_llava_step(*configs(), 24, 3, dtype, stage)
    assert floor[3]["images"] == 3 and speed[2] == ">= 1.7" and len(made) > 1
    # LLaVA has the logits of 60 positions in memory, and this code those of 24.
    assert 0 < memory[1] < 1


def test_lengths_of_stage_2_count_tokens_without_padding(monkeypatch):
    def simulate(part):
        tokens = [num_patches + 3 + i % 20 for i in range(400)]
        return tokens, [n if i % 5 else -n for i, n in enumerate(tokens)]
    num_patches = bench.random_vlm(*configs(), side=24, dtype=torch.float32).num_patches
    monkeypatch.setattr("results.padding.simulate", simulate)
    monkeypatch.setattr("torch.nn.Module.compile", lambda block, **options: None)
    rows = list(bench.bench_lengths(*configs(), side=24, images=2, ranks=2))
    assert [row[1] > 0 for row in rows] == [True] * 3 and rows[0][2] == ">= 2.5"
