"""The pocket world: pictures, captions, questions, tokenizers, a vision tower and three small LLMs, made on the spot.

    python pocket.py                  # all into data/pocket: minutes on two CPU cores, no network, no GPU
    python pocket.py --tiny           # few scenes and few steps, in half a minute: to test code, not models

It lets a reader run the whole story (pretrain, SFT, transfer to another LLM, benchmarks) without a GPU or a model hub.
The world is small, but nothing downstream is special to it: the files are in LLaVA's, POPE's, GQA's and MME's own
formats, the models are ordinary Hugging Face folders, and the LLMs have never seen a picture. They have learnt to read:
a description where an image would stand, then questions about it.

Held-out scenes are told apart by what is in them (`is_held_out`), for the pictures and for the LLMs' text alike.
Everything follows from --seed: two runs on one machine give the same bytes.
"""
import argparse
import base64
import csv
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import time
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------------------
# The world: a scene is one to three objects on a 3 x 3 grid. Lengths are in pixels of the saved picture.

SIDE = 192                                                  # of a saved picture; the tower sees it smaller
COLORS = {"red": (214, 40, 40), "orange": (247, 134, 20), "yellow": (250, 212, 30), "green": (44, 150, 62),
          "blue": (38, 92, 214), "purple": (124, 52, 168), "pink": (250, 130, 190), "black": (34, 34, 38)}
SHAPES = {"circle": 1.3, "square": 1.2, "triangle": 1.1, "star": 1.0, "heart": 1.0, "cross": 0.9, "moon": 0.8,
          "diamond": 0.7, "sign": 2.6}                     # how often: POPE's "popular" needs it uneven
FRIENDS = {"circle": "square", "square": "circle", "triangle": "cross", "cross": "triangle", "star": "moon",
           "moon": "star", "heart": "diamond", "diamond": "heart", "sign": "circle"}   # for POPE's "adversarial"
SIZES = ("large", "small")
CELLS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
WORDS = ("stop", "open", "exit", "taxi", "bank", "milk", "sale", "hotel", "zoo", "pizza", "books", "jazz")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BACKGROUNDS = ((246, 241, 230), (231, 240, 247), (236, 245, 233), (247, 236, 238), (240, 238, 247), (243, 243, 243))


def make_scene(rng, most=3):
    """One random scene: {"objects": [{"shape", "color", "size", "cell", "box", "word" (signs)}], "background": int}."""
    count = min(rng.choices((1, 2, 3), (2, 5, 4))[0], most)
    shapes = list(SHAPES)
    names = []
    for _ in range(count):
        roll = rng.random()
        name = rng.choices(shapes, list(SHAPES.values()))[0]
        if names and roll < 0.25:
            name = names[-1]                                # the same again: something to count
        elif names and roll < 0.5:
            name = FRIENDS[names[-1]]
        names.append("circle" if name == "sign" and "sign" in names else name)     # one sign a scene
    free = list(range(9))
    objects = []
    for name in sorted(names, key=lambda name: name != "sign"):     # signs first: they need the middle column
        cell = rng.choice([c for c in free if name != "sign" or c % 3 == 1])
        free.remove(cell)
        color = objects[-1]["color"] if objects and rng.random() < 0.2 else rng.choice(list(COLORS))
        thing = {"shape": name, "color": color, "size": rng.choice(SIZES), "cell": cell}
        cx, cy, rx = 32 + 64 * (cell % 3), 32 + 64 * (cell // 3), {"large": 29, "small": 20}[thing["size"]]
        if name == "sign":                                  # all signs sit alike: a small tower must read them
            thing.update(size="large", word=rng.choice(WORDS))
            rx, ry = 36, 20
        else:
            ry = rx
            cx, cy = cx + rng.randint(-4, 4) * 3 // 4, cy + rng.randint(-4, 4) * 3 // 4
        thing["box"] = [cx - rx, cy - ry, cx + rx, cy + ry]
        objects.append(thing)
    rng.shuffle(objects)
    return {"objects": objects, "background": rng.randrange(len(BACKGROUNDS))}


def scene_key(scene):
    """What is in a scene and where, as one string; size, jitter, background and order do not make a scene a new one."""
    return "; ".join(sorted(f"{o['color']} {o['shape']} {o.get('word', '')} {o['cell']}" for o in scene["objects"]))


def is_held_out(scene):
    """True for the tenth of all possible scenes that no model may train on, neither as a picture nor as text."""
    return hashlib.sha1(scene_key(scene).encode()).digest()[0] < 26


def some_scene(rng, held_out=False, most=3):
    """A random scene from one side of the split."""
    while True:
        scene = make_scene(rng, most)
        if is_held_out(scene) == held_out:
            return scene


def outline(shape):
    """The outline of a shape in the square [-1, 1] x [-1, 1], y downwards: a list of points."""
    turn = [i / 40 * 2 * math.pi for i in range(40)]
    if shape == "circle":
        return [(math.cos(a), math.sin(a)) for a in turn]
    if shape == "heart":
        return [(math.sin(a) ** 3, (5 * math.cos(2 * a) + 2 * math.cos(3 * a) + math.cos(4 * a) - 13 * math.cos(a)) / 16
                 - 0.1) for a in turn]
    if shape == "star":
        return [((1.05 if i % 2 == 0 else 0.45) * math.sin(i * math.pi / 5), 0.08 - (1.05 if i % 2 == 0 else 0.45)
                 * math.cos(i * math.pi / 5)) for i in range(10)]
    if shape == "moon":
        outer, inner = ([math.radians(a + b * i / 30) for i in range(31)] for a, b in ((60, 240), (270, -180)))
        return ([(0.25 + math.cos(a), math.sin(a)) for a in outer]
                + [(0.75 + 0.9 * math.cos(a), 0.9 * math.sin(a)) for a in inner])
    t = 0.36
    return {"square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
            "triangle": [(0, -0.95), (1, 0.82), (-1, 0.82)],
            "diamond": [(0, -1), (0.68, 0), (0, 1), (-0.68, 0)],
            "cross": [(-t, -1), (t, -1), (t, -t), (1, -t), (1, t), (t, t),
                      (t, 1), (-t, 1), (-t, t), (-1, t), (-1, -t), (-t, -t)],
            "sign": [(-1, -1), (1, -1), (1, 1), (-1, 1)]}[shape]


@functools.cache
def background(number, big):
    """A light colour that darkens a little downwards: PIL image, RGB, big * SIDE square."""
    from PIL import Image, ImageOps
    light = BACKGROUNDS[number]
    grey = Image.linear_gradient("L").resize((big * SIDE, big * SIDE))
    return ImageOps.colorize(grey, light, tuple(int(0.9 * c) for c in light))


@functools.cache
def lettering(size):
    """Pillow's own font, so that no font file is needed."""
    from PIL import ImageFont
    return ImageFont.load_default(size)


def draw_scene(scene):
    """The picture of a scene: PIL image, RGB, SIDE x SIDE; drawn at twice the size and reduced, for smooth edges."""
    from PIL import ImageDraw
    big = 2
    shade = tuple(int(0.9 * c) for c in BACKGROUNDS[scene["background"]])
    picture, font = background(scene["background"], big).copy(), lettering(18 * big)
    pen = ImageDraw.Draw(picture)
    for thing in scene["objects"]:
        x0, y0, x1, y1 = (big * v for v in thing["box"])
        middle, reach = ((x0 + x1) / 2, (y0 + y1) / 2), ((x1 - x0) / 2, (y1 - y0) / 2)
        points = [(middle[0] + x * reach[0], middle[1] + y * reach[1]) for x, y in outline(thing["shape"])]
        color = COLORS[thing["color"]]
        dark = tuple(int(0.75 * c) for c in color)
        pen.polygon([(x + 3 * big, y + 4 * big) for x, y in points], fill=tuple(int(0.86 * c) for c in shade))
        pen.polygon(points, fill=color)
        pen.line(points + points[:2], fill=dark, width=2 * big, joint="curve")
        if "word" in thing:
            pen.rectangle((x0 + 5 * big, y0 + 5 * big, x1 - 5 * big, y1 - 5 * big), fill=(255, 255, 255))
            pen.text(middle, thing["word"].upper(), fill=(20, 20, 20), font=font, anchor="mm",
                     stroke_width=big // 2, stroke_fill=(20, 20, 20))
    return picture.reduce(big)


# ---------------------------------------------------------------------------------------------------------------------
# Its language: descriptions of a scene in several styles, questions with answers, and a little that needs no picture

SUFFIX = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
BRIEF = ("Say briefly what is in the picture.", "What is shown here, in short?", "Describe the image in one line.",
         "Give a short caption for this picture.", "Sum up the image.", "Tell me shortly what you see.",
         "Write one short line about the image.", "What does the picture show?", "Name what can be seen here.",
         "Put the image into a few words.", "Give a brief account of the picture.")
STYLES = ("and", "there", "keys", "short")
FACTS = {f"What is the opposite of {a}?": b for a, b in (
    ("large", "Small"), ("small", "Large"), ("left", "Right"), ("right", "Left"), ("top", "Bottom"), ("bottom", "Top"),
    ("open", "Closed"), ("black", "White"), ("yes", "No"), ("no", "Yes"), ("hot", "Cold"), ("day", "Night"))}
FACTS |= {f"What color is {a}?": b for a, b in (
    ("grass", "Green"), ("the sky", "Blue"), ("blood", "Red"), ("coal", "Black"), ("a lemon", "Yellow"),
    ("a plum", "Purple"))}
FACTS |= {f"How many sides does a {a} have?": b for a, b in (
    ("triangle", "Three"), ("square", "Four"), ("diamond", "Four"))}
FACTS |= {f"What is {NUMBERS[a]} plus {NUMBERS[b]}?": NUMBERS[a + b].capitalize() for a in range(5) for b in range(5)}
FACTS |= {f"What number comes after {NUMBERS[a]}?": NUMBERS[a + 1].capitalize() for a in range(9)}
FACTS |= {f"Is {a} a color?": "Yes" for a in COLORS} | {f"Is {a} a color?": "No" for a in list(SHAPES)[:8]}
FACTS |= {f"Is a {a} a shape?": "Yes" for a in list(SHAPES)[:8]} | {f"Is a {a} a shape?": "No" for a in WORDS[6:16:2]}


def place(thing):
    """Where an object is: "at top left", "at center"."""
    return "at " + CELLS[thing["cell"]]


def describe(scene, rng, style):
    """One line about all objects of a scene, in random order. Style "short" leaves out sizes and places."""
    things = rng.sample(scene["objects"], len(scene["objects"]))

    def name(thing, where=True):
        size = thing["size"] + " " if where and "word" not in thing else ""
        saying = f" saying {thing['word']}" if "word" in thing else ""
        return f"{size}{thing['color']} {thing['shape']}" + (" " + place(thing) if where else "") + saying

    if style == "keys":
        return ", ".join(name(t) for t in things)
    if style == "there":
        return " ".join(f"There is {article(name(t))}." for t in things)
    return " and ".join(article(name(t, where=style != "short")) for t in things)


def article(phrase):
    """The phrase with "a" or "an" before it."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


# kind -> (GQA's structural, semantic, detailed type, group of comparable answers); None: GQA asks nothing of the kind
KINDS = {"exist": ("verify", "obj", "exist", None), "exist color": ("verify", "obj", "existAttr", None),
         "is color": ("verify", "attr", "verifyAttr", None), "is place": ("verify", "attr", "positionVerify", None),
         "is word": ("verify", "attr", "verifyText", None), "color": ("query", "attr", "directOf", "color"),
         "shape": ("query", "cat", "categoryThat", "shape"), "word": ("query", "attr", "textOf", "word"),
         "which color": ("choose", "attr", "chooseAttr", None), "where": ("query", "attr", "positionQuery", "place"),
         "and": ("logical", "obj", "existAnd", None),
         "or": ("logical", "obj", "existOr", None), "same color": ("compare", "attr", "twoSame", None),
         "count": None, "is count": None}


def ask(kind, scene, rng, style="and", yes=None):
    """A question of the given kind with its answer, or None when this scene does not allow one that is clear.

    For yes/no kinds the answer is tossed first and the question made to fit, so that a blind guess is right half of the
    time (or give yes); for the others an object is drawn that must be the only one of its name. style: that of the
    description when the question is about text, which may lack the fact. Returns (question, answer, shapes named).
    """
    things = scene["objects"]
    names = [t["shape"] for t in things]
    absent = [s for s in SHAPES if s not in names]
    yes = rng.random() < 0.5 if yes is None else yes
    noun = rng.choice(("image", "picture"))
    single = [t for t in things if names.count(t["shape"]) == 1]
    thing = rng.choice(single) if single else None
    if kind == "exist":
        name = rng.choice(names) if yes else rng.choice(absent)
        return f"Is there a {name} in the {noun}?", yes, [name]
    if kind == "exist color":
        it = rng.choice(things)
        color, name = it["color"], it["shape"]
        while not yes and any((t["color"], t["shape"]) == (color, name) for t in things):
            color, name = it["color"], it["shape"]          # wrong in one half only: both words must be read
            color, name = (rng.choice(list(COLORS)), name) if rng.random() < 0.5 else (color, rng.choice(list(SHAPES)))
        return f"Is there {article(color + ' ' + name)} in the {noun}?", yes, [name]
    if kind in ("and", "or"):
        wanted = {("and", True): "pp", ("and", False): "pa", ("or", True): "pa", ("or", False): "aa"}[kind, yes]
        present = sorted(set(names))
        if len(present) < 2:                                # for every case alike: else "and" is nearly always no
            return None
        pair = rng.sample(present, wanted.count("p")) + rng.sample(absent, wanted.count("a"))
        rng.shuffle(pair)
        return f"Is there a {pair[0]} {kind} a {pair[1]} in the {noun}?", yes, pair
    if kind in ("count", "is count"):
        name = rng.choice(names + ["object"])
        number = len(things) if name == "object" else names.count(name)
        if name != "object" and number == 1 and rng.random() < 0.6:
            return None                                     # else nearly every count is one
        plural = "crosses" if name == "cross" else name + "s"
        if kind == "count":
            return f"How many {plural} are there in the {noun}?", NUMBERS[number], [name]
        number = number if yes else rng.choice([n for n in (1, 2, 3, 4) if n != number])
        claim = f"Is there one {name}" if number == 1 else f"Are there {NUMBERS[number]} {plural}"
        return f"{claim} in the {noun}?", yes, [name]
    if kind in ("word", "is word"):
        sign = next((t for t in things if "word" in t), None)
        if sign is None:
            return None
        if kind == "word":
            return rng.choice(("What word is written on the sign?", "What does the sign say?")), sign["word"], ["sign"]
        word = sign["word"] if yes else rng.choice([w for w in WORDS if w != sign["word"]])
        return f"Does the sign say {word}?", yes, ["sign"]
    return ask_about(thing, kind, scene, rng, style, yes, noun) if thing else None


def ask_about(thing, kind, scene, rng, style, yes, noun):
    """The kinds of `ask` that are about one object which is the only one of its shape."""
    things, name = scene["objects"], thing["shape"]
    other = rng.choice([c for c in COLORS if c != thing["color"]])
    if kind == "color":
        return f"What color is the {name}?", thing["color"], [name]
    if kind == "is color":
        return f"Is the {name} {thing['color'] if yes else other}?", yes, [name]
    if kind == "which color":
        pair = rng.sample((thing["color"], other), 2)
        return f"Is the {name} {pair[0]} or {pair[1]}?", thing["color"], [name]
    if kind == "shape":
        if [t["color"] for t in things].count(thing["color"]) > 1:
            return None
        return f"What shape is {thing['color']}?", name, [name]
    if kind == "same color":
        names = [t["shape"] for t in things]
        single = [t for t in things if names.count(t["shape"]) == 1]
        if len(single) < 2:
            return None
        a, b = rng.sample(single, 2)
        if (a["color"] == b["color"]) != yes or (not yes and rng.random() < 0.65):      # else nearly always no
            return None
        return f"Do the {a['shape']} and the {b['shape']} have the same color?", yes, [a["shape"], b["shape"]]
    if style == "short":
        return None                                         # no place in such a description
    if kind == "where":
        return f"Where is the {name}?", CELLS[thing["cell"]], [name]
    if kind == "is place":
        wrong = rng.choice([c for c in range(9) if c != thing["cell"]])
        return f"Is the {name} {place(thing if yes else {'cell': wrong})}?", yes, [name]
    return None


def questions(scene, rng, count, kinds, style="and"):
    """Up to `count` different questions about a scene: list of (kind, question, answer: "Yes", "Red", "Two")."""
    found = {}
    for _ in range(12 * count):
        kind = rng.choice(kinds)
        made = ask(kind, scene, rng, style)
        if made and made[0] not in found:
            found[made[0]] = (kind, made[0], spoken(made[1]))
            if len(found) == count:
                break
    return list(found.values())


def choices(scene, rng, count, style="and"):
    """Up to `count` multiple-choice questions about a scene: list of (kind, question, answer, two to four options)."""
    made = []
    for kind, question, answer in questions(scene, rng, count, tuple(OPTIONS), style):
        wrong = [spoken(option) for option in OPTIONS[kind] if spoken(option) != answer]
        made.append((kind, question, answer, rng.sample([answer, *rng.sample(wrong, n := rng.choice((1, 2, 3)))], n + 1)))
    return made


def with_options(question, options):
    """A multiple-choice question as MMBench's prompt writes it. LLMs this small answer in words all the same: to find the
    right word and then its letter stayed at chance in 750 steps. MMBench's matching takes either."""
    return "\n".join([question] + [f"{letter}. {option}" for letter, option in zip("ABCD", options)] + [LETTER])


def spoken(answer):
    """An answer as LLaVA's data writes it: True -> "Yes", "red" -> "Red"."""
    return ("Yes" if answer else "No") if isinstance(answer, bool) else answer.capitalize()


# how often each kind is asked in training; a kind's name stands as often as its weight
TRAIN_KINDS = tuple(k for k, n in {
    "exist": 3, "exist color": 3, "is color": 2, "is place": 2, "is word": 1, "color": 4, "shape": 4, "word": 4,
    "where": 3, "which color": 2, "and": 2, "or": 1, "same color": 1, "count": 1, "is count": 1,
}.items() for _ in range(n))
OPTIONS = {"color": tuple(COLORS), "shape": tuple(SHAPES), "word": WORDS, "where": CELLS}      # of multiple choice
EASY_KINDS = ("color", "shape", "shape", "where", "where", "word", "which color", "exist")   # lookups first


# ---------------------------------------------------------------------------------------------------------------------
# Text for the LLMs and for the tokenizers: what an LLM reads before it ever meets a picture

def document(rng, held_out=False, most=3, chats=0.5, kinds=TRAIN_KINDS):
    """One piece of text: chat messages [{"role", "content"}], or plain pieces [(text, trained)].

    chats: share of chats with questions, of the given kinds. The rest holds more answers a token: mostly the same
    questions and answers line by line; seldom the scene in other words, or plain statements about it.
    """
    roll = rng.random()
    if roll < 0.02:
        return chat(rng.sample(list(FACTS.items()), 4))
    scene = some_scene(rng, held_out, most)
    style = rng.choice(STYLES)
    text = describe(scene, rng, style)
    if roll < 0.04:
        return [(text + "\n", True)]
    again = describe(scene, rng, rng.choice([s for s in STYLES if (s == "short") == (style == "short")] + ["short"]))
    if roll < 0.06:
        return chat([(rng.choice(BRIEF), again)], text, suffix=False)
    if roll < 0.06 + chats / 10:
        pairs = [(with_options(q, options), a) for _, q, a, options in choices(scene, rng, 3, style)]
        if pairs:
            return chat(pairs, text, suffix=False)
    pairs = questions(scene, rng, rng.randint(4, 8), kinds, style)
    if roll > 1 - chats and pairs:
        return chat([(q, a) for _, q, a in pairs], text)
    if roll < 0.15 or not pairs:
        return [(text + "\n", False), (rng.choice((again, statements(scene, rng, style))) + "\n", True)]
    return [(text + "\n", False)] + [piece for _, q, a in pairs for piece in ((q + "\n", False), (a + "\n", True))]


def statements(scene, rng, style):
    """Short true sentences about each object that is the only one of its shape, in random order."""
    names = [t["shape"] for t in scene["objects"]]
    found = []
    for thing in scene["objects"]:
        if names.count(thing["shape"]) == 1:
            about = [thing["color"]] + ([thing["size"]] if "word" not in thing and style != "short" else [])
            about += [place(thing)] if style != "short" else []
            about += [f"marked {thing['word']}"] if "word" in thing else []
            found += [f"The {thing['shape']} is {fact}." for fact in about]
    found.append(f"There are {NUMBERS[len(names)]} objects." if len(names) > 1 else "There is one object.")
    return " ".join(rng.sample(found, len(found)))


def chat(pairs, description=None, suffix=True):
    """Questions and answers as messages; the description stands first in the first user turn, where an image would be.

    The suffix is written once, after the first question, and holds for the turns that follow, as in LLaVA's data.
    """
    messages = []
    for i, (question, answer) in enumerate(pairs):
        text = f"{question}\n{SUFFIX}" if suffix and i == 0 else question
        text = f"{description}\n{text}" if description is not None and i == 0 else text
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return messages


def corpus(seed, count):
    """Text with every word of the world, for training the tokenizers: list of strings."""
    rng = random.Random(f"corpus {seed}")
    words = (*COLORS, *SHAPES, *WORDS, *NUMBERS, *SIZES, "left", "right", "top", "bottom")
    lines = [f"{f} {w} {w.capitalize()} {w}" for w in words for f in ("user", "assistant", "system")]
    lines += list(BRIEF) * 3 + [f"{q}\n{a}" for q, a in FACTS.items()] * 3
    for _ in range(count):
        lines += [m[0] if isinstance(m, tuple) else m["content"] for m in document(rng)]
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers: two that agree about most words and about nothing else

CHATML = dict(
    start="", user="<|im_start|>user\n", end="<|im_end|>", gap="\n", assistant="<|im_start|>assistant\n",
    special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], bos=None, pad="<|endoftext|>",
    template="{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
             "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
HEADERS = dict(
    start="<|begin_of_text|>", user="<|start_header_id|>user<|end_header_id|>\n\n", end="<|eot_id|>", gap="",
    assistant="<|start_header_id|>assistant<|end_header_id|>\n\n", bos="<|begin_of_text|>", pad="<|pad|>",
    special=["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|start_header_id|>", "<|end_header_id|>",
             "<|eot_id|>"],
    template="<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
             "{{ m['content'] }}<|eot_id|>{% endfor %}"
             "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
SPLIT = {"chatml": ("jazz",), "headers": ("pizza", "zoo")}      # had only in pieces


def make_tokenizer(family, lines):
    """A fast Hugging Face tokenizer trained on lines. "chatml": byte-level BPE; "headers": "▁" with byte fallback."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    form = {"chatml": CHATML, "headers": HEADERS}[family]
    rare = SPLIT[family]
    lines = [" ".join(w for w in line.split(" ") if not any(r in w.lower() for r in rare)) for line in lines]
    if family == "chatml":
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        raw.train_from_iterator(lines, trainers.BpeTrainer(
            vocab_size=1100, min_frequency=2, initial_alphabet=alphabet, show_progress=False))
    else:
        raw = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        words = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")
        apart = pre_tokenizers.Split(Regex(r"\n+|[0-9]|[^\w\s]"), "isolated")
        raw.pre_tokenizer = pre_tokenizers.Sequence([apart, words])
        raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        raw.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=1000, min_frequency=12, show_progress=False))
        state = json.loads(raw.to_str())                    # the trainer knows no byte fallback: put 256 bytes in front
        learnt = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
        pieces = ["<unk>"] + [f"<0x{i:02X}>" for i in range(256)] + learnt
        state["model"]["vocab"] = {piece: i for i, piece in enumerate(pieces)}
        raw = Tokenizer.from_str(json.dumps(state))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=form["end"], pad_token=form["pad"], bos_token=form["bos"],
        clean_up_tokenization_spaces=False, additional_special_tokens=[
            t for t in form["special"] if t not in (form["end"], form["pad"], form["bos"])],
        model_max_length=2048, padding_side="right")
    tokenizer.chat_template = form["template"]
    return tokenizer


def make_encoder(tokenizer, form):
    """A function document -> (ids, trained): lists of equal length, trained True for what the model must say."""
    @functools.cache
    def encode(text):
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    def one(made):
        ids, trained = list(encode(form["start"])), [False] * len(encode(form["start"]))
        for m in made:
            if isinstance(m, tuple):
                ids += encode(m[0])
                trained += [m[1]] * len(encode(m[0]))
                continue
            user = m["role"] == "user"
            head, body = encode(form["user" if user else "assistant"]), encode(m["content"]) + encode(form["end"])
            tail = encode(form["gap"])
            ids += head + body + tail
            trained += [False] * len(head) + [not user] * len(body) + [False] * len(tail)
        return ids, trained
    return one


# ---------------------------------------------------------------------------------------------------------------------
# Files: LLaVA's two stages, then POPE, GQA and MME as their authors lay them out

def write_json(path, value, lines=False):
    """Write JSON, or JSON lines; parent folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(json.dumps(v) for v in value) if lines else json.dumps(value, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def llava(messages):
    """Chat messages as LLaVA's "conversations"."""
    return [{"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]} for m in messages]


def make_world(out, count, held_count, seed, pool):
    """Draw all pictures and write all data files under out. Returns the number of pictures.

    Two sets are held out: "val" to choose by, "test" to report; same files, other scenes.
    """
    rng = random.Random(f"world {seed}")
    scenes, seen = {}, set()
    for name, number in (("train", count), ("val", held_count), ("test", held_count)):
        made = 0
        while made < number:
            scene = some_scene(rng, held_out=name != "train")
            if scene_key(scene) not in seen:                # every picture shows another scene
                seen.add(scene_key(scene))
                scenes[f"{name}_{made:06d}.png"] = scene
                made += 1
    train = {k: v for k, v in scenes.items() if k.startswith("train")}
    (out / "images").mkdir(parents=True, exist_ok=True)
    work = [(str(out / "images" / name), scene) for name, scene in scenes.items()]
    parts = [work[i:i + 200] for i in range(0, len(work), 200)]
    done, start = 0, time.time()
    for number in pool.imap(draw_files, parts):
        done += number
        print(f"pictures          {done:>5}/{len(work)}  {time.time() - start:.0f} s", flush=True)
    write_training(out, train, rng)
    for folder, split in (("val", "val"), ("eval", "test")):
        held = {k: v for k, v in scenes.items() if k.startswith(split)}
        write_json(out / f"captions_{split}.json", [caption_record(n, s, rng) for n, s in held.items()])
        for name, write in (("pope", write_pope), ("gqa", write_gqa), ("mme", write_mme), ("textvqa", write_textvqa),
                            ("mmbench", write_mmbench)):
            write(out / folder / name, out / "images", held, random.Random(f"{name} {split} {seed}"))
    write_json(out / "truth.json", scenes)
    return len(scenes)


def draw_files(work):
    """Draw [(path, scene)]; one worker process's share."""
    for path, scene in work:
        draw_scene(scene).save(path)
    return len(work)


def caption_record(name, scene, rng):
    """A stage 1 record: a brief prompt with <image> before or after it, and a caption."""
    prompt = rng.choice(BRIEF)
    human = f"<image>\n{prompt}" if rng.random() < 0.5 else f"{prompt}\n<image>"
    caption = describe(scene, rng, rng.choice(STYLES))
    return {"id": name[:-4], "image": name, "conversations": llava([{"role": "user", "content": human},
                                                                   {"role": "assistant", "content": caption}])}


def write_training(out, train, rng):
    """pretrain.json (a caption a picture) and sft.json (questions over several turns; the last tenth is text alone)."""
    write_json(out / "pretrain.json", [caption_record(name, scene, rng) for name, scene in train.items()])
    records = []
    for name, scene in train.items():
        roll = rng.random()
        if roll < 0.05:
            messages = chat([(rng.choice(BRIEF), describe(scene, rng, rng.choice(STYLES)))], "<image>", suffix=False)
        elif roll < 0.15 and (asked := choices(scene, rng, 3)):
            messages = chat([(with_options(q, options), a) for _, q, a, options in asked], "<image>", suffix=False)
        else:
            messages = chat([(q, a) for _, q, a in questions(scene, rng, rng.randint(4, 6), TRAIN_KINDS)], "<image>")
            assert messages, f"no question found about {name}"
        records.append({"id": name[:-4], "image": name, "conversations": llava(messages)})
    rng.shuffle(records)
    while len(records) < 1.1 * len(train):
        made = document(rng)
        if isinstance(made[0], dict):
            records.append({"id": f"text_{len(records):06d}", "conversations": llava(made)})
    write_json(out / "sft.json", records)


def copy_picture(source, target):
    """Copy a picture, as JPEG where the benchmark's names say so."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == source.suffix:
        shutil.copyfile(source, target)
    elif not target.exists():
        target.write_bytes(jpeg(source))


@functools.cache
def jpeg(source):
    """A picture file as the bytes of a JPEG."""
    from PIL import Image
    buffer = io.BytesIO()
    Image.open(source).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_pope(out, images, test, rng):
    """POPE: is there a ...? Two present and two absent shapes a picture; the files differ in which are absent."""
    found = {name: sorted({t["shape"] for t in scene["objects"]}) for name, scene in test.items()}
    often = {a: sum(a in f for f in found.values()) for a in SHAPES}
    together = {(a, b): sum(a in f and b in f for f in found.values()) for a in SHAPES for b in SHAPES}
    chosen = [name for name in test if len(found[name]) >= 2][:75]
    asked = []
    for start, category in ((0, "adversarial"), (10_000_000, "random"), (20_000_000, "popular")):
        labels = []
        for name in chosen:
            present = random.Random(name).sample(found[name], 2)              # the same in all three files
            absent = rng.sample([s for s in SHAPES if s not in found[name]], len(SHAPES) - len(found[name]))
            if category == "popular":
                absent.sort(key=lambda s: -often[s])
            elif category == "adversarial":
                absent.sort(key=lambda s: -max(together[s, p] / often[p] for p in found[name]))
            image = f"pocket_{name[:-4]}.jpg"
            copy_picture(images / name, out / "val2014" / image)
            for shape, label in zip((present[0], absent[0], present[1], absent[1]), ("yes", "no", "yes", "no")):
                labels.append({"question_id": len(labels) + 1, "image": image,
                               "text": f"Is there a {shape} in the image?", "label": label})
        write_json(out / "coco" / f"coco_pope_{category}.json", labels, lines=True)
        asked += [{"question_id": start + r["question_id"], "image": r["image"], "text": f"{r['text']}\n{SUFFIX}",
                   "category": category} for r in labels]
    write_json(out / "llava_pope_test.jsonl", asked, lines=True)


def write_gqa(out, images, test, rng, each=2):
    """GQA: about `each` balanced questions a picture; yes and no equally often within a kind, other answers capped."""
    share = {"query": 8, "verify": 5, "logical": 3, "choose": 3, "compare": 2}          # about that of the official set
    kinds = {t: [k for k, v in KINDS.items() if v and v[0] == t] for t in share}
    given, records, lines = {}, {}, []
    for name, scene in test.items():
        image, asked = f"n{name[-10:-4]}", set()
        copy_picture(images / name, out / "images" / f"{image}.jpg")
        for _ in range(30):
            structural = rng.choices(list(share), list(share.values()))[0]
            kind = rng.choice(kinds[structural])
            made = ask(kind, scene, rng)
            if len(asked) == each:
                break
            if made is None or made[0] in asked:
                continue
            answer = spoken(made[1]).lower()
            counts = given.setdefault(kind, {})
            options = {"yes": 2, "no": 2}.get(answer, 8)
            if counts.get(answer, 0) > sum(counts.values()) / options + 1:
                continue                                    # this answer has had its share
            counts[answer] = counts.get(answer, 0) + 1
            asked.add(made[0])
            key = f"{len(records) + 1:08d}"
            records[key] = gqa_record(key, image, kind, made, answer)
            lines.append({"question_id": key, "image": f"{image}.jpg", "text": f"{made[0]}\n{SUFFIX}",
                          "category": "default"})
    write_json(out / "testdev_balanced_questions.json", records)
    write_json(out / "llava_gqa_testdev_balanced.jsonl", lines, lines=True)


def gqa_record(key, image, kind, made, answer):
    """One entry of GQA's question file."""
    structural, semantic, detailed, group = KINDS[kind]
    steps = [{"operation": "select", "argument": f"{name} (0)", "dependencies": []} for name in made[2]]
    steps.append({"operation": structural, "argument": kind, "dependencies": list(range(len(made[2])))})
    return {"question": made[0], "answer": answer, "fullAnswer": f"{answer.capitalize()}.", "imageId": image,
            "isBalanced": True, "groups": {"global": group, "local": f"{kind}-{made[2][0]}"},
            "types": {"structural": structural, "semantic": semantic, "detailed": detailed},
            "semantic": steps, "semanticStr": "->".join(f"{s['operation']}: {s['argument']}" for s in steps),
            "entailed": [], "equivalent": [key], "annotations": {"question": {}, "answer": {}, "fullAnswer": {}}}


def write_mme(out, images, test, rng, each=30):
    """MME: five tasks, `each` pictures a task, one question answered Yes and one answered No a picture."""
    asked = []
    for task, kind in (("existence", "exist"), ("count", "is count"), ("position", "is place"), ("color", "is color"),
                       ("OCR", "is word")):
        folder, truth = out / "MME_Benchmark_release_version" / task, []
        for name in rng.sample(list(test), len(test)):
            tossed = f"{task} {name}"                       # the same dice for both: they ask about the same object
            pair = [(ask(kind, test[name], random.Random(tossed), yes=yes), spoken(yes)) for yes in (True, False)]
            if len(truth) == 2 * each or None in (pair[0][0], pair[1][0]):
                continue
            copy_picture(images / name, folder / name)
            rows = [(f"{made[0]} Please answer yes or no.", said) for made, said in pair]
            (folder / f"{name[:-4]}.txt").write_text("".join(f"{q}\t{said}\n" for q, said in rows), encoding="utf-8")
            truth += [f"{name}\t{q}\t{said}\n" for q, said in rows]
            asked += [{"question_id": f"{task}/{name}", "image": f"{task}/{name}", "text": f"{made[0]}\n{SUFFIX}",
                       "category": task} for made, _ in pair]
        (out / "ground_truth").mkdir(parents=True, exist_ok=True)
        (out / "ground_truth" / f"{task}.txt").write_text("".join(truth), encoding="utf-8")
    write_json(out / "llava_mme.jsonl", asked, lines=True)


def write_textvqa(out, images, test, rng):
    """TextVQA: the word on each sign. No line of OCR tokens: it would give the answer away. Ten people agree."""
    records, lines = [], []
    for name, scene in test.items():
        made = ask("word", scene, rng)
        if made:
            copy_picture(images / name, out / "train_images" / f"{name[:-4]}.jpg")
            records.append({"question_id": len(records), "image_id": name[:-4], "question": made[0],
                            "answers": [made[1]] * 10})
            lines.append({"question_id": name[:-4], "image": f"{name[:-4]}.jpg", "text": f"{made[0]}\n{SUFFIX}",
                          "category": "default"})
    write_json(out / "TextVQA_0.5.1_val.json", {"data": records})
    write_json(out / "llava_textvqa_val_v051_ocr.jsonl", lines, lines=True)


def write_mmbench(out, images, test, rng, number=100):
    """MMBench: one multiple-choice question a picture with all rotations of its options, the base rows first."""
    rows = []
    for base, (name, scene) in enumerate(list(test.items())[:number]):
        image = base64.b64encode(jpeg(images / name)).decode()
        for kind, question, answer, options in choices(scene, rng, 1):
            for turn in range(len(options)):
                rows.append({"index": turn * 1_000_000 + base, "question": question, "hint": "",
                             **dict(zip("ABCD", options + [""] * 4)), "answer": "ABCD"[options.index(answer)],
                             "category": kind, "image": image, "source": "pocket", "l2-category": "attribute",
                             "comment": "", "split": "dev"})
                options = options[-1:] + options[:-1]       # each option one place later, the last one first
    rows.sort(key=lambda row: row["index"])
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "mmbench_dev_20230712.tsv", "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Models

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TOWER = dict(image_size=96, patch_size=16, hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
             intermediate_size=384)
LLMS = {"pocket-qwen-wide": dict(family="chatml", width=160, layers=5, heads=5, mlp=320, steps=620),
        "pocket-llama": dict(family="headers", width=144, layers=4, heads=4, mlp=320, steps=620),
        "pocket-qwen": dict(family="chatml", width=128, layers=4, heads=4, mlp=288, steps=620)}
TOWER_STEPS = 140
BATCH, LR = 16, 5e-3                                        # BATCH: rows of text a step
MODELS = ("pocket-qwen-wide", "pocket-llama", "pocket-qwen", "vision-tower")      # longest first, for two workers


def optimizers(model, lr):
    """Muon for the matrices inside the layers (half the steps of AdamW here), AdamW for everything else."""
    import torch
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    rest = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers." in n)]
    return [torch.optim.Muon(inner, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]


def train(name, model, steps, lr, batch_loss):
    """The loop of all four models; batch_loss(step) -> scalar. Warm up, hold, fall to zero over the second half."""
    import torch
    opts = optimizers(model, lr)
    fast = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    start = last = time.time()
    for step in range(steps):
        for opt in opts:
            opt.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20, 2 * (steps - step) / steps)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            loss = batch_loss(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        if time.time() - last > 5 or step == steps - 1:
            last = time.time()
            eta = (last - start) / (step + 1) * (steps - step - 1)
            print(f"{name:17} {step + 1:>4}/{steps}  loss {loss.item():.3f}  eta {eta:.0f} s", flush=True)


def make_llm(recipe, tokenizer):
    """An untrained Qwen2 (tied embeddings) or Llama (untied) of the recipe's size, float32."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
    chatml = recipe["family"] == "chatml"
    sizes = dict(vocab_size=len(tokenizer), hidden_size=recipe["width"], num_hidden_layers=recipe["layers"],
                 num_attention_heads=recipe["heads"], num_key_value_heads=recipe["heads"],
                 intermediate_size=recipe["mlp"], max_position_embeddings=2048, tie_word_embeddings=chatml,
                 bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                 pad_token_id=tokenizer.pad_token_id)
    if chatml:
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    else:
        model = LlamaForCausalLM(LlamaConfig(attention_bias=True, **sizes))
    model.set_attn_implementation("eager")                  # twice as fast as "sdpa" here: short, bfloat16, CPU
    plant(model, tokenizer)
    return model


def plant(model, tokenizer):
    """Start where minutes of training would otherwise lead: looking back, looking for the same word, and copying it.

    Embeddings: "red", " red" and "Red" begin alike, as they end in any LLM. Every second layer, three heads: constant
    queries and keys (their biases) that rotary embedding turns into "one, two, three tokens back". All other heads:
    queries = keys, so that equal words attract each other; output = values transposed (after Trockman and Kolter,
    "Mimetic initialization of self-attention layers", 2023). All of it is free to change in training.
    """
    import torch
    width, heads = model.config.hidden_size, model.config.num_attention_heads
    size, half = width // heads, width // heads // 2
    turn = 10000.0 ** (-torch.arange(half) / half)          # radians a token, as in the model's rotary embedding
    strength = 4.0 * (turn > 0.05)                          # slow turns cannot tell neighbours apart
    with torch.no_grad():
        stems = {}
        for i in range(len(tokenizer)):
            stems.setdefault(tokenizer.decode([i]).strip().lower(), []).append(i)
        model.model.embed_tokens.weight.normal_(0, 0.3)     # a word must not drown in what attention adds to it
        for ids in stems.values():
            model.model.embed_tokens.weight[ids] += 0.4 * torch.randn(width)
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
        model.model.norm.weight.fill_(0.2)                  # and the first guesses must stay mild all the same
        for number, layer in enumerate(model.model.layers):
            a = layer.self_attn
            a.q_proj.weight.copy_(a.k_proj.weight.mul_(4))
            torch.nn.init.orthogonal_(a.v_proj.weight)
            a.o_proj.weight.copy_(0.4 * a.v_proj.weight.T)
            for back in (1, 2, 3) if number % 2 == 0 else ():
                rows = slice((back - 1) * size, back * size)
                a.q_proj.weight[rows] *= 0.1
                a.k_proj.weight[rows] *= 0.1
                a.q_proj.bias[rows] = torch.cat([strength * (back * turn).cos(), -strength * (back * turn).sin()])
                a.k_proj.bias[rows] = torch.cat([strength, 0 * strength])


def pad_batch(rows, pad_id):
    """[(ids, trained)] -> input_ids int64[B, T], labels int64[B, T] (-100 where not trained), padded on the right."""
    import torch
    longest = -(-max(len(ids) for ids, _ in rows) // 16) * 16          # few different lengths: less memory is kept
    ids = torch.tensor([list(i) + [pad_id] * (longest - len(i)) for i, _ in rows])
    trained = torch.tensor([list(t) + [False] * (longest - len(t)) for _, t in rows])
    return ids, torch.where(trained, ids, -100)


def train_llm(name, folder, settings):
    """Make one LLM and its tokenizer in folder. Returns its reading accuracy on held-out text, by kind of question."""
    import torch
    recipe = LLMS[name]
    form = {"chatml": CHATML, "headers": HEADERS}[recipe["family"]]
    tokenizer = make_tokenizer(recipe["family"], corpus(settings["seed"], settings["corpus"]))
    encode = make_encoder(tokenizer, form)
    probe = chat([("Is there a star?", "Yes"), ("What color is it?", "Red")], "a red star")
    assert encode(probe)[0] == tokenizer.apply_chat_template(probe, return_dict=False), f"{name}: template disagrees"
    torch.manual_seed(settings["seed"])
    model = make_llm(recipe, tokenizer)
    rng, steps, batches = random.Random(f"text {settings['seed']}"), int(recipe["steps"] * settings["effort"]) + 1, []
    known, losses = [], []                                  # known: filled once the easy questions are

    def batch_loss(step):
        early = not known and step < 0.35 * steps
        if early and len(losses) >= 100 and sorted(losses[-32:])[16] < 0.1:
            known.append(step)
            batches.clear()
            print(f"{name:17} knows the easy questions after {step} steps", flush=True)
            early = False
        if not batches:                                     # rows of like length together, batches in random order
            most, chats, kinds = (2, 0.15, EASY_KINDS) if early else (3, 0.2 if step < 0.6 * steps else 0.7, TRAIN_KINDS)
            rows = [encode(document(rng, most=most, chats=chats, kinds=kinds)) for _ in range(8 * BATCH)]
            rows.sort(key=lambda row: len(row[0]))
            batches.extend(rows[i:i + BATCH] for i in range(0, len(rows), BATCH))
            rng.shuffle(batches)
        ids, labels = pad_batch(batches.pop(), tokenizer.pad_token_id)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]   # (B, T) -> (B, T-1, D)
        said = labels[:, 1:] != -100
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[said]).float(), labels[:, 1:][said])
        losses.append(loss.item())
        return loss

    train(name, model, steps, LR, batch_loss)
    model.eval()
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, token, getattr(tokenizer, token))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return reading_test(model, tokenizer, encode, settings)


def reading_test(model, tokenizer, encode, settings):
    """Share of held-out questions about described scenes answered exactly when greedy: {"all" or kind: share}."""
    import torch
    rng, rows = random.Random("reading"), []
    while len(rows) < settings["tested"]:
        scene, style = some_scene(rng, held_out=True), rng.choice(STYLES)
        text = describe(scene, rng, style)
        rows += [(kind, encode(chat([(q, a)], text))) for kind, q, a in questions(scene, rng, 3, TRAIN_KINDS, style)]
        rows += [("choice", encode(chat([(with_options(q, options), a)], text, suffix=False)))
                 for _, q, a, options in choices(scene, rng, 1, style)]
    rows.sort(key=lambda row: len(row[1][0]))
    right = {}
    with torch.no_grad():
        for i in range(0, len(rows), 50):
            ids, labels = pad_batch([row for _, row in rows[i:i + 50]], tokenizer.pad_token_id)
            guess, labels = model(input_ids=ids).logits[:, :-1].argmax(-1), labels[:, 1:]
            exact = ((guess == labels) | (labels == -100)).all(1).tolist()          # every token, and the end
            for (kind, _), ok in zip(rows[i:i + 50], exact):
                right.setdefault(kind, []).append(ok)
    right["all"] = [ok for v in right.values() for ok in v]
    return {kind: round(sum(v) / len(v), 3) for kind, v in sorted(right.items())}


def load_pixels(out, names):
    """Pictures as the tower sees them: float32[N, 3, S, S]."""
    import numpy as np
    import torch
    from PIL import Image
    size = TOWER["image_size"]
    opened = (Image.open(out / "images" / name).convert("RGB").resize((size, size), Image.BICUBIC) for name in names)
    pixels = np.stack([np.asarray(picture) for picture in opened])
    mean, std = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std


def altered(scene, rng):
    """The scene with one fact of one object changed (the word of a sign, if there is one, half of the time)."""
    things = [dict(t) for t in scene["objects"]]
    sign = next((t for t in things if "word" in t), None)
    thing = sign if sign and rng.random() < 0.5 else rng.choice(things)
    fact = "word" if thing is sign else rng.choice(("color", "shape", "shape", "cell", "cell", "size"))
    among = {"word": WORDS, "color": list(COLORS), "shape": [s for s in SHAPES if s != "sign"], "size": SIZES,
             "cell": range(9)}[fact]
    thing[fact] = rng.choice([value for value in among if value != thing[fact]])
    return {"objects": things}


def phrase_features(caption, index):
    """The phrases of a keyword caption, each as the ids of its words and pairs of words: list of lists of int."""
    phrases = []
    for phrase in caption.split(", "):
        words = phrase.replace("top left", "topleft").replace("top right", "topright").split()
        words = [w for w in words if w not in ("at", "saying")]
        words += [f"{a} {b}" for i, a in enumerate(words) for b in words[i + 1:]]
        phrases.append([index.setdefault(w, len(index)) for w in words])
    return phrases


def train_tower(name, folder, settings):
    """Make the vision tower in folder, by contrast of pictures and captions. Returns what a linear probe reads from it.

    Similarity of a picture and a caption: for each phrase the best of the patches (after FILIP, Yao et al., 2021), mean
    over phrases, plus the class token against the mean of the phrases. Beside the batch's other captions a picture has
    to reject captions with one fact changed (after NegCLIP, Yuksekgonul et al., 2022): else colour and shape would do,
    and written words would never be learnt. The text side is thrown away.
    """
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel
    out = Path(settings["out"])
    truth = json.loads((out / "truth.json").read_text(encoding="utf-8"))
    scenes = [(n, s) for n, s in truth.items() if n.startswith("train")]
    pixels = load_pixels(out, [n for n, _ in scenes])
    torch.manual_seed(settings["seed"])
    F, dim, index = torch.nn.functional, 128, {}
    tower = CLIPVisionModel(CLIPVisionConfig(**TOWER))
    place_patches(tower)
    model = torch.nn.ModuleDict({
        "tower": tower, "words": torch.nn.EmbeddingBag(6000, dim, mode="sum"),
        "patch": torch.nn.Linear(TOWER["hidden_size"], dim), "whole": torch.nn.Linear(TOWER["hidden_size"], dim)})
    model.register_parameter("scale", torch.nn.Parameter(torch.tensor(2.5)))
    rng, steps, order = random.Random(f"tower {settings['seed']}"), int(TOWER_STEPS * settings["effort"]) + 1, []
    size = min(96, len(scenes))

    def batch_loss(step):
        if len(order) < size:
            order[:] = rng.sample(range(len(scenes)), len(scenes))
        picked = [order.pop() for _ in range(size)]
        shown = [scenes[i][1] for i in picked]
        shown += [altered(scene, rng) for scene in shown]
        texts = [phrase_features(describe(scene, rng, "keys"), index) for scene in shown]
        bags = [torch.tensor(p) for t in texts for p in t]
        owner = torch.tensor([n for n, t in enumerate(texts) for _ in t])
        offsets = torch.tensor([0] + [len(b) for b in bags[:-1]]).cumsum(0)
        phrases = F.normalize(model["words"](torch.cat(bags), offsets).float(), dim=-1)       # (N, dim), N phrases
        seen = tower(pixel_values=pixels[picked])
        patches = F.normalize(model["patch"](seen.last_hidden_state[:, 1:]).float(), dim=-1)  # (B, P, dim)
        whole = F.normalize(model["whole"](seen.pooler_output).float(), dim=-1)               # (B, dim)
        best = (patches @ phrases.T).amax(1)                                                  # (B, P, N) -> (B, N)
        share = F.one_hot(owner, 2 * size).float()
        share = share / share.sum(0)                                                          # (N, 2B), a mean
        like = best @ share + whole @ F.normalize(share.T @ phrases, dim=-1).T                # (B, 2B)
        like = model.scale.exp() * like / 2
        target = torch.arange(size)
        return (F.cross_entropy(like, target) + F.cross_entropy(like[:, :size].T, target)) / 2

    train(name, model, steps, LR, batch_loss)
    tower.eval()
    tower.save_pretrained(folder)
    size = TOWER["image_size"]
    write_json(folder / "preprocessor_config.json", {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": size}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": size, "width": size}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
        "do_convert_rgb": True})
    held = [(n, s) for n, s in truth.items() if n.startswith("test")]
    return linear_probe(tower, (scenes[:1500], pixels[:1500]), (held, load_pixels(out, [n for n, _ in held])))


def place_patches(tower):
    """Start the position embeddings at sines and cosines of row and column (as fixed in MAE, He et al., 2022): from
    noise of 0.01 the tower would take long to tell left from right."""
    import torch
    across, width = TOWER["image_size"] // TOWER["patch_size"], TOWER["hidden_size"] // 4
    turns = torch.arange(across)[:, None] * 10 ** (-torch.arange(width) / width)                # (across, Dv/4) radians
    waves = torch.cat([turns.sin(), turns.cos()], 1)                                            # (across, Dv/2)
    rows, columns = (waves.repeat_interleave(across, 0), waves.repeat(across, 1))               # (P, Dv/2) each
    table = dict(tower.named_parameters())
    name = next(n for n in table if n.endswith("position_embedding.weight"))
    with torch.no_grad():
        table[name][1:] = 0.3 * torch.cat([rows, columns], 1)                                   # (P, Dv), after the CLS


def linear_probe(tower, train_set, test_set):
    """Least squares from the patches under an object (hidden layer -2, mean) to what it is: {fact: share right}."""
    import torch
    sides = []
    for scenes, pixels in (train_set, test_set):
        rows, facts = [], []
        with torch.no_grad():
            hidden = torch.cat([tower(pixel_values=part, output_hidden_states=True).hidden_states[-2][:, 1:]
                                for part in pixels.split(100)])                               # (N, P, Dv), no CLS
        across = TOWER["image_size"] // TOWER["patch_size"]
        for (_, scene), grid in zip(scenes, hidden.unflatten(1, (across, across))):           # (rows, columns, Dv)
            for thing in scene["objects"]:
                x0, y0, x1, y1 = (min(across - 1, max(0, int(v * across / SIDE))) for v in thing["box"])
                rows.append(torch.cat([grid[y0:y1 + 1, x0:x1 + 1].mean((0, 1)), torch.ones(1)]))
                facts.append(thing)
        sides.append((torch.stack(rows), facts))
    (x, seen), (z, asked) = sides
    found = {}
    for fact, names in (("color", list(COLORS)), ("shape", list(SHAPES)), ("size", SIZES), ("cell", range(9)),
                        ("word", WORDS)):
        keep, test = ([i for i, t in enumerate(side) if fact in t] for side in (seen, asked))
        if keep and test:
            y = torch.eye(len(names))[[names.index(seen[i][fact]) for i in keep]]
            a = x[keep]
            weights = torch.linalg.solve(a.T @ a + 1e-2 * torch.eye(a.shape[1]), a.T @ y)     # (Dv+1, classes)
            guess = (z[test] @ weights).argmax(1).tolist()
            found[fact] = round(sum(names.index(asked[i][fact]) == g for i, g in zip(test, guess)) / len(test), 3)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Main

def make_model(job):
    """Make one model in a temporary folder and rename it when it is whole; runs in a worker process."""
    name, settings = job
    import torch
    import transformers
    torch.set_num_threads(1)                                # models this small do not gain from a second thread
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder, start = Path(settings["out"]) / name, time.time()
    unfinished = folder.with_name(name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    measured = (train_tower if name == "vision-tower" else train_llm)(name, unfinished, settings)
    write_json(unfinished / "measured.json", measured)
    os.replace(unfinished, folder)
    return name, time.time() - start


def report(out):
    """Print what was measured: reading and probe accuracy, blind baselines."""
    for name in MODELS:
        measured = json.loads((out / name / "measured.json").read_text(encoding="utf-8"))
        what = "linear probe on held-out patches" if name == "vision-tower" else "reading held-out text"
        print(f"{name:17} {what}: " + "  ".join(f"{k} {100 * v:.1f}" for k, v in measured.items()))
    gqa = json.loads((out / "eval/gqa/testdev_balanced_questions.json").read_text(encoding="utf-8"))
    kinds, blind = {}, 0
    for q in gqa.values():
        answers = kinds.setdefault(q["types"]["detailed"], {})
        answers[q["answer"]] = answers.get(q["answer"], 0) + 1
    blind = sum(max(a.values()) for a in kinds.values()) / len(gqa)
    everyone = [q["answer"] for q in gqa.values()]
    print(f"blind baselines   GQA: {100 * max(map(everyone.count, set(everyone))) / len(gqa):.1f} (one answer to all), "
          f"{100 * blind:.1f} (best answer to each kind of question);  POPE: F1 66.7, accuracy 50.0 (always yes);  "
          f"MME: 50 of 200 a task (always yes)")


def main():
    parser = argparse.ArgumentParser(description="Make the pocket world: pictures, questions, tower, LLMs.")
    parser.add_argument("--out", default="data/pocket", help="folder to write (default data/pocket)")
    parser.add_argument("--scenes", type=int, default=3200, help="training pictures (default 3200)")
    parser.add_argument("--held_out", type=int, default=300, help="pictures to choose by, and as many to report")
    parser.add_argument("--effort", type=float, default=1.0, help="multiplies all training steps (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="60 scenes, a few steps: to test code, not models")
    parser.add_argument("--overwrite", action="store_true", help="remake what is there")
    args = parser.parse_args()
    if args.scenes < 20 or args.held_out < 20 or args.effort < 0:
        raise SystemExit("pocket.py: --scenes and --held_out must be at least 20, --effort at least 0")
    settings = {"scenes": args.scenes, "held_out": args.held_out, "effort": args.effort, "seed": args.seed,
                "corpus": 1500, "tested": 600}
    if args.tiny:
        settings |= {"scenes": 60, "held_out": 24, "effort": 0.005, "corpus": 200, "tested": 30}
    out, start = Path(args.out), time.time()
    marker = out / "pocket.json"                            # written when the pictures and files are whole
    if args.overwrite:
        marker.unlink(missing_ok=True)
        (out / "words.json").unlink(missing_ok=True)        # vocab.py's, of the tokenizers that go
        for name in (*MODELS, "images", "eval", "val"):
            shutil.rmtree(out / name, ignore_errors=True)
    elif marker.exists() and json.loads(marker.read_text(encoding="utf-8")) != settings:
        raise SystemExit(f"pocket.py: {marker} records other settings; give --overwrite or another --out")
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    with multiprocessing.get_context("spawn").Pool(min(2, os.cpu_count() or 1), maxtasksperchild=30) as pool:
        if marker.exists():
            print(f"pictures          reused from {out}")
        else:
            number = make_world(out, settings["scenes"], settings["held_out"], args.seed, pool)
            write_json(marker, settings)
            print(f"pictures          {number} with their files in {time.time() - start:.0f} s", flush=True)
        wanted = [(name, settings | {"out": str(out)}) for name in MODELS if not (out / name).exists()]
        print("".join(f"{name:17} reused\n" for name in MODELS if (out / name).exists()), end="", flush=True)
        for name, took in pool.imap_unordered(make_model, wanted):
            print(f"{name:17} done in {took:.0f} s", flush=True)
    report(out)
    print(f"all in {out} after {time.time() - start:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"pocket.py: {error}")
