"""
An image as words: what each patch of an image says to the LLM, as a picture, as a page, and as numbers.

    python words.py CHECKPOINT [CHECKPOINT ...] IMAGE [--out DIR] [--ask "What is this?"] [--top 8]

writes DIR/words.png and DIR/words.html, a page that needs no network. A LangBridge shows its own weights: softmax weights,
or raw scores, whose words have signs and are shown at both ends. Any connector, an MLP too, shows the cosine similarity of
its image embeds to every ordinary token of the LLM's vocabulary (the paper's analysis), with what chance would give.
Checkpoints on the same LLM (snapshots of a run, pretraining then SFT) become a slider, different LLMs stand side by side.

    python words.py --study CHECKPOINT [...] --data captions.json --images DIR [--truth truth.json] [--out DIR]

counts instead: over many pictures, how far the words are from chance and how often they name what the picture shows ->
DIR/study.json, study.md and study.png. Folders of one name and step (seed1/LB seed2/LB) are seeds of one row; steps/000100
of a run is that run at step 100; the first checkpoint is the one that the others are compared with.
"""
import argparse
import base64
import functools
import io
import json
import math
import os
import re
import sys
from collections import Counter

import checkpoint
import common
from generate import generate
import vocab

KEEP = 16                       # words that a patch keeps, in each mode and at each end
MAP_BYTES = 2_000_000           # of all heat maps of a page; the weakest words only show where a list has them
PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "words.html.in")
TOP = (1, 5, 10)                # the study: so many of a patch's strongest words are looked at
COVER = 1 / 3                   # part of a patch that an object's box must cover for the patch to be the object's
SMALL = frozenset("and are for from has have into its that the there this with".split())    # words that name nothing
PAPER, INK, WHITE = (252, 251, 248), (24, 24, 28), (255, 255, 255)


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT",
                        help="checkpoint folders, in the order of training; then, but for --study, a picture file")
    parser.add_argument("--out", metavar="DIR", help="folder to write (default: out/words/IMAGE or out/study)")
    parser.add_argument("--study", action="store_true", help="count over many pictures instead of showing one")
    parser.add_argument("--data", metavar="FILE", help="of the study: captions in LLaVA's format")
    parser.add_argument("--images", metavar="DIR", help="of the study: the folder that its image paths start from")
    parser.add_argument("--truth", metavar="FILE", help="of the study: {image: {objects}}, as pocket.py writes it")
    parser.add_argument("--number", type=int, default=100, help="of the study: how many pictures (default: 100)")
    parser.add_argument("--ask", metavar="QUESTION", help="have each checkpoint answer a question about the image")
    parser.add_argument("--top", type=int, default=8, help=f"words shown for a patch, 1 to {KEEP} (default: 8)")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--offline", action="store_true", help=common.OFFLINE)
    args = parser.parse_args()
    if args.study and not (args.data and args.images and args.number > 0):
        parser.error("--study needs --data, --images and a --number above 0")
    if not args.study and len(args.checkpoints) < 2:
        parser.error("give one or more checkpoints and then a picture")
    args.image = None if args.study else args.checkpoints.pop()
    return args


if __name__ == "__main__":                   # before the slow imports: --help answers at once
    ARGS = read_arguments()
    if ARGS.offline:
        common.go_offline()

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import data


# ----------------------------------------------------------------------------------------------------------------------
# the numbers: tensors in, tensors out

def entropy(w):
    """Bits of the weights of each patch: float[P, K] -> float[P]. 2 to this power is how many words it is like.

    Raw scores enter by their absolute value, as a share of the row's sum."""
    p = w.abs() / w.abs().sum(-1, keepdim=True)
    return -torch.special.xlogy(p, p).sum(-1) / math.log(2)


def effective_rank(w):
    """How many different mixtures the patches are: float[P, K] -> float from 1 to P.

    exp of the entropy of the normalised singular values (Roy and Vetterli 2007, "The effective rank")."""
    s = torch.linalg.svdvals(w.double())
    p = s / s.sum()
    return torch.special.xlogy(p, p).sum().neg().exp().item()


def contribution(w, E, embeds, chosen):
    """The part of each embedding that the chosen words bring in: float[P]; over all words it adds up to 1.

    w float[P, K], E float[K, D], embeds = w @ E float[P, D], chosen int64[P, n]. A word brings w_k E_k, of which the part
    along the embedding counts: w_k <E_k, v> / <v, v>. With raw scores words cancel each other and it can leave 0..1."""
    along = torch.einsum("pnd,pd->pn", E[chosen], embeds)           # (P, n, D) x (P, D) -> (P, n)
    return (w.gather(1, chosen) * along).sum(-1) / embeds.square().sum(-1)


def span_share(E, embeds, chosen):
    """The part of each embedding's squared norm that the best mixture of the chosen words reaches: float[P] in 0..1.

    E float[K, D], embeds float[P, D], chosen int64[P, n]. n random words reach about n / D."""
    rows = E[chosen]                                                # (P, n, D)
    mix = torch.einsum("pd,pdn->pn", embeds, torch.linalg.pinv(rows))
    reached = torch.einsum("pn,pnd->pd", mix, rows)
    return reached.square().sum(-1) / embeds.square().sum(-1)


def cosine(embeds, E):
    """Cosine similarity: embeds float[P, D], E float[V, D] -> float[P, V]"""
    return F.normalize(embeds, dim=-1) @ F.normalize(E, dim=-1).T


def cosine_null(E, directions=128, seed=0):
    """The best cosine similarity that a random direction finds in E, on average: float. What chance gives."""
    random = torch.randn(directions, E.shape[1], generator=torch.Generator().manual_seed(seed))
    return cosine(random.to(E), E).amax(-1).mean().item()


def vocabulary(vlm):
    """Every ordinary token of the LLM: (list of V words, its input embeddings float32[V, D])"""
    ids = vocab.tokenizer_words(vlm.tokenizer)
    embed = vlm.llm.get_input_embeddings()
    return list(ids), embed(torch.tensor(list(ids.values()), device=embed.weight.device)).float()


def loudness(kind, value, size, null):
    """How much a patch's strongest word stands out, 0..1: value float[P] of size words.

    softmax: bits above an even spread, as a part of all there are, squared; raw scores: against the image's strongest;
    cosine: above chance, against the image's best, but no picture of chance level becomes loud by that."""
    if kind == "softmax":
        return (1 + (value.clamp(min=1 / size)).log() / math.log(max(size, 2))).square()
    if kind == "none":
        return value.abs() / value.abs().max().clamp(min=1e-12)
    return ((value - null) / max(value.max().item() - null, 0.1)).clamp(0, 1)


def make_mode(kind, words, scores, top, null=0.0):
    """Scores of every word, float32[P, K], cut down to the words that are among the KEEP strongest of some patch.

    -> {"kind", "size": K, "null", "words": U strings, "values": float32[P, U], "high": int64[P, <= KEEP] columns of
    values, strongest first, "low": the same from the other end for raw scores, else None, "loud": float[P]}, "chosen":
    the top words of each patch, as columns of scores}"""
    keep = min(KEEP, len(words))
    ends = [scores.topk(keep, largest=largest).indices for largest in ((True, False) if kind == "none" else (True,))]
    used, columns = torch.unique(torch.stack(ends), return_inverse=True)             # (U,), (ends, P, keep)
    values = scores[:, used]
    return {"kind": kind, "size": len(words), "null": null, "words": [words[i] for i in used.tolist()], "values": values,
            "high": columns[0], "low": columns[1] if kind == "none" else None,
            "loud": loudness(kind, values.gather(1, columns[0][:, :1])[:, 0], len(words), null),
            "chosen": torch.cat([end[:, :top] for end in ends], 1)}


@torch.no_grad()
def read(vlm, pixels, top=8):
    """One image, float32[3, S, S], as words -> {"weights": mode (LangBridge only), "cosine": mode}, see make_mode.

    Each mode also has "share" float[P], see contribution and span_share, and "weights" has "entropy" float[P], "rank".
    The tensors are for people and files: they are on the CPU, whatever the model is on."""
    patches = vlm.patch_features(pixels[None]).float()              # (1, P, Dv)
    embeds = vlm.connector(patches)[0].float()                      # (P, D)
    modes = {}
    if vlm.words:
        w, E = vlm.connector.weights(patches)[0].cpu(), vlm.connector.vocab_embeds.float().cpu()
        modes["weights"] = mode = make_mode("none" if vlm.connector.normalize == "none" else "softmax", vlm.words, w, top)
        mode.update(entropy=entropy(w), rank=effective_rank(w))
        if vlm.connector.normalize == "unit":                       # what is added up there: see model.combine
            w, E = F.normalize(w, dim=-1), E - E.mean(0)
        mode["share"] = contribution(w, E, embeds.cpu(), mode["chosen"])
    tokens, E = vocabulary(vlm)
    modes["cosine"] = mode = make_mode("cosine", tokens, cosine(embeds, E).cpu(), top, cosine_null(E))
    mode["share"] = span_share(E, embeds, mode["chosen"].to(E.device)).cpu()
    return modes


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints

def square(image, mode, mean, side):
    """PIL RGB -> the square that data.transform shows the vision tower, side x side pixels, for people to look at"""
    w, h = image.size
    scale = side / (min(w, h) if mode == "crop" else max(w, h))
    w, h = max(1, round(w * scale)), max(1, round(h * scale))
    canvas = Image.new("RGB", (side, side), tuple(int(m * 255) for m in mean))
    canvas.paste(image.resize((w, h), Image.Resampling.BICUBIC), ((side - w) // 2, (side - h) // 2))
    return canvas


def state_of(folder, image, image_mode, ask, top, device=None, dtype="float32"):
    """Load a checkpoint and read the image with it. -> a state, a dict: "label" says which moment of training, "name" which
    LLM; "modes", see read; "side", patches along one side of the image; "answer" to the question `ask`, or None.
    States of one "group" are one connector kind on one LLM."""
    config, whole = checkpoint.read_config(folder)
    vlm = checkpoint.load(folder, common.choose_device(device, most=1), getattr(torch, dtype))
    pixels = data.transform(image, mode=image_mode, **vlm.image_settings).to(vlm.llm.device)
    step = re.fullmatch(r"0*(\d+)", os.path.basename(os.path.normpath(folder)))      # train.py --snapshots: steps/000100
    state = {"label": f"{whole['stage']}, step {step[1]}" if step else whole["stage"],
             "name": os.path.basename(os.path.normpath(config.llm)), "connector": config.connector,
             "group": (config.connector, config.normalize, whole["embeddings_hash"], whole["words_hash"]),
             "modes": read(vlm, pixels, top), "side": math.isqrt(vlm.num_patches), "mean": vlm.image_settings["mean"], "answer": None}
    if ask:
        messages = [{"role": "user", "content": f"<image>\n{ask}"}]
        ids = data.encode_prompt(messages, vlm.tokenizer, vlm.num_patches, whole.get("template", "chat"))
        answer = generate(vlm, [ids], pixels[None], max_new_tokens=64)[0]
        state["answer"] = vlm.tokenizer.decode(answer, skip_special_tokens=True).strip()
    return state


def panels_of(states):
    """Group states: [{"name", "states"}], one panel for each LLM and connector, a state for each moment of its training"""
    panels = {}
    for state in states:
        panels.setdefault(state["group"], []).append(state)
    kinds = {(s[0]["connector"], s[0]["modes"].get("weights", {}).get("kind")) for s in panels.values()}
    names = {("mlp", None): "MLP", ("langbridge", "softmax"): "LangBridge", ("langbridge", "none"): "LangBridge, raw"}
    result = []
    for s in panels.values():
        kind = names[s[0]["connector"], s[0]["modes"].get("weights", {}).get("kind")]
        result.append({"name": f"{s[0]['name']} · {kind}" if len(kinds) > 1 else s[0]["name"], "states": s})
    return result


# ----------------------------------------------------------------------------------------------------------------------
# words.png

@functools.cache
def system_fonts():
    """Font files of this machine, upright ones of no special purpose first"""
    from matplotlib.font_manager import findSystemFonts
    odd = re.compile("bold|italic|oblique|mono|serif|condensed|black|thin|light|display|color|emoji", re.I)
    return sorted(findSystemFonts(), key=lambda f: (bool(odd.search(os.path.basename(f))), "Noto" not in f, f))


@functools.cache
def covered(path):
    """Code points that a font file has a glyph for; none for a file that cannot be read or has only bitmaps"""
    from matplotlib.ft2font import FT2Font
    try:
        ImageFont.truetype(path, 20)
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


@functools.cache
def font_for(text):
    """The first font file that has every character of text, or None. DejaVu Sans, which matplotlib brings along, first."""
    from matplotlib import get_data_path
    need, own = frozenset(map(ord, text)), f"{get_data_path()}/fonts/ttf/DejaVuSans-Bold.ttf"
    return own if need <= covered(own) else next((f for f in system_fonts() if need <= covered(f)), None)


@functools.cache
def runs_of(text):
    """[(font file, text)]: in one piece if one font has it all, else by character, <U+4E2D> where no font has it"""
    if font_for(text):
        return [(font_for(text), text)]
    parts = [c if font_for(c) else f"<U+{ord(c):04X}>" for c in text]
    return [(font_for(p), p) for p in parts]


@functools.cache
def truetype(path, size):
    return ImageFont.truetype(path, size)


def width_of(text, size):
    return sum(truetype(path, size).getlength(part) for path, part in runs_of(text))


def bare(shown):
    """A word as it stands on a patch: without the marks of its spaces, unless it is nothing else"""
    return shown.strip("␣") or shown


def fit(text, size, width):
    """(text, size) such that the text is at most width pixels long: smaller down to 8 pixels, then cut off"""
    size = min(size, size * width / max(width_of(text, max(int(size), 8)), 1))
    while size < 8 and len(text) > 2 and width_of(text, 8) > width:
        text = text.rstrip("…")[:-1] + "…"
    return text, max(int(size), 8)


def put(draw, text, size, center, fill, stroke=0):
    """Write text around the middle of a line, in as many fonts as it needs"""
    x, y = center[0] - width_of(text, size) / 2, center[1] + 0.36 * size
    for path, part in runs_of(text):
        draw.text((x, y), part, font=truetype(path, size), fill=fill, anchor="ls", stroke_width=stroke)
        x += truetype(path, size).getlength(part)


def labels_of(mode, i):
    """What stands on patch i: [(text, 0..1 how loud)], the strongest word, or for raw scores the highest and the lowest"""
    if mode["low"] is None:
        return [(bare(vocab.show(mode["words"][mode["high"][i, 0]])), mode["loud"][i].item())]
    strongest = mode["values"].abs().max().clamp(min=1e-12)
    return [(sign + bare(vocab.show(mode["words"][end[i, 0]])), (mode["values"][i, end[i, 0]].abs() / strongest).item())
            for sign, end in (("+", mode["high"]), ("−", mode["low"]))]


def draw_state(state, picture, cell):
    """The picture with its grid and the strongest word of each patch (raw scores: both ends) -> PIL RGB"""
    g, mode = state["side"], next(iter(state["modes"].values()))
    image = picture.resize((g * cell, g * cell), Image.Resampling.BICUBIC)
    grid, glow = ImageDraw.Draw(image, "RGBA"), Image.new("L", image.size)
    letters = {ink: Image.new("L", image.size) for ink in (INK, WHITE)}     # text drawn on RGB would ignore its opacity
    for i in range(1, g):
        for line in ((i * cell, 0, i * cell, g * cell), (0, i * cell, g * cell, i * cell)):
            grid.line(line, fill=(*WHITE, 60))
    for i, colour in enumerate(patch_colours(picture, g)):
        labels = labels_of(mode, i)
        for n, (text, loud) in enumerate(labels):
            # A word of up to six letters has the size that its weight gives it; only a longer one has to shrink.
            text, size = fit(text, cell * (0.13 + 0.12 * loud) / len(labels) ** 0.3, 0.94 * cell)
            center = ((i % g + 0.5) * cell, (i // g + (n + 0.5) / len(labels) * 0.8 + 0.1) * cell)
            ink = INK if luminance(colour) > 0.18 else WHITE
            put(ImageDraw.Draw(letters[ink]), text, size, center, int(255 * (0.65 + 0.35 * loud)))
            put(ImageDraw.Draw(glow), text, size, center, 255, stroke=max(2, size // 4))
    # Behind the letters the picture fades into the mean colour of their patch, against which the ink was chosen.
    flat = picture.resize((g, g), Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)
    image.paste(flat, mask=glow.filter(ImageFilter.GaussianBlur(cell / 40)).point(lambda v: min(235, 2 * v)))
    for ink, mask in letters.items():
        image.paste(ink, mask=mask)
    return image


def patch_colours(picture, g):
    """Mean colour of each patch: g * g tuples of R, G, B in 0..255"""
    return [tuple(c) for c in np.asarray(picture.resize((g, g), Image.Resampling.BOX)).reshape(-1, 3).tolist()]


def luminance(colour):
    """Relative luminance 0..1 as WCAG 2 defines it; above 0.18 dark ink has the better contrast"""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (c / 255 for c in colour))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def draw_picture(panels, picture):
    """words.png: a row for each panel, a column for each of its states, a line of explanation below each -> PIL RGB"""
    g = panels[0]["states"][0]["side"]
    columns = max(len(panel["states"]) for panel in panels)
    cell = min(192, max(72, (1024 if columns < 3 else 512) // g))   # a film of training has smaller frames
    across = len(panels) > 1 and columns == 1                       # single states stand side by side
    side, gap = g * cell, 28
    band = min(72, max(54, side // 18))
    cols, rows = (len(panels), 1) if across else (columns, len(panels))
    sheet = Image.new("RGB", (cols * (side + gap) - gap, rows * (side + band)), PAPER)
    draw = ImageDraw.Draw(sheet, "RGBA")
    for p, panel in enumerate(panels):
        for s, state in enumerate(panel["states"]):
            x, y = (p if across else s) * (side + gap), (0 if across else p) * (side + band)
            sheet.paste(draw_state(state, picture, cell), (x, y))
            kind = next(iter(state["modes"].values()))["kind"]
            what = {"softmax": "the word of most weight", "none": "the highest and the lowest score",
                    "cosine": "the nearest token by cosine"}[kind]
            text, size = fit(f"{panel['name']}, {state['label']}: {what} in each patch", 0.36 * band, side - 16)
            put(draw, text, size, (x + side / 2, y + side + band / 2), (*INK, 170))
    return sheet


# ----------------------------------------------------------------------------------------------------------------------
# words.html

def rounded(tensor):
    """Numbers of three significant digits in a flat list, for JSON"""
    return [float(f"{x:.3g}") for x in tensor.flatten().tolist()]


def page_mode(mode, index, maps):
    """A mode as the page wants it. index: {word shown: its number}, filled here; maps: how many words get a heat map."""
    number = [index.setdefault(vocab.show(word), len(index)) for word in mode["words"]]
    top = torch.cat([mode["high"]] + ([mode["low"]] if mode["low"] is not None else []), 1)          # (P, n)
    peaks = mode["values"].abs().amax(0)                            # (U,)
    mapped = peaks.argsort(descending=True, stable=True)[:maps]
    levels = (mode["values"][:, mapped] / peaks[mapped].clamp(min=1e-12) * 127).round()               # (P, maps) in -127..127
    return {"kind": mode["kind"], "size": mode["size"], "null": float(f"{mode['null']:.3g}"), "stride": top.shape[1],
            "ids": [number[i] for i in top.flatten().tolist()], "values": rounded(mode["values"].gather(1, top)),
            "loud": rounded(mode["loud"]), "share": rounded(mode["share"]),
            **({"entropy": rounded(mode["entropy"]), "rank": round(mode["rank"], 1)} if "entropy" in mode else {}),
            "mapped": [number[i] for i in mapped.tolist()], "peaks": rounded(peaks[mapped]),
            "maps": base64.b64encode(levels.T.contiguous().to(torch.int8).numpy().tobytes()).decode()}


def make_page(panels, picture, name, ask, top):
    """words.html as a string. Everything that comes from outside is in one JSON block and reaches the page as text."""
    side = panels[0]["states"][0]["side"]
    count = sum(len(state["modes"]) for panel in panels for state in panel["states"])
    maps, index = MAP_BYTES // count // side ** 2, {}
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=88)
    content = {"image": "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode(), "name": name, "ask": ask,
               "side": side, "top": top, "colours": ["#%02x%02x%02x" % c for c in patch_colours(picture, side)],
               "panels": [{"name": panel["name"], "states": [{
                   "label": state["label"], "answer": state["answer"],
                   "modes": {key: page_mode(mode, index, maps) for key, mode in state["modes"].items()}}
                   for state in panel["states"]]} for panel in panels]}
    content["words"] = list(index)
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    # Within <script> only "<" can end or open anything; the two separators are line ends to old JavaScript.
    for c in "<>&\u2028\u2029":
        text = text.replace(c, f"\\u{ord(c):04x}")
    with open(PAGE, encoding="utf-8") as f:
        return f.read().replace("@DATA@", text)


# ----------------------------------------------------------------------------------------------------------------------
# the study: do the words mean something, and is it more than chance?

def plain(word):
    """A canonical word as a reader compares it: "ĠRed" -> "red" """
    return vocab.show(word).strip("␣").lower()


def content_words(text):
    """The words of a caption, lower case, that can name something: three letters or more and not in SMALL. -> set"""
    return set(re.findall(r"[^\W\d_]{3,}", text.lower())) - SMALL


def names_of_patches(objects, size, side, mode):
    """What each patch could be called: side * side sets {shape, colour}, empty where no object is.

    objects: [{"shape", "color", "box": [x0, y0, x1, y1]}], pixels of a picture of size (w, h) that data.transform shows
    the tower in `mode`. A patch belongs to the object whose box covers most of it, and at least COVER."""
    edge = min(size) if mode == "crop" else max(size)               # of the square that the tower sees
    left, top, unit = (size[0] - edge) / 2, (size[1] - edge) / 2, edge / side

    def share(thing, r, c):
        x0, y0, x1, y1 = thing["box"]
        across = min(x1, left + (c + 1) * unit) - max(x0, left + c * unit)
        down = min(y1, top + (r + 1) * unit) - max(y0, top + r * unit)
        return max(across, 0) * max(down, 0) / unit ** 2

    names = []
    for r, c in np.ndindex(side, side):
        thing = max(objects, key=lambda o: share(o, r, c), default=None)
        covers = thing and share(thing, r, c) >= COVER
        names.append({thing["shape"].lower(), thing["color"].lower()} if covers else set())
    return names


def found(tops, names, k):
    """(precision, hit rate) of the first k words of each patch, over the patches that have names; NaN where none has.

    tops: for each patch its words, strongest first; names: for each patch a set. Precision: the part of the k words
    that are names; hit: whether one of them is."""
    right = [[word in wanted for word in top[:k]] for top, wanted in zip(tops, names) if wanted]
    if not right:
        return math.nan, math.nan
    return sum(sum(r) / len(r) for r in right) / len(right), sum(map(any, right)) / len(right)


def found_by_chance(counts, names, k):
    """What `found` gives for k words drawn blindly, without replacement, on average. counts: Counter of all words"""
    size, rates = counts.total(), []
    for wanted in filter(None, names):
        m = sum(counts[word] for word in wanted)
        rates.append((m / size, 1 - math.comb(size - m, min(k, size)) / math.comb(size, min(k, size))))
    return tuple(np.mean(rates, 0).tolist()) if rates else (math.nan, math.nan)


def borrowed(names, others):
    """Another picture's names on the named patches of this one: what words find that would fit any picture"""
    pool = [n for n in others if n]
    spots = [i for i, n in enumerate(names) if n] if pool else []
    return [pool[spots.index(i) % len(pool)] if i in spots else set() for i in range(len(names))]


def agreement(tops, others, k):
    """How much of the first k words two readings of the same patches share: mean of |both| / |either| over patches"""
    shares = [len({*a[:k]} & {*b[:k]}) / len({*a[:k]} | {*b[:k]}) for a, b in zip(tops, others)]
    return sum(shares) / len(shares)


def interval(values, draws=2000, seed=0):
    """[mean, low, high], a 95 % interval by bootstrap: values float[seeds, pictures], NaN where a picture has nothing.

    Pictures are drawn with replacement and, where there are several, seeds too. None if there is nothing at all."""
    values = np.asarray(values, float)
    values = values[:, ~np.isnan(values).any(0)]
    if not values.size:
        return None
    dice, (S, N) = np.random.default_rng(seed), values.shape
    rows, columns = dice.integers(S, size=(draws, S, 1)), dice.integers(N, size=(draws, 1, N))
    means = values[rows, columns].mean((1, 2))                      # (draws, S, N) -> (draws,)
    return [float(values.mean()), *np.quantile(means, [0.025, 0.975]).tolist()]


def of_run(folder, whole):
    """(name of the run, step or None) of a checkpoint folder: steps/000100 belongs to the run two folders above"""
    path = os.path.abspath(folder)
    step = re.fullmatch(r"0*(\d+)", os.path.basename(path))
    if step:
        return os.path.basename(path.rsplit(os.sep, 2)[0]), int(step[1])
    return os.path.basename(path), whole.get("steps")


def study_records(args):
    """[(picture, words of its captions, its objects or None)]: the first args.number different images of args.data"""
    truth = common.read_json(args.truth) if args.truth else None
    captions = {}
    for record in vocab.read_records(args.data):
        messages, images = data.messages_of(record)
        if len(images) == 1 and (images[0] in captions or len(captions) < args.number):
            said = content_words(" ".join(m["content"] for m in messages if m["role"] == "assistant"))
            captions[images[0]] = captions.get(images[0], set()) | said
    if len(captions) < 2:
        raise ValueError(f"a study needs two pictures or more: {len(captions)} of {args.data}, --number is {args.number}")
    missing = [name for name in captions if truth is not None and name not in truth]
    if missing:
        raise ValueError(f"{args.truth} does not know {missing[0]}")
    return [(data.open_image(data.image_path(args.images, name)), said, truth and truth[name]["objects"])
            for name, said in captions.items()]


@torch.no_grad()
def observe(folder, records, device=None, dtype="float32"):
    """All that is counted of a checkpoint -> {"name", "step", "llm", "connector", "words": K, "patches": P, "values":
    {what: a number for each picture}, "tops": {"weights" (LangBridge only), "cosine": for each picture and patch the
    strongest words}}. Of raw scores the highest count: a word of negative score is taken away from a patch."""
    config, whole = checkpoint.read_config(folder)
    vlm = checkpoint.load(folder, common.choose_device(device, most=1), getattr(torch, dtype))
    mode, side = whole.get("image_mode", "pad"), math.isqrt(vlm.num_patches)
    tokens, E = vocabulary(vlm)
    centred = F.normalize(E - E.mean(0), dim=-1)
    E = F.normalize(E, dim=-1)
    null, null_centred = cosine_null(E), cosine_null(centred)
    names = {"cosine": [plain(word) for word in tokens], "weights": [plain(word) for word in vlm.words or ()]}

    def strongest(how, scores):
        return [[names[how][i] for i in row] for row in scores.topk(min(max(TOP), scores.shape[1])).indices.tolist()]

    values, tops, embeds = {}, {"cosine": []}, []
    note = lambda what, value: values.setdefault(what, []).append(value)
    for n, (picture, _, _) in enumerate(records):
        pixels = data.transform(picture, mode=mode, **vlm.image_settings)    # (3, S, S)
        mixed = torch.randperm(pixels[0].numel(), generator=torch.Generator().manual_seed(n))
        mixed = pixels.flatten(1)[:, mixed].view_as(pixels)         # the same pixels, no picture
        patches = vlm.patch_features(torch.stack([pixels, mixed]).to(vlm.llm.device)).float()        # (2, P, Dv)
        seen, blank = vlm.connector(patches).float()                # (P, D) each
        embeds.append(seen)
        similar = F.normalize(seen, dim=-1) @ E.T                   # (P, D) x (D, V) -> (P, V)
        best = similar.amax(-1).mean().item()
        note("top-1 cosine", best)
        note("above random directions", best - null)
        note("above shuffled pixels", best - cosine(blank, E).amax(-1).mean().item())
        tops["cosine"].append(strongest("cosine", similar))
        if vlm.words:
            w = vlm.connector.weights(patches[:1])[0]               # (P, K)
            note("entropy", entropy(w).mean().item())
            note("effective rank", effective_rank(w))
            tops.setdefault("weights", []).append(strongest("weights", w))
    middle = torch.cat(embeds).mean(0)                              # what all patches share is neither found nor missed
    for seen in embeds:
        best = cosine(seen - middle, centred).amax(-1).mean().item()
        note("centred, above random directions", best - null_centred)

    wanted = {"caption": [[said] * vlm.num_patches for _, said, _ in records]}
    if records[0][2] is not None:
        wanted["object"] = [names_of_patches(objects, picture.size, side, mode) for picture, _, objects in records]
    for how, picture_tops in tops.items():
        counts = Counter(names[how])
        for what, patch_names in wanted.items():
            for n, (words, named) in enumerate(zip(picture_tops, patch_names)):
                other = borrowed(named, patch_names[n - 1])
                for k in TOP:
                    for against, (precision, hit) in (("right", found(words, named, k)),
                                                      ("wrong picture", found(words, other, k)),
                                                      ("chance", found_by_chance(counts, named, k))):
                        note(f"{how}, {what}, precision at {k}, {against}", precision)
                        note(f"{how}, {what}, hit at {k}, {against}", hit)
    name, step = of_run(folder, whole)
    kind = "MLP" if config.connector == "mlp" else f"LangBridge, {config.normalize}"
    return {"name": name, "step": step, "llm": os.path.basename(config.llm), "connector": kind,
            "words": len(vlm.words or ()), "patches": vlm.num_patches, "values": values, "tops": tops}


def compare(seen, first):
    """Adds to `seen` how much its top words agree with those of `first`, and with those of first's previous picture."""
    for how in seen["tops"].keys() & first["tops"].keys():
        mine, theirs = seen["tops"][how], first["tops"][how]
        for k in TOP if seen["patches"] == first["patches"] and seen is not first else ():
            for against, shift in (("same", 0), ("another", 1)):
                seen["values"][f"{how}, agreement at {k}, {against} picture"] = [
                    agreement(words, theirs[n - shift], k) for n, words in enumerate(mine)]


def study(args):
    """Read every checkpoint, group seeds -> what study.json holds."""
    records, groups = study_records(args), {}
    for folder in args.checkpoints:                                 # one LLM in memory at a time
        seen = observe(folder, records, args.device, args.dtype)
        groups.setdefault((seen["name"], seen["step"]), []).append(seen)
        print(f"read {folder}", flush=True)
    first, rows = next(iter(groups.values())), []
    for seeds in groups.values():
        for n, seen in enumerate(seeds):
            compare(seen, first[min(n, len(first) - 1)])
        what = seeds[0]["values"]
        about = {key: seeds[0][key] for key in ("name", "step", "llm", "connector", "words", "patches")}
        rows.append({**about, "seeds": len(seeds),
                     "values": {key: interval([seen["values"][key] for seen in seeds]) for key in what}})
    return {"pictures": len(records), "data": os.path.basename(args.data), "rows": rows}


def study_tables(result):
    """study.md"""
    rows = result["rows"]
    lines = [f"{result['pictures']} pictures of {result['data']}; mean and 95 % interval by bootstrap over pictures"
             + (" and over seeds." if any(row["seeds"] > 1 for row in rows) else "."), ""]
    for row in rows:
        lines.append(f"- {label(row)}: {row['connector']} on {row['llm']}, {row['patches']} patches"
                     + (f", {row['words']} words" if row["words"] else "") + f", {row['seeds']} seed(s)")

    def table(title, columns, scale=1, digits=3):
        """columns: {head: what a field shows, the first with its interval}. Rows and tables of nothing are left out."""
        def field(row, whats):
            found = [[f"{scale * x:.{digits}f}" for x in row["values"].get(what) or ()] for what in whats]
            if not all(found):
                return "–"
            (mean, low, high), others = found[0], found[1:]
            return " / ".join([f"{mean} [{low}, {high}]", *(other[0] for other in others)])

        fields = {label(row): [field(row, whats) for whats in columns.values()] for row in rows}
        fields = {name: cells for name, cells in fields.items() if set(cells) != {"–"}}
        if fields:
            lines.extend(["", title, "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"])
            lines.extend(f"| {name} | {' | '.join(cells)} |" for name, cells in fields.items())

    table("The nearest token of a patch by cosine similarity, and how spread its weights are (bits; mixtures).",
          {what: [what] for what in ("top-1 cosine", "above random directions", "above shuffled pixels",
                                     "centred, above random directions", "entropy", "effective rank")})
    against = ("right", "wrong picture", "chance")
    for what, said in (("object", "name the object that covers the patch (shape or colour)"),
                       ("caption", "stand in the picture's caption")):
        for how in ("weights", "cosine"):
            table(f"By {how}: percent of a patch's first words that {said}, and of patches that have such a word among "
                  "them (hit). Right picture / another picture / words drawn blindly.",
                  {f"{rate} at {k}": [f"{how}, {what}, {rate} at {k}, {x}" for x in against]
                   for rate in ("precision", "hit") for k in TOP}, 100, 1)
    table(f"Agreement with {label(rows[0])}: percent of the words that two readings of a patch have in common. "
          "Same picture / another.",
          {f"{how}, at {k}": [f"{how}, agreement at {k}, {x} picture" for x in ("same", "another")]
           for how in ("weights", "cosine") for k in TOP}, 100, 1)
    return "\n".join(lines) + "\n"


def label(row):
    return row["name"] if row["step"] is None else f"{row['name']}, step {row['step']}"


def draw_study(result, path):
    """study.png: checkpoints from top to bottom, moments of one run connected; hollow: what another picture gives"""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows, both = result["rows"], ("weights", "cosine")
    panels = {"top-1 cosine": ["above random directions", "above shuffled pixels", "centred, above random directions"],
              "entropy of the weights, bits": ["entropy"]}
    for what in ("object", "caption"):
        panels[f"first word: {what}, %"] = [f"{how}, {what}, precision at 1, {x}" for how in both
                                            for x in ("right", "wrong picture")]
    panels["first 10 words as in the first row, %"] = [f"{how}, agreement at 10, {x} picture" for how in both
                                                       for x in ("same", "another")]
    known = {what for row in rows for what, value in row["values"].items() if value}
    panels = {title: [w for w in whats if w in known] for title, whats in panels.items() if known & set(whats)}
    figure, axes = plt.subplots(1, len(panels), figsize=(3.3 * len(panels) + 1.5, 1.8 + 0.32 * len(rows)), sharey=True)
    for axis, (title, whats) in zip(axes, panels.items()):
        scale = 100 if "%" in title else 1
        for n, what in enumerate(whats):
            null = "wrong" in what or "another" in what
            paint = f"C{both.index(what.partition(',')[0])}" if scale == 100 else f"C{n}"
            style = {"ms": 4, "color": paint, "mfc": "white" if null else paint, "alpha": 0.6 if null else 1}
            for name in dict.fromkeys(row["name"] for row in rows):
                at = [i for i, row in enumerate(rows) if row["name"] == name and row["values"].get(what)]
                mean, low, high = scale * np.array([rows[i]["values"][what] for i in at]).reshape(-1, 3).T
                # maximum: an interval of no width may lie beside the mean by rounding
                axis.errorbar(mean, np.array(at) + 0.1 * (n - len(whats) / 2),
                              xerr=np.maximum([mean - low, high - mean], 0), fmt="o:", **style)
            title_of = what.partition(",")[0] + (", another picture" if null else "") if scale == 100 else what
            axis.plot([], [], "o", label=title_of, **style)
        axis.set_title(title, fontsize=9)
        axis.set_xlim(left=min(0, axis.get_xlim()[0]))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    axes[0].set_yticks(range(len(rows)), [label(row) for row in rows])
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def study_main(args):
    out = args.out or os.path.join("out", "study")
    paths = [os.path.join(out, f"study.{kind}") for kind in ("json", "md", "png")]
    refuse_to_overwrite(paths, args)
    result = study(args)
    tables = study_tables(result)
    common.write_json(result, paths[0])
    common.write_text(tables, paths[1])
    draw_study(result, paths[2])
    print(tables)
    print(f"wrote {', '.join(paths)}")


def refuse_to_overwrite(paths, args):
    there = [path for path in paths if os.path.exists(path)]
    if there and not args.overwrite:
        sys.exit(f"{there[0]} exists; name another --out or say --overwrite")


def main(args):
    if not 1 <= args.top <= KEEP:
        sys.exit(f"--top is a number from 1 to {KEEP}, not {args.top}")
    out = args.out or os.path.join("out", "words", os.path.splitext(os.path.basename(args.image))[0])
    paths = [os.path.join(out, name) for name in ("words.png", "words.html")]
    refuse_to_overwrite(paths, args)
    image = data.open_image(args.image)
    configs = [checkpoint.read_config(folder)[1] for folder in args.checkpoints]
    # One picture for all, or patches could not be compared: as the last checkpoint that says so was trained.
    image_mode = next((c["image_mode"] for c in reversed(configs) if "image_mode" in c), "pad")
    if args.ask and any(c["stage"] == "pretrain" for c in configs):
        print("note: a checkpoint of stage 1 has learnt to write captions, not to answer", file=sys.stderr)
    states = []
    for folder in args.checkpoints:                                 # one LLM in memory at a time
        states.append(state_of(folder, image, image_mode, args.ask, args.top, args.device, args.dtype))
        if states[-1]["side"] != states[0]["side"]:
            sys.exit(f"{folder} sees {states[-1]['side']} x {states[-1]['side']} patches, {args.checkpoints[0]} "
                     f"{states[0]['side']} x {states[0]['side']}: they cannot share a picture")
    panels = panels_of(states)
    picture = square(image, image_mode, states[0]["mean"], min(1024, max(448, *image.size)))
    os.makedirs(out, exist_ok=True)
    with common.replacing(paths[0]) as temporary:
        draw_picture(panels, picture).save(temporary, "PNG")
    common.write_text(make_page(panels, picture, os.path.basename(args.image), args.ask, args.top), paths[1])
    for folder, state in zip(args.checkpoints, states):
        print(f"{folder} ({state['name']}, {state['label']})" + (f": {state['answer']}" if args.ask else ""))
    print(f"wrote {paths[0]} and {paths[1]}")


if __name__ == "__main__":
    try:
        study_main(ARGS) if ARGS.study else main(ARGS)
    except (ValueError, OSError) as error:                          # a user's mistake: its first line says which
        sys.exit(f"words.py: {str(error).strip().splitlines()[0]}")
