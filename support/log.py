"""The log of a training run: what trains, a sample, log.jsonl, the line of a step, loss.png."""
import itertools
import json
import os

import common
from conversation import IGNORE, IMAGE_ID


def parts_table(vlm, cfg):
    """Return a table as text: for each part its parameters, how many train, dtype and rate."""
    lines = [f"{'part':14}{'parameters':>16}{'trained':>16}  {'dtype':10}{'lr':>8}"]
    for part in ("vision_tower", "connector", "llm"):
        parameters = list(getattr(vlm, part).parameters())
        total = sum(p.numel() for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        lr = getattr(cfg, f"{part}_lr") if trained else 0
        dtype = str(parameters[0].dtype).removeprefix("torch.")
        lines.append(f"{part:14}{total:16,}{trained:16,}  {dtype:10}{lr:8.1e}")
    if vlm.image_newline is not None:
        D = len(vlm.image_newline)
        lines.append(f"{'image_newline':14}{D:16,}{D:16,}  {'float32':10}{cfg.llm_lr:8.1e}")
    return "\n".join(lines)


def show_sample(ids, labels, tokenizer):
    """Return a sample as text for a terminal: trained tokens green, an image as [image x P]."""
    def kind(pair):
        return pair[0] == IMAGE_ID, pair[1] != IGNORE

    shown = ""
    # Runs of tokens are decoded together, because one character can take several tokens.
    pairs = zip(map(int, ids), map(int, labels))
    for (is_image, is_trained), run in itertools.groupby(pairs, kind):
        run = [i for i, _ in run]
        text = f"[image x {len(run)}]"
        if not is_image:
            text = tokenizer.decode(run, clean_up_tokenization_spaces=False).replace("\033", "␛")
        shown += f"\033[{32 if is_trained else 2}m{text}\033[0m"
    return shown


def open_log(path, step):
    """Return log.jsonl, open for more lines, without the lines of `step` and later."""
    lines = open(path).readlines() if os.path.isfile(path) and step else []
    # The last line of a killed run can lack its end.
    kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] < step]
    common.write_text("".join(kept), path)
    return open(path, "a", buffering=1)


def averages(sums):
    """Return what log.jsonl has of a step's sums over all ranks: {name: number}."""
    row = {"loss": sums["loss"] / max(sums["trained"], 1), "trained": int(sums["trained"])}
    if sums["num_words"]:
        row["words_loss"] = sums["words_loss"] / sums["num_words"]
    if sums["blind_trained"]:
        row["blind"] = sums["blind_loss"] / sums["blind_trained"]
    return row


def log_step(log, row, steps, seconds, cfg):
    """Write one step to log.jsonl and print it. To use another logger, change this function.

    row: {name: number}. seconds: what a step of this run takes on average.
    """
    log.write(json.dumps(row) + "\n")
    left = steps - row["step"] - 1
    if row["step"] % cfg.log_every and left and "blind" not in row:
        return
    blind = f" (blind {row['blind']:.4f})" if "blind" in row else ""
    words = f"  words {row['words_loss']:.4f}" if "words_loss" in row else ""
    skipped = f"  skipped {row['skipped']}" if row["skipped"] else ""
    minutes = seconds * left / 60
    print(f"step {row['step']:5d}/{steps}  loss {row['loss']:7.4f}{blind}{words}"
          f"  trained {row['trained']:6d}  lr {row['lr']:.2e}  grad {row['grad_norm']:8.3f}"
          f"  {row['tok_s']:7.0f} tok/s{skipped}  eta {minutes:5.1f} min", flush=True)


def plot_loss(path, out):
    """Draw loss.png from log.jsonl: the loss, and the loss of the same batch without its images."""
    from matplotlib.figure import Figure
    rows = [json.loads(line) for line in open(path)]
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for key, style, label in (("loss", "-", "loss"), ("blind", "o-", "without the image"),
                              ("words_loss", "-", "words loss, per word")):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points), style, lw=1, ms=3, label=label)
    # With words_patch_weight the words loss can be below 0.
    is_positive = all(line.get_ydata().min() > 0 for line in axes.lines)
    axes.set(xlabel="step", ylabel="nats per trained token, or per word in stage words",
             yscale="log" if is_positive else "linear")
    axes.legend()
    figure.savefig(out, dpi=120, bbox_inches="tight")
