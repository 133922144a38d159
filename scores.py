"""
The scores of GQA, TextVQA, MME, MMBench, MM-Vet, POPE and ScienceQA as LLaVA-1.5 and LangBridge report them.

No model, no torch. Each benchmark has the pure rule for one answer (gqa_prediction, textvqa_value, mme_parse,
mmbench_match, pope_parse, scienceqa_parse) and one function that reads the official files and counts:

    gqa(questions, truth, predictions, partial=False) -> summary, items

questions, truth, predictions are paths as `python eval.py --score` takes them. summary is what it prints, nothing is
rounded, an average over nothing is 0. items is {question: score in 0..1}, what a paired test compares. predictions are
JSON lines in LLaVA's format, paired by identity: their order changes nothing. `text` is scored as it stands. partial
scores the questions that have an answer. ValueError, one sentence: a line that is not JSON, an answer that is missing,
double or unknown, labels that do not fit the questions.
"""

import csv
import json
import math
import os
import re
from collections import defaultdict

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


# ---- reading, pairing, averaging

def read_json(path):
    """One JSON value; ValueError names file and line where it is cut off."""
    with open(path, "rb") as f:
        try:
            return json.loads(f.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:  # a JSONDecodeError knows its line, a torn character does not
            raise ValueError(f"{path}, line {getattr(error, 'lineno', '?')}: not complete JSON") from None


def read_lines(path, *fields):
    """JSON lines -> list of dicts with `fields`; ValueError names the line, for half a file must not become a score."""
    records = []
    with open(path, "rb") as f:  # bytes: only \n ends a line, whatever else Unicode calls a line break
        for number, line in enumerate(f, 1):
            try:
                records.append(json.loads(line.decode("utf-8-sig")))
            except (ValueError, RecursionError):
                raise ValueError(f"{path}, line {number}: not complete JSON") from None
            need(records[-1], fields, f"{path}, line {number}")
    return records


TYPES = {"text": str, "prompt": str, "question": str, "image": str, "category": str, "label": str, "value": str,
         "structural": str, "types": dict, "data": list, "answers": list, "capability": list, "score": list,
         "test": list, "conversations": list, "choices": list}  # a field that is not here may hold anything


def need(record, fields, where):
    """ValueError where `record` is no object, lacks one of `fields`, or holds there what is not of its type."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: not a JSON object")
    for field in fields:
        kind = TYPES.get(field, object)
        if field not in record:
            raise ValueError(f"{where}: no field '{field}'")
        if not isinstance(record[field], kind):
            raise ValueError(f"{where}: no {'text' if kind is str else kind.__name__} in '{field}'")
    return record


def unique(records, key, path):
    """{key(record): record} in order; ValueError where a key comes twice. A key is a string or a tuple of strings."""
    found = {}
    for record in records:
        if found.setdefault(key(record), record) is not record:
            raise ValueError(f"{path}: question {name(key(record))} is there twice")
    return found


def pair(questions, answers, path, partial=False, key=lambda answer: str(answer["question_id"])):
    """{key: answer} in the order of `questions` (a dict); ValueError where an answer is double, unknown or missing."""
    found = unique(answers, key, path)
    for k in found:
        if k not in questions:
            raise ValueError(f"{path}: question {name(k)} is unknown: it is not in the question file")
    for k in questions:
        if k not in found and not partial:
            raise ValueError(f"{path}: question {name(k)} has no answer")
    return {k: found[k] for k in questions if k in found}


def name(key):
    return key if isinstance(key, str) else " / ".join(key)


def mean(values, scale=1):
    values = list(values)
    return scale * sum(values) / len(values) if values else 0.0


def stderr(values, scale=100):
    """One standard error of the mean of `values`, in points"""
    values = list(values)
    m = mean(values)
    return scale * math.sqrt(sum((v - m) ** 2 for v in values)) / len(values) if values else 0.0


def by_group(groups, values):
    """{group: {"accuracy": percent, "count": n}} of two parallel sequences"""
    table = defaultdict(list)
    for group, value in zip(groups, values):
        table[group].append(value)
    return {g: {"accuracy": mean(table[g], 100), "count": len(table[g])} for g in sorted(table)}


# ---- GQA

def gqa_prediction(text):
    """Case and periods at the very end are forgiven, nothing else: "yes. " keeps its period, a space follows it."""
    return text.rstrip(".").lower()


def gqa(questions, truth, predictions, partial=False):
    """questions: testdev_balanced_questions.json, answers in it"""
    asked = need(read_json(questions), (), questions)
    for k, q in asked.items():
        need(need(q, ("answer", "types"), f"{questions}: question {k}")["types"], ("structural",), f"{questions}: {k}")
    answers = pair(asked, read_lines(predictions, "question_id", "text"), predictions, partial=True)
    balanced = {k: q for k, q in asked.items() if q.get("isBalanced", True)}  # only these count and need an answer
    answers = pair(balanced, [a for k, a in answers.items() if k in balanced], predictions, partial)
    right = {k: int(gqa_prediction(a["text"]) == balanced[k]["answer"]) for k, a in answers.items()}
    types = [balanced[k]["types"] for k in right]
    kinds = [t["structural"] for t in types]
    return {
        "accuracy": mean(right.values(), 100),
        "binary": mean((r for r, kind in zip(right.values(), kinds) if kind != "query"), 100),  # "query" alone is open
        "open": mean((r for r, kind in zip(right.values(), kinds) if kind == "query"), 100),
        "correct": sum(right.values()), "total": len(right), "stderr": stderr(right.values()),
        "by_structural_type": by_group(kinds, right.values()),
        "by_semantic_type": by_group([str(t.get("semantic")) for t in types], right.values()),
    }, right


# ---- TextVQA

DIGITS = {w: str(n) for n, w in enumerate("zero one two three four five six seven eight nine ten".split())}
DIGITS["none"] = "0"
CONTRACTIONS = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock
oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll someone's
something'd something'll that's there'd there're there's they'd they'll they're they've 'twas wasn't
we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's
who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've""".split()
DOUBLES = """couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've""".split()
CONTRACTED = {full.replace("'", ""): full for full in CONTRACTIONS}
CONTRACTED |= {full[:i] + full[i + 1:]: full for full in DOUBLES for i in range(len(full)) if full[i] == "'"}
CONTRACTED |= {"somebody'd": "somebodyd", "'ows'at": "'ow's'at"}  # the official table's own slips


def textvqa_normalize(text):
    """The EvalAI answer processor, for the answer and for each human answer"""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    out = text
    for c in ';/[]"{}()=+\\_-><@`,?!':
        # One mark beside a space and all of its kind vanish, else they part words; the text before any change decides.
        out = out.replace(c, "" if c + " " in text or " " + c in text else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=32)  # 32: the official tool passes re.UNICODE where the count belongs
    words = [DIGITS.get(word, word) for word in out.lower().split()]
    return " ".join(CONTRACTED.get(word, word) for word in words if word not in ("a", "an", "the"))


def textvqa_value(text, answers):
    """Soft accuracy against ten human answers: 0, .3, .6, .9 or 1 for 0, 1, 2, 3, more that agree. It is the mean over
    the ten of min(1, how many of the other nine agree / 3)."""
    return min(10, 3 * [textvqa_normalize(answer) for answer in answers].count(textvqa_normalize(text))) / 10


def textvqa_question(prompt, where):
    """The question, lower-cased, in each of the prompts that LLaVA has used"""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        match = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        if match:
            return match[1].lower()
    elif "Reference OCR token: " in prompt and len(lines) == 3:
        return lines[prompt.startswith("Reference OCR token:")].lower()  # line 2 where line 1 is the OCR line
    elif len(lines) == 2:
        return lines[0].lower()
    raise ValueError(f"{where}: no question found in the prompt {prompt!r}")


def textvqa(questions, truth, predictions, partial=False):
    """questions: TextVQA_0.5.1_val.json, answers in it. LLaVA's question_id is the image id: key (image, question)."""
    data = need(read_json(questions), ("data",), questions)["data"]
    for i, q in enumerate(data):
        humans = need(q, ("image_id", "question", "answers"), f"{questions}: record {i}")["answers"]
        if len(humans) != 10 or not all(isinstance(human, str) for human in humans):
            raise ValueError(f"{questions}: {q['question']!r} on {q['image_id']} has not ten answers")
    asked = unique(data, lambda q: (str(q["image_id"]), q["question"].lower()), questions)
    answers = read_lines(predictions, "question_id", "prompt", "text")
    answers = pair(asked, answers, predictions, partial, key=lambda a: (
        str(a["question_id"]), textvqa_question(a["prompt"], f"{predictions}: question {a['question_id']}")))
    items = {name(k): textvqa_value(a["text"], asked[k]["answers"]) for k, a in answers.items()}
    tenths = [round(10 * value) for value in items.values()]  # integers, so that the sum is exact
    return {"accuracy": mean(tenths, 10), "total": len(items), "stderr": stderr(items.values())}, items


# ---- MME

PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()


def mme_parse(text):
    """yes, no or other by the first four characters, not stripped: "Nothing" is no, "**Yes**" and "1. No" are other."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme_bare(question):
    """The question without instructions and the spaces around them: seven official questions have two, not one."""
    return question.replace(SHORT, "").strip().removesuffix("Please answer yes or no.").strip()


def mme_key(question_id, question):
    """What ties a question to its label: (task, image file up to its first dot, bare question)"""
    return question_id.split("/")[0], question_id.split("/")[-1].split(".")[0], mme_bare(question)


def mme_labels(folder, tasks):
    """<task>.txt with lines image, official question, Yes or No -> {mme_key: "yes" or "no"}"""
    labels = {}
    for task in tasks:
        path = os.path.join(folder, f"{task}.txt")
        with open(path, encoding="utf-8-sig", newline="\n") as f:
            for number, line in enumerate(f, 1):
                parts = line.strip("\r\n").split("\t")
                if len(parts) != 3 or parts[2].strip().lower() not in ("yes", "no"):
                    raise ValueError(f"{path}, line {number}: not image, question, Yes or No with tabs between")
                key = mme_key(f"{task}/{parts[0]}", parts[1])
                if key in labels:
                    raise ValueError(f"{path}, line {number}: {name(key)} is labelled twice")
                labels[key] = parts[2].strip().lower()
    return labels


def mme(questions, truth, predictions, partial=False):
    """questions: llava_mme.jsonl; truth: a folder with <task>.txt for each task that is asked"""
    asked = read_lines(questions, "question_id", "text")
    asked = unique(asked, lambda q: (str(q["question_id"]), mme_bare(q["text"])), questions)
    images = defaultdict(list)  # an image's two questions share its question_id
    for k in asked:
        images[k[0]].append(k)
    for image, keys in images.items():
        if len(keys) != 2:
            raise ValueError(f"{questions}: {image} has {len(keys)} questions instead of two")
    keyed = unique(asked, lambda k: mme_key(*k), questions)
    labels = mme_labels(truth, sorted({k[0] for k in keyed}))
    for k in sorted(labels.keys() ^ keyed.keys()):
        what = "has no question" if k in labels else "has no label"
        raise ValueError(f"{os.path.join(truth, k[0] + '.txt')}: labels and questions differ: {name(k)} {what}")
    answers = pair(asked, read_lines(predictions, "question_id", "prompt", "text"), predictions, partial,
                   key=lambda a: (str(a["question_id"]), mme_bare(a["prompt"])))
    said = {k: mme_parse(a["text"]) for k, a in answers.items()}
    right = {k: int(said[k] == labels[mme_key(*k)]) for k in said}
    per_task, variance = {}, 0
    for task in sorted({mme_key(*k)[0] for k in said}):
        mine = [k for k in said if mme_key(*k)[0] == task]
        pairs = [[right[k] for k in images[image] if k in right] for image in dict.fromkeys(k[0] for k in mine)]
        acc, acc_plus = mean(right[k] for k in mine), mean(int(pair == [1, 1]) for pair in pairs)
        per_task[task] = {"acc": acc, "acc_plus": acc_plus, "score": acc * 100 + acc_plus * 100, "images": len(pairs),
                          "questions": len(mine), "unparsed": sum(said[k] == "other" for k in mine)}
        variance += stderr(mean(pair) + (pair == [1, 1]) for pair in pairs) ** 2
    perception = sum(per_task[t]["score"] for t in PERCEPTION if t in per_task)
    cognition = sum(per_task[t]["score"] for t in COGNITION if t in per_task)
    return {"perception": perception, "cognition": cognition, "total": perception + cognition,
            "stderr": math.sqrt(variance), "questions": len(said),
            "unparsed": sum(t["unparsed"] for t in per_task.values()), "per_task": per_task,
            }, {name(k): r for k, r in right.items()}


# ---- MMBench

REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer")


def missing(value):
    """An absent option or hint. These only: pandas would also swallow options such as "NA" or "null"."""
    return value is None or value.lower() in ("", "nan", "none")


def mmbench_options(row):
    """{letter: text} of a row; reading stops at the first missing one"""
    options = {}
    for letter in "ABCD":
        if missing(row.get(letter)):
            break
        options[letter] = row[letter]
    return options


def mmbench_match(text, options):
    """VLMEvalKit's matching without a judge -> an option's letter, "Z" for a refusal, or None"""
    if any(refusal in text for refusal in REFUSALS):
        return "Z"
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - 4:  # earlier it is more likely the article "A"
        return letters[0]
    if not letters and "Z" in words:
        return "Z"
    match = re.search(r"answer\s+is\s+\**([A-D])", text, re.IGNORECASE)  # no word need end: "answer is a cat" gives A
    if match and match[1].upper() in options:
        return match[1].upper()
    if len(text) <= 2 * sum(map(len, options.values())):  # that a long text holds an option proves nothing
        held = [letter for letter, option in options.items() if option.lower() in text.lower()]
        if len(held) == 1:
            return held[0]
    return None


def read_mmbench(path):
    """The TSV -> list of dicts. By csv, not split: fields with tabs, line breaks or quotation marks are quoted."""
    csv.field_size_limit(1 << 30)  # the images are in it, in base64
    rows = []
    with open(path, encoding="utf-8-sig", newline="") as f:
        reader = csv.DictReader(f, delimiter="\t")
        for row in reader:
            if None in row or None in row.values() or not row.get("index", "").isdecimal() or "answer" not in row:
                raise ValueError(f"{path}, line {reader.line_num}: not a complete row with an index and an answer")
            rows.append(row)
    return rows


def mmbench_counts(groups, right):
    """groups: {base index: its rows' keys}, right: {key: 0 or 1} -> the three accuracies, {base: all rows right}"""
    circular = {str(base): int(all(right[k] for k in keys)) for base, keys in groups.items()}
    vanilla = [right[k] for k in right if int(k) < 1_000_000]  # base rows; the others are rotations of their options
    return {"circular": mean(circular.values(), 100), "vanilla": mean(vanilla, 100), "rows": mean(right.values(), 100),
            "circular_correct": sum(circular.values()), "groups": len(circular), "vanilla_correct": sum(vanilla),
            "vanilla_total": len(vanilla), "rows_correct": sum(right.values()), "rows_total": len(right)}, circular


def mmbench(questions, truth, predictions, partial=False):
    """questions: mmbench_dev_20230712.tsv, answers in it"""
    rows = unique(read_mmbench(questions), lambda row: str(int(row["index"])), questions)
    answers = pair(rows, read_lines(predictions, "question_id", "text"), predictions, partial)
    groups = defaultdict(list)  # by index and never by the number of options: 53 groups of three rotations have four
    for k in answers:
        groups[int(k) % 1_000_000].append(k)
    matched = {k: mmbench_match(a["text"], mmbench_options(rows[k])) for k, a in answers.items()}
    summary, circular = mmbench_counts(groups, {k: int(matched[k] == rows[k]["answer"]) for k in answers})
    strict, _ = mmbench_counts(groups, {k: int(a["text"].strip() == rows[k]["answer"]) for k, a in answers.items()})
    by = {f"by_{column}": by_group([rows[min(keys, key=int)][column] for keys in groups.values()], circular.values())
          for column in ("category", "l2-category") if column in next(iter(rows.values()), {})}
    return {**summary, "stderr": stderr(circular.values()), "unparsed": sum(m is None for m in matched.values()),
            "strict": strict, **by}, circular


# ---- MM-Vet

def mmvet_answers(questions, predictions, partial=False):
    """-> mm-vet.json as a dict, and {"v1_0": text, ...}: the file that any judge of MM-Vet takes"""
    asked = need(read_json(questions), (), questions)
    for k, q in asked.items():
        need(q, ("question", "answer", "capability"), f"{questions}: question {k}")
        if not all(isinstance(text, str) for text in [q["answer"], *q["capability"]]):
            raise ValueError(f"{questions}: question {k} has an answer or a capability that is no text")
    answers = read_lines(predictions, "question_id", "text")
    answers = pair(asked, answers, predictions, partial, key=lambda a: f"v1_{a['question_id']}")
    return asked, {k: a["text"] for k, a in answers.items()}


def mmvet(questions, truth, predictions, partial=False):
    """questions: mm-vet.json; truth: the official evaluator's grades, {"v1_0": {"score": [one per run], ...}, ...}"""
    asked, answers = mmvet_answers(questions, predictions, partial)
    grades = need(read_json(truth), (), truth)
    for k, grade in grades.items():
        if k not in asked:
            raise ValueError(f"{truth}: question {k} is unknown: it is not in the question file")
        grades[k] = need(grade, ("score",), f"{truth}: question {k}")["score"]
    runs = max(map(len, grades.values()), default=0)
    for k in answers:
        if not runs or len(grades.get(k, ())) != runs:
            raise ValueError(f"{truth}: question {k} has {len(grades.get(k, ()))} grades, another has {runs}")
        if not all(type(grade) in (int, float) and 0 <= grade <= 1 for grade in grades[k]):
            raise ValueError(f"{truth}: question {k} has a grade that is no number from 0 to 1")
    capabilities, integrations = defaultdict(list), defaultdict(list)
    for k in answers:  # a question counts in each of its capabilities, and in exactly one set of them
        integrations["_".join(sorted(set(asked[k]["capability"])))] += grades[k]
        for capability in set(asked[k]["capability"]):
            capabilities[capability] += grades[k]
    totals = [mean((grades[k][run] for k in answers), 100) for run in range(runs)]
    items = {k: mean(grades[k]) for k in answers}
    return {"total": mean(totals), "totals": totals, "runs": runs, "questions": len(items),
            "std": math.sqrt(mean((total - mean(totals)) ** 2 for total in totals)),  # between the runs of the judge
            "stderr": stderr(items.values()),
            # Every run has the same questions: the mean over runs of their means is the mean of all grades.
            "capabilities": {c: mean(values, 100) for c, values in sorted(capabilities.items())},
            "integrations": {c: mean(values, 100) for c, values in sorted(integrations.items())}}, items


# ---- POPE

POPE_OFFSET = {"random": 10_000_000, "popular": 20_000_000, "adversarial": 0}  # question_id = label's id + this


def pope_parse(text):
    """no if "No", "no" or "not" is a word before the first period, else yes: also the empty text, "NO" and "Nope"."""
    words = text.split(".")[0].replace(",", "").split(" ")  # single spaces: "no\n" is not "no"
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def pope_labels(path, split, asked):
    """{question_id: label} of one split. A label fits a question if id, image and text agree; in a file numbered anew,
    if image and text do. POPE's later random file fits neither way; by position it would silently score 50 %."""
    labels = read_lines(path, "question_id", "image", "text", "label")
    for r in labels:
        if not str(r["question_id"]).isdecimal():
            raise ValueError(f"{path}: question_id {r['question_id']!r} is no number")
    theirs = [(str(int(r["question_id"]) + POPE_OFFSET[split]), r["image"], r["text"]) for r in labels]
    ours = {k: (k, q["image"], q["text"].split("\n")[0]) for k, q in asked.items()}
    for start in (0, 1):
        found = {key[start:]: r["label"] for key, r in zip(theirs, labels)}
        keys = {k: key[start:] for k, key in ours.items()}
        if len(found) == len(labels) == len(keys) and found.keys() == set(keys.values()):
            return {k: found[key] for k, key in keys.items()}
    raise ValueError(f"{path}: its {len(labels)} labels do not match the {len(asked)} '{split}' questions one to one")


def pope_split(outcomes):
    """{question: "TP", "FP", "TN" or "FN"} -> the figures of one split, from 0 to 1; 0 where undefined"""
    TP, FP, TN, FN = (list(outcomes.values()).count(kind) for kind in ("TP", "FP", "TN", "FN"))
    n = max(len(outcomes), 1)
    return {"accuracy": (TP + TN) / n, "precision": TP / max(TP + FP, 1), "recall": TP / max(TP + FN, 1),
            "f1": 2 * TP / max(2 * TP + FP + FN, 1), "yes_ratio": (TP + FP) / n, "TP": TP, "FP": FP, "TN": TN, "FN": FN}


def pope(questions, truth, predictions, partial=False):
    """questions: llava_pope_test.jsonl; truth: a folder with coco_pope_<split>.json for each split that is asked"""
    asked = read_lines(questions, "question_id", "image", "text", "category")
    asked = unique(asked, lambda q: str(q["question_id"]), questions)
    for k, q in asked.items():
        if q["category"] not in POPE_OFFSET:
            raise ValueError(f"{questions}: question {k} has the unknown category {q['category']!r}")
    answers = pair(asked, read_lines(predictions, "question_id", "text"), predictions, partial)
    splits = [split for split in POPE_OFFSET if any(asked[k]["category"] == split for k in answers)]
    summary, items, pull = {}, {}, defaultdict(float)
    for split in splits:
        mine = {k: q for k, q in asked.items() if q["category"] == split}
        labels = pope_labels(os.path.join(truth, f"coco_pope_{split}.json"), split, mine)
        outcomes = {}
        for k in (k for k in mine if k in answers):
            yes, said = labels[k] != "no", pope_parse(answers[k]["text"]) == "yes"
            outcomes[k] = ("T" if yes == said else "F") + ("P" if said else "N")
            items[k] = int(yes == said)
        summary[split] = pope_split(outcomes)
        weight = 2 * summary[split]["TP"] + summary[split]["FP"] + summary[split]["FN"]
        for k, kind in outcomes.items():  # each question's pull on F1 (first order) per image: the splits share images
            change = {"TP": 2 - 2 * summary[split]["f1"], "TN": 0}.get(kind, -summary[split]["f1"])
            pull[mine[k]["image"]] += change / max(weight, 1) / len(splits)
    guessed = sum(pope_parse(a["text"]) == "yes" and "yes" not in a["text"].lower() for a in answers.values())
    return {"mean_f1": mean(s["f1"] for s in summary.values()),
            "mean_accuracy": mean(s["accuracy"] for s in summary.values()),
            "stderr": math.sqrt(sum(p * p for p in pull.values())), "questions": len(items),
            "unparsed": guessed, **summary}, items  # unparsed: taken as yes although the word is not there


# ---- ScienceQA

def scienceqa_parse(text):
    """A letter or "FAILED". A bare letter or letter, period, space will do: "A." fails; "The answer is Apple" is A."""
    if text in ("A", "B", "C", "D", "E") or len(text) >= 3 and text[0] in "ABCDE" and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else "FAILED"


def read_scienceqa(path):
    """llava_test_CQM-A.json -> its records, each with a first turn that has a text"""
    records = read_json(path)
    if not isinstance(records, list):
        raise ValueError(f"{path}: not a list of records")
    for i, record in enumerate(records):
        turns = need(record, ("id", "conversations"), f"{path}: record {i}")["conversations"]
        need(turns[0] if turns else None, ("value",), f"{path}: record {i}, first turn")
    return records


def scienceqa(questions, truth, predictions, partial=False):
    """questions: llava_test_CQM-A.json; truth: a folder with problems.json and pid_splits.json"""
    asked = unique(read_scienceqa(questions), lambda q: str(q["id"]), questions)
    splits, problems = (os.path.join(truth, file) for file in ("pid_splits.json", "problems.json"))
    test = [str(k) for k in need(read_json(splits), ("test",), splits)["test"]]
    differ = sorted(set(test) ^ set(asked))
    if differ or len(test) != len(asked):
        raise ValueError(f"{splits}: its test ids are not those of the questions: {', '.join(differ[:3]) or 'double'}")
    gold = need(read_json(problems), asked, problems)
    answers = pair(asked, read_lines(predictions, "question_id", "prompt", "text"), predictions, partial)
    parsed, right, img = {}, {}, {}
    for k, a in answers.items():
        human = asked[k]["conversations"][0]["value"].replace("<image>", "").strip()
        if ("<image>" in a["prompt"]) != ("image" in asked[k]) or human not in a["prompt"]:
            raise ValueError(f"{predictions}: the prompt of question {k} is not that of the question file")
        need(gold[k], ("choices", "answer"), f"{problems}: question {k}")
        parsed[k] = scienceqa_parse(a["text"])
        letters = "ABCDE"[:len(gold[k]["choices"])]  # a letter beyond the choices is parsed, and wrong
        right[k] = int(letters.find(parsed[k]) == gold[k]["answer"])
        if "<image>" in a["prompt"]:
            img[k] = right[k]
    return {"accuracy": mean(right.values(), 100), "correct": sum(right.values()), "total": len(right),
            "img_accuracy": mean(img.values(), 100), "img_correct": sum(img.values()), "img_total": len(img),
            "stderr": stderr(img.values()), "unparsed": sum(p == "FAILED" for p in parsed.values())}, img or right


# ---- two models on the same questions

def mcnemar(only_a, only_b):
    """Exact two-sided p: of the questions that one model alone gets right, could a fair coin have dealt them out?"""
    n = only_a + only_b
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2 ** n)


def sign_flip(differences, rounds=100):
    """Two-sided p for soft scores by 100 x rounds draws of random signs: how often is the sum as far from 0? Seeded."""
    import numpy as np
    differences = np.array([d for d in differences if d])
    dice = np.random.default_rng(0)
    sums = np.concatenate([dice.choice([-1, 1], (100, len(differences))) @ differences for _ in range(rounds)])
    return float((np.count_nonzero(abs(sums) >= abs(differences.sum()) - 1e-9) + 1) / (len(sums) + 1))
