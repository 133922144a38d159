"""Two runs held against each other: what counts as the same, and the working tree and its log."""
import math
import subprocess
import sys

import pytest

from conftest import ROOT

sys.path.insert(0, ROOT)
from tools.compare_runs import compare  # noqa: E402

# Another version of torch rounds sums differently, and so may a processor that was not tried. On a
# Zen 3 and a Zen 4 the test prints "the same to the bit"; if not, a sum has changed and the log must
# be written anew.
# Without vector instructions the numbers differ from the log by at most 3.5e-5.
TOLERANCE = 2e-4


@pytest.mark.parametrize("before, after, sentence, difference", [
    ([1.0, 2.0], [1.0, 2.0], "the same to the bit in 2 steps", 0),
    ([1.0, 2.0, 4.0], [1.0, 2.0 + 2e-15, 4.0], "differs from step 1 on", 1e-15),
    ([1.0, 2.0, 4.0], [1.0, 1.0, 4.0], "at most by 5.0e-01 at step 1", 0.5),
    ([1.0], [1.0, 1.0], "1 steps and 2 steps", math.inf),
    ([1.0], [math.nan], "differs from step 0 on", math.inf),
])
def test_what_counts_as_the_same(before, after, sentence, difference):
    said, largest = compare(before, after)
    assert sentence in said and largest == pytest.approx(difference, rel=0.2)


def test_the_losses_are_those_of_the_committed_log():
    """`python tools/compare_runs.py --log results/compare.json --write` writes a new log. The commit
    that does so says which sum it changed, and why."""
    command = [sys.executable, "tools/compare_runs.py", "--log", "results/compare.json",
               "--tolerance", str(TOLERANCE)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("20 steps") + done.stdout.count("differs from step") == 4


def test_a_ref_that_does_not_exist_is_named():
    done = subprocess.run([sys.executable, "tools/compare_runs.py", "nowhere", "."], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode != 0 and "nowhere" in done.stderr and "Traceback" not in done.stderr
