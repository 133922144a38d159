"""The pocket world: scenes, their pictures, and the language about them.

A scene is one to three objects on a 3 x 3 grid. `is_held_out` splits all possible scenes by what is
in them, and the split is the same for the pictures and for the LLMs' text.

Every function takes its random numbers from `rng`, a random.Random. So the order of the calls is
part of the world: with another order the same seed gives other scenes and other questions.
"""
import hashlib
import math
import random

from PIL import Image, ImageDraw, ImageFont, ImageOps

# --------------------------------------------------------------------------------------------------
# scenes; lengths are in pixels of the saved picture

SIDE = 192                                  # side of a saved picture; the tower sees it smaller
COLORS = {"red": (214, 40, 40), "orange": (247, 134, 20), "yellow": (250, 212, 30),
          "green": (44, 150, 62), "blue": (38, 92, 214), "purple": (124, 52, 168),
          "pink": (250, 130, 190), "black": (34, 34, 38)}
# How often each shape is drawn. POPE's "popular" questions need some that are more frequent.
SHAPES = {"circle": 1.3, "square": 1.2, "triangle": 1.1, "star": 1.0, "heart": 1.0, "cross": 0.9,
          "moon": 0.8, "diamond": 0.7, "sign": 2.6}
# Shapes that often come together. POPE's "adversarial" questions need them.
PARTNERS = {"circle": "square", "square": "circle", "triangle": "cross", "cross": "triangle",
            "star": "moon", "moon": "star", "heart": "diamond", "diamond": "heart",
            "sign": "circle"}
SIZES = ("large", "small")
CELLS = ("top left", "top", "top right", "left", "center", "right",
         "bottom left", "bottom", "bottom right")
WORDS = ("stop", "open", "exit", "taxi", "bank", "milk", "sale", "hotel", "zoo", "pizza", "books",
         "jazz")                            # what signs say
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BACKGROUNDS = ((246, 241, 230), (231, 240, 247), (236, 245, 233), (247, 236, 238), (240, 238, 247),
               (243, 243, 243))


def make_scene(rng, most):
    """Return a random scene: {"objects": a list, "background": an index into BACKGROUNDS}.

    An object is {"shape", "color", "size", "cell": 0 to 8, "box": [x0, y0, x1, y1]}, and a sign
    has a "word", too. A scene has one sign at most. most: the largest number of objects.
    """
    shapes = []
    for _ in range(min(rng.choices((1, 2, 3), (2, 5, 4))[0], most)):
        chance = rng.random()
        shape = rng.choices(list(SHAPES), list(SHAPES.values()))[0]
        if shapes and chance < 0.25:
            shape = shapes[-1]              # something to count
        elif shapes and chance < 0.5:
            shape = PARTNERS[shapes[-1]]
        shapes.append("circle" if shape == "sign" and "sign" in shapes else shape)
    free = list(range(9))
    objects = []
    # Signs come first, because they need a cell of the middle column.
    for shape in sorted(shapes, key=lambda shape: shape != "sign"):
        cell = rng.choice([c for c in free if shape != "sign" or c % 3 == 1])
        free.remove(cell)
        has_same_color = objects and rng.random() < 0.2
        color = objects[-1]["color"] if has_same_color else rng.choice(list(COLORS))
        thing = {"shape": shape, "color": color, "size": rng.choice(SIZES), "cell": cell}
        x, y = 32 + 64 * (cell % 3), 32 + 64 * (cell // 3)
        if shape == "sign":                 # all signs look alike: a small tower must read them
            thing |= {"size": "large", "word": rng.choice(WORDS)}
            half_width, half_height = 36, 20
        else:
            half_width = half_height = 29 if thing["size"] == "large" else 20
            x += rng.randint(-4, 4) * 3 // 4
            y += rng.randint(-4, 4) * 3 // 4
        thing["box"] = [x - half_width, y - half_height, x + half_width, y + half_height]
        objects.append(thing)
    rng.shuffle(objects)
    return {"objects": objects, "background": rng.randrange(len(BACKGROUNDS))}


def scene_key(scene):
    """Return what is in a scene and where, as one string: no sizes, no jitter, no background."""
    return "; ".join(sorted(f"{t['color']} {t['shape']} {t.get('word', '')} {t['cell']}"
                            for t in scene["objects"]))


def is_held_out(scene):
    """Return True for the tenth of all scenes that no model may train on, as picture or as text."""
    return hashlib.sha1(scene_key(scene).encode()).digest()[0] < 26


def random_scene(rng, held_out=False, most=3):
    """Return a random scene from one side of the split."""
    while True:
        scene = make_scene(rng, most)
        if is_held_out(scene) == held_out:
            return scene


def sign_of(scene):
    """Return the sign of a scene, or None."""
    return next((t for t in scene["objects"] if t["shape"] == "sign"), None)


def unique_things(scene):
    """Return the objects that are the only ones of their shape: "the star" means one of these."""
    shapes = [t["shape"] for t in scene["objects"]]
    return [t for t in scene["objects"] if shapes.count(t["shape"]) == 1]


# --------------------------------------------------------------------------------------------------
# pictures of scenes

# The outline of each shape in the square [-1, 1] x [-1, 1], y downwards, as points.
ARM = 0.36                                  # half the width of a cross's arm
ANGLES = [i / 40 * 2 * math.pi for i in range(40)]
POINTS = [(i * math.pi / 5, 1.05 if i % 2 == 0 else 0.45) for i in range(10)]   # of a star
OUTER = [math.radians(60 + 240 * i / 30) for i in range(31)]                    # arcs of a moon
INNER = [math.radians(270 - 180 * i / 30) for i in range(31)]
OUTLINES = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0, -0.95), (1, 0.82), (-1, 0.82)],
    "diamond": [(0, -1), (0.68, 0), (0, 1), (-0.68, 0)],
    "cross": [(-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM),
              (ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM)],
    "sign": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "circle": [(math.cos(a), math.sin(a)) for a in ANGLES],
    "heart": [(math.sin(a) ** 3, (5 * math.cos(2 * a) + 2 * math.cos(3 * a) + math.cos(4 * a)
                                  - 13 * math.cos(a)) / 16 - 0.1) for a in ANGLES],
    "star": [(radius * math.sin(a), 0.08 - radius * math.cos(a)) for a, radius in POINTS],
    "moon": ([(0.25 + math.cos(a), math.sin(a)) for a in OUTER]
             + [(0.75 + 0.9 * math.cos(a), 0.9 * math.sin(a)) for a in INNER])}


def darker(color, factor):
    return tuple(int(factor * value) for value in color)


def draw_scene(scene):
    """Return the picture of a scene: RGB image, SIDE x SIDE."""
    scale = 2                               # drawn at twice the size and reduced: smooth edges
    light = BACKGROUNDS[scene["background"]]
    dark = darker(light, 0.9)               # the background darkens a little downwards
    column = ImageOps.colorize(Image.linear_gradient("L").resize((1, scale * SIDE)), light, dark)
    picture = column.resize((scale * SIDE, scale * SIDE))
    pen = ImageDraw.Draw(picture)
    for thing in scene["objects"]:
        x0, y0, x1, y1 = (scale * v for v in thing["box"])
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        half_width, half_height = (x1 - x0) / 2, (y1 - y0) / 2
        points = [(x + u * half_width, y + v * half_height) for u, v in OUTLINES[thing["shape"]]]
        shadow = [(u + 3 * scale, v + 4 * scale) for u, v in points]
        color = COLORS[thing["color"]]
        pen.polygon(shadow, fill=darker(dark, 0.86))
        pen.polygon(points, fill=color)
        pen.line(points + points[:2], fill=darker(color, 0.75), width=2 * scale, joint="curve")
        if "word" in thing:
            border = int((y1 - y0) / 8)
            font = ImageFont.load_default(int(0.45 * (y1 - y0)))    # Pillow's own: needs no file
            pen.rectangle((x0 + border, y0 + border, x1 - border, y1 - border), fill="white")
            pen.text((x, y), thing["word"].upper(), fill=(20, 20, 20), font=font, anchor="mm",
                     stroke_width=scale // 2)
    return picture.reduce(scale)


# --------------------------------------------------------------------------------------------------
# language: descriptions of a scene, questions with answers, and facts that need no picture

SUFFIX = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
BRIEF = ("Say briefly what is in the picture.", "What is shown here, in short?",
         "Describe the image in one line.", "Give a short caption for this picture.",
         "Sum up the image.", "Tell me shortly what you see.",
         "Write one short line about the image.", "What does the picture show?",
         "Name what can be seen here.", "Put the image into a few words.",
         "Give a brief account of the picture.")
STYLES = ("and", "there", "keys", "short")  # of descriptions

OPPOSITES = {"large": "Small", "small": "Large", "left": "Right", "right": "Left",
             "top": "Bottom", "bottom": "Top", "open": "Closed", "black": "White",
             "yes": "No", "no": "Yes", "hot": "Cold", "day": "Night"}
COLORS_OF = {"grass": "Green", "the sky": "Blue", "blood": "Red", "coal": "Black",
             "a lemon": "Yellow", "a plum": "Purple"}
NUM_SIDES = {"triangle": "Three", "square": "Four", "diamond": "Four"}
REAL_SHAPES = [shape for shape in SHAPES if shape != "sign"]
# {question: answer} about the world's words, without a scene.
FACTS = (
    {f"What is the opposite of {a}?": b for a, b in OPPOSITES.items()}
    | {f"What color is {a}?": b for a, b in COLORS_OF.items()}
    | {f"How many sides does a {a} have?": b for a, b in NUM_SIDES.items()}
    | {f"What is {NUMBERS[a]} plus {NUMBERS[b]}?": NUMBERS[a + b].capitalize()
       for a in range(5) for b in range(5)}
    | {f"What number comes after {NUMBERS[a]}?": NUMBERS[a + 1].capitalize() for a in range(9)}
    | {f"Is {a} a color?": "Yes" if a in COLORS else "No" for a in (*COLORS, *REAL_SHAPES)}
    | {f"Is a {a} a shape?": "Yes" if a in SHAPES else "No"
       for a in (*REAL_SHAPES, *WORDS[6::2])})


def article(phrase):
    """Return the phrase with "a" or "an" before it."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def describe(scene, rng, style):
    """Return one line about all objects of a scene, in random order.

    style: one of STYLES. "short" leaves out sizes and places.
    """
    names = []
    for thing in rng.sample(scene["objects"], len(scene["objects"])):
        name = f"{thing['color']} {thing['shape']}"
        if style != "short":
            name += f" at {CELLS[thing['cell']]}"
        if "word" in thing:
            name += f" saying {thing['word']}"      # all signs have one size
        elif style != "short":
            name = f"{thing['size']} {name}"
        names.append(name)
    if style == "keys":
        return ", ".join(names)
    if style == "there":
        return " ".join(f"There is {article(name)}." for name in names)
    return " and ".join(article(name) for name in names)


def statements(scene, rng, style):
    """Return short true sentences about the unique objects and the number of objects."""
    count = len(scene["objects"])
    facts = []
    for thing in unique_things(scene):
        subject = f"The {thing['shape']} is"
        facts.append(f"{subject} {thing['color']}.")
        if style != "short" and "word" not in thing:
            facts.append(f"{subject} {thing['size']}.")
        if style != "short":
            facts.append(f"{subject} at {CELLS[thing['cell']]}.")
        if "word" in thing:
            facts.append(f"{subject} marked {thing['word']}.")
    number = "is one object" if count == 1 else f"are {NUMBERS[count]} objects"
    facts.append(f"There {number}.")
    return " ".join(rng.sample(facts, len(facts)))


# How often training asks each kind of question.
KINDS = {"exist": 3, "exist color": 3, "is color": 2, "is place": 2, "is word": 1, "color": 4,
         "shape": 4, "word": 4, "where": 3, "which color": 2, "and": 2, "or": 1, "same color": 1,
         "count": 1, "is count": 1}
TRAIN_KINDS = tuple(kind for kind, often in KINDS.items() for _ in range(often))
# What an LLM learns first: to look up a fact.
EASY_KINDS = ("color", "shape", "shape", "where", "where", "word", "which color", "exist")
# Kinds that are also asked as multiple choice, with all options.
OPTIONS = {"color": tuple(COLORS), "shape": tuple(SHAPES), "word": WORDS, "where": CELLS}


def ask(kind, scene, rng, style="and", yes=None):
    """Return (question, answer) in lower case, or None if the scene allows no clear question.

    kind: one of KINDS. A yes or no is drawn before the question, so that a blind guess is right
    half of the time; yes=True or False sets it instead. style: of the description, if the question
    is about text.
    """
    if yes is None:
        yes = rng.random() < 0.5
    yes_or_no = "yes" if yes else "no"
    noun = rng.choice(("image", "picture"))
    unique = unique_things(scene)
    thing = rng.choice(unique) if unique else None
    shapes = [t["shape"] for t in scene["objects"]]
    absent = [s for s in SHAPES if s not in shapes]
    # Kinds about the whole scene.
    if kind == "exist":
        return f"Is there a {rng.choice(shapes if yes else absent)} in the {noun}?", yes_or_no
    if kind == "exist color":
        pairs = [(t["color"], t["shape"]) for t in scene["objects"]]
        color, shape = pair = rng.choice(pairs)
        while not yes and (color, shape) in pairs:
            # Only the colour or only the shape is wrong, so a reader must look at both.
            if rng.random() < 0.5:
                color, shape = rng.choice(list(COLORS)), pair[1]
            else:
                color, shape = pair[0], rng.choice(list(SHAPES))
        return f"Is there {article(f'{color} {shape}')} in the {noun}?", yes_or_no
    if kind in ("and", "or"):
        present = sorted(set(shapes))
        # Both answers need two shapes. Otherwise the answer to "and" would nearly always be no.
        if len(present) < 2:
            return None
        num_present = yes + (kind == "and")     # "and" needs both shapes for a yes, "or" needs one
        pair = rng.sample(present, num_present) + rng.sample(absent, 2 - num_present)
        rng.shuffle(pair)
        return f"Is there a {pair[0]} {kind} a {pair[1]} in the {noun}?", yes_or_no
    if kind in ("count", "is count"):
        name = rng.choice(shapes + ["object"])
        number = len(shapes) if name == "object" else shapes.count(name)
        # Without this nearly every count would be one.
        if name != "object" and number == 1 and rng.random() < 0.6:
            return None
        plural = "crosses" if name == "cross" else name + "s"
        if kind == "count":
            return f"How many {plural} are there in the {noun}?", NUMBERS[number]
        if not yes:
            number = rng.choice([n for n in (1, 2, 3, 4) if n != number])
        claim = f"Is there one {name}" if number == 1 else f"Are there {NUMBERS[number]} {plural}"
        return f"{claim} in the {noun}?", yes_or_no
    if kind in ("word", "is word"):
        sign = sign_of(scene)
        if sign is None:
            return None
        word = sign["word"]
        if kind == "word":
            asked = ("What word is written on the sign?", "What does the sign say?")
            return rng.choice(asked), word
        claim = word if yes else rng.choice([w for w in WORDS if w != word])
        return f"Does the sign say {claim}?", yes_or_no
    # Kinds about one object, which must be the only one of its shape.
    if thing is None:
        return None
    shape, color, cell = thing["shape"], thing["color"], thing["cell"]
    other_color = rng.choice([c for c in COLORS if c != color])
    if kind == "color":
        return f"What color is the {shape}?", color
    if kind == "is color":
        return f"Is the {shape} {color if yes else other_color}?", yes_or_no
    if kind == "which color":
        pair = rng.sample((color, other_color), 2)
        return f"Is the {shape} {pair[0]} or {pair[1]}?", color
    if kind == "shape":
        colors = [t["color"] for t in scene["objects"]]
        return (f"What shape is {color}?", shape) if colors.count(color) == 1 else None
    if kind == "same color":
        if len(unique) < 2:
            return None
        a, b = rng.sample(unique, 2)
        # Few pairs have the same colour. So drop most of the others: otherwise nearly all are no.
        if (a["color"] == b["color"]) != yes or not yes and rng.random() < 0.65:
            return None
        return f"Do the {a['shape']} and the {b['shape']} have the same color?", yes_or_no
    if style == "short":
        return None                         # such a description names no place
    if kind == "where":
        return f"Where is the {shape}?", CELLS[cell]
    wrong = rng.choice([c for c in range(9) if c != cell])      # "is place"
    return f"Is the {shape} at {CELLS[cell if yes else wrong]}?", yes_or_no


def questions(scene, rng, count, kinds, style="and"):
    """Return up to `count` different questions: list of (kind, question, answer like "Red")."""
    found = {}
    for _ in range(12 * count):
        kind = rng.choice(kinds)
        made = ask(kind, scene, rng, style)
        if made and made[0] not in found:
            question, answer = made
            found[question] = (kind, question, answer.capitalize())
            if len(found) == count:
                break
    return list(found.values())


def choices(scene, rng, count, style="and"):
    """Return up to `count` multiple-choice questions: list of (kind, question, answer, options)."""
    rows = []
    for kind, question, answer in questions(scene, rng, count, tuple(OPTIONS), style):
        wrong = [o.capitalize() for o in OPTIONS[kind] if o.capitalize() != answer]
        options = [answer, *rng.sample(wrong, rng.choice((1, 2, 3)))]
        rows.append((kind, question, answer, rng.sample(options, len(options))))
    return rows


def chat(pairs, opening="", ending=SUFFIX):
    """Return (question, answer) pairs as chat messages: list of {"role", "content"}.

    opening: "<image>" or a description before the first question. ending: of the first question. It
    holds for all turns, as in LLaVA's data.
    """
    messages = [{"role": role, "content": text} for pair in pairs
                for role, text in zip(("user", "assistant"), pair)]
    lines = [opening, messages[0]["content"], ending]
    messages[0]["content"] = "\n".join(line for line in lines if line)
    return messages


def choice_chat(rows, opening):
    """Return the rows of `choices` as chat messages, with the options as in MMBench's prompt.

    The answers are words all the same: in 750 steps LLMs this small did not learn to answer with
    the letter. MMBench's scoring accepts both.
    """
    pairs = []
    for _, question, answer, options in rows:
        lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options)]
        pairs.append(("\n".join([question, *lines, LETTER]), answer))
    return chat(pairs, opening, ending="")


# --------------------------------------------------------------------------------------------------
# text for the LLMs and for the tokenizers

def document(rng, most=3, chats=0.5, kinds=TRAIN_KINDS):
    """Return one text: (messages, template for conversation.encode).

    most: objects in the scene. chats: the share of chats, with questions of the given kinds. The
    others, by template "prompted", have more answers a token: a line each, without roles.
    """
    chance = rng.random()
    if chance < 0.02:
        return chat(rng.sample(list(FACTS.items()), 4)), "chat"
    scene = random_scene(rng, most=most)
    style = rng.choice(STYLES)
    text = describe(scene, rng, style)
    if chance < 0.04:
        return [{"role": "assistant", "content": text}], "prompted"
    same_content = [s for s in STYLES if (s == "short") == (style == "short")]
    again = describe(scene, rng, rng.choice(same_content + ["short"]))
    if chance < 0.06:
        return chat([(rng.choice(BRIEF), again)], text, ending=""), "chat"
    if chance < 0.06 + chats / 10:
        rows = choices(scene, rng, 3, style)
        if rows:
            return choice_chat(rows, text), "chat"
    pairs = [(q, a) for _, q, a in questions(scene, rng, rng.randint(4, 8), kinds, style)]
    if chance > 1 - chats and pairs:
        return chat(pairs, text), "chat"
    if chance < 0.15 or not pairs:
        pairs, text = [(text, rng.choice((again, statements(scene, rng, style))))], ""
    return chat(pairs, text, ending=""), "prompted"


def corpus(seed, count):
    """Return text with every word of the world, for training the tokenizers: list of strings."""
    rng = random.Random(f"corpus {seed}")
    words = (*COLORS, *SHAPES, *WORDS, *NUMBERS, *SIZES, "left", "right", "top", "bottom")
    lines = [f"{role} {word} {word.capitalize()} {word}"
             for word in words for role in ("user", "assistant", "system")]
    lines += list(BRIEF) * 3
    lines += [f"{question}\n{answer}" for question, answer in FACTS.items()] * 3
    for _ in range(count):
        messages, template = document(rng)
        for message in messages:
            content = message["content"]
            lines += content.splitlines() if template == "prompted" else [content]
    return lines
