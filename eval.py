"""
Ask a model the questions of seven benchmarks, score its answers, and print one table.

    python eval.py CHECKPOINT --tasks pope,gqa --data DIR [--out DIR]
    torchrun --nproc_per_node=N eval.py CHECKPOINT ...                          # the same, shared
    python eval.py --score TASK --questions F [--truth F] --predictions F       # needs no model
    python eval.py --table A/results.json B/results.json                        # one row for each
    python eval.py --compare A B                                                # paired tests

    benchmarks/TASK.py: questions() -> prompts -> batches -> <task>.jsonl -> score() -> table

DIR holds the official files under the names that benchmarks/*.py declare. If a file is missing, the
script says so before it loads the model. --out (default CHECKPOINT/eval) gets for each task
    <task>.jsonl            the answers in LLaVA's format, in the order of the questions
    <task>.settings.json    the checkpoint and the settings that made them
    <task>.scores.json      one score for each question
and results.json. A run that was stopped continues where it stopped. --score prints one JSON object.
MM-Vet needs a judge: --judge MODEL asks OPENAI_BASE_URL with OPENAI_API_KEY. Without --judge, the
file that a judge takes is written.
"""
import json
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import common
from benchmarks import BENCHMARKS
from benchmarks.answers import (answer_record, join_answers, prepare_files, question_key,
                                refuse_other_run, saved_answers)
from benchmarks.files import load_all_questions, official_paths, score_files
from benchmarks.tables import comparison_table, results_table, write_results

# torch and what needs it are imported inside functions, so that --help and --score answer at once.

LOADERS = 4         # threads that read images, 10 to 14 ms each, ahead of a GPU


# ---- prompts and batches

def prompt_ids(vlm, question):
    """Return the ids of one prompt; they end where the model begins to answer."""
    from conversation import IMAGE, encode_prompt
    # The image comes before the question, as in the training data.
    image_line = f"{IMAGE}\n" if question["image"] else ""
    message = {"role": "user", "content": image_line + question["text"]}
    picture_size = None
    if question["image"] and vlm.config.tiles:
        from support.pictures import open_image
        picture_size = open_image(question["image"]).size
    num_ids = [vlm.num_tokens(picture_size)] if question["image"] else []
    return encode_prompt([message], vlm.tokenizer, num_ids)


def group_by_image(questions):
    """Return lists of questions about one image, in the order in which the images appear.

    The questions without an image are one list.
    """
    groups = {}
    for question in questions:
        groups.setdefault(question["image"], []).append(question)
    return list(groups.values())


def make_batches(groups, lengths, size):
    """Yield lists of questions. A group stays in one batch if it fits.

    groups: lists of questions. lengths: {question_key: number of tokens}. A padded batch has at
    most `size` x (longest prompt) tokens. The longest prompts come first, so that a lack of memory
    shows at once.
    """
    def length(question):
        return lengths[question_key(question)]

    batch, tokens = [], size * max(lengths.values(), default=0)
    for group in sorted(groups, key=lambda group: -max(map(length, group))):
        group = sorted(group, key=lambda question: -length(question))
        while group:
            longest = max(map(length, batch + group[:1]))
            room = tokens // longest - len(batch)
            # Do not fill up the batch with part of a group: two batches would encode its image.
            if batch and len(group) > room:
                yield batch
                batch = []
            else:
                batch, group = batch + group[:room], group[room:]
    if batch:
        yield batch


# ---- answers

def load_images(batch, vlm, executor):
    """Return {image: future of its pixels and its size} for a batch of questions.

    The result of a future is (float32[n, 3, S, S], (width, height)). n is 1 without tiles.
    The threads of `executor` read the images while the GPU answers the batch before.
    """
    from support.pictures import open_image, tile_pixels

    def load(name):
        image = open_image(name)
        # mode="pad" makes the image square with a border, as LLaVA does for all benchmarks.
        pixels = tile_pixels(image, **vlm.image_settings, mode="pad", tiles=vlm.config.tiles)
        return pixels, image.size

    images = dict.fromkeys(q["image"] for q in batch if q["image"])
    return {image: executor.submit(load, image) for image in images}


def answer_batch(vlm, batch, prompts, loaded, max_new_tokens):
    """Return the texts of the answers to a batch of questions. Each image is encoded once.

    loaded: see load_images.
    """
    import torch
    from generate import generate
    # Each image is sent once; image_index names its number for each question that has an image.
    images = list(loaded)
    image_index = [images.index(q["image"]) for q in batch if q["image"]]
    pixel_values, picture_sizes = None, None
    if images:
        pixel_values, picture_sizes = zip(*[future.result() for future in loaded.values()])
        pixel_values = torch.cat(pixel_values)                              # (N, 3, S, S)
    # Greedy, as the papers do. Up to rounding, an answer does not depend on its batch.
    answers = generate(vlm, prompts, pixel_values, max_new_tokens, image_index=image_index,
                       picture_sizes=picture_sizes)
    return [vlm.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]


def answer_questions(vlm, task, questions, done, stem, args):
    """Answer this rank's share of the questions and append the answers to <stem>.rank<rank>.jsonl.

    done: {question_key: record} of earlier runs; these questions are not asked again. The answers
    are written after each batch. If a kill leaves half a line, `prepare_files` of the next run
    cuts it off.
    """
    from tqdm import tqdm
    from support import ranks
    rank, world = ranks.rank, ranks.world
    # A share is a contiguous piece, so that most images are needed by one rank only.
    ordered = [q for group in group_by_image(questions) for q in group]
    start = rank * len(ordered) // world
    stop = (rank + 1) * len(ordered) // world
    todo = [q for q in ordered[start:stop] if question_key(q) not in done]
    # All prompts are made first: a batch needs their lengths, and a bad prompt stops the run now.
    prompts = {question_key(q): prompt_ids(vlm, q) for q in todo}
    lengths = {key: len(ids) for key, ids in prompts.items()}
    model_id = os.path.basename(os.path.abspath(args.checkpoint))
    max_new_tokens = BENCHMARKS[task].MAX_NEW_TOKENS
    batches = list(make_batches(group_by_image(todo), lengths, args.batch_size))
    progress = tqdm(total=len(todo), desc=task, disable=rank > 0)
    with (open(f"{stem}.rank{rank}.jsonl", "a", encoding="utf-8") as file, progress,
          ThreadPoolExecutor(LOADERS) as executor):
        coming = load_images(batches[0], vlm, executor) if batches else {}
        for batch, following in zip(batches, batches[1:] + [[]]):
            loaded, coming = coming, load_images(following, vlm, executor)
            batch_prompts = [prompts[question_key(q)] for q in batch]
            texts = answer_batch(vlm, batch, batch_prompts, loaded, max_new_tokens)
            for question, text in zip(batch, texts):
                record = answer_record(question, text, task, model_id)
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()                    # after a kill, only the current batch is lost
            progress.update(len(batch))


# ---- scores

def score_task(task, subset, total, stem, args):
    """Score the answers of one task, write a score for each question, print and return the summary.

    subset: the questions that were asked, of `total`.
    """
    predictions = join_answers(subset, stem)
    paths = official_paths(BENCHMARKS[task], args.data)
    summary, items = score_files(task, *paths, predictions, args, bool(args.limit))
    if len(subset) < total:
        summary["partial"] = f"first {len(subset)} of {total} questions, no benchmark score"
    common.write_json(items, f"{stem}.scores.json")
    print(f"{task}: {json.dumps(summary, ensure_ascii=False)}", flush=True)
    return summary


# ---- a checkpoint through the benchmarks

def keep_or_refuse_answers(questions, stems, results, made_by, args):
    """Keep earlier answers that the same model and settings have made. ValueError for others."""
    from support import fingerprint
    if os.path.exists(results) and not args.overwrite:
        old = common.read_json(results)
        refuse_other_run(results, old.get("made_by", {}) if isinstance(old, dict) else {}, made_by)
    os.makedirs(os.path.dirname(results), exist_ok=True)
    for task, stem in stems.items():
        benchmark = BENCHMARKS[task]
        asked = fingerprint.file_hash(os.path.join(args.data, benchmark.ASK), complete=True)
        images = {q["image"] for q in questions[task] if isinstance(q["image"], str)}
        seen = fingerprint.images_hash(sorted(images))
        settings = {**made_by, "questions": asked, "images": seen,
                    "max_new_tokens": benchmark.MAX_NEW_TOKENS}
        prepare_files(stem, settings, args.overwrite)


def evaluate(args):
    """Check the data, answer, score, print. Each rank answers a share; rank 0 does the rest."""
    out = os.path.abspath(args.out or os.path.join(args.checkpoint, "eval"))
    config_path = os.path.join(args.checkpoint, "config.json")
    if not os.path.isfile(config_path):
        raise ValueError(f"{args.checkpoint} is no checkpoint: it has no config.json")
    # The data come first: loading a large model takes minutes.
    questions = load_all_questions(args.tasks, args.data)

    import torch
    import checkpoint
    from support import fingerprint, ranks
    from support.device import own_device
    # Ranks only wait for each other. Days, because a slow rank is not a dead one.
    ranks.join("gloo", timedelta(days=7))
    # Under torchrun each rank loads the whole model on its own GPU.
    device = own_device(args.device, most=1 if ranks.world > 1 else None)
    dtype = args.dtype or ("float32" if str(device) == "cpu" else "bfloat16")
    # A trial with --limit has files of its own, so that it cannot be taken for a score.
    suffix = f".first{args.limit}" if args.limit else ""
    stems = {task: os.path.join(out, task + suffix) for task in args.tasks}
    vlm = checkpoint.load(args.checkpoint, device=device, dtype=getattr(torch, dtype),
                          attention=args.attention)
    # These decide whether an earlier answer can be used again. Batch size and number of ranks
    # change an answer by rounding only, so they are not here.
    made_by = {"checkpoint": fingerprint.of_connector(args.checkpoint), "template": "chat",
               "dtype": dtype}
    made_by |= {f"{source} {part}": value for source, parts in vlm.fingerprint.items()
                for part, value in parts.items()}
    results = os.path.join(out, f"results{suffix}.json")
    ranks.on_rank0(lambda: keep_or_refuse_answers(questions, stems, results, made_by, args))
    trained_with = common.read_json(config_path).get("template")
    if trained_with not in (None, "chat"):
        common.print_rank0(f"note: this checkpoint was trained with template {trained_with}, but "
                           "the questions are asked with the LLM's own chat template")
    done = {task: saved_answers(stems[task]) for task in args.tasks}
    ranks.wait_for_all()                    # each rank has read them, before one of them writes

    summaries = {}
    for task in args.tasks:
        subset = questions[task][:args.limit or None]
        with ranks.sharing_errors():        # at its end all answers are there
            answer_questions(vlm, task, subset, done[task], stems[task], args)
        if ranks.rank == 0:
            summaries[task] = score_task(task, subset, len(questions[task]), stems[task], args)
    if ranks.rank == 0:
        name = os.path.basename(os.path.abspath(args.checkpoint))
        write_results(name, results, made_by, summaries)
        print(f"\n{results_table([results])}\n\n{results}")
    ranks.leave()


# ---- command line

def parse_arguments(argv):
    parser = common.argument_parser(__doc__)
    add = parser.add_argument
    add("checkpoint", nargs="?", help="checkpoint folder")
    add("--tasks", default="all", help=f"with commas between, or all: {','.join(BENCHMARKS)}")
    add("--data", help="folder with gqa/, textvqa/, mme/, ...")
    add("--out", help="folder of the results (default: CHECKPOINT/eval)")
    add("--batch_size", type=int, default=32, help="batch size for the longest questions")
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="default: float32 on a CPU, bfloat16 on CUDA")
    add("--attention", help=common.ATTENTION)
    add("--device", help="default: cuda if there is one, else cpu; auto: the LLM on all GPUs")
    add("--limit", type=int, default=0, help="only the first N questions: a trial, not a score")
    add("--overwrite", action="store_true",
        help="replace answers of another checkpoint or other settings")
    add("--offline", action="store_true", help=common.OFFLINE)
    add("--judge", help="MM-Vet: model to ask at OPENAI_BASE_URL")
    add("--runs", type=int, default=1, help="MM-Vet: how often the judge grades all answers")
    add("--timeout", type=float, default=60, help="MM-Vet: seconds to wait for a reply")
    add("--score", choices=BENCHMARKS, metavar="TASK", help="score a file of answers, no model")
    add("--questions", help="the official question file")
    add("--truth", help="labels: a folder (mme, pope, scienceqa) or the grade file (mmvet)")
    add("--predictions", help="answers, JSON lines in LLaVA's format")
    add("--table", nargs="+", metavar="RESULTS",
        help="results.json files or checkpoints: one joint table")
    add("--mean", action="store_true",
        help="with --table: rows of one name are seeds; print mean and standard deviation")
    add("--compare", nargs=2, metavar=("A", "B"), help="two checkpoints or result folders")
    args = parser.parse_args(argv)
    if args.offline:
        common.go_offline()
    args.tasks = list(BENCHMARKS) if args.tasks == "all" else args.tasks.split(",")
    for task in args.tasks:
        if task not in BENCHMARKS:
            parser.error(f"there is no task '{task}'; there are {', '.join(BENCHMARKS)}")
    if args.limit < 0 or args.batch_size < 1 or args.runs < 1:
        parser.error("--limit must not be negative, --batch_size and --runs must be at least 1")
    if args.score:
        required = ["questions", "predictions"]
        if hasattr(BENCHMARKS[args.score], "TRUTH"):
            required.append("truth")
        missing = [f"--{flag}" for flag in required if not getattr(args, flag)]
        if missing:
            parser.error(f"{missing[0]} is missing: --score {args.score} needs it")
    elif not args.table and not args.compare:
        if not args.checkpoint or not args.data:
            parser.error("CHECKPOINT or --data is missing")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if args.score:
        summary, _ = score_files(args.score, args.questions, args.truth, args.predictions, args)
        print(json.dumps(summary, ensure_ascii=False, allow_nan=False))
    elif args.compare:
        print(comparison_table(*args.compare))
    elif args.table:
        print(results_table(args.table, args.mean))
    else:
        evaluate(args)


if __name__ == "__main__":
    common.run_script(main)
