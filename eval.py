"""
Seven benchmarks: questions to answers (batched, greedy, resumable), answers to scores, scores to one table.

    [torchrun --nproc_per_node=N] python eval.py CHECKPOINT --tasks pope,gqa,mme --data DIR [--out DIR]
    python eval.py --score TASK --questions F [--truth F] --predictions F      no model; prints one JSON object
    python eval.py --table A/results.json B/results.json                       one table, a row for each checkpoint
    python eval.py --compare A B                                               paired tests on two result folders

DIR holds the official files under the names in TASKS; what is missing is listed before a model is loaded. --out
(default CHECKPOINT/eval) gets, for each task, <task>.jsonl (answers in LLaVA's format and in question order),
<task>.settings.json (what made them), <task>.scores.json (one score per question); and results.json. MM-Vet needs a
judge: --judge MODEL asks OPENAI_BASE_URL with OPENAI_API_KEY; without it the file for a judge is written.
"""

import argparse
import base64
import csv
import hashlib
import http.client
import io
import json
import os
import sys
import tempfile
import time
import urllib.error
import urllib.request
from datetime import timedelta
from glob import escape, glob

import common
import scores

# What differs between the benchmarks, in the order of the paper's columns. ask: the questions that the model gets, in
# LLaVA's converted files (its eval.zip); questions, truth, labels: the official files that the score reads; tokens:
# max_new_tokens; suffix: what the question file lacks, the others hold it; source: where the official files come from.
COMMON = dict(headline="accuracy", scale=1, tokens=128, suffix="", truth="", labels=())
TASKS = {task: {**COMMON, **spec} for task, spec in {
    "gqa": dict(column="GQA", score=scores.gqa, images="gqa/images", ask="gqa/llava_gqa_testdev_balanced.jsonl",
                questions="gqa/testdev_balanced_questions.json", source="GQA's site: questions v1.2, images"),
    "textvqa": dict(column="TextVQA", score=scores.textvqa, images="textvqa/train_images",
                    ask="textvqa/llava_textvqa_val_v051_ocr.jsonl", questions="textvqa/TextVQA_0.5.1_val.json",
                    source="TextVQA's site: val 0.5.1, train_val_images.zip"),
    "mme": dict(column="MME", score=scores.mme, headline="total", images="mme/MME_Benchmark_release_version",
                ask="mme/llava_mme.jsonl", questions="mme/llava_mme.jsonl", truth="mme/ground_truth",  # <task>.txt
                source="MME's authors: images; labels from the templates in eval_tool.zip"),
    "mmbench": dict(column="MMBench", score=scores.mmbench, headline="circular", tokens=1024, suffix=scores.LETTER,
                    images="", ask="mmbench/mmbench_dev_20230712.tsv", questions="mmbench/mmbench_dev_20230712.tsv",
                    source="MMBench's site: dev file of 2023-07-12, images inside"),
    "mmvet": dict(column="MM-Vet", score=scores.mmvet, headline="total", tokens=1024, images="mmvet/images",
                  ask="mmvet/llava-mm-vet.jsonl", questions="mmvet/mm-vet.json",
                  source="yuweihao/MM-Vet, release v1: mm-vet.zip"),
    "pope": dict(column="POPE", score=scores.pope, headline="mean_f1", scale=100, images="pope/val2014",
                 ask="pope/llava_pope_test.jsonl", questions="pope/llava_pope_test.jsonl", truth="pope/coco",
                 labels=[f"coco_pope_{split}.json" for split in scores.POPE_OFFSET],
                 source="AoiDragon/POPE at e3e3926, output/coco; COCO val2014"),
    "scienceqa": dict(column="SciQA", score=scores.scienceqa, headline="img_accuracy", tokens=1024,
                      suffix=scores.LETTER, images="scienceqa/test", ask="scienceqa/llava_test_CQM-A.json",
                      questions="scienceqa/llava_test_CQM-A.json", truth="scienceqa",
                      labels=("problems.json", "pid_splits.json"),
                      source="lupantech/ScienceQA: data/scienceqa, test.zip"),
}.items()}


# ---- questions

def load_questions(task, data):
    """The questions of a task in order: dicts with question_id, prompt (what is stored), text (what is sent, without
    <image>), image (a path, base64 in MMBench, or None) and extra (further fields of the answer file)."""
    from data import inside
    spec, path = TASKS[task], os.path.join(data, TASKS[task]["ask"])

    def question(question_id, text, image, prompt, **extra):
        if image and spec["images"]:
            folder = os.path.join(data, spec["images"])
            if not isinstance(image, str):
                raise ValueError(f"{path}: question {question_id} has an image that is no file name")
            inside(folder, image)
            image = os.path.join(folder, image)
        return dict(question_id=question_id, prompt=prompt, text=text, image=image, extra=extra)

    if task == "mmbench":  # the stored prompt lacks the last line
        rows = [(row, scores.mmbench_options(row)) for row in scores.read_mmbench(path)]
        if rows and not {"question", "image"} <= rows[0][0].keys():
            raise ValueError(f"{path}: no column 'question' or 'image': it can be scored, not asked")
        texts = ["\n".join(([] if scores.missing(row.get("hint")) else [row["hint"]]) + [row["question"]]
                           + [f"{letter}. {option}" for letter, option in options.items()]) for row, options in rows]
        questions = [question(int(row["index"]), f"{text}\n{spec['suffix']}", row["image"], text, round_id=0,
                              options=list(options.values()), option_char=list(options))
                     for (row, options), text in zip(rows, texts)]
    elif task == "scienceqa":  # the stored prompt has the <image> line: the score reads it there
        questions = []
        for record in scores.read_scienceqa(path):
            text = record["conversations"][0]["value"].replace("<image>", "").strip() + f"\n{spec['suffix']}"
            image = record.get("image")
            questions.append(question(record["id"], text, image, f"<image>\n{text}" if image else text))
    else:
        questions = [question(record["question_id"], record["text"], record["image"], record["text"])
                     for record in scores.read_lines(path, "question_id", "text", "image")]
    scores.unique(questions, key, path)
    return questions


def key(question):
    """What tells the questions of a task apart: TextVQA and MME give one question_id to several."""
    return str(question["question_id"]), question["prompt"]


def check(task, data):
    """-> (questions, sentences about what is missing). Looks at every file and image that the task needs; if all are
    there, scores empty answers: labels that do not fit the questions are an error before the model runs, not after."""
    spec, questions = TASKS[task], []
    files, labels = {spec["ask"], spec["questions"]}, spec["labels"]
    if os.path.isfile(os.path.join(data, spec["ask"])):
        questions = load_questions(task, data)
    if task == "mme":
        labels = {f"{str(q['question_id']).split('/')[0]}.txt" for q in questions}
    files |= {os.path.join(spec["truth"], label) for label in labels}
    lacks = [file for file in sorted(files) if not os.path.isfile(os.path.join(data, file))]
    images = {q["image"] for q in questions if q["image"] and spec["images"]}
    absent = sorted(image for image in images if not os.path.isfile(image))
    if absent:
        lacks.append(f"{len(absent)} of {len(images)} images, such as {os.path.relpath(absent[0], data)}")
    if not lacks:
        with tempfile.TemporaryDirectory() as folder:
            empty, truth = os.path.join(folder, os.path.basename(spec["ask"])), os.path.join(data, spec["truth"])
            common.write_text("".join(json.dumps({**q, "text": "", "image": None}) + "\n" for q in questions), empty)
            if task == "mmvet":
                scores.mmvet_answers(os.path.join(data, spec["questions"]), empty)
            else:
                spec["score"](os.path.join(data, spec["questions"]), truth, empty)
    return questions, lacks


# ---- prompts

# The paper's strings: (before the message, after it, the token that ends an answer)
PAPER = {
    "qwen_2": ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
               "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"),
    "llama3": ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nA chat between a curious user and an "
               "artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the "
               "user's questions.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
               "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
}


def prompt_ids(vlm, text, image, template):
    """One question -> ids that end where the model begins to speak, with P times IMAGE_ID for an image.

    template: "chat" is the LLM's own; "qwen_2" and "llama3" are the paper's strings, tokenised as there: the pieces
    around the image on their own, with the tokenizer's default special tokens, so that a llama3 prompt begins with two
    BOS, one spelled out and one added, where the tokenizer adds one. ValueError where the LLM lacks the template's
    tokens."""
    from data import IMAGE_ID, encode_prompt
    if template == "chat":
        message = {"role": "user", "content": "<image>\n" * bool(image) + text}
        return encode_prompt([message], vlm.tokenizer, vlm.num_patches)
    before, after, end = PAPER[template]
    if vlm.tokenizer.convert_tokens_to_ids(end) not in vlm.eos_ids:  # else each answer runs on to the limit
        raise ValueError(f"template {template} ends answers with {end}, which does not end them in this LLM")
    first = vlm.tokenizer(before if image else before + text + after).input_ids
    if not image:
        return first
    rest = vlm.tokenizer("\n" + text + after).input_ids
    if rest[0] == vlm.tokenizer.bos_token_id:  # only the first piece keeps the BOS that the tokenizer adds
        rest = rest[1:]
    return first + [IMAGE_ID] * vlm.num_patches + rest


# ---- answers

def read_done(stem):
    """{key: record} of all answers so far: the joined file of an earlier run, the pieces of any number of ranks"""
    records = [r for path in sorted(glob(f"{escape(stem)}.rank*.jsonl")) + [f"{stem}.jsonl"] if os.path.exists(path)
               for r in scores.read_lines(path, "question_id", "prompt", "text")]
    return {key(record): record for record in records}


def batches(groups, length, size):
    """Numbers of questions -> lists of at most `size`, a group in one if it fits: the model runs its image only once.

    groups: lists of numbers; length: {number: tokens}. The longest first, so that memory runs out at once or never."""
    batch = []
    for group in sorted(groups, key=lambda group: -max(length[i] for i in group)):
        group = sorted(group, key=lambda i: -length[i])
        for piece in (group[k:k + size] for k in range(0, len(group), size)):
            if len(batch) + len(piece) > size:
                yield batch
                batch = []
            batch = batch + piece
    if batch:
        yield batch


def by_image(questions, numbers):
    """-> the numbers as lists, one for each image and one for the questions without, in order of first appearance"""
    groups = {}
    for i in numbers:
        groups.setdefault(questions[i]["image"], []).append(i)
    return list(groups.values())


def answer_questions(vlm, task, questions, done, stem, args, rank, world):
    """Answer this rank's share of the questions, those not in `done`, into <stem>.rank<rank>.jsonl.

    Questions about one image stay together. After each batch its answers are written; what a kill leaves of a line is
    cut off by `prepare` on the next start."""
    import torch
    from tqdm import tqdm
    from generate import generate
    from data import open_image, transform
    order = [i for group in by_image(questions, range(len(questions))) for i in group]
    mine = order[rank * len(order) // world:(rank + 1) * len(order) // world]
    todo = [i for i in mine if key(questions[i]) not in done]
    ids = {i: prompt_ids(vlm, questions[i]["text"], questions[i]["image"], args.template) for i in todo}
    model_id = os.path.basename(os.path.abspath(args.checkpoint))
    size, mean, std = (vlm.image_settings[k] for k in ("size", "mean", "std"))
    with open(f"{stem}.rank{rank}.jsonl", "a", encoding="utf-8") as f, \
            tqdm(total=len(mine), initial=len(mine) - len(todo), desc=task, disable=rank > 0) as bar:
        for batch in batches(by_image(questions, todo), {i: len(ids[i]) for i in todo}, args.batch_size):
            asked = [questions[i]["image"] for i in batch if questions[i]["image"]]
            images = list(dict.fromkeys(asked))  # each once
            which = [images.index(image) for image in asked]
            if not TASKS[task]["images"]:
                images = [io.BytesIO(base64.b64decode(image)) for image in images]
            pixels = [transform(open_image(image), size, mean, std, mode="pad") for image in images]
            pixels = torch.stack(pixels) if pixels else None  # (N, 3, S, S)
            answers = generate(vlm, [ids[i] for i in batch], pixels, TASKS[task]["tokens"], image_index=which)
            for i, answer in zip(batch, answers):
                q = questions[i]
                text = vlm.tokenizer.decode(answer, skip_special_tokens=True).strip()
                # LLaVA's answer_id is random; a hash, so that the same run gives the same file
                answer_id = hashlib.sha256(json.dumps([model_id, task, *key(q)]).encode()).hexdigest()[:22]
                record = {"question_id": q["question_id"], "prompt": q["prompt"], "text": text, "answer_id": answer_id,
                          "model_id": model_id, "metadata": {}, **q["extra"]}
                f.write(json.dumps(record, ensure_ascii=False) + "\n")
            f.flush()
            bar.update(len(batch))


def join(questions, stem):
    """All pieces -> <stem>.jsonl in question order, then the pieces go. -> its path"""
    done = read_done(stem)
    common.write_text("".join(json.dumps(done[key(q)], ensure_ascii=False) + "\n" for q in questions), f"{stem}.jsonl")
    for piece in glob(f"{escape(stem)}.rank*.jsonl"):
        os.remove(piece)
    return f"{stem}.jsonl"


def prepare(stem, settings, overwrite):
    """Before the first answer: refuse those of another checkpoint or other settings, cut off torn last lines."""
    old = scores.read_json(f"{stem}.settings.json") if os.path.exists(f"{stem}.settings.json") else None
    files = [f for f in glob(f"{escape(stem)}.rank*.jsonl") + [f"{stem}.jsonl"] if os.path.exists(f)]
    if files and old != settings:
        if not overwrite:
            differs = ", ".join(k for k in settings if (old or {}).get(k) != settings[k])
            raise ValueError(f"{stem}.jsonl is of another run (other {differs}): give another --out, or --overwrite")
        for f in files:
            os.remove(f)
    for f in files * (old == settings):
        with open(f, "r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
    common.write_json(settings, f"{stem}.settings.json")


def fingerprint(folder, out):
    """Hash of a checkpoint's files: names, sizes, first and last megabyte of each; state/ and results left out"""
    digest = hashlib.sha256()
    for path in sorted(glob(f"{escape(folder)}/**", recursive=True)):
        inside = os.path.relpath(path, folder)
        if (os.path.isfile(path) and inside.endswith((".json", ".safetensors", ".model", ".txt", ".jinja"))
                and inside.split(os.sep)[0] not in ("state", "eval")
                and not os.path.abspath(path).startswith(out + os.sep)):
            with open(path, "rb") as f:
                head = f.read(1 << 20)
                f.seek(max(0, os.path.getsize(path) - (1 << 20)))
                digest.update(f"{inside} {os.path.getsize(path)} ".encode() + head + f.read())
    return digest.hexdigest()[:16]


# ---- MM-Vet's judge

INSTRUCTION = """Grade how correct a prediction is, given the ground truth, from 0.0 (entirely wrong) to 1.0 (entirely \
right) in steps of 0.1. <AND> in the ground truth means that the prediction is right only with every element it joins; \
<OR> means that any one of the elements it joins will do. Fill in the last field of the last row.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
Which values of x solve the equation? | 2 <AND> -7 | x = 5 | 0.0
Which values of x solve the equation? | 2 <AND> -7 | x = 2 | 0.5
Which values of x solve the equation? | 2 <AND> -7 | x = -7 | 0.5
Which values of x solve the equation? | 2 <AND> -7 | x = 2 or x = 7 | 0.5
Which values of x solve the equation? | 2 <AND> -7 | x = -7 or x = 2 | 1.0
Why is this meme funny? | The sign says "quiet please" while the dog below it barks: text and picture contradict each \
other. | A dog stands under a sign, and dogs are funny. | 0.4
Why is this meme funny? | The sign says "quiet please" while the dog below it barks: text and picture contradict each \
other. | It plays on contradiction: the sign demands silence, yet the dog right under it is barking. | 1.0"""
RETRY = "\nPredict the correctness of the answer (digit): "
WAITS = (1, 2, 4, 8, 16)  # seconds between tries while the server is silent, busy or talks nonsense


def ask_judge(prompt, judge, temperature, timeout):
    """One reply of an OpenAI-compatible server -> (model, content). ValueError when none comes; never shows the key."""
    base = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1").rstrip("/")
    messages = [{"role": "user", "content": prompt}]
    body = {"model": judge, "messages": messages, "temperature": temperature, "max_tokens": 3}
    request = urllib.request.Request(f"{base}/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    if os.environ.get("OPENAI_API_KEY"):  # unredirected: a redirect to another host must not carry the key along
        request.add_unredirected_header("Authorization", f"Bearer {os.environ['OPENAI_API_KEY']}")
    for wait in (*WAITS, None):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                reply = json.loads(response.read())
            return str(reply.get("model", judge)), reply["choices"][0]["message"]["content"] or ""
        except urllib.error.HTTPError as error:
            trouble = f"HTTP status {error.code}"
            if error.code in (400, 401, 403, 404):
                break  # trying again will not help
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as error:
            trouble = type(getattr(error, "reason", error)).__name__  # refused, too slow, or no chat completion
        if wait is not None:
            print(f"judge: {trouble}, again in {wait} s", file=sys.stderr)
            time.sleep(wait)
    raise ValueError(f"the judge at {base.split('@')[-1]} gives no reply ({trouble}); the grades so far are kept")


def grade(question, text, judge, timeout):
    """One grade by the official rules -> (model, content, score). Up to six requests, the sixth reply is never read."""
    truth = question["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    prompt = f"{INSTRUCTION}\n{question['question']} | {truth} | {text} | "
    model, content = ask_judge(prompt, judge, 0.0, timeout)
    for temperature in (0.0, 0.5, 1.0, 1.5, 2.0):
        try:
            score = float(content.split(" ")[0].strip())
            if 0 <= score <= 1:
                return model, content, score
        except ValueError:
            pass
        model, content = ask_judge(prompt + RETRY, judge, temperature, timeout)
    return model, content, 0.0


def run_judge(questions, predictions, judge, runs, timeout, partial=False):
    """Grade all answers `runs` times -> path of the grade file, beside the predictions, in the official format. It is
    written after each grade and read on the next start; its "text" and "judge" tie a grade to answer and judge."""
    asked, answers = scores.mmvet_answers(questions, predictions, partial)
    path = f"{os.path.splitext(predictions)[0]}.mm-vet-grades.json"
    old = scores.read_json(path) if os.path.exists(path) else {}
    grades = {k: {"model": [], "content": [], "score": [], "text": text, "judge": judge} for k, text in answers.items()}
    for k, entry in old.items():
        if k in grades and all(entry.get(field) == grades[k][field] for field in ("text", "judge")):
            grades[k] = entry
    for run in range(runs):
        for number, (k, text) in enumerate(answers.items()):
            if len(grades[k]["score"]) <= run:
                for field, value in zip(("model", "content", "score"), grade(asked[k], text, judge, timeout)):
                    grades[k][field].append(value)
                common.write_json(grades, path)
                print(f"judge: run {run + 1}/{runs}, {number + 1}/{len(answers)}", file=sys.stderr)
    for entry in grades.values():  # a file of more runs than asked for now
        entry.update({field: entry[field][:runs] for field in ("model", "content", "score")})
    common.write_json(grades, path)
    return path


# ---- scores

def score(task, questions, truth, predictions, args, partial=False):
    """-> (summary, items). MM-Vet without grades and without a judge: ({"judge_file": path}, {})"""
    if task == "mmvet" and not truth and not args.judge:
        _, answers = scores.mmvet_answers(questions, predictions, partial)
        path = f"{os.path.splitext(predictions)[0]}.mm-vet.json"
        if os.path.exists(path) and scores.read_json(path) != answers and not args.overwrite:
            raise ValueError(f"{path} exists and differs; --overwrite replaces it")
        common.write_json(answers, path)
        return {"judge_file": path}, {}
    if task == "mmvet" and not truth:
        truth = run_judge(questions, predictions, args.judge, args.runs, args.timeout, partial)
    return TASKS[task]["score"](questions, truth, predictions, partial)


def table(rows, mean=False):
    """[(name, {task: summary}), ...] -> a markdown table in the columns of the paper, those that have a score, each with one
    standard error. mean: rows of one name are seeds of one thing and become one row, their mean and standard deviation."""
    used = [task for task in TASKS if any(task in results for _, results in rows)] or list(TASKS)
    seeds = {}
    for i, (name, results) in enumerate(rows):
        seeds.setdefault(name if mean else (name, i), []).append(results)
    head = "mean ± standard deviation over seeds" if mean else ""
    lines = [f"| {head} | " + " | ".join(TASKS[task]["column"] for task in used) + " |", "|---" * (len(used) + 1) + "|"]
    for name, runs in seeds.items():
        name = name if mean else name[0]
        cells = [cell(task, [results[task] for results in runs if task in results]) for task in used]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(task, summaries):
    """One field of the table, for one run or several seeds"""
    headline, scale = TASKS[task]["headline"], TASKS[task]["scale"]
    found = [s for s in summaries if headline in s]
    if not found:
        return "–"
    values = [s[headline] * scale for s in found]
    mean = sum(values) / len(values)
    spread = (found[0]["stderr"] * scale if len(values) == 1 else
              (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5)
    text = f"{mean:.1f} ± {spread:.1f}"
    if task == "mme" and len(found) == 1:
        text += f" (P {found[0]['perception']:.1f} + C {found[0]['cognition']:.1f})"
    return f"PARTIAL ({found[0]['partial']}): {text}" if "partial" in found[0] else text


def details(title, summary, indent=""):
    """Everything in a summary as indented lines: counts, splits, unparsed answers"""
    values = [f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}"
              for k, v in summary.items() if not isinstance(v, dict)]
    inner = [details(k, v, indent + "  ") for k, v in summary.items() if isinstance(v, dict)]
    return "\n".join([f"{indent}{title}: {', '.join(values)}", *inner])


def compare(a, b):
    """Two result folders, or checkpoints that have one -> a markdown table: a paired test for each task that both have"""
    folders = [f"{folder}/eval" if os.path.isdir(f"{folder}/eval") else folder for folder in (a, b)]
    lines = ["| task | questions | A | B | B - A | only A right | only B right | p | test |", "|---" * 9 + "|"]
    for task, spec in TASKS.items():
        paths = [os.path.join(folder, f"{task}.scores.json") for folder in folders]
        if not all(map(os.path.exists, paths)):
            continue
        A, B = map(scores.read_json, paths)
        if A.keys() != B.keys():
            raise ValueError(f"{paths[0]} and {paths[1]} are not about the same questions")
        if {*A.values(), *B.values()} <= {0, 1}:
            only = [sum(x[k] > y[k] for k in A) for x, y in ((A, B), (B, A))]
            p, test = scores.mcnemar(*only), "McNemar, exact"
        else:
            only, p, test = ["–", "–"], scores.sign_flip([B[k] - A[k] for k in A]), "random signs"
        means = [scores.mean(x.values(), 100) for x in (A, B)]
        lines.append(f"| {spec['column']} | {len(A)} | {means[0]:.2f} | {means[1]:.2f} | {means[1] - means[0]:+.2f} | "
                     f"{only[0]} | {only[1]} | {p:.2g} | {test} |")
    if len(lines) == 2:
        raise ValueError(f"{folders[0]} and {folders[1]} have no task in common: no <task>.scores.json is in both")
    lines += ["", f"A is {a}, B is {b}: mean score of a question in percent (MMBench: a group; SciQA: with image)."]
    return "\n".join(lines)


# ---- a checkpoint through the benchmarks

def evaluate(args):
    """Check the data, answer, score, print; under torchrun each rank answers a piece and rank 0 does the rest."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    out = os.path.abspath(args.out or os.path.join(args.checkpoint, "eval"))
    if not os.path.isfile(os.path.join(args.checkpoint, "config.json")):
        raise ValueError(f"{args.checkpoint} is no checkpoint: it has no config.json")
    questions, incomplete = {}, []
    for task in args.tasks:
        questions[task], lacks = check(task, args.data)
        lines = [f"{task}: {len(questions[task])} questions, all files are there"]
        if lacks:
            incomplete.append(task)
            lines = [f"{task}: MISSING {lack}" for lack in lacks]
            lines.append(f"{task}: the official files come from {TASKS[task]['source']}; LLaVA's eval.zip")
        if rank == 0:
            print("\n".join(lines), file=sys.stderr)
    if incomplete:
        raise ValueError(f"files are missing under {args.data} for {', '.join(incomplete)}; nothing was run")

    import torch
    import checkpoint
    device = common.choose_device(args.device, most=1 if world > 1 else None)
    dtype = args.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    stems = {task: os.path.join(out, f"{task}.first{args.limit}" if args.limit else task) for task in args.tasks}
    made_by = {"checkpoint": fingerprint(args.checkpoint, out), "template": args.template, "dtype": dtype}
    if rank == 0:
        os.makedirs(out, exist_ok=True)
        for task in args.tasks:
            with open(os.path.join(args.data, TASKS[task]["ask"]), "rb") as f:
                asked = hashlib.sha256(f.read()).hexdigest()[:16]
            settings = {**made_by, "questions": asked, "max_new_tokens": TASKS[task]["tokens"]}
            prepare(stems[task], settings, args.overwrite)
    if world > 1:
        common.check_restarts()
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))  # a slow rank is no dead rank
    barrier = torch.distributed.barrier if world > 1 else lambda: None
    device = f"cuda:{local}" if device == "cuda" else device
    vlm = checkpoint.load(args.checkpoint, device=device, dtype=getattr(torch, dtype))
    trained = scores.read_json(os.path.join(args.checkpoint, "config.json")).get("template")
    if rank == 0 and trained not in (None, "chat"):
        print(f"note: {args.checkpoint} was trained with template {trained}, the questions are asked with "
              f"{args.template}", file=sys.stderr)
    barrier()  # rank 0 has prepared the files
    done = {task: read_done(stems[task]) for task in args.tasks}
    barrier()  # each rank has read them, before the first one writes
    results = {}
    for task in args.tasks:
        subset = questions[task][:args.limit or None]
        answer_questions(vlm, task, subset, done[task], stems[task], args, rank, world)
        barrier()  # all pieces are there
        if rank == 0:
            file, truth = (TASKS[task][k] and os.path.join(args.data, TASKS[task][k]) for k in ("questions", "truth"))
            summary, items = score(task, file, truth, join(subset, stems[task]), args, partial=bool(args.limit))
            if args.limit:
                summary["partial"] = f"first {len(subset)} of {len(questions[task])} questions, no benchmark score"
            results[task] = summary
            common.write_json(items, f"{stems[task]}.scores.json")
            print(details(task, summary), flush=True)
    if rank == 0:
        report(args, out, made_by, results)
    if world > 1:
        torch.distributed.destroy_process_group()


def report(args, out, made_by, results):
    """results.json (with what earlier runs of the same checkpoint and settings found there) and the table"""
    path = os.path.join(out, f"results.first{args.limit}.json" if args.limit else "results.json")
    whole = {"name": os.path.basename(os.path.abspath(args.checkpoint)), "made_by": made_by, "tasks": {}}
    if os.path.exists(path):
        old = scores.read_json(path)
        whole["tasks"] = old["tasks"] if old.get("made_by") == made_by else {}
    whole["tasks"].update(results)
    common.write_json(whole, path)
    print(f"\n{table([(whole['name'], whole['tasks'])])}\n\n{path}")


# ---- command line

def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(f"eval.py: {message}")  # one sentence, no usage text
    add = parser.add_argument
    add("checkpoint", nargs="?", help="checkpoint folder")
    add("--tasks", default="all", help=f"with commas between, or all: {','.join(TASKS)}")
    add("--data", help="folder with gqa/, textvqa/, mme/, ...")
    add("--out", help="folder of the results (default: CHECKPOINT/eval)")
    add("--batch_size", type=int, default=32, help="questions at a time; those of one image share its prefix")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on a CPU, bfloat16 on CUDA")
    add("--device", help="default: cuda if there is one, else cpu; cuda:0,cuda:1 cuts the LLM over two")
    add("--template", choices=("chat", *PAPER), default="chat", help="the LLM's own, or the paper's strings")
    add("--limit", type=int, default=0, help="only the first N questions: a trial, labelled partial on_all_ranks")
    add("--overwrite", action="store_true", help="replace answers of another checkpoint or other settings")
    add("--offline", action="store_true", help=common.OFFLINE)
    add("--judge", help="MM-Vet: model to ask at OPENAI_BASE_URL")
    add("--runs", type=int, default=1, help="MM-Vet: how often the judge grades everything")
    add("--timeout", type=float, default=60, help="MM-Vet: seconds to wait for a reply")
    add("--score", choices=TASKS, metavar="TASK", help="score a file of answers, no model")
    add("--questions", help="the official question file")
    add("--truth", help="labels: a folder (mme, pope, scienceqa) or the grade file (mmvet)")
    add("--predictions", help="answers, JSON lines in LLaVA's format")
    add("--table", nargs="+", metavar="RESULTS", help="results.json files or their folders: one joint table")
    add("--mean", action="store_true", help="with --table: rows of one name are seeds, print mean and standard deviation")
    add("--compare", nargs=2, metavar=("A", "B"), help="two checkpoints or result folders: paired tests")
    args = parser.parse_args(argv)
    if args.offline:
        common.go_offline()
    args.tasks = list(TASKS) if args.tasks == "all" else args.tasks.split(",")
    for task in args.tasks:
        if task not in TASKS:
            parser.error(f"there is no task '{task}'; there are {', '.join(TASKS)}")
    if args.limit < 0 or args.batch_size < 1 or args.runs < 1:
        parser.error("--limit must not be negative, --batch_size and --runs must be at least 1")
    if args.score:
        required = ["questions", "predictions"] + ["truth"] * (args.score in ("mme", "pope", "scienceqa"))
    else:
        required = [] if args.table or args.compare else ["checkpoint", "data"]
    for flag in required:
        if not getattr(args, flag):
            parser.error(f"{'CHECKPOINT' if flag == 'checkpoint' else '--' + flag} is missing"
                         + (f": --score {args.score} needs it" if args.score else ""))
    return args


def main(argv=None):
    args = parse(argv)
    try:
        if args.score:
            try:
                summary, _ = score(args.score, args.questions, args.truth, args.predictions, args)
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                what = f"{type(error).__name__} {error}"
                raise ValueError(f"the files do not have the format of {args.score}: {what}") from None
            print(json.dumps(summary, ensure_ascii=False, allow_nan=False))
        elif args.compare:
            print(compare(*args.compare))
        elif args.table:
            wholes = [scores.read_json(os.path.join(p, "results.json") if os.path.isdir(p) else p) for p in args.table]
            try:
                print(table([(whole["name"], whole["tasks"]) for whole in wholes], args.mean))
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"--table takes results.json files of eval.py: {error!r}") from None
        else:
            evaluate(args)
    except (ValueError, OSError, csv.Error) as error:
        named = isinstance(error, OSError) and error.filename
        sentence = f"{error.filename}: {error.strerror}" if named else str(error)
        sys.exit("eval.py: " + " ".join(sentence.split()))


if __name__ == "__main__":
    main()
