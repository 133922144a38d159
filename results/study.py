"""
Count over many images whether the words of the patches mean something.

    python results/study.py [NAME=]CHECKPOINT [...] --data captions.json --images DIR
        [--truth truth.json] [--out DIR]

The script measures how near the image embeds are to words, and how often the strongest word of a
patch names what the image shows. It writes DIR/study.json and study.md. NAME is the name of the
folder if none is given. Checkpoints of one name and number of steps are seeds of one row.
"""
import itertools
import math
import os
import sys
from collections import Counter, defaultdict

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch
import torch.nn.functional as F

import common
import data
from results.photos import content_words, entropy, load_named, plain
from support import pictures
from support.checks import refuse_files
from words import cosine_null, grid_patches, vocabulary

COVER = 1 / 3                   # part of a patch that an object's box must cover to give its name
# Words that name nothing that an image shows.
NO_THING = set("""a an and are as at be by for from has have he if in into is it its no of on or so
that the there this to with""".split())
# What is measured for each image. A share is the part of the patches whose strongest word names the
# object on the patch, or stands in the image's caption.
NEAR = ("top-1 cosine", "above random directions", "entropy")
SHARES = ("object, by weights", "object, by cosine", "caption, by weights", "caption, by cosine")
AGAINST = ("right picture", "another picture", "chance")


# --------------------------------------------------------------------------------------------------
# the numbers

def names_of_patches(objects, size, side, mode):
    """Return the possible names of each patch: side * side sets {shape, colour}, or empty sets.

    objects: [{"shape", "color", "box": [x0, y0, x1, y1]}] in pixels of an image of `size` (w, h),
    which pictures.transform shows to the tower in `mode`, "crop" or "pad". A patch belongs to the
    object whose box covers most of it, and at least COVER of it.
    """
    edge = min(size) if mode == "crop" else max(size)               # of the square that is seen
    unit = edge / side                                              # pixels along a patch
    names = []
    for row, column in np.ndindex(side, side):
        x = (size[0] - edge) / 2 + column * unit
        y = (size[1] - edge) / 2 + row * unit

        def cover(thing):
            x0, y0, x1, y1 = thing["box"]
            across = min(x1, x + unit) - max(x0, x)
            down = min(y1, y + unit) - max(y0, y)
            return max(across, 0) * max(down, 0) / unit ** 2

        thing = max(objects, key=cover, default=None)
        is_covered = thing is not None and cover(thing) >= COVER
        names.append({thing["shape"].lower(), thing["color"].lower()} if is_covered else set())
    return names


def shares_of(words, names, other_names, counts):
    """Return {one of AGAINST: part of the patches with names whose word is among the names}.

    words: the word of each patch. names: a set for each patch. other_names: the names of another
    image, which the words of this image should not find. counts: a Counter of the vocabulary, from
    which chance draws a word. NaN if no patch has a name.
    """
    # The other image's names go to the patches that have names here, one after another.
    others = itertools.cycle([wanted for wanted in other_names if wanted] or [set()])
    found = []
    for word, wanted in zip(words, names):
        if wanted:
            chance = sum(counts[name] for name in wanted) / counts.total()
            found.append((word in wanted, word in next(others), chance))
    return dict(zip(AGAINST, np.mean(found, 0).tolist() if found else [math.nan] * 3))


def interval_over_seeds(values, draws=2000):
    """Return [mean, low, high], a 95 % interval by bootstrap, or None if there is no value.

    values float[seeds, images], NaN for an image without a value. Images are drawn with
    replacement. Where there are several seeds, seeds are drawn, too. Each image counts equally. In
    photos.interval an image counts by its patches or bytes.
    """
    values = np.asarray(values, float)
    values = values[:, ~np.isnan(values).any(0)]
    if not values.size:
        return None
    generator = np.random.default_rng(0)
    S, N = values.shape
    rows = generator.integers(S, size=(draws, S, 1))
    columns = generator.integers(N, size=(draws, 1, N))
    means = values[rows, columns].mean((1, 2))                      # (draws, S, N) -> (draws,)
    return [float(values.mean()), *np.quantile(means, [0.025, 0.975]).tolist()]


# --------------------------------------------------------------------------------------------------
# reading checkpoints

def study_records(args):
    """Return [(image, words of its captions, its objects or None)] of the first args.number images.

    ValueError for fewer than two images, or for an image that --truth does not have.
    """
    captions = {}
    for _, record in data.read_records(args.data):
        messages, images = data.messages_of(record)
        if len(images) == 1 and (images[0] in captions or len(captions) < args.number):
            answers = " ".join(m["content"] for m in messages if m["role"] == "assistant")
            captions.setdefault(images[0], set()).update(content_words(answers, NO_THING))
    if len(captions) < 2:
        raise ValueError(f"a study needs two images or more: {len(captions)} of {args.data}, "
                         f"--number is {args.number}")
    truth = common.read_json(args.truth) if args.truth else dict.fromkeys(captions, {})
    absent = captions.keys() - truth.keys()
    if absent:
        raise ValueError(f"{args.truth} does not know {min(absent)}")
    return [(pictures.open_image(pictures.image_path(args.images, name)), caption,
             truth[name].get("objects")) for name, caption in captions.items()]


@torch.no_grad()
def observe(name, vlm, metadata, records):
    """Return a row of study.json for one checkpoint, with a number for each image under "values".

    Of raw scores the highest counts, because a word of negative score is taken from a patch.
    """
    mode = metadata.get("image_mode", "pad")
    side = math.isqrt(vlm.num_patches)
    tokens, E = vocabulary(vlm)
    E = F.normalize(E, dim=-1)
    null = cosine_null(E)
    vocabularies = {"cosine": [plain(word) for word in tokens],
                    "weights": [plain(word) for word in vlm.words or ()]}
    values = defaultdict(list)
    strongest = defaultdict(list)               # for each image the strongest word of each patch
    names = defaultdict(list)                   # for each image the possible names of each patch
    for image, caption, objects in records:
        names["caption"].append([caption] * side ** 2)
        if objects is not None:
            names["object"].append(names_of_patches(objects, image.size, side, mode))
        pixels = pictures.transform(image, mode=mode, **vlm.image_settings)         # (3, S, S)
        patches = grid_patches(vlm, pixels[None])                   # (1, P, Dv)
        embeds = vlm.connector(patches)[0].float()                  # (P, D)
        scores = {"cosine": F.normalize(embeds, dim=-1) @ E.T}      # (P, D) x (D, V) -> (P, V)
        nearest = scores["cosine"].amax(-1).mean().item()
        values["top-1 cosine"].append(nearest)
        values["above random directions"].append(nearest - null)
        if vlm.words:
            scores["weights"] = vlm.connector.weights(patches)[0]   # (P, K)
            values["entropy"].append(entropy(scores["weights"]).mean().item())
        for kind, score in scores.items():
            strongest[kind].append([vocabularies[kind][i] for i in score.argmax(-1).tolist()])

    for (kind, words), (what, wanted) in itertools.product(strongest.items(), names.items()):
        counts = Counter(vocabularies[kind])
        for n in range(len(records)):
            shares = shares_of(words[n], wanted[n], wanted[n - 1], counts)
            for against, share in shares.items():
                values[f"{what}, by {kind}: {against}"].append(share)
    kind = f"LangBridge, {vlm.config.normalize}" if vlm.words else "MLP"
    return {"name": name, "step": metadata.get("steps"), "llm": os.path.basename(vlm.config.llm),
            "connector": kind, "words": len(vlm.words or ()), "patches": side ** 2,
            "values": values}


def join_seeds(seeds):
    """Return the row of checkpoints that differ by their seed: an interval for each measure."""
    values = {measure: interval_over_seeds([row["values"][measure] for row in seeds])
              for measure in seeds[0]["values"]}
    return seeds[0] | {"values": values, "seeds": len(seeds)}


# --------------------------------------------------------------------------------------------------
# study.md

def cell(row, measures, scale, digits):
    """Return a cell of the table: the first measure with its interval, then the other means."""
    intervals = [row["values"].get(measure) for measure in measures]
    if not all(intervals):
        return "–"
    texts = [[f"{scale * x:.{digits}f}" for x in values] for values in intervals]
    first = "{} [{}, {}]".format(*texts[0])
    return " / ".join([first, *(text[0] for text in texts[1:])])


def study_table(result):
    """Return study.md as a string."""
    has_seeds = any(row["seeds"] > 1 for row in result["rows"])
    runs, table = [], []
    for row in result["rows"]:
        name = row["name"] if row["step"] is None else f"{row['name']}, step {row['step']}"
        words = f", {row['words']} words" if row["words"] else ""
        runs.append(f"- {name}: {row['connector']} on {row['llm']}, {row['patches']} patches"
                    f"{words}, {row['seeds']} seed(s)")
        cells = [cell(row, [measure], 1, 3) for measure in NEAR]
        cells += [cell(row, [f"{share}: {x}" for x in AGAINST], 100, 1) for share in SHARES]
        table.append(f"| {name} | {' | '.join(cells)} |")
    lines = [f"{result['pictures']} pictures of {result['data']}; mean and 95 % interval by "
             f"bootstrap over pictures{' and over seeds' * has_seeds}.", "", *runs, "",
             "Cosine similarity of a patch and its nearest token; entropy of the weights in "
             "bits; percent of the patches whose strongest word names the object that covers the "
             "patch (shape or colour), or stands in the picture's caption: right picture / "
             "another picture / words drawn blindly.", "",
             f"| | {' | '.join(NEAR + SHARES)} |", "|---" * (1 + len(NEAR + SHARES)) + "|", *table]
    return "\n".join(lines) + "\n"


def main(argv=None):
    parser = common.argument_parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="[NAME=]CHECKPOINT", help="in the order of the rows")
    add("--data", metavar="FILE", required=True, help="captions in LLaVA's format")
    add("--images", metavar="DIR", required=True, help="the folder of their images")
    add("--truth", metavar="FILE", help="{image: {objects}}, as pocket.py writes it")
    add("--number", type=int, default=100, help="number of images (default: 100)")
    add("--out", metavar="DIR", default="out/study", help="folder to write (default: out/study)")
    add("--overwrite", action="store_true", help="replace the files in --out")
    args = parser.parse_args(argv)
    paths = [f"{args.out}/study.json", f"{args.out}/study.md"]
    refuse_files(paths, args.overwrite)
    records = study_records(args)
    groups = defaultdict(list)
    for name, vlm, metadata in load_named(args.checkpoints):
        row = observe(name, vlm, metadata, records)
        groups[row["name"], row["step"]].append(row)
        print(f"read {name}", flush=True)
    result = {"pictures": len(records), "data": os.path.basename(args.data),
              "rows": [join_seeds(seeds) for seeds in groups.values()]}
    table = study_table(result)
    common.write_json(result, paths[0])
    common.write_text(table, paths[1])
    print(f"{table}\nwrote {', '.join(paths)}")


if __name__ == "__main__":
    common.run_script(main)
