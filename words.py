"""
An image as words: what each patch of an image says to the LLM, as a picture, as a page, and as numbers.

    python words.py CHECKPOINT [CHECKPOINT ...] IMAGE [--out DIR] [--ask "What is this?"] [--top 8]

writes DIR/words.png and DIR/words.html, a page that needs no network. A LangBridge shows its own weights: softmax weights,
or raw scores, whose words have signs and are shown at both ends. Any connector, an MLP too, shows the cosine similarity of
its image embeds to every ordinary token of the LLM's vocabulary (the paper's analysis), with what chance would give.
Checkpoints on the same LLM (snapshots of a run, pretraining then SFT) become a slider, different LLMs stand side by side.
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

import vocab

KEEP = 16                       # words that a patch keeps, in each mode and at each end
MAP_BYTES = 2_000_000           # of all heat maps of a page; the weakest words beyond it show only where they are in a list
PAGE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "words.html.in")
PAPER, INK, WHITE = (252, 251, 248), (24, 24, 28), (255, 255, 255)


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="checkpoint folders, in the order of training")
    parser.add_argument("image", metavar="IMAGE", help="picture file")
    parser.add_argument("--out", metavar="DIR", help="folder to write (default: out/words/NAME OF THE IMAGE)")
    parser.add_argument("--ask", metavar="QUESTION", help="have each checkpoint answer a question about the image")
    parser.add_argument("--top", type=int, default=8, help=f"words shown for a patch, 1 to {KEEP} (default: 8)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--offline", action="store_true", help=vocab.OFFLINE)
    return parser.parse_args()


if __name__ == "__main__":                   # before the slow imports: --help answers at once
    ARGS = read_arguments()
    if ARGS.offline:
        vocab.offline()

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont

import data
import model


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

    Each mode also has "share" float[P], see contribution and span_share, and "weights" has "entropy" float[P], "rank"."""
    patches = vlm.patch_features(pixels[None]).float()              # (1, P, Dv)
    embeds = vlm.connector(patches)[0].float()                      # (P, D)
    modes = {}
    if vlm.words:
        w, E = vlm.connector.weights(patches)[0], vlm.connector.vocab_embeds.float()
        modes["weights"] = mode = make_mode("none" if vlm.connector.normalize == "none" else "softmax", vlm.words, w, top)
        mode.update(entropy=entropy(w), rank=effective_rank(w))
        if vlm.connector.normalize == "unit":                       # what is added up there: see model.combine
            w, E = F.normalize(w, dim=-1), E - E.mean(0)
        mode["share"] = contribution(w, E, embeds, mode["chosen"])
    tokens, E = vocabulary(vlm)
    modes["cosine"] = mode = make_mode("cosine", tokens, cosine(embeds, E), top, cosine_null(E))
    mode["share"] = span_share(E, embeds, mode["chosen"])
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


def state_of(folder, image, image_mode, ask, top, device="cpu", dtype="float32"):
    """Load a checkpoint and read the image with it. -> a state, a dict: "label" says which moment of training, "name" which
    LLM; "modes", see read; "side", patches along one side of the image; "answer" to the question `ask`, or None.
    States of one "group" are one connector kind on one LLM."""
    config, whole = model.read_config(folder)
    vlm = model.load(folder, torch.device(device), getattr(torch, dtype))
    pixels = data.transform(image, mode=image_mode, **vlm.image).to(vlm.llm.device)
    step = re.fullmatch(r"0*(\d+)", os.path.basename(os.path.normpath(folder)))      # train.py --snapshots: steps/000100
    state = {"label": f"{whole['stage']}, step {step[1]}" if step else whole["stage"],
             "name": os.path.basename(os.path.normpath(config.llm)), "connector": config.connector,
             "group": (config.connector, config.normalize, whole["embeddings_hash"], whole["words_hash"]),
             "modes": read(vlm, pixels, top), "side": math.isqrt(vlm.num_patches), "mean": vlm.image["mean"], "answer": None}
    if ask:
        messages = [{"role": "user", "content": f"<image>\n{ask}"}]
        ids = data.encode_prompt(messages, vlm.tokenizer, vlm.num_patches, whole.get("template", "chat"))
        answer = vlm.generate([ids], pixels[None], max_new_tokens=64)[0]
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
    for i in range(1, g):
        for line in ((i * cell, 0, i * cell, g * cell), (0, i * cell, g * cell, i * cell)):
            grid.line(line, fill=(*WHITE, 60))
    todo = []
    for i, colour in enumerate(patch_colours(picture, g)):
        labels = labels_of(mode, i)
        for n, (text, loud) in enumerate(labels):
            # A word of up to six letters has the size that its weight gives it; only a longer one has to shrink.
            text, size = fit(text, cell * (0.13 + 0.12 * loud) / len(labels) ** 0.3, 0.94 * cell)
            center = ((i % g + 0.5) * cell, (i // g + (n + 0.5) / len(labels) * 0.8 + 0.1) * cell)
            todo.append((text, size, center, (*(INK if luminance(colour) > 0.18 else WHITE), int(255 * (0.5 + 0.5 * loud)))))
            put(ImageDraw.Draw(glow), text, size, center, int(255 * (0.55 + 0.45 * loud)), stroke=max(2, size // 5))
    # Behind the letters the picture fades into the mean colour of their patch, against which the ink was chosen.
    flat = picture.resize((g, g), Image.Resampling.BOX).resize(image.size, Image.Resampling.BILINEAR)
    image.paste(flat, mask=glow.filter(ImageFilter.GaussianBlur(cell / 32)))
    for text, size, center, fill in todo:
        put(ImageDraw.Draw(image, "RGBA"), text, size, center, fill)
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
    cell, columns = min(192, max(72, 1024 // g)), max(len(panel["states"]) for panel in panels)
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


def main(args):
    if not 1 <= args.top <= KEEP:
        sys.exit(f"--top is a number from 1 to {KEEP}, not {args.top}")
    out = args.out or os.path.join("out", "words", os.path.splitext(os.path.basename(args.image))[0])
    paths = [os.path.join(out, name) for name in ("words.png", "words.html")]
    there = [path for path in paths if os.path.exists(path)]
    if there and not args.overwrite:
        sys.exit(f"{there[0]} exists; name another --out or say --overwrite")
    image = data.open_image(args.image)
    configs = [model.read_config(folder)[1] for folder in args.checkpoints]
    # One picture for all, or patches could not be compared: as the last checkpoint that says so was trained.
    image_mode = next((c["image_mode"] for c in reversed(configs) if "image_mode" in c), "pad")
    states = []
    for folder in args.checkpoints:                                 # one LLM in memory at a time
        states.append(state_of(folder, image, image_mode, args.ask, args.top, args.device, args.dtype))
        if states[-1]["side"] != states[0]["side"]:
            sys.exit(f"{folder} sees {states[-1]['side']} x {states[-1]['side']} patches, {args.checkpoints[0]} "
                     f"{states[0]['side']} x {states[0]['side']}: they cannot share a picture")
    panels = panels_of(states)
    picture = square(image, image_mode, states[0]["mean"], min(1024, max(448, *image.size)))
    os.makedirs(out, exist_ok=True)
    with vocab.replacing(paths[0]) as temporary:
        draw_picture(panels, picture).save(temporary, "PNG")
    vocab.write_text(make_page(panels, picture, os.path.basename(args.image), args.ask, args.top), paths[1])
    for state in states:
        print(f"{state['name']}, {state['label']}" + (f": {state['answer']}" if args.ask else ""))
    print(f"wrote {paths[0]} and {paths[1]}")


if __name__ == "__main__":
    try:
        main(ARGS)
    except (ValueError, OSError) as error:
        sys.exit(f"words.py: {error}")
