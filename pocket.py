"""Make the pocket world: pictures, questions, tokenizers, a vision tower and two small LLMs.

    python pocket.py            # writes data/pocket: minutes on two CPU cores, no network, no GPU
    python pocket.py --tiny     # few scenes and few steps, half a minute: to test code, not models

A reader can run everything in this world on a laptop: pretrain, SFT, transfer to another LLM and
benchmarks. The files have the formats of LLaVA, POPE, GQA, MME, TextVQA and MMBench, and the models
are Hugging Face folders, so no other script treats them specially. The LLMs have never seen a
picture. They have learnt to read a description, which stands where an image would stand, and to
answer questions about it.

Everything follows from --seed: two runs on one machine write the same bytes. This file writes the
data. support/pocket_world.py holds scenes, pictures and questions, and support/pocket_models.py
trains the models.
"""
import base64
import io
import multiprocessing
import os
import random
import shutil
import signal
from collections import Counter, defaultdict
from pathlib import Path

from benchmarks.answers import write_lines
from common import argument_parser, read_json, run_script, write_json, write_text
from support.pocket_world import (BRIEF, SHAPES, STYLES, SUFFIX, TRAIN_KINDS, ask, chat,
                                  choice_chat, choices, describe, document, draw_scene, questions,
                                  random_scene, scene_key)

# Each is trained by one process. The longest training comes first, for machines with two cores.
MODELS = ("pocket-llama", "pocket-qwen", "vision-tower")


def main():
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--out", default="data/pocket", help="folder (%(default)s)")
    add("--scenes", type=int, default=3200, help="training pictures (%(default)s)")
    add("--held_out", type=int, default=300,
        help="pictures for validation, as many for the test (%(default)s)")
    add("--effort", type=float, default=1.0, help="multiplies all training steps (%(default)s)")
    add("--seed", type=int, default=0, help="of everything (%(default)s)")
    add("--tiny", action="store_true", help="60 scenes and a few steps: to test code, not models")
    add("--overwrite", action="store_true", help="make everything again")
    args = parser.parse_args()
    if args.scenes < 20 or args.held_out < 20 or args.effort < 0:
        parser.error("--scenes and --held_out must be at least 20, --effort at least 0")
    settings = {"scenes": args.scenes, "held_out": args.held_out, "effort": args.effort,
                "seed": args.seed, "corpus": 1500}
    if args.tiny:
        settings |= {"scenes": 60, "held_out": 24, "effort": 0.005, "corpus": 200}
    out = Path(args.out)
    marker = out / "pocket.json"            # written when pictures and data files are complete
    if args.overwrite:
        marker.unlink(missing_ok=True)
        (out / "words.json").unlink(missing_ok=True)    # of the tokenizers that are removed
        for name in (*MODELS, "images", "eval", "val"):
            shutil.rmtree(out / name, ignore_errors=True)
    elif marker.exists():
        recorded = read_json(marker)
        if recorded | settings != recorded:
            raise ValueError(f"{marker} records other settings; give --overwrite or another --out")
    # The worker processes read these when they import torch: one thread for each.
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
                   "TOKENIZERS_PARALLELISM": "false"}
    workers = min(len(MODELS), os.cpu_count())
    # Ctrl-C reaches all processes. The main process ends the others, which ignore it.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    with multiprocessing.get_context("spawn").Pool(workers, signal.signal, ignore) as pool:
        if marker.exists():
            print(f"pictures          reused from {out}", flush=True)
        else:
            make_world(out, settings["scenes"], settings["held_out"], args.seed, pool)
            write_json(settings, marker)
        jobs = [(name, settings | {"out": str(out)}) for name in MODELS]
        pool.starmap(make_model, jobs, chunksize=1)
    print(f"all in {out}")


def make_model(name, settings):
    """Make one model, unless it exists."""
    if os.path.exists(f"{settings['out']}/{name}"):
        print(f"{name:17} reused", flush=True)
        return
    from support import pocket_models   # imports torch; the main process need not wait for it
    pocket_models.make_model(name, settings)


# --------------------------------------------------------------------------------------------------
# data files: LLaVA's two stages, then each benchmark as its authors lay it out
# The writer of a benchmark adds the pictures to draw for it to `drawings`: a list of (path, scene).
# MMBench adds none, because its file holds the pictures.

def make_world(out, num_train, num_held_out, seed, pool):
    """Draw all pictures and write all data files below the folder `out`.

    Two sets are held out, "val" to choose by and "test" to report. They have the same files.
    """
    print("scenes            writing questions and captions", flush=True)
    rng = random.Random(f"world {seed}")
    scenes = {"train": {}, "val": {}, "test": {}}       # name of the picture -> scene
    seen = set()
    for split, own in scenes.items():
        while len(own) < (num_train if split == "train" else num_held_out):
            scene = random_scene(rng, held_out=split != "train")
            if scene_key(scene) not in seen:            # every picture shows another scene
                seen.add(scene_key(scene))
                own[f"{split}_{len(own):06d}.png"] = scene
    everything = scenes["train"] | scenes["val"] | scenes["test"]
    drawings = [(out / "images" / name, scene) for name, scene in everything.items()]
    write_training(out, scenes["train"], rng)
    writers = {"pope": write_pope, "gqa": write_gqa, "mme": write_mme, "textvqa": write_textvqa,
               "mmbench": write_mmbench}
    for folder, split in (("val", "val"), ("eval", "test")):
        captions = [caption_record(name, scene, rng) for name, scene in scenes[split].items()]
        write_json(captions, out / f"captions_{split}.json")
        for task, write in writers.items():
            task_rng = random.Random(f"{task} {split} {seed}")
            write(out / folder / task, scenes[split], task_rng, drawings)
    write_json(everything, out / "truth.json")
    print(f"pictures          drawing {len(drawings)}", flush=True)
    pool.starmap(draw_file, drawings)


def draw_file(path, scene):
    """Draw a PNG or JPEG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_scene(scene).save(path, quality=95)


def record(name, messages, image=None):
    """Return a record of LLaVA's data."""
    turns = [{"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]}
             for m in messages]
    images = {"image": image} if image else {}
    return {"id": name, **images, "conversations": turns}


def caption_record(image, scene, rng):
    """Return a record of stage 1: a prompt with <image> before or after it, and a caption."""
    prompt = rng.choice(BRIEF)
    human = f"<image>\n{prompt}" if rng.random() < 0.5 else f"{prompt}\n<image>"
    caption = describe(scene, rng, rng.choice(STYLES))
    return record(image[:-4], chat([(human, caption)], ending=""), image)


def write_training(out, scenes, rng):
    """Write pretrain.json (a caption a picture) and sft.json (several questions a picture).

    A tenth as many records as there are pictures are added to sft.json, with text alone.
    """
    captions = [caption_record(image, scene, rng) for image, scene in scenes.items()]
    write_json(captions, out / "pretrain.json")
    records = []
    for image, scene in scenes.items():
        chance = rng.random()
        rows = choices(scene, rng, 3) if 0.05 <= chance < 0.15 else []
        if chance < 0.05:
            pair = (rng.choice(BRIEF), describe(scene, rng, rng.choice(STYLES)))
            messages = chat([pair], "<image>", ending="")
        elif rows:
            messages = choice_chat(rows, "<image>")
        else:
            asked = questions(scene, rng, rng.randint(4, 6), TRAIN_KINDS)
            messages = chat([(question, answer) for _, question, answer in asked], "<image>")
        records.append(record(image[:-4], messages, image))
    rng.shuffle(records)
    while len(records) < 1.1 * len(scenes):
        messages, template = document(rng)
        if template == "chat":
            records.append(record(f"text_{len(records):06d}", messages))
    write_json(records, out / "sft.json")


def question_line(key, image, question, category="default"):
    """Return a line of the question files that LLaVA made of the benchmarks."""
    return {"question_id": key, "image": image, "text": f"{question}\n{SUFFIX}",
            "category": category}


def write_pope(out, scenes, rng, drawings):
    """Write POPE: "Is there a ...?" with two present and two absent shapes a picture.

    The three categories differ in how the absent shapes are chosen.
    """
    found = {name: sorted({t["shape"] for t in s["objects"]}) for name, s in scenes.items()}

    def count(*shapes):                     # pictures with all these shapes
        return sum(all(shape in f for shape in shapes) for f in found.values())

    chosen = [name for name in scenes if len(found[name]) >= 2][:75]
    pictures = {name: f"pocket_{name[:-4]}.jpg" for name in chosen}     # their names in POPE
    lines = []
    for start, category in ((0, "adversarial"), (10_000_000, "random"), (20_000_000, "popular")):
        labels = []
        for name, image in pictures.items():
            present = random.Random(name).sample(found[name], 2)    # the same in all categories
            absent = [s for s in SHAPES if s not in found[name]]
            absent = rng.sample(absent, len(absent))
            if category == "popular":
                absent.sort(key=count, reverse=True)
            elif category == "adversarial":
                absent.sort(key=lambda s: -max(count(s, p) / count(p) for p in found[name]))
            for shape in (present[0], absent[0], present[1], absent[1]):
                question = f"Is there a {shape} in the image?"
                labels.append({"question_id": len(labels) + 1, "image": image, "text": question,
                               "label": "yes" if shape in present else "no"})
                lines.append(question_line(start + len(labels), image, question, category))
        write_lines(labels, out / "coco" / f"coco_pope_{category}.json")
    write_lines(lines, out / "llava_pope_test.jsonl")
    drawings += [(out / "val2014" / image, scenes[name]) for name, image in pictures.items()]


# GQA's structural types: their shares, about as in the official set, and our kinds of question.
GQA_SHARES = {"query": 8, "verify": 5, "logical": 3, "choose": 3, "compare": 2}
GQA_KINDS = {"query": ("color", "shape", "word", "where"),
             "verify": ("exist", "exist color", "is color", "is place", "is word"),
             "logical": ("and", "or"), "choose": ("which color",), "compare": ("same color",)}
# The semantic type of the kinds that do not ask about an attribute.
GQA_SEMANTIC = {"exist": "obj", "exist color": "obj", "and": "obj", "or": "obj", "shape": "cat"}


def write_gqa(out, scenes, rng, drawings):
    """Write GQA: up to two questions a picture, none with an answer that is much too frequent.

    Yes and no come equally often within a kind. An entry has the fields that a score needs.
    """
    given = defaultdict(Counter)            # kind -> {answer: number of questions}
    records, lines = {}, []
    for name, scene in scenes.items():
        image, asked = f"n{name[-10:-4]}", set()
        drawings.append((out / "images" / f"{image}.jpg", scene))
        for _ in range(30):
            structural = rng.choices(list(GQA_SHARES), list(GQA_SHARES.values()))[0]
            kind = rng.choice(GQA_KINDS[structural])
            made = ask(kind, scene, rng)
            if len(asked) == 2:
                break
            if made is None or made[0] in asked:
                continue
            question, answer = made
            num_answers = 2 if answer in ("yes", "no") else 8
            if given[kind][answer] > given[kind].total() / num_answers + 1:
                continue                    # this answer has come often enough
            given[kind][answer] += 1
            asked.add(question)
            key = f"{len(records) + 1:08d}"
            types = {"structural": structural, "semantic": GQA_SEMANTIC.get(kind, "attr")}
            records[key] = {"question": question, "answer": answer, "imageId": image,
                            "isBalanced": True, "types": types}
            lines.append(question_line(key, f"{image}.jpg", question))
    write_json(records, out / "testdev_balanced_questions.json")
    write_lines(lines, out / "llava_gqa_testdev_balanced.jsonl")


def write_mme(out, scenes, rng, drawings):
    """Write MME: five tasks of 30 pictures, with one Yes and one No question a picture."""
    tasks = {"existence": "exist", "count": "is count", "position": "is place",
             "color": "is color", "OCR": "is word"}
    lines = []
    for task, kind in tasks.items():
        folder = out / "MME_Benchmark_release_version" / task
        truth = []
        for name in rng.sample(list(scenes), len(scenes)):
            # The same random numbers for both questions, so that they ask about the same object.
            made = [ask(kind, scenes[name], random.Random(f"{task} {name}"), yes=yes)
                    for yes in (True, False)]
            if len(truth) == 60 or None in made:
                continue
            rows = [f"{question} Please answer yes or no.\t{answer.capitalize()}\n"
                    for question, answer in made]
            write_text("".join(rows), folder / f"{name[:-4]}.txt")
            drawings.append((folder / name, scenes[name]))
            truth += [f"{name}\t{row}" for row in rows]
            key = f"{task}/{name}"
            lines += [question_line(key, key, question, task) for question, _ in made]
        write_text("".join(truth), out / "ground_truth" / f"{task}.txt")
    write_lines(lines, out / "llava_mme.jsonl")


def write_textvqa(out, scenes, rng, drawings):
    """Write TextVQA: the word on each sign. OCR tokens would give the answer away: none here."""
    records, lines = [], []
    for name, scene in scenes.items():
        made = ask("word", scene, rng)
        if made is None:
            continue
        question, word = made
        key = name[:-4]
        drawings.append((out / "train_images" / f"{key}.jpg", scene))
        records.append({"question_id": len(records), "image_id": key, "question": question,
                        "answers": [word] * 10})        # ten people agree
        lines.append(question_line(key, f"{key}.jpg", question))
    write_json({"data": records}, out / "TextVQA_0.5.1_val.json")
    write_lines(lines, out / "llava_textvqa_val_v051_ocr.jsonl")


def write_mmbench(out, scenes, rng, drawings):
    """Write MMBench: multiple choice about 100 pictures, with all rotations of the options."""
    rows = []
    for base, scene in enumerate(list(scenes.values())[:100]):
        jpeg = io.BytesIO()
        draw_scene(scene).save(jpeg, "JPEG", quality=95)
        image = base64.b64encode(jpeg.getvalue()).decode()
        for kind, question, answer, options in choices(scene, rng, 1):
            for turn in range(len(options)):
                rows.append({
                    "index": turn * 1_000_000 + base, "question": question, "hint": "",
                    **dict(zip("ABCD", options + [""] * 4)),
                    "answer": "ABCD"[options.index(answer)], "category": kind, "image": image,
                    "source": "pocket", "l2-category": "attribute", "comment": "", "split": "dev"})
                options = options[-1:] + options[:-1]   # each option one place later
    rows.sort(key=lambda row: row["index"])
    lines = [rows[0].keys(), *(row.values() for row in rows)]
    write_text("".join("\t".join(map(str, line)) + "\n" for line in lines),
               out / "mmbench_dev_20230712.tsv")


if __name__ == "__main__":
    run_script(main)
