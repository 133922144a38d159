"""
Measure checkpoints on photographs with captions and boxes: words, bits per byte, written captions.

    python results/photos.py [NAME=]CHECKPOINT [...] --captions captions_val.json
        --boxes boxes_val.json --images DIR --out FILE.json [--number 300] [--features DIR]

Three measurements, each beside the same one with another picture:

words      the strongest word of a patch stands in the label of the box that covers it; the same for
           one of the five strongest. A patch belongs to the smallest box that holds its centre. For
           an MLP the words are those whose embeddings have the largest cosine.
captions   bits per byte of a human caption with the right, a wrong and no image, after the
           question of its record. With --prompt once more after PROMPT, as prompt_...
written    the first line that the model writes contains a word of a label of the picture.

Intervals are 95 % bootstrap intervals over pictures. Images must be squares, because the boxes
(fractions of a side, {file: {"objects": [{"label", "box": [x0, y0, x1, y1]}]}}) are not cropped.
"""
import math
import os
import random
import re
import sys
from collections import defaultdict

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch

import checkpoint
import common
import conversation
import data
import vocab
import words
from generate import generate

# Words of a label that name no thing: function words, numbers, colours, places, pronouns.
NO_THING = set("""a an the of in on at to and with his her its their one two three four five
six some another other others many several all both each every left right front back side top
bottom he she it they them him something someone group black white red blue green yellow orange
brown pink purple gray grey""".split())
BATCH_SIZE = 16
# How an LLM is asked for a caption. The connector's embeds are near words, and no LLM was trained
# with it, so the prompt says that they are words. It is the best of five on 32 other photographs.
PROMPT = f"These words describe a photo: {conversation.IMAGE}\nDescribe the photo in one sentence."
ASKED = {"role": "user", "content": PROMPT}


def plain(word):
    """Return a word of the vocabulary as a reader compares it: "ĠRed" -> "red"."""
    return vocab.show(word).strip("␣").lower()


def content_words(text, no_thing):
    """Return the set of lower-case words of a text that are not in the set no_thing."""
    return set(re.findall(r"[^\W\d_]+", text.lower())) - no_thing


def entropy(weights):
    """Return the entropy of each patch's weights in bits: float[P, K] -> float[P].

    Raw scores count by their absolute value.
    """
    p = weights.abs() / weights.abs().sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1) / math.log(2)


def labels_of_patches(objects, side):
    """Return the words of each patch's label: side * side sets, empty where there is no box."""
    labels = []
    for i in range(side * side):
        y, x = (i // side + 0.5) / side, (i % side + 0.5) / side
        covering = []
        for thing in objects:
            x0, y0, x1, y1 = thing["box"]
            if x0 <= x <= x1 and y0 <= y <= y1:
                covering.append(((x1 - x0) * (y1 - y0), thing["label"]))
        labels.append(content_words(min(covering)[1], NO_THING) if covering else set())
    return labels


def interval(rows):
    """Return [mean, low, high] of sum(hits) / sum(counts) over rows of (hits, count)."""
    hits, counts = np.array([row for row in rows if row[1]], float).T
    generator = random.Random(0)
    draws = [generator.choices(range(len(hits)), k=len(hits)) for _ in range(1000)]
    means = np.sort(hits[draws].sum(1) / counts[draws].sum(1))
    return [round(float(v), 4) for v in (hits.sum() / counts.sum(), means[25], means[975])]


def first_line(text):
    """Return the first line of an answer. Line breaks before it do not count."""
    return text.strip().split("\n")[0].strip()


def write_captions(vlm, questions, template, images):
    """Return the first line that the model writes about each image: N questions -> N strings."""
    prompts = [conversation.encode_prompt([question], vlm.tokenizer, vlm.num_patches, template)
               for question in questions]
    lines = []
    for i in range(0, len(prompts), BATCH_SIZE):
        batch = slice(i, i + BATCH_SIZE)
        answers = generate(vlm, prompts[batch], images[batch], max_new_tokens=24)
        lines += [first_line(vlm.tokenizer.decode(ids, skip_special_tokens=True))
                  for ids in answers]
    return lines


@torch.no_grad()
def bits_per_byte(vlm, turns, samples, template):
    """Return the bits per byte of captions with the right, a wrong and no image, {key: interval}.

    turns: [question, answer] for each sample. The wrong image is that of the sample before.
    """
    rows = defaultdict(list)
    for n, (pair, sample) in enumerate(zip(turns, samples)):
        ids, labels = conversation.encode(pair, vlm.tokenizer, vlm.num_patches, template)
        row = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
        batch = data.collate([{**row, "id": sample["id"], "images": sample["images"]}], vlm.pad_id)
        other = batch | {"pixel_values": samples[n - 1]["images"]}
        right, wrong, none = (vlm(view)[0].item() / math.log(2)
                              for view in (batch, other, data.without_images(batch)))
        num_bytes = len(pair[1]["content"].encode())
        for key, bits in {"bits_per_byte_right": right, "bits_per_byte_wrong": wrong,
                          "bits_per_byte_none": none, "wrong_minus_right": wrong - right}.items():
            rows[key].append((bits, num_bytes))
    return {key: interval(value) for key, value in rows.items()}


def match_norm(vlm):
    """Give each image embed the mean length of the LLM's words, as a normalised MLP would have."""
    length = words.vocabulary(vlm)[1].norm(dim=-1).mean()
    vlm.connector.register_forward_hook(
        lambda module, inputs, output: output * length / output.norm(dim=-1, keepdim=True))


@torch.no_grad()
def words_in_labels(vlm, samples, objects):
    """Return how often the strongest words of patches are in labels, {key: interval}, and entropy.

    objects: those of the boxes file for each sample. Another picture is that of the sample before.
    """
    side = math.isqrt(vlm.num_patches)
    labels_of = [labels_of_patches(of_one, side) for of_one in objects]
    names, E = (vlm.words, None) if vlm.words else words.vocabulary(vlm)
    rows = defaultdict(list)
    entropies = []
    for n, sample in enumerate(samples):
        patches = words.grid_patches(vlm, sample["images"])                     # (1, P, Dv)
        if vlm.words:
            scores = vlm.connector.weights(patches)[0]                          # (P, K)
            entropies.append(entropy(scores).mean().item())
        else:
            scores = words.cosine(vlm.connector(patches)[0].float(), E)         # (P, V)
        strongest = [[plain(names[k]) for k in top] for top in scores.topk(5).indices.tolist()]
        for suffix, labels in (("", labels_of[n]), ("_other", labels_of[n - 1])):
            pairs = [(five, label) for five, label in zip(strongest, labels) if label]
            for k in (1, 5):
                hits = sum(not label.isdisjoint(five[:k]) for five, label in pairs)
                rows[f"words_top{k}{suffix}"].append((hits, len(pairs)))
    report = {key: interval(value) for key, value in rows.items()}
    if entropies:
        report["entropy_bits"] = round(sum(entropies) / len(entropies), 3)
    return report


def measure(vlm, metadata, args):
    """Return a checkpoint's report, {name: [mean, low, high]}."""
    if args.match_norm:
        match_norm(vlm)
    template = metadata["template"]
    settings = {**vlm.image_settings, "mode": metadata["image_mode"]}
    dataset = data.Conversations([args.captions], args.images, vlm.tokenizer, vlm.num_patches,
                                 settings, template, features=args.features)
    boxes = {name: value["objects"] for name, value in common.read_json(args.boxes).items()}
    first = {}                                      # {image: number of its first caption}
    for i, images in enumerate(dataset.image_names):
        if len(images) == 1 and boxes.get(images[0]):
            first.setdefault(images[0], i)
    first = dict(list(first.items())[:args.number])
    objects = [boxes[name] for name in first]
    samples = [dataset.sample(i) for i in first.values()]
    report = words_in_labels(vlm, samples, objects) | {"pictures": len(first)}
    if args.words_only:
        return report

    turns = [data.messages_of(dataset.records[i], template == "chat")[0] for i in first.values()]
    report |= bits_per_byte(vlm, turns, samples, template)
    if args.prompt:
        turns, template = [[ASKED, answer] for _, answer in turns], "chat"
        bits = bits_per_byte(vlm, turns, samples, template)
        report |= {f"prompt_{key}": value for key, value in bits.items()}

    images = torch.cat([sample["images"] for sample in samples])
    captions = write_captions(vlm, [question for question, _ in turns], template, images)
    things = [content_words(" ".join(thing["label"] for thing in of_one), NO_THING)
              for of_one in objects]
    for suffix, shift in (("", 0), ("_other", 1)):
        hits = [(bool(content_words(caption, NO_THING) & things[n - shift]), 1)
                for n, caption in enumerate(captions)]
        report[f"written{suffix}"] = interval(hits)
    return report


def load_named(pairs):
    """Yield (name, VLM, metadata) for each "NAME=CHECKPOINT". A folder alone has its own name."""
    for pair in pairs:
        name, equals, folder = pair.partition("=")
        if not equals:
            name, folder = os.path.basename(os.path.abspath(pair)), pair
        yield name, checkpoint.load(folder), checkpoint.read_config(folder)[1]


def write_reports(pairs, path, measure):
    """Measure each "NAME=CHECKPOINT" and write {name: report} to a JSON file. Old names are kept.

    measure(vlm, metadata of the checkpoint) returns the report.
    """
    reports = common.read_json(path) if os.path.isfile(path) else {}
    for name, vlm, metadata in load_named(pairs):
        reports[name] = measure(vlm, metadata) | {"git_commit": metadata["git_commit"]}
        print(name, *(f"  {key} {value}" for key, value in reports[name].items()), sep="\n")
        common.write_json(reports, path)


def main():
    parser = common.argument_parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="[NAME=]CHECKPOINT")
    add("--captions", required=True, help="LLaVA-format captions; the first one of each picture")
    add("--boxes", required=True)
    add("--images", required=True)
    add("--out", required=True, metavar="FILE.json", help="reports by name; old names are kept")
    add("--number", type=int, default=300, help="pictures (default 300)")
    add("--words_only", action="store_true", help="measure the words alone, which needs no LLM")
    add("--prompt", action="store_true", help="ask by PROMPT, too")
    add("--match_norm", action="store_true", help="scale image embeds to the length of words")
    add("--features", default="", help="a folder that train.py --features has filled")
    args = parser.parse_args()
    write_reports(args.checkpoints, args.out, lambda *loaded: measure(*loaded, args))


if __name__ == "__main__":
    common.run_script(main)
