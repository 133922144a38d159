"""MMBench, dev file of 2023-07-12: single choice. All rotations of a question must be right."""
import base64
import csv
import re
from itertools import takewhile

from benchmarks.reading import LETTER, by_group, group, mean, stderr

HEADLINE, SCALE = "circular", 1
MAX_NEW_TOKENS = 1024
ASK = "mmbench/mmbench_dev_20230712.tsv"
IMAGES = ""                                 # they are in the file above, in base64
SOURCE = "MMBench's site: dev file of 2023-07-12, images inside"

REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer")


def is_missing(value):
    """Return whether an option or a hint is absent. pandas would also drop "NA" and "null"."""
    return value is None or value.lower() in ("", "nan", "none")


def options_of(row):
    """Return {letter: text}. Reading stops at the first option that is missing."""
    letters = takewhile(lambda letter: not is_missing(row.get(letter)), "ABCD")
    return {letter: row[letter] for letter in letters}


def read(path, truth=None):
    """Return {index: row} of the TSV. A field with a tab or a line break is quoted in it."""
    csv.field_size_limit(1 << 30)
    rows = {}
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        for row in reader:
            if None in row.values():
                raise ValueError(f"{path}, line {reader.line_num}: the row is not complete")
            rows[row["index"]] = row
    return rows


def questions(path, images):
    found = []
    for row in read(path).values():
        options = options_of(row)
        hint = [] if is_missing(row.get("hint")) else [row["hint"]]
        choices = [f"{letter}. {option}" for letter, option in options.items()]
        prompt = "\n".join([*hint, row["question"], *choices])  # what is stored lacks the last line
        found.append({
            "question_id": int(row["index"]), "text": f"{prompt}\n{LETTER}", "prompt": prompt,
            "image": base64.b64decode(row["image"]),
            "extra": {"round_id": 0, "options": list(options.values()),
                      "option_char": list(options)},
        })
    return found


def match(text, options):
    """Return an option's letter, "Z" for a refusal, or None: VLMEvalKit's rules without a judge."""
    if any(refusal in text for refusal in REFUSALS):
        return "Z"
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    letters = [letter for letter in options if letter in words]
    # Before the last four words, "A" is more likely an article than a letter.
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - 4:
        return letters[0]
    if not letters and "Z" in words:
        return "Z"
    # The rule does not ask for the end of the word: "answer is a cat" gives A.
    found = re.search(r"answer\s+is\s+\**([A-D])", text, re.IGNORECASE)
    if found and found[1].upper() in options:
        return found[1].upper()
    # A long text may contain an option by chance.
    contained = [k for k, option in options.items() if option.lower() in text.lower()]
    if len(contained) == 1 and len(text) <= 2 * sum(map(len, options.values())):
        return contained[0]
    return None


def accuracies(groups, right):
    """Return the three accuracies, and {base index: 1 if all rows of the group are right}.

    groups: {base index: keys of its rows}. right: {key: 0 or 1}.
    """
    circular = {base: int(all(right[k] for k in keys)) for base, keys in groups.items()}
    vanilla = [right[k] for k in right if int(k) < 1_000_000]   # without the rotated copies
    return {
        "circular": mean(circular.values(), 100),
        "vanilla": mean(vanilla, 100),
        "rows": mean(right.values(), 100),
        "circular_correct": sum(circular.values()), "groups": len(circular),
        "vanilla_correct": sum(vanilla), "vanilla_total": len(vanilla),
        "rows_correct": sum(right.values()), "rows_total": len(right),
    }, circular


def score(rows, answers):
    # The number of options does not give the size of a group: 53 groups of three have four.
    groups = group(answers, lambda k: str(int(k) % 1_000_000))
    letters = {k: match(a["text"], options_of(rows[k])) for k, a in answers.items()}
    right = {k: int(letters[k] == rows[k]["answer"]) for k in answers}
    same_letter = {k: int(a["text"].strip() == rows[k]["answer"]) for k, a in answers.items()}
    summary, circular = accuracies(groups, right)
    summary["stderr"] = stderr(circular.values())
    summary["unparsed"] = sum(letter is None for letter in letters.values())
    summary["strict"] = accuracies(groups, same_letter)[0]
    base_rows = {base: rows[min(keys, key=int)] for base, keys in groups.items()}
    for column in ("category", "l2-category"):
        if all(column in row for row in base_rows.values()):
            summary[f"by_{column}"] = by_group(circular, lambda base: base_rows[base][column])
    return summary, circular
