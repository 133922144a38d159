"""
The log of a training run: log.jsonl, the printed line of a step, and loss.png.
"""
import json
import os

import common


def open_log(path, step):
    """Return log.jsonl, open for more lines, without the lines of `step` and later."""
    kept = []
    if os.path.isfile(path) and step:
        for line in open(path).read().splitlines():
            if line.endswith("}") and json.loads(line)["step"] < step:      # "}": a kill cuts lines
                kept.append(line + "\n")
    common.write_text("".join(kept), path)
    return open(path, "a", buffering=1)


def log_step(log, row, steps, seconds, is_printed):
    """Write one step to log.jsonl and print it. To use another logger, change this function.

    row: {name: number}. seconds: what a step of this run takes on average. Call it on rank 0.
    """
    log.write(json.dumps(row) + "\n")
    if not is_printed:
        return
    blind = f" (blind {row['blind']:.4f})" if "blind" in row else ""
    words = f"  words {row['words_loss']:.4f}" if "words_loss" in row else ""
    skipped = f"  skipped {row['skipped']}" if row["skipped"] else ""
    minutes = seconds * (steps - row["step"] - 1) / 60
    print(f"step {row['step']:5d}/{steps}  loss {row['loss']:7.4f}{blind}{words}"
          f"  trained {row['trained']:6d} tok  lr {row['lr']:.2e}  grad {row['grad_norm']:8.3f}"
          f"  {row['tok_s']:7.0f} tok/s{skipped}  eta {minutes:5.1f} min", flush=True)


def plot_loss(path, out):
    """Draw loss.png from log.jsonl: the loss, and the loss of the same batch without its images."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = [json.loads(line) for line in open(path)]
    figure, axes = plt.subplots(figsize=(7, 4))
    for key, style, label in (("loss", "-", "loss"), ("blind", "o-", "without the image"),
                              ("words_loss", "-", "words loss, per word")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points), style, lw=1, ms=3, label=label)
    axes.set(xlabel="step", ylabel="nats per trained token", yscale="log")
    axes.legend()
    figure.savefig(out, dpi=120, bbox_inches="tight")
    plt.close(figure)
