"""TextVQA, val 0.5.1: text in photographs, soft accuracy against ten human answers."""
import re

from benchmarks.reading import mean, stderr, unique
from common import read_json

HEADLINE, SCALE = "accuracy", 1
MAX_NEW_TOKENS = 128
ASK = "textvqa/llava_textvqa_val_v051_ocr.jsonl"
IMAGES = "textvqa/train_images"
QUESTIONS = "textvqa/TextVQA_0.5.1_val.json"
SOURCE = "TextVQA's site: val 0.5.1, train_val_images.zip"

NUMBERS = "zero one two three four five six seven eight nine ten".split()
DIGITS = {word: str(n) for n, word in enumerate(NUMBERS)} | {"none": "0"}
CONTRACTIONS = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock
oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's
something'd something'll that's there'd there're there's they'd they'll they're they've 'twas wasn't
we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's
who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've""".split()
DOUBLES = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've
""".split()
CONTRACTED = {full.replace("'", ""): full for full in CONTRACTIONS}
for full in DOUBLES:        # the official table has each spelling that lacks one apostrophe
    CONTRACTED |= {full[:i] + full[i + 1:]: full for i, c in enumerate(full) if c == "'"}
CONTRACTED |= {"somebody'd": "somebodyd", "'ows'at": "'ow's'at"}    # errors of the official table


def normalize(text):
    """Return a text as the EvalAI answer processor leaves it."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out = text
    for c in ';/[]"{}()=+\\_-><@`,?!':
        # If one such mark stands beside a space, all of them vanish; else each becomes a space.
        # The official tool looks for this in the text before any change, not in `out`.
        beside_space = c + " " in text or " " + c in text
        out = out.replace(c, "" if beside_space else " ")
    # The official tool passes re.UNICODE (32) where the count belongs.
    out = re.sub(r"\.(?!\d)", "", out, count=32)
    words = [DIGITS.get(word, word) for word in out.lower().split()]
    words = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(CONTRACTED.get(word, word) for word in words)


def soft_accuracy(text, humans):
    """Return 0, .3, .6, .9 or 1 if 0, 1, 2, 3 or more of the ten human answers agree.

    This is the mean over the ten of min(1, number of the other nine that agree / 3).
    """
    agree = [normalize(human) for human in humans].count(normalize(text))
    return min(10, 3 * agree) / 10


def question_in(prompt):
    """Return the question, in lower case, of any prompt that LLaVA has used."""
    in_the_middle = re.match(r"OCR tokens: .*?Question: (.*?) Short answer:", prompt, re.DOTALL)
    if in_the_middle:
        return in_the_middle[1].lower()
    lines = prompt.split("\n")
    ocr_first = prompt.startswith("Reference OCR token:") and len(lines) == 3
    return lines[1 if ocr_first else 0].lower()


def key(answer):
    """Return "image / question": LLaVA's question_id is the id of the image."""
    return f"{answer['question_id']} / {question_in(answer['prompt'])}"


def read(questions, truth):
    """Return {key: record} of TextVQA_0.5.1_val.json, which holds the answers."""
    data = read_json(questions)["data"]
    for q in data:
        if len(q["answers"]) != 10:
            raise ValueError(f"{q['question']!r} on {q['image_id']} has not ten answers")
    return unique(data, lambda q: f"{q['image_id']} / {q['question'].lower()}")


def score(official, answers):
    items = {k: soft_accuracy(a["text"], official[k]["answers"]) for k, a in answers.items()}
    tenths = [round(10 * value) for value in items.values()]    # integers: their sum is exact
    summary = {"accuracy": mean(tenths, 10), "total": len(items), "stderr": stderr(items.values())}
    return summary, items
