"""
Count over many images whether the words of the patches mean something.

    python results/study.py CHECKPOINT [...] --data captions.json --images DIR [--truth truth.json]
        [--out DIR]

The script measures how far the words are from chance, and how often they name what the image shows.
It writes DIR/study.json, study.md and study.png. Folders of one name and step (seed1/LB seed2/LB)
are seeds of one row. steps/000100 of a run is that run at step 100. All checkpoints are compared
with the first one.
"""
import argparse
import math
import os
import re
import sys
from collections import Counter

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import common

TOP = (1, 5, 10)                # so many of a patch's strongest words are looked at
COVER = 1 / 3                   # part of a patch that an object's box must cover to give its name
# Words that name nothing that an image shows.
SMALL = frozenset("and are for from has have into its that the there this with".split())


def read_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="folders, in the order of the rows")
    add("--data", metavar="FILE", required=True, help="captions in LLaVA's format")
    add("--images", metavar="DIR", required=True, help="the folder of their images")
    add("--truth", metavar="FILE", help="{image: {objects}}, as pocket.py writes it")
    add("--number", type=int, default=100, help="number of images (default: 100)")
    add("--out", metavar="DIR", help="folder to write (default: out/study)")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--overwrite", action="store_true", help="replace the files in --out")
    add("--offline", action="store_true", help=common.OFFLINE)
    args = parser.parse_args(argv)
    if args.number < 1:
        parser.error("--number must be above 0")
    return args


if __name__ == "__main__":                   # before the slow imports, so that --help is quick
    ARGS = read_arguments()
    if ARGS.offline:
        common.go_offline()

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import checkpoint
import data
import vocab
from words import (cosine, cosine_null, grid_patches, refuse_to_overwrite, save_figure,
                   vocabulary)
from support import pictures
from support.device import own_device


# --------------------------------------------------------------------------------------------------
# the numbers

def entropy(w):
    """Return the entropy of each patch's weights in bits: float[P, K] -> float[P].

    Raw scores count by their absolute value.
    """
    p = w.abs() / w.abs().sum(-1, keepdim=True)
    return -torch.special.xlogy(p, p).sum(-1) / math.log(2)


def effective_rank(w):
    """Return how many different mixtures the patches are: float[P, K] -> float from 1 to P.

    This is exp of the entropy of the normalised singular values.
    Source: Roy and Vetterli 2007, "The effective rank".
    """
    s = torch.linalg.svdvals(w.double())
    p = s / s.sum()
    return torch.special.xlogy(p, p).sum().neg().exp().item()


def plain(word):
    """Return a canonical word as a reader compares it: "ĠRed" -> "red"."""
    return vocab.show(word).strip("␣").lower()


def content_words(text):
    """Return the set of words that can name something: lower case, 3 letters or more, no SMALL."""
    return set(re.findall(r"[^\W\d_]{3,}", text.lower())) - SMALL


def names_of_patches(objects, size, side, mode):
    """Return the possible names of each patch: side * side sets {shape, colour}, or empty sets.

    objects: [{"shape", "color", "box": [x0, y0, x1, y1]}] in pixels of an image of `size` (w, h),
    which pictures.transform shows to the tower in `mode`, "crop" or "pad". A patch belongs to the
    object whose box covers most of it, and at least COVER of it.
    """
    edge = min(size) if mode == "crop" else max(size)               # of the square that is seen
    left = (size[0] - edge) / 2
    top = (size[1] - edge) / 2
    unit = edge / side                                              # pixels along a patch

    def cover(thing, row, column):
        x0, y0, x1, y1 = thing["box"]
        x = left + column * unit
        y = top + row * unit
        across = min(x1, x + unit) - max(x0, x)
        down = min(y1, y + unit) - max(y0, y)
        return max(across, 0) * max(down, 0) / unit ** 2

    names = []
    for row, column in np.ndindex(side, side):
        covers = [cover(thing, row, column) for thing in objects]
        if covers and max(covers) >= COVER:
            thing = objects[covers.index(max(covers))]
            names.append({thing["shape"].lower(), thing["color"].lower()})
        else:
            names.append(set())
    return names


def found(tops, names, k):
    """Return (precision, hit rate) of the first k words, over patches with names; NaN without any.

    tops: for each patch its words, the strongest first. names: a set for each patch. Precision is
    the part of the k words that are names. A hit is a patch with a name among its k words.
    """
    right = [[word in wanted for word in top[:k]] for top, wanted in zip(tops, names) if wanted]
    if not right:
        return math.nan, math.nan
    precision = sum(sum(r) / len(r) for r in right) / len(right)
    return precision, sum(map(any, right)) / len(right)


def found_by_chance(counts, names, k):
    """Return the mean of `found` for k words drawn without replacement from `counts`, a Counter."""
    size = counts.total()
    k = min(k, size)
    rates = []
    for wanted in filter(None, names):
        m = sum(counts[word] for word in wanted)
        rates.append((m / size, 1 - math.comb(size - m, k) / math.comb(size, k)))
    return tuple(np.mean(rates, 0).tolist()) if rates else (math.nan, math.nan)


def borrowed(names, others):
    """Return the names of another image on the named patches of this image.

    Words that find these names would fit any image.
    """
    pool = [n for n in others if n]
    result = []
    used = 0
    for own in names:
        if own and pool:
            result.append(pool[used % len(pool)])
            used += 1
        else:
            result.append(set())
    return result


def agreement(tops, others, k):
    """Return how far two readings share their first k words: the mean of |both| / |either|."""
    shares = []
    for a, b in zip(tops, others):
        shares.append(len({*a[:k]} & {*b[:k]}) / len({*a[:k]} | {*b[:k]}))
    return sum(shares) / len(shares)


def interval(values, draws=2000, seed=0):
    """Return [mean, low, high], a 95 % interval by bootstrap, or None if there is no value.

    values float[seeds, images], NaN for an image without a value. Images are drawn with
    replacement. Where there are several seeds, seeds are drawn, too.
    """
    values = np.asarray(values, float)
    values = values[:, ~np.isnan(values).any(0)]
    if not values.size:
        return None
    generator = np.random.default_rng(seed)
    S, N = values.shape
    rows = generator.integers(S, size=(draws, S, 1))
    columns = generator.integers(N, size=(draws, 1, N))
    means = values[rows, columns].mean((1, 2))                      # (draws, S, N) -> (draws,)
    return [float(values.mean()), *np.quantile(means, [0.025, 0.975]).tolist()]


# --------------------------------------------------------------------------------------------------
# reading checkpoints

def run_of(folder, metadata):
    """Return (name of the run, step or None) of a checkpoint folder.

    steps/000100 belongs to the run two folders above it.
    """
    path = os.path.abspath(folder)
    step = re.fullmatch(r"0*(\d+)", os.path.basename(path))
    if step:
        return os.path.basename(path.rsplit(os.sep, 2)[0]), int(step[1])
    return os.path.basename(path), metadata.get("steps")


def study_records(args):
    """Return [(image, words of its captions, its objects or None)] of the first args.number images.

    ValueError for fewer than two images, or for an image that --truth does not have.
    """
    truth = common.read_json(args.truth) if args.truth else None
    captions = {}
    for _, record in data.read_records(args.data):
        messages, images = data.messages_of(record)
        if len(images) == 1 and (images[0] in captions or len(captions) < args.number):
            answers = [m["content"] for m in messages if m["role"] == "assistant"]
            captions.setdefault(images[0], set()).update(content_words(" ".join(answers)))
    if len(captions) < 2:
        raise ValueError(f"a study needs two images or more: {len(captions)} of {args.data}, "
                         f"--number is {args.number}")
    missing = [name for name in captions if truth is not None and name not in truth]
    if missing:
        raise ValueError(f"{args.truth} does not know {missing[0]}")
    records = []
    for name, caption in captions.items():
        image = pictures.open_image(pictures.image_path(args.images, name))
        records.append((image, caption, truth and truth[name]["objects"]))
    return records


@torch.no_grad()
def observe(folder, records, device=None, dtype="float32"):
    """Return all that is counted of a checkpoint, a dict.

    "values": {name of a measure: a number for each image}. "tops": {"weights" (LangBridge only),
    "cosine": for each image and patch the strongest words}. Also "name", "step", "llm",
    "connector", "words" K and "patches" P. Of raw scores only the highest count, because a word of
    negative score is taken away from a patch.
    """
    config, metadata = checkpoint.read_config(folder)
    vlm = checkpoint.load(folder, own_device(device), getattr(torch, dtype))
    mode = metadata.get("image_mode", "pad")
    side = math.isqrt(vlm.num_patches)
    tokens, E = vocabulary(vlm)
    centred = F.normalize(E - E.mean(0), dim=-1)
    E = F.normalize(E, dim=-1)
    null = cosine_null(E)
    null_centred = cosine_null(centred)
    names = {"cosine": [plain(word) for word in tokens],
             "weights": [plain(word) for word in vlm.words or ()]}
    values = {}
    tops = {}
    embeds = []

    def note(measure, value):
        values.setdefault(measure, []).append(value)

    def note_strongest(how, scores):
        columns = scores.topk(min(max(TOP), scores.shape[1])).indices.tolist()
        tops.setdefault(how, []).append([[names[how][i] for i in row] for row in columns])

    for n, (picture, _, _) in enumerate(records):
        pixels = pictures.transform(picture, mode=mode, **vlm.image_settings)   # (3, S, S)
        generator = torch.Generator().manual_seed(n)
        order = torch.randperm(pixels[0].numel(), generator=generator)
        mixed = pixels.flatten(1)[:, order].view_as(pixels)         # the same pixels, no picture
        both = torch.stack([pixels, mixed])                         # (2, 3, S, S)
        patches = grid_patches(vlm, both)                           # (2, P, Dv)
        seen, blank = vlm.connector(patches).float()                # (P, D) each
        embeds.append(seen)
        similar = F.normalize(seen, dim=-1) @ E.T                   # (P, D) x (D, V) -> (P, V)
        best = similar.amax(-1).mean().item()
        note("top-1 cosine", best)
        note("above random directions", best - null)
        note("above shuffled pixels", best - cosine(blank, E).amax(-1).mean().item())
        note_strongest("cosine", similar)
        if vlm.words:
            w = vlm.connector.weights(patches[:1])[0]               # (P, K)
            note("entropy", entropy(w).mean().item())
            note("effective rank", effective_rank(w))
            note_strongest("weights", w)
    # What all patches share is neither found nor missed, so it is taken away here.
    middle = torch.cat(embeds).mean(0)
    for seen in embeds:
        best = cosine(seen - middle, centred).amax(-1).mean().item()
        note("centred, above random directions", best - null_centred)

    wanted = {"caption": [[caption] * side ** 2 for _, caption, _ in records]}
    if records[0][2] is not None:
        wanted["object"] = [names_of_patches(objects, picture.size, side, mode)
                            for picture, _, objects in records]
    for how, image_tops in tops.items():
        counts = Counter(names[how])
        for what, patch_names in wanted.items():
            for n, (words, named) in enumerate(zip(image_tops, patch_names)):
                other = borrowed(named, patch_names[n - 1])
                for k in TOP:
                    rates = {"right": found(words, named, k),
                             "wrong picture": found(words, other, k),
                             "chance": found_by_chance(counts, named, k)}
                    for against, (precision, hit) in rates.items():
                        note(f"{how}, {what}, precision at {k}, {against}", precision)
                        note(f"{how}, {what}, hit at {k}, {against}", hit)
    name, step = run_of(folder, metadata)
    kind = "MLP" if config.connector == "mlp" else f"LangBridge, {config.normalize}"
    return {"name": name, "step": step, "llm": os.path.basename(config.llm), "connector": kind,
            "words": len(vlm.words or ()), "patches": side ** 2, "values": values, "tops": tops}


def compare(seen, first):
    """Add to `seen` how far its top words agree with those of `first`.

    The other measure is the agreement with the previous image of `first`.
    """
    if seen is first or seen["patches"] != first["patches"]:
        return
    for how in seen["tops"].keys() & first["tops"].keys():
        others = first["tops"][how]
        for k in TOP:
            for against, shift in (("same", 0), ("another", 1)):
                values = [agreement(words, others[n - shift], k)
                          for n, words in enumerate(seen["tops"][how])]
                seen["values"][f"{how}, agreement at {k}, {against} picture"] = values


def study(args):
    """Read every checkpoint, group the seeds, and return what study.json holds."""
    records = study_records(args)
    groups = {}
    for folder in args.checkpoints:                                 # one LLM in memory at a time
        seen = observe(folder, records, args.device, args.dtype)
        groups.setdefault((seen["name"], seen["step"]), []).append(seen)
        print(f"read {folder}", flush=True)
    first = next(iter(groups.values()))
    rows = []
    for seeds in groups.values():
        for n, seen in enumerate(seeds):
            compare(seen, first[min(n, len(first) - 1)])
        row = {key: seeds[0][key]
               for key in ("name", "step", "llm", "connector", "words", "patches")}
        row["seeds"] = len(seeds)
        row["values"] = {key: interval([seen["values"][key] for seen in seeds])
                         for key in seeds[0]["values"]}
        rows.append(row)
    return {"pictures": len(records), "data": os.path.basename(args.data), "rows": rows}


# --------------------------------------------------------------------------------------------------
# study.md and study.png

def label(row):
    """Return the name of a row."""
    return row["name"] if row["step"] is None else f"{row['name']}, step {row['step']}"


def field(row, measures, scale, digits):
    """Return a cell of a table: the first measure with its interval, then the other means."""
    found_values = [row["values"].get(measure) for measure in measures]
    if not all(found_values):
        return "–"
    texts = [[f"{scale * x:.{digits}f}" for x in value] for value in found_values]
    mean, low, high = texts[0]
    return " / ".join([f"{mean} [{low}, {high}]", *(text[0] for text in texts[1:])])


def table(rows, title, columns, scale=1, digits=3):
    """Return the lines of a table. columns: {head: list of measures, see field}.

    Rows without any value are left out, and so is a table without rows.
    """
    lines = []
    for row in rows:
        cells = [field(row, measures, scale, digits) for measures in columns.values()]
        if set(cells) != {"–"}:
            lines.append(f"| {label(row)} | {' | '.join(cells)} |")
    if not lines:
        return []
    head = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return ["", title, "", *head, *lines]


def study_tables(result):
    """Return study.md as a string."""
    rows = result["rows"]
    seeds = " and over seeds" if any(row["seeds"] > 1 for row in rows) else ""
    lines = [f"{result['pictures']} pictures of {result['data']}; mean and 95 % interval by "
             f"bootstrap over pictures{seeds}.", ""]
    for row in rows:
        words = f", {row['words']} words" if row["words"] else ""
        lines.append(f"- {label(row)}: {row['connector']} on {row['llm']}, {row['patches']} "
                     f"patches{words}, {row['seeds']} seed(s)")
    measures = ("top-1 cosine", "above random directions", "above shuffled pixels",
                "centred, above random directions", "entropy", "effective rank")
    lines += table(rows, "The nearest token of a patch by cosine similarity, and how spread its "
                   "weights are (bits; mixtures).", {measure: [measure] for measure in measures})
    against = ("right", "wrong picture", "chance")
    meanings = {"object": "name the object that covers the patch (shape or colour)",
                "caption": "stand in the picture's caption"}
    for what, meaning in meanings.items():
        for how in ("weights", "cosine"):
            columns = {f"{rate} at {k}": [f"{how}, {what}, {rate} at {k}, {x}" for x in against]
                       for rate in ("precision", "hit") for k in TOP}
            lines += table(rows, f"By {how}: percent of a patch's first words that {meaning}, and "
                           "of patches that have such a word among them (hit). Right picture / "
                           "another picture / words drawn blindly.", columns, 100, 1)
    columns = {f"{how}, at {k}": [f"{how}, agreement at {k}, {x} picture"
                                  for x in ("same", "another")]
               for how in ("weights", "cosine") for k in TOP}
    lines += table(rows, f"Agreement with {label(rows[0])}: percent of the words that two readings "
                   "of a patch have in common. Same picture / another.", columns, 100, 1)
    return "\n".join(lines) + "\n"


def plots_of(rows):
    """Return {title of a plot: measures that it shows}, only those that some row has."""
    plots = {"top-1 cosine": ["above random directions", "above shuffled pixels",
                              "centred, above random directions"],
             "entropy of the weights, bits": ["entropy"]}
    for what in ("object", "caption"):
        plots[f"first word: {what}, %"] = [f"{how}, {what}, precision at 1, {x}"
                                           for how in ("weights", "cosine")
                                           for x in ("right", "wrong picture")]
    plots["first 10 words as in the first row, %"] = [f"{how}, agreement at 10, {x} picture"
                                                      for how in ("weights", "cosine")
                                                      for x in ("same", "another")]
    known = {key for row in rows for key, value in row["values"].items() if value}
    plots = {title: [m for m in measures if m in known] for title, measures in plots.items()}
    return {title: measures for title, measures in plots.items() if measures}


def draw_measure(axis, rows, measure, offset, scale, style):
    """Draw one measure of all rows. The moments of one run are connected."""
    for name in dict.fromkeys(row["name"] for row in rows):
        at = [i for i, row in enumerate(rows)
              if row["name"] == name and row["values"].get(measure)]
        values = [rows[i]["values"][measure] for i in at]
        mean, low, high = scale * np.array(values).reshape(-1, 3).T
        # An interval of no width may lie beside the mean by rounding, and matplotlib refuses it.
        widths = np.maximum([mean - low, high - mean], 0)
        axis.errorbar(mean, np.array(at) + offset, xerr=widths, fmt="o:", **style)


def draw_study(result):
    """Return study.png as a Figure: a row for each checkpoint. Hollow marks: another image."""
    rows = result["rows"]
    plots = plots_of(rows)
    size = (3.3 * len(plots) + 1.5, 1.8 + 0.32 * len(rows))
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(1, len(plots), sharey=True, squeeze=False)[0]
    for axis, (title, measures) in zip(axes, plots.items()):
        percent = "%" in title
        for n, measure in enumerate(measures):
            how = measure.partition(",")[0]
            is_null = "wrong" in measure or "another" in measure
            colour = f"C{int(how == 'cosine')}" if percent else f"C{n}"
            style = {"ms": 4, "color": colour, "mfc": "white" if is_null else colour,
                     "alpha": 0.6 if is_null else 1}
            offset = 0.1 * (n - len(measures) / 2)
            draw_measure(axis, rows, measure, offset, 100 if percent else 1, style)
            text = how + (", another picture" if is_null else "") if percent else measure
            axis.plot([], [], "o", label=text, **style)
        axis.set_title(title, fontsize=9)
        axis.set_xlim(left=min(0, axis.get_xlim()[0]))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    axes[0].set_yticks(range(len(rows)), [label(row) for row in rows])
    axes[0].invert_yaxis()
    return figure


def main(args):
    out = args.out or os.path.join("out", "study")
    paths = [os.path.join(out, f"study.{kind}") for kind in ("json", "md", "png")]
    refuse_to_overwrite(paths, args)
    result = study(args)
    tables = study_tables(result)
    common.write_json(result, paths[0])
    common.write_text(tables, paths[1])
    save_figure(draw_study(result), paths[2])
    print(tables)
    print(f"wrote {', '.join(paths)}")


if __name__ == "__main__":
    common.run_script(main, ARGS)
