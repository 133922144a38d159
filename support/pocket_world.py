"""The pocket world: scenes, their pictures, and the language about them.

A scene is one to three objects on a 3 x 3 grid. `is_held_out` splits all possible scenes by what is
in them, and the split is the same for the pictures and for the LLMs' text. pocket.py writes the
data files, pocket_models.py trains the models.

Every function takes its random numbers from `rng`, a random.Random. So the order of the calls is
part of the world: with another order the same seed gives other scenes and other questions.
"""
import functools
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


def make_scene(rng, most=3):
    """Return a random scene: {"objects": a list, "background": an index into BACKGROUNDS}.

    An object is {"shape", "color", "size", "cell": 0 to 8, "box": [x0, y0, x1, y1]}, and a sign
    has a "word", too. most: the largest number of objects.
    """
    free = list(range(9))
    objects = []
    # Signs come first, because they need a cell of the middle column.
    for shape in sorted(make_shapes(rng, most), key=lambda shape: shape != "sign"):
        cell = rng.choice([c for c in free if shape != "sign" or c % 3 == 1])
        free.remove(cell)
        if objects and rng.random() < 0.2:
            color = objects[-1]["color"]
        else:
            color = rng.choice(list(COLORS))
        objects.append(make_object(rng, shape, color, cell))
    rng.shuffle(objects)
    return {"objects": objects, "background": rng.randrange(len(BACKGROUNDS))}


def make_shapes(rng, most):
    """Return the shapes of one scene: a list of one to `most` names, at most one of them "sign"."""
    count = min(rng.choices((1, 2, 3), (2, 5, 4))[0], most)
    shapes = []
    for _ in range(count):
        chance = rng.random()
        shape = rng.choices(list(SHAPES), list(SHAPES.values()))[0]
        if shapes and chance < 0.25:
            shape = shapes[-1]              # something to count
        elif shapes and chance < 0.5:
            shape = PARTNERS[shapes[-1]]
        if shape == "sign" and "sign" in shapes:
            shape = "circle"
        shapes.append(shape)
    return shapes


def make_object(rng, shape, color, cell):
    """Return one object of a scene, of random size and a little off the middle of its cell."""
    thing = {"shape": shape, "color": color, "size": rng.choice(SIZES), "cell": cell}
    x, y = 32 + 64 * (cell % 3), 32 + 64 * (cell // 3)
    if shape == "sign":                     # all signs look alike: a small tower must read them
        thing.update(size="large", word=rng.choice(WORDS))
        half_width, half_height = 36, 20
    else:
        half_width = half_height = 29 if thing["size"] == "large" else 20
        x += rng.randint(-4, 4) * 3 // 4
        y += rng.randint(-4, 4) * 3 // 4
    thing["box"] = [x - half_width, y - half_height, x + half_width, y + half_height]
    return thing


def scene_key(scene):
    """Return what is in a scene and where, as one string.

    A scene with other sizes, jitter, background or order of objects is the same scene.
    """
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
    signs = [t for t in scene["objects"] if t["shape"] == "sign"]
    return signs[0] if signs else None


def unique_things(scene):
    """Return the objects that are the only ones of their shape: "the star" means one of these."""
    shapes = [t["shape"] for t in scene["objects"]]
    return [t for t in scene["objects"] if shapes.count(t["shape"]) == 1]


# --------------------------------------------------------------------------------------------------
# pictures of scenes

ARM = 0.36                                  # half the width of a cross's arm
POLYGONS = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0, -0.95), (1, 0.82), (-1, 0.82)],
    "diamond": [(0, -1), (0.68, 0), (0, 1), (-0.68, 0)],
    "cross": [(-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM),
              (ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM)],
    "sign": [(-1, -1), (1, -1), (1, 1), (-1, 1)]}


def outline(shape):
    """Return the outline of a shape in the square [-1, 1] x [-1, 1], y downwards, as points."""
    if shape in POLYGONS:
        return POLYGONS[shape]
    angles = [i / 40 * 2 * math.pi for i in range(40)]
    if shape == "circle":
        return [(math.cos(a), math.sin(a)) for a in angles]
    if shape == "heart":
        return [(math.sin(a) ** 3, heart_y(a)) for a in angles]
    if shape == "star":
        points = []
        for i in range(10):
            radius = 1.05 if i % 2 == 0 else 0.45
            points.append((radius * math.sin(i * math.pi / 5),
                           0.08 - radius * math.cos(i * math.pi / 5)))
        return points
    outer = [math.radians(60 + 240 * i / 30) for i in range(31)]        # a moon: two arcs
    inner = [math.radians(270 - 180 * i / 30) for i in range(31)]
    return ([(0.25 + math.cos(a), math.sin(a)) for a in outer]
            + [(0.75 + 0.9 * math.cos(a), 0.9 * math.sin(a)) for a in inner])


def heart_y(a):
    curve = 5 * math.cos(2 * a) + 2 * math.cos(3 * a) + math.cos(4 * a) - 13 * math.cos(a)
    return curve / 16 - 0.1


@functools.cache
def background(index, scale):
    """Return a light colour that darkens a little downwards: RGB image, scale * SIDE square."""
    light = BACKGROUNDS[index]
    grey = Image.linear_gradient("L").resize((scale * SIDE, scale * SIDE))
    return ImageOps.colorize(grey, light, darker(light, 0.9))


@functools.cache
def sign_font(size):
    return ImageFont.load_default(size)     # Pillow's own font, so that no font file is needed


def darker(color, factor):
    return tuple(int(factor * value) for value in color)


def draw_scene(scene):
    """Return the picture of a scene: RGB image, SIDE x SIDE."""
    scale = 2                               # drawn at twice the size and reduced: smooth edges
    shadow = darker(darker(BACKGROUNDS[scene["background"]], 0.9), 0.86)
    picture = background(scene["background"], scale).copy()
    pen = ImageDraw.Draw(picture)
    for thing in scene["objects"]:
        x0, y0, x1, y1 = (scale * v for v in thing["box"])
        x, y = (x0 + x1) / 2, (y0 + y1) / 2
        half_width, half_height = (x1 - x0) / 2, (y1 - y0) / 2
        points = [(x + u * half_width, y + v * half_height) for u, v in outline(thing["shape"])]
        color = COLORS[thing["color"]]
        pen.polygon([(u + 3 * scale, v + 4 * scale) for u, v in points], fill=shadow)
        pen.polygon(points, fill=color)
        pen.line(points + points[:2], fill=darker(color, 0.75), width=2 * scale, joint="curve")
        if "word" in thing:
            border = int((y1 - y0) / 8)
            font = sign_font(int(0.45 * (y1 - y0)))
            ink = (20, 20, 20)
            pen.rectangle((x0 + border, y0 + border, x1 - border, y1 - border),
                          fill=(255, 255, 255))
            pen.text((x, y), thing["word"].upper(), fill=ink, font=font, anchor="mm",
                     stroke_width=scale // 2, stroke_fill=ink)
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


def make_facts():
    """Return {question: answer} about the world's words, without a scene."""
    opposites = {"large": "Small", "small": "Large", "left": "Right", "right": "Left",
                 "top": "Bottom", "bottom": "Top", "open": "Closed", "black": "White",
                 "yes": "No", "no": "Yes", "hot": "Cold", "day": "Night"}
    colors = {"grass": "Green", "the sky": "Blue", "blood": "Red", "coal": "Black",
              "a lemon": "Yellow", "a plum": "Purple"}
    sides = {"triangle": "Three", "square": "Four", "diamond": "Four"}
    shapes = list(SHAPES)[:8]               # without the sign
    facts = {f"What is the opposite of {a}?": b for a, b in opposites.items()}
    facts |= {f"What color is {a}?": b for a, b in colors.items()}
    facts |= {f"How many sides does a {a} have?": b for a, b in sides.items()}
    for a in range(5):
        for b in range(5):
            facts[f"What is {NUMBERS[a]} plus {NUMBERS[b]}?"] = NUMBERS[a + b].capitalize()
    facts |= {f"What number comes after {NUMBERS[a]}?": NUMBERS[a + 1].capitalize()
              for a in range(9)}
    facts |= {f"Is {a} a color?": "Yes" for a in COLORS}
    facts |= {f"Is {a} a color?": "No" for a in shapes}
    facts |= {f"Is a {a} a shape?": "Yes" for a in shapes}
    facts |= {f"Is a {a} a shape?": "No" for a in WORDS[6:16:2]}
    return facts


FACTS = make_facts()


def place(cell):
    """Return where an object is, such as "at top left" or "at center"."""
    return "at " + CELLS[cell]


def article(phrase):
    """Return the phrase with "a" or "an" before it."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def name_of(thing, full=True):
    """Return an object's name: "small red star at left". Not `full`: "red star"."""
    name = f"{thing['color']} {thing['shape']}"
    if full:
        name += " " + place(thing["cell"])
    if "word" in thing:
        return f"{name} saying {thing['word']}"     # all signs have one size
    return f"{thing['size']} {name}" if full else name


def describe(scene, rng, style):
    """Return one line about all objects of a scene, in random order.

    style: one of STYLES. "short" leaves out sizes and places.
    """
    things = rng.sample(scene["objects"], len(scene["objects"]))
    if style == "keys":
        return ", ".join(name_of(t) for t in things)
    if style == "there":
        return " ".join(f"There is {article(name_of(t))}." for t in things)
    return " and ".join(article(name_of(t, full=style != "short")) for t in things)


def statements(scene, rng, style):
    """Return short true sentences about the unique objects and the number of objects."""
    sentences = []
    for thing in unique_things(scene):
        facts = [thing["color"]]
        if style != "short":
            if "word" not in thing:
                facts.append(thing["size"])
            facts.append(place(thing["cell"]))
        if "word" in thing:
            facts.append(f"marked {thing['word']}")
        sentences += [f"The {thing['shape']} is {fact}." for fact in facts]
    count = len(scene["objects"])
    if count == 1:
        sentences.append("There is one object.")
    else:
        sentences.append(f"There are {NUMBERS[count]} objects.")
    return " ".join(rng.sample(sentences, len(sentences)))


# Kind of question -> how often training asks it, and GQA's three types (structural, semantic,
# detailed) and group of comparable answers. GQA does not ask the kinds with None.
KINDS = {
    "exist": (3, ("verify", "obj", "exist", None)),
    "exist color": (3, ("verify", "obj", "existAttr", None)),
    "is color": (2, ("verify", "attr", "verifyAttr", None)),
    "is place": (2, ("verify", "attr", "positionVerify", None)),
    "is word": (1, ("verify", "attr", "verifyText", None)),
    "color": (4, ("query", "attr", "directOf", "color")),
    "shape": (4, ("query", "cat", "categoryThat", "shape")),
    "word": (4, ("query", "attr", "textOf", "word")),
    "where": (3, ("query", "attr", "positionQuery", "place")),
    "which color": (2, ("choose", "attr", "chooseAttr", None)),
    "and": (2, ("logical", "obj", "existAnd", None)),
    "or": (1, ("logical", "obj", "existOr", None)),
    "same color": (1, ("compare", "attr", "twoSame", None)),
    "count": (1, None),
    "is count": (1, None)}
TRAIN_KINDS = tuple(kind for kind, (often, _) in KINDS.items() for _ in range(often))
# What an LLM learns first: to look up a fact.
EASY_KINDS = ("color", "shape", "shape", "where", "where", "word", "which color", "exist")
# Kinds that are also asked as multiple choice, with all options.
OPTIONS = {"color": tuple(COLORS), "shape": tuple(SHAPES), "word": WORDS, "where": CELLS}


def ask(kind, scene, rng, style="and", yes=None):
    """Return (question, answer, shapes named), or None if the scene allows no clear question.

    kind: one of KINDS. The answer is a string, or a bool for yes/no kinds. There the answer is
    drawn first and the question is made to fit, so that a blind guess is right half of the time;
    `yes` sets the answer instead. style: of the description, if the question is about text. A
    "short" one lacks sizes and places.
    """
    if yes is None:
        yes = rng.random() < 0.5
    noun = rng.choice(("image", "picture"))
    unique = unique_things(scene)
    thing = rng.choice(unique) if unique else None
    if kind in ("exist", "exist color", "and", "or"):
        return ask_whether(kind, scene, rng, yes, noun)
    if kind in ("count", "is count"):
        return ask_number(kind, scene, rng, yes, noun)
    if kind in ("word", "is word"):
        return ask_word(kind, scene, rng, yes)
    if thing is None:
        return None
    return ask_about(thing, kind, scene, rng, style, yes)


def ask_whether(kind, scene, rng, yes, noun):
    """`ask` for the kinds that ask whether an object is there."""
    things = scene["objects"]
    shapes = [t["shape"] for t in things]
    absent = [s for s in SHAPES if s not in shapes]
    if kind == "exist":
        shape = rng.choice(shapes if yes else absent)
        return f"Is there a {shape} in the {noun}?", yes, [shape]
    if kind == "exist color":
        thing = rng.choice(things)
        color, shape = thing["color"], thing["shape"]
        present = [(t["color"], t["shape"]) for t in things]
        while not yes and (color, shape) in present:
            # Only the colour or only the shape is wrong, so a reader must look at both.
            color, shape = thing["color"], thing["shape"]
            if rng.random() < 0.5:
                color = rng.choice(list(COLORS))
            else:
                shape = rng.choice(list(SHAPES))
        return f"Is there {article(color + ' ' + shape)} in the {noun}?", yes, [shape]
    present = sorted(set(shapes))
    # Both answers need two shapes. Otherwise the answer to "and" would nearly always be no.
    if len(present) < 2:
        return None
    # "and" needs both shapes for a yes, "or" needs one.
    num_present = {"and": 1, "or": 0}[kind] + yes
    pair = rng.sample(present, num_present) + rng.sample(absent, 2 - num_present)
    rng.shuffle(pair)
    return f"Is there a {pair[0]} {kind} a {pair[1]} in the {noun}?", yes, pair


def ask_number(kind, scene, rng, yes, noun):
    """`ask` for the kinds that ask how many objects there are."""
    shapes = [t["shape"] for t in scene["objects"]]
    name = rng.choice(shapes + ["object"])
    number = len(shapes) if name == "object" else shapes.count(name)
    # Without this nearly every count would be one.
    if name != "object" and number == 1 and rng.random() < 0.6:
        return None
    plural = "crosses" if name == "cross" else name + "s"
    if kind == "count":
        return f"How many {plural} are there in the {noun}?", NUMBERS[number], [name]
    if not yes:
        number = rng.choice([n for n in (1, 2, 3, 4) if n != number])
    claim = f"Is there one {name}" if number == 1 else f"Are there {NUMBERS[number]} {plural}"
    return f"{claim} in the {noun}?", yes, [name]


def ask_word(kind, scene, rng, yes):
    """`ask` for the kinds that ask what the sign says."""
    sign = sign_of(scene)
    if sign is None:
        return None
    if kind == "word":
        question = rng.choice(("What word is written on the sign?", "What does the sign say?"))
        return question, sign["word"], ["sign"]
    word = sign["word"] if yes else rng.choice([w for w in WORDS if w != sign["word"]])
    return f"Does the sign say {word}?", yes, ["sign"]


def ask_about(thing, kind, scene, rng, style, yes):
    """`ask` for the kinds about `thing`, an object that is the only one of its shape."""
    shape, color = thing["shape"], thing["color"]
    other_color = rng.choice([c for c in COLORS if c != color])
    if kind == "color":
        return f"What color is the {shape}?", color, [shape]
    if kind == "is color":
        return f"Is the {shape} {color if yes else other_color}?", yes, [shape]
    if kind == "which color":
        pair = rng.sample((color, other_color), 2)
        return f"Is the {shape} {pair[0]} or {pair[1]}?", color, [shape]
    if kind == "shape":
        if [t["color"] for t in scene["objects"]].count(color) > 1:
            return None
        return f"What shape is {color}?", shape, [shape]
    if kind == "same color":
        unique = unique_things(scene)
        if len(unique) < 2:
            return None
        a, b = rng.sample(unique, 2)
        if (a["color"] == b["color"]) != yes:
            return None
        # Few pairs have the same colour. So drop most of the others: otherwise nearly all are no.
        if not yes and rng.random() < 0.65:
            return None
        shapes = [a["shape"], b["shape"]]
        return f"Do the {shapes[0]} and the {shapes[1]} have the same color?", yes, shapes
    if style == "short":
        return None                         # such a description names no place
    if kind == "where":
        return f"Where is the {shape}?", CELLS[thing["cell"]], [shape]
    wrong = rng.choice([c for c in range(9) if c != thing["cell"]])     # "is place"
    return f"Is the {shape} {place(thing['cell'] if yes else wrong)}?", yes, [shape]


def spoken(answer):
    """Return an answer as LLaVA's data writes it: True -> "Yes", "red" -> "Red"."""
    if isinstance(answer, bool):
        return "Yes" if answer else "No"
    return answer.capitalize()


def questions(scene, rng, count, kinds, style="and"):
    """Return up to `count` different questions: list of (kind, question, answer like "Red")."""
    found = {}
    for _ in range(12 * count):
        kind = rng.choice(kinds)
        made = ask(kind, scene, rng, style)
        if made and made[0] not in found:
            question, answer, _ = made
            found[question] = (kind, question, spoken(answer))
            if len(found) == count:
                break
    return list(found.values())


def choices(scene, rng, count, style="and"):
    """Return up to `count` multiple-choice questions: list of (kind, question, answer, options)."""
    rows = []
    for kind, question, answer in questions(scene, rng, count, tuple(OPTIONS), style):
        wrong = [spoken(option) for option in OPTIONS[kind] if spoken(option) != answer]
        num_wrong = rng.choice((1, 2, 3))
        options = [answer, *rng.sample(wrong, num_wrong)]
        rows.append((kind, question, answer, rng.sample(options, len(options))))
    return rows


def with_options(question, options):
    """Return a multiple-choice question as MMBench's prompt writes it.

    The answers are words all the same: in 750 steps LLMs this small did not learn to answer with
    the letter. MMBench's scoring accepts both.
    """
    lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options)]
    return "\n".join([question, *lines, LETTER])


def chat(pairs, opening=None, suffix=True):
    """Return (question, answer) pairs as chat messages: list of {"role", "content"}.

    opening: a description or "<image>" before the first question. The suffix is written once,
    after the first question, and holds for all turns, as in LLaVA's data.
    """
    messages = []
    for i, (question, answer) in enumerate(pairs):
        text = question
        if i == 0 and suffix:
            text = f"{text}\n{SUFFIX}"
        if i == 0 and opening is not None:
            text = f"{opening}\n{text}"
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": answer})
    return messages


def choice_chat(rows, opening):
    """Return the rows of `choices` as chat messages."""
    pairs = [(with_options(question, options), answer) for _, question, answer, options in rows]
    return chat(pairs, opening, suffix=False)


# --------------------------------------------------------------------------------------------------
# text for the LLMs and for the tokenizers

def document(rng, most=3, chats=0.5, kinds=TRAIN_KINDS):
    """Return one text: chat messages [{"role", "content"}], or plain pieces [(text, is_trained)].

    most: objects in the scene. chats: the share of chats, with questions of the given kinds. The
    plain texts have more answers a token: mostly questions and answers, a line each.
    """
    chance = rng.random()
    if chance < 0.02:
        return chat(rng.sample(list(FACTS.items()), 4))
    scene = random_scene(rng, most=most)
    style = rng.choice(STYLES)
    text = describe(scene, rng, style)
    if chance < 0.04:
        return [(text + "\n", True)]
    same_content = [s for s in STYLES if (s == "short") == (style == "short")]
    again = describe(scene, rng, rng.choice(same_content + ["short"]))
    if chance < 0.06:
        return chat([(rng.choice(BRIEF), again)], text, suffix=False)
    if chance < 0.06 + chats / 10:
        rows = choices(scene, rng, 3, style)
        if rows:
            return choice_chat(rows, text)
    pairs = [(q, a) for _, q, a in questions(scene, rng, rng.randint(4, 8), kinds, style)]
    if chance > 1 - chats and pairs:
        return chat(pairs, text)
    pieces = [(text + "\n", False)]
    if chance < 0.15 or not pairs:
        pieces.append((rng.choice((again, statements(scene, rng, style))) + "\n", True))
        return pieces
    for question, answer in pairs:
        pieces += [(question + "\n", False), (answer + "\n", True)]
    return pieces


def corpus(seed, count):
    """Return text with every word of the world, for training the tokenizers: list of strings."""
    rng = random.Random(f"corpus {seed}")
    words = (*COLORS, *SHAPES, *WORDS, *NUMBERS, *SIZES, "left", "right", "top", "bottom")
    lines = [f"{role} {word} {word.capitalize()} {word}"
             for word in words for role in ("user", "assistant", "system")]
    lines += list(BRIEF) * 3
    lines += [f"{question}\n{answer}" for question, answer in FACTS.items()] * 3
    for _ in range(count):
        lines += [m["content"] if isinstance(m, dict) else m[0] for m in document(rng)]
    return lines
