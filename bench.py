"""
Speed and memory on this machine, against what a user would write otherwise.

    python bench.py combine [--json FILE]         # the vocabulary combination: about ten minutes on two CPU cores

All variants run in one process on the same tensors, in turns; a time is the median of the rounds. With --json the numbers
go into FILE under the name of the sub-command, beside what other sub-commands have put there.
"""
import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time

import vocab

P, K, D = 1152, 19200, 896                          # two images of 576 patches, the paper's vocabulary, Qwen2-0.5B
SECONDS = 40                                        # for the timed rounds of one line


# ----------------------------------------------------------------------------------------------------------------------
# measuring

def take_turns(calls, most=7):
    """Median seconds of each call. calls: {name: function without arguments}; one round runs each of them once.

    A first round, not counted, warms up (and compiles); from it follows how many rounds SECONDS allow, 2 to `most`.
    """
    import torch

    def timed(call):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for call in calls.values():
        call()
    rounds = [{name: timed(call) for name, call in calls.items()}]
    for _ in range(min(most, max(2, int(SECONDS / sum(rounds[0].values())))) - 1):
        rounds.append({name: timed(call) for name, call in calls.items()})
    return {name: statistics.median(r[name] for r in rounds) for name in calls}


def extra_memory(call):
    """Bytes that `call` holds at its worst moment, without what was there before and without the tensors it returns.

    Replays every allocation and release that torch's profiler has seen, so it is exact and the same in each run; the
    scratch memory of the BLAS is not in it.
    """
    import torch
    call()                                                          # what is only made once does not count
    with torch.profiler.profile(profile_memory=True) as profile:
        results = call()
    returned = {t.untyped_storage().data_ptr() for t in results}
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        profile.export_chrome_trace(trace.name)
        with open(trace.name, encoding="utf-8") as f:
            events = [e for e in json.load(f)["traceEvents"] if e["name"] == "[memory]"]
    events = [(e["args"]["Addr"], e["args"]["Bytes"]) for e in sorted(events, key=lambda e: e["ts"])]
    # An address is used again and again: the last allocation there is the returned tensor's.
    last = {addr: i for i, (addr, size) in enumerate(events) if size > 0 and addr in returned}
    live = peak = 0
    for i, (addr, size) in enumerate(events):
        if last.get(addr) != i:
            live += size
            peak = max(peak, live)
    return peak


def processor():
    """The processor's name, and how many threads torch uses of it"""
    import torch
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            name = next((line.split(":")[1].strip() for line in f if line.startswith("model name")), name)
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{name}, {torch.get_num_threads()} threads"


# ----------------------------------------------------------------------------------------------------------------------
# python bench.py combine

class Combination:
    """Tensors of one shape and dtype, and forward + backward over them in each way that is compared.

    Each way is a function without arguments. It returns what a training step gets: the image embeds and the gradients of
    z, W and b.
    """

    def __init__(self, P, H, K, dtype):
        import torch

        import model
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator().manual_seed(0)

        def random(*shape, scale=1.0):
            return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)
        self.z, self.W = random(P, H).requires_grad_(), random(K, H, scale=H ** -0.5).requires_grad_()      # scores of spread 1
        self.b, self.E, self.g = random(K).requires_grad_(), random(K, D), random(P, D)
        self.weights = None
        self.combine = model.combine
        self.compiled_chain = torch.compile(self.chain)

    @staticmethod
    def chain(z, W, b, E, normalize):
        """What a user would write."""
        scores = z @ W.T + b
        return (scores.softmax(-1) if normalize == "softmax" else scores) @ E

    def run(self, function, normalize):
        import torch
        out = function(self.z, self.W, self.b, self.E, normalize)
        return out.detach(), *torch.autograd.grad(out, (self.z, self.W, self.b), self.g)

    def ours(self, normalize="softmax"):
        return self.run(self.combine, normalize)

    def plain(self, normalize="softmax"):
        return self.run(self.chain, normalize)

    def compiled(self, normalize="softmax"):
        return self.run(self.compiled_chain, normalize)

    def floor(self):
        """The matrix products that every exact method needs, and nothing else. Where weights or their gradient are a
        factor, scores from the warm-up stand in: what is in a matrix does not matter to the speed of its product."""
        import torch
        with torch.no_grad():
            if self.weights is None:
                self.weights = self.z @ self.W.T
            self.z @ self.W.T                                       # forward: scores (P, K)
            self.weights @ self.E                                   # forward: image embeds (P, D)
            self.g @ self.E.T                                       # backward: of the weights (P, K)
            self.weights @ self.W                                   # backward: of z (P, H)
            self.weights.T @ self.z                                 # backward: of W (K, H)


def bench_combine():
    """-> a list of rows, dicts, printed as they are made"""
    import torch
    rows = []

    def row(what, H, dtype, **values):
        rows.append({"what": what, "P": P, "H": H, "K": K, "D": D, "dtype": str(dtype)[6:], **values})
        print(f"{what:24} H {H}  {str(dtype)[6:]:9}" + "".join(
            f"  {k} {v:.3f}" if isinstance(v, float) else f"  {k} {v:,}" for k, v in values.items()), flush=True)

    for H in (1024, 5120):
        for dtype in (torch.float32, torch.bfloat16):
            at = Combination(P, H, K, dtype)
            t = take_turns({"floor": at.floor, "ours": at.ours, "plain": at.plain, "compiled": at.compiled})
            row("softmax, seconds", H, dtype, **t, of_floor=t["ours"] / t["floor"], of_plain=t["ours"] / t["plain"],
                of_compiled=t["ours"] / t["compiled"])
            ours, plain = extra_memory(at.ours), extra_memory(at.plain)
            row("softmax, extra bytes", H, dtype, ours=ours, plain=plain, of_plain=ours / plain)
            raw = take_turns({"ours": lambda: at.ours("none"), "plain": lambda: at.plain("none")})
            row("none, seconds", H, dtype, **raw, of_plain=raw["ours"] / raw["plain"])
            more = Combination(P, H, 4 * K, dtype)
            m = take_turns({"at K": at.ours, "at 4 K": more.ours}, most=3)
            row("softmax, K x 4", H, dtype, time=m["at 4 K"] / m["at K"], extra_memory=extra_memory(more.ours) / ours)
            del more
    for dtype in (torch.float32, torch.bfloat16):
        at = Combination(16 * P, 1024, K, dtype)
        raw = take_turns({"ours": lambda: at.ours("none"), "plain": lambda: at.plain("none")}, most=2)
        row("none, 16 P, seconds", 1024, dtype, **raw, of_plain=raw["ours"] / raw["plain"])
    return rows


# ----------------------------------------------------------------------------------------------------------------------

COMMANDS = {"combine": (bench_combine, "the vocabulary combination against its matrix products and the plain chain")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text).add_argument("--json", metavar="FILE", help="put the numbers into FILE, too")
    args = parser.parse_args()
    results = {}
    if args.json and os.path.exists(args.json):
        results = vocab.read_json(args.json)                        # before the minutes of measuring, not after
    import torch
    print(f"{processor()}, torch {torch.__version__}")
    rows = COMMANDS[args.command][0]()
    if args.json:
        results[args.command] = {"processor": processor(), "torch": torch.__version__, "rows": rows}
        vocab.write_json(results, args.json)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"bench.py: {error}")
