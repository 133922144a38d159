"""tests/gpu.sh without a GPU: the code of each section runs at tiny sizes. `DEVICE=cpu SMALL=1 bash tests/gpu.sh` is all of it."""
import contextlib
import io
import json
import os
import subprocess
import sys

import pytest

import gpu
from conftest import ROOT, train_here


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The sections in this process, and train.py as well, so that nothing waits for torch to be imported."""
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "SMALL", True)
    monkeypatch.setattr(gpu, "FOLDER", str(tmp_path))
    started = gpu.run

    def run(*command, **kwargs):
        if command[0] == "train.py":
            text = io.StringIO()
            with contextlib.redirect_stdout(text):
                return train_here(list(command[1:])), text.getvalue()
        if command[:2] == ("-m", "pytest"):
            return 0, "1 passed"                        # the suite has test_device.py anyway
        return started(*command, **kwargs)
    monkeypatch.setattr(gpu, "run", run)
    return lambda: [json.loads(line) for line in open(tmp_path / "results.jsonl")]


@pytest.mark.parametrize("number", [1, 2, 3, 6, 7])
def test_a_section_passes(results, number):
    for part in gpu.SECTIONS[number][2]:
        gpu.attempt(*part)
    assert results() and {row["verdict"] for row in results()} <= {"pass", "note"}, results()


def test_sft_passes(results):
    gpu.sft_step("sdpa")
    assert [row["verdict"] for row in results()] == ["pass"]


def test_dry_run_is_read():
    assert gpu.dry_run_bytes("softmax", 1) > 16 * 129_790_720


def test_a_run_under_torchrun_with_shard_and_one_with_pack_have_the_same_losses(results):
    gpu.make_world()
    gpu.sharded()
    assert [row["verdict"] for row in results()] == ["pass", "pass"]


def test_a_killed_run_and_two_runs_alike(results):
    import torch
    try:
        for part in gpu.SECTIONS[5][2]:
            gpu.attempt(*part)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
    assert [row["verdict"] for row in results()] == ["pass", "pass"]
    killed = results()[0]
    assert killed["resumed"] and 2 <= killed["steps_at_kill"] <= 6


def test_a_section_that_fails_or_hangs_does_not_end_the_others(tmp_path, monkeypatch):
    """One raises, one sleeps: both are named, the exit status says so, and the JSON file is whole."""
    script = tmp_path / "broken.py"
    script.write_text(f"""
import sys, time
sys.path.insert(0, {os.path.join(ROOT, 'tests')!r})
import gpu
def good(): gpu.check("good", True, "is good", number=1.0)
def bad(): 1 / 0
def slow(): time.sleep(60)
gpu.SECTIONS = {{1: ("one", 120, [(bad,), (good,)]), 2: ("two", 2, [(slow,)]), 3: ("three", 120, [(good,)])}}
gpu.__file__ = __file__
if __name__ == "__main__": gpu.main()
""")
    done = subprocess.run([sys.executable, script, "--out", tmp_path / "out.json"], capture_output=True, text=True,
                          env={**os.environ, "DEVICE": "cpu", "SMALL": "1"})
    sections = json.loads((tmp_path / "out.json").read_text())["sections"]
    assert [sections[n]["verdict"] for n in "123"] == ["FAIL", "FAIL", "pass"] and done.returncode == 1
    assert "ZeroDivisionError" in sections["1"]["checks"][0]["error"] and sections["1"]["checks"][1]["verdict"] == "pass"
    assert sections["2"]["status"] == "cut off by its time box"
