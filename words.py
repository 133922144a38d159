"""
An image as words: what each patch of an image says to the LLM, as a picture and as a page.

    python words.py CHECKPOINT [CHECKPOINT ...] IMAGE [--out DIR] [--ask "What is this?"]

The script writes DIR/words.png and DIR/words.html, a page that needs no network. A LangBridge shows
its own weights, of raw scores the highest and the lowest. Any connector, also an MLP, shows the
cosine similarity of its image embeds to every ordinary token of the LLM (the paper's analysis), the
five tokens that explain an image embed best together, and what chance gives. With --ask the page
also shows which patches and words the answer needs. Several checkpoints on one LLM become a slider
on the page. Different LLMs stand side by side. results/study.py counts over many images.
"""
import base64
import io
import json
import math
import os
import warnings
from pathlib import Path

import common

TOP = 8                         # words of a patch; of raw scores so many at each end
TOGETHER = 5                    # words of a patch that explain it together
MAP_BYTES = 2_000_000           # of all heat maps of a page; the weakest words have no map
PAGE = Path(__file__).with_name("words.html")


def read_arguments(argv=None):
    parser = common.argument_parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="folders in the order of training")
    add("image", metavar="IMAGE", help="an image file")
    add("--out", metavar="DIR", help="folder to write (default: out/words/IMAGE)")
    add("--tile", type=int, default=0, metavar="N", help="of a checkpoint with tiles: read tile N; "
        "0 is the whole picture")
    add("--ask", metavar="QUESTION", help="let each checkpoint answer a question about the image")
    add("--llm", help="read with this LLM instead: hub name or folder")
    add("--vision_tower", help="where the same tower is, if not under the name in config.json")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--dtype", default="float32", choices=["float32", "bfloat16"])
    add("--attention", help=common.ATTENTION)
    add("--overwrite", action="store_true", help="replace the files in --out")
    add("--offline", action="store_true", help=common.OFFLINE)
    return parser.parse_args(argv)


if __name__ == "__main__":                   # before the slow imports, so that --help is quick
    ARGS = read_arguments()
    if ARGS.offline:
        common.go_offline()
    print(f"reading {ARGS.image} with {', '.join(ARGS.checkpoints)}", flush=True)

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image

import checkpoint
import transfer
import vocab
from support import needs, pictures
from support.checks import refuse_files
from support.device import own_device


# --------------------------------------------------------------------------------------------------
# the numbers: an image as "modes", three ways to score words for each patch

# What a patch shows. Kind of scores: (words listed, whether as many of the lowest follow, caption)
KINDS = {"shares": (TOP, False, "the word of most weight"),             # weights that sum to 1
         "signed": (TOP, True, "the highest and the lowest score"),     # other weights
         "cosine": (TOP, False, "the nearest token by cosine"),
         "together": (TOGETHER, False, "the words that explain it best")}       # see `pursuit`


def cosine(embeds, E):
    """Return cosine similarities: embeds float[P, D], E float[V, D] -> float[P, V]."""
    return F.normalize(embeds, dim=-1) @ F.normalize(E, dim=-1).T


def random_directions(E):
    """Return 128 random directions in the space of E float[V, D]: float[128, D]."""
    return torch.randn(128, E.shape[1], generator=torch.Generator().manual_seed(0)).to(E)


def cosine_null(E):
    """Return the best cosine similarity in E that a random direction has on average: a float."""
    return cosine(random_directions(E), E).amax(-1).mean().item()


def pursuit(embeds, E, number=TOGETHER):
    """Return the words that explain each embed best together, by orthogonal matching pursuit.

    embeds float[P, D], E float[V, D] -> picks int64[P, n], coefficients float[P, n], explained
    float[P]. All embeddings have the length 1 here. Each step picks the word that is most like what
    is not yet explained, or most unlike it, and fits the coefficients of all picks anew by least
    squares. explained: R^2, the part of the squared length that the n words explain.
    Source: Pati, Rezaiifar and Krishnaprasad, Orthogonal matching pursuit, 1993.
    """
    embeds, E = F.normalize(embeds, dim=-1), F.normalize(E, dim=-1)
    picks = torch.empty(len(embeds), 0, dtype=torch.long, device=E.device)
    rest = embeds
    for _ in range(number):
        likeness = (rest @ E.T).abs_()                              # (P, D) x (D, V) -> (P, V)
        likeness.scatter_(1, picks, -1)                             # no word is picked twice
        picks = torch.cat([picks, likeness.argmax(dim=1, keepdim=True)], dim=1)
        A = E[picks]                                                # (P, n, D)
        products = A @ embeds[:, :, None]                           # (P, n, 1)
        # Two words may have one embedding. Then pinv shares the coefficient; solve would fail.
        coefficients = torch.linalg.pinv(A @ A.mT, hermitian=True) @ products       # (P, n, 1)
        rest = embeds - (A.mT @ coefficients)[..., 0]
    return picks, coefficients[..., 0], (coefficients * products).sum(dim=(1, 2))


def vocabulary(vlm):
    """Return every ordinary token of the LLM: a list of V words, and float32[V, D] embeddings."""
    ids = vocab.tokenizer_words(vlm.tokenizer)
    embed = vlm.llm.get_input_embeddings()
    # Call the module, do not index its weight: Gemma's embedding multiplies by sqrt(D).
    E = embed(torch.tensor(list(ids.values()), device=embed.weight.device))
    return list(ids), E.float()


def grid_patches(vlm, pixels):
    """Return the tower's features: pixels float[N, 3, S, S] -> float32[N, P, Dv], P a square."""
    features = vlm.patch_features(pixels).float()
    side = math.isqrt(features.shape[1])
    return features[:, -side * side:]               # a changed reader may keep the CLS token first


def make_mode(kind, words, scores, null=0.0, explained=None):
    """Return a mode: what the picture and the page show of the scores float32[P, K] of K words.

    kind: one of KINDS. null: the value that chance gives. explained float[P]: R^2 of `pursuit`.
    "words": the U words that some patch lists. "values": their scores float32[P, U].
    "top" int64[P, n]: columns of values, the strongest first. "loud" float[P] in 0..1: how much the
    strongest word, or R^2, stands out.
    """
    number, both_ends, _ = KINDS[kind]
    number = min(number, len(words))
    strength = scores.abs() if kind == "together" else scores
    top = strength.topk(number).indices                             # (P, n)
    if both_ends:
        lowest = scores.topk(number, largest=False).indices.flip(1)
        top = torch.cat([top, lowest], dim=1)                       # (P, 2n), the lowest last
    used, top = torch.unique(top, return_inverse=True)
    values = scores[:, used]
    above = (values.gather(1, top)[:, 0] if explained is None else explained) - null        # (P,)
    # The scale is the best patch, but 0.1 at least. Otherwise a value near chance would be loud.
    loud = (above / above.max().clamp(min=0.1)).clamp(0, 1)
    return {"kind": kind, "size": len(words), "null": null, "explained": explained,
            "words": [words[i] for i in used.tolist()], "values": values, "top": top, "loud": loud}


@torch.no_grad()
def read(vlm, pixels):
    """Return the modes of one image: float32[3, S, S] -> {"weights", "cosine", "together": mode}.

    An MLP has no "weights". All tensors are on the CPU, wherever the model is.
    """
    patches = grid_patches(vlm, pixels[None])                       # (1, P, Dv)
    embeds = vlm.connector(patches)[0].float()                      # (P, D)
    modes = {}
    if vlm.words:
        w = vlm.connector.weights(patches)[0].cpu()                 # (P, K)
        are_shares = (w >= 0).all() and torch.allclose(w.sum(-1), torch.ones(len(w)), atol=1e-2)
        kind, null = ("shares", 1 / len(vlm.words)) if are_shares else ("signed", 0.0)
        modes["weights"] = make_mode(kind, vlm.words, w, null)
    tokens, E = vocabulary(vlm)
    modes["cosine"] = make_mode("cosine", tokens, cosine(embeds, E).cpu(), cosine_null(E))
    picks, coefficients, explained = (tensor.cpu() for tensor in pursuit(embeds, E))
    scores = torch.zeros(len(embeds), len(E)).scatter_(1, picks, coefficients)      # (P, V)
    null = pursuit(random_directions(E), E)[2].mean().item()
    modes["together"] = make_mode("together", tokens, scores, null, explained)
    return modes


def read_checkpoint(folder, image, image_mode, args):
    """Return the state of a checkpoint: a dict of what it sees in an image and what it answers.

    "label": the moment of training. "name": LLM and connector. "modes": see `read`. "side": patches
    along a side. "group": equal for checkpoints of one connector kind, LLM and list of words.
    "picture": see `square`. "needs": what the answer needs, see needs.ask.
    """
    config, metadata = checkpoint.read_config(folder)
    place = own_device(args.device), getattr(torch, args.dtype), args.attention
    if args.llm:
        vlm = transfer.move(folder, args.llm, *place, args.vision_tower)
    else:
        vlm = checkpoint.load(folder, *place, vision_tower=args.vision_tower)
    settings = vlm.image_settings
    pixels = pictures.tile_pixels(image, **settings, mode=image_mode, tiles=config.tiles)
    if not 0 <= args.tile < len(pixels):
        raise ValueError(f"--tile {args.tile}: {folder} sees this picture as {len(pixels)} "
                         "tile(s), counted from 0")
    modes = read(vlm, pixels[args.tile])
    answer = lost = None
    if args.ask:
        template = metadata.get("template", "chat")
        if template == "plain":                     # it was trained on pictures without a question
            print(f"note: {folder} was trained with template plain: it does not read the question "
                  "and writes a caption")
        patches = grid_patches(vlm, pixels[args.tile, None])
        answer, lost = needs.ask(vlm, args.ask, template, image.size, pixels, patches, args.tile,
                                 modes.get("weights"))
    if config.tiles:
        image = pictures.cut_tiles(image, settings["size"], config.tiles)[args.tile]
        image_mode = "squash"
    step = Path(folder).name                        # of steps/000100
    return {"label": metadata["stage"] + (f", step {int(step)}" if step.isdecimal() else ""),
            "name": f"{Path(vlm.config.llm).name} · {'LangBridge' if vlm.words else 'MLP'}",
            "group": (config.connector, config.normalize, os.path.realpath(vlm.config.llm),
                      metadata["words_hash"]),
            "modes": modes, "tiles": config.tiles, "side": math.isqrt(vlm.num_patches),
            "picture": square(image, image_mode, settings["mean"],
                              min(1024, max(448, *image.size))),
            "answer": answer, "needs": lost}


def make_panels(states):
    """Return the panels: lists of states of one group, each in the order of training."""
    groups = {}
    for state in states:
        groups.setdefault(state["group"], []).append(state)
    return list(groups.values())


# --------------------------------------------------------------------------------------------------
# words.png

DPI = 100
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans Arabic", "Noto Sans Thai", "Noto Emoji",
         "WenQuanYi Zen Hei", "Arial Unicode MS", "PingFang SC", "Microsoft YaHei")


def square(image, mode, mean, side):
    """Return the square that the vision tower sees, for people: PIL RGB of side x side pixels."""
    pixels = pictures.transform(image, side, mean, std=(1, 1, 1), mode=mode)    # colour minus mean
    colours = (pixels.permute(1, 2, 0).numpy() + np.float32(mean)) * 255
    return Image.fromarray(colours.round().clip(0, 255).astype(np.uint8))


def patch_colours(picture, side):
    """Return the mean colour of each patch: side * side strings "#rrggbb"."""
    small = np.asarray(picture.resize((side, side), Image.Resampling.BOX))
    return ["#%02x%02x%02x" % tuple(colour) for colour in small.reshape(-1, 3).tolist()]


def ink_on(colour):
    """Return the text colour, dark or white, that contrasts more with "#rrggbb" (WCAG 2)."""
    rgb = np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return "#18181c" if linear @ (0.2126, 0.7152, 0.0722) > 0.18 else "#ffffff"


def labels_of(mode, i):
    """Return what stands on patch i: [(text, loudness 0..1)], for signed scores both ends."""
    _, both_ends, _ = KINDS[mode["kind"]]
    peak = mode["values"].abs().max().clamp(min=1e-12)
    labels = []
    for column in mode["top"][i, [0, -1] if both_ends else [0]]:
        word, value = vocab.show(mode["words"][column]), mode["values"][i, column]
        sign = "−" if value < 0 else "+" if both_ends else ""
        loud = value.abs() / peak if both_ends else mode["loud"][i]
        labels.append((sign + (word.strip("␣") or word), loud.item()))
    return labels


def fit(text, size, width, smallest=8):
    """Return (text, size in pixels): smaller letters, then fewer, so that it is `width` long."""
    size = min(size, width / (0.7 * len(text)))     # a letter is about 0.7 of its height wide
    if size >= smallest:
        return text, size
    letters = max(1, int(len(text) * size / smallest) - 1)
    return text[:letters] + "…", smallest


def draw_state(axis, state, picture, cell):
    """Draw the image and the strongest word of each patch. cell: pixels along a patch."""
    side = state["side"]
    mode = next(iter(state["modes"].values()))
    installed = font_manager.get_font_names()
    fonts = [name for name in FONTS if name in installed]       # a later font draws what one lacks
    axis.imshow(picture, extent=(0, side, side, 0))
    axis.set(xticks=range(side + 1), yticks=range(side + 1), xticklabels=[], yticklabels=[])
    axis.tick_params(length=0)
    axis.grid(color="white", alpha=0.25, linewidth=0.6)
    axis.spines[:].set_visible(False)
    for i, colour in enumerate(patch_colours(picture, side)):
        labels = labels_of(mode, i)
        for n, (text, loud) in enumerate(labels):
            wanted = cell * (0.13 + 0.12 * loud) / len(labels) ** 0.3
            text, size = fit(text, wanted, 0.94 * cell)
            y = i // side + 0.1 + 0.8 * (n + 0.5) / len(labels)
            # The outline has the mean colour of the patch, against which the ink was chosen.
            outline = withStroke(linewidth=size / 4, foreground=colour, alpha=0.8)
            # With parse_math a word with two dollar signs would be read as TeX and fail.
            axis.text(i % side + 0.5, y, text, fontsize=size * 72 / DPI, fontfamily=fonts,
                      fontweight="bold", color=ink_on(colour), alpha=0.65 + 0.35 * loud,
                      ha="center", va="center", parse_math=False, path_effects=[outline])


def draw_picture(panels, picture):
    """Return words.png as a Figure: a row for each panel, a column for each of its states."""
    side = panels[0][0]["side"]
    columns = max(len(states) for states in panels)
    cell = min(192, max(72, (1024 if columns < 3 else 512) // side))
    size = side * cell / DPI                        # inches
    shape = (1, len(panels)) if columns == 1 else (len(panels), columns)    # rows, columns
    figure = Figure((shape[1] * size, shape[0] * (size + 0.5)), dpi=DPI, layout="constrained")
    for row, states in enumerate(panels):
        for column, state in enumerate(states):
            axis = figure.add_subplot(*shape, row * columns + column + 1)
            draw_state(axis, state, picture, cell)
            _, _, caption = KINDS[next(iter(state["modes"].values()))["kind"]]
            axis.set_xlabel(f"{state['name']}, {state['label']}\n{caption} in each patch",
                            parse_math=False, fontsize=9)
    return figure


def save_figure(figure, path):
    """Write a figure as PNG. A character that no font has is drawn as a box."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), common.replacing(path) as temporary:
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(temporary, format="png", dpi=DPI)


# --------------------------------------------------------------------------------------------------
# words.html

def page_words(pairs):
    """Return what the page reads of (word, value) pairs: values have three significant digits."""
    return [{"word": vocab.show(word), "value": float(f"{value:.3g}")} for word, value in pairs]


def page_mode(mode, maps):
    """Return a mode as the page reads it. Only the `maps` strongest words have a heat map."""
    words, values = mode["words"], mode["values"]
    tops = [page_words((words[column], row[column].item()) for column in top)
            for top, row in zip(mode["top"], values)]
    peaks = values.abs().amax(0).clamp(min=1e-12)                   # (U,)
    levels = (values / peaks * 127).round().to(torch.int8).numpy()  # (P, U)
    heat_maps = [{"word": vocab.show(words[i]), "peak": peaks[i].item(),
                  "levels": base64.b64encode(levels[:, i].tobytes()).decode()}
                 for i in peaks.argsort(descending=True, stable=True)[:maps].tolist()]
    return {"kind": mode["kind"], "size": mode["size"], "null": mode["null"], "tops": tops,
            "labels": [labels_of(mode, i) for i in range(len(values))], "maps": heat_maps,
            "explained": mode["explained"] is not None and mode["explained"].tolist()}


def make_page(panels, picture, name, ask):
    """Return words.html as a string. What comes from outside is one JSON block, used as text."""
    side = panels[0][0]["side"]
    maps = MAP_BYTES // sum(3 * len(states) for states in panels) // side ** 2
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=88)
    colours = patch_colours(picture, side)
    content = {"image": "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode(),
               "name": name, "ask": ask, "side": side, "colours": colours,
               "inks": [ink_on(colour) for colour in colours], "panels": []}
    for states in panels:
        content["panels"].append({"name": states[0]["name"], "states": []})
        for state in states:
            lost = state["needs"] and {"patches": state["needs"]["patches"].tolist(),
                                       "words": page_words(state["needs"]["words"])}
            modes = {key: page_mode(mode, maps) for key, mode in state["modes"].items()}
            content["panels"][-1]["states"].append(
                {"label": state["label"], "answer": state["answer"], "needs": lost, "modes": modes})
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c")                 # only "<" can end a <script>
    return PAGE.read_text(encoding="utf-8").replace("@DATA@", text)


def print_needs(lost, side):
    """Print the patches and the words without which the answer loses most. lost: see needs.ask."""
    patches = [(f"row {i // side + 1} column {i % side + 1}", nats)
               for i, nats in enumerate(lost["patches"].tolist())]
    words = [(vocab.show(word), nats) for word, nats in lost["words"]]
    for kind, pairs in ("patch", patches), ("word", words):
        if pairs:
            most = sorted(pairs, key=lambda pair: -pair[1])[:5]
            print(f"  without a {kind} the answer loses, in nats of log-probability:",
                  ", ".join(f"{name} {nats:+.2f}" for name, nats in most), flush=True)


def main(args):
    out = args.out or f"out/words/{Path(args.image).stem}"
    png, html = os.path.join(out, "words.png"), os.path.join(out, "words.html")
    refuse_files([png, html], args.overwrite)
    image = pictures.open_image(args.image)
    metadata = [checkpoint.read_config(folder)[1] for folder in args.checkpoints]
    # All checkpoints see the same square, or their patches could not be compared.
    image_mode = metadata[-1].get("image_mode", "pad")
    states = []
    for folder in args.checkpoints:                 # one LLM in memory at a time
        state = read_checkpoint(folder, image, image_mode, args)
        states.append(state)
        if (state["tiles"], state["side"]) != (states[0]["tiles"], states[0]["side"]):
            raise ValueError(f"{folder} and {args.checkpoints[0]} cut pictures into other tiles or "
                             "patches: they cannot share a picture")
        # An answer may hold control characters, and a terminal would obey them.
        answer = "".join(c if c.isprintable() else " " for c in state["answer"] or "")
        print(f"{folder} ({state['name']}, {state['label']})" + (f": {answer}" if args.ask else ""),
              flush=True)
        if state["needs"]:
            print_needs(state["needs"], state["side"])
    panels, picture = make_panels(states), states[0]["picture"]
    save_figure(draw_picture(panels, picture), png)
    common.write_text(make_page(panels, picture, Path(args.image).name, args.ask), html)
    print(f"wrote {png} and {html}")


if __name__ == "__main__":
    common.run_script(main, ARGS)
