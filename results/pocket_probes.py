"""Measure what the models of the pocket world have learnt, on held-out scenes, before any training
with pictures: how well the LLMs read, what a linear probe reads from the tower, and how well a
blind guess does on the benchmarks.

    python results/pocket_probes.py [--world data/pocket] [--questions 600]
"""
import argparse
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPVisionModel

from common import read_json, run_script
from data import IGNORE
from support.pocket_models import LLMS, TOWER, encode, load_pixels, pad_batch
from support.pocket_world import (CELLS, COLORS, SHAPES, SIDE, SIZES, STYLES, TRAIN_KINDS, WORDS,
                                  chat, choice_chat, choices, describe, questions, random_scene)


@torch.no_grad()
def reading(folder, count):
    """Return {kind of question: share of questions that the LLM of `folder` answers exactly}.

    About `count` questions, each about one described scene, answered greedily.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    llm = AutoModelForCausalLM.from_pretrained(folder)
    rng = random.Random("reading")
    rows = []                               # (kind, (ids, labels))
    while len(rows) < count:
        scene = random_scene(rng, held_out=True)
        style = rng.choice(STYLES)
        text = describe(scene, rng, style)
        for kind, question, answer in questions(scene, rng, 3, TRAIN_KINDS, style):
            rows.append((kind, encode(chat([(question, answer)], text), tokenizer)))
        for row in choices(scene, rng, 1, style):
            rows.append(("choice", encode(choice_chat([row], text), tokenizer)))
    right = defaultdict(list)
    for kind, row in rows:
        ids, labels = pad_batch([row], tokenizer.pad_token_id)
        targets = labels[:, 1:]
        guesses = llm(input_ids=ids).logits[:, :-1].argmax(-1)
        # Every token must be right, and so must the token that ends the answer.
        ok = bool(((guesses == targets) | (targets == IGNORE)).all())
        right[kind].append(ok)
        right["all"].append(ok)
    return {kind: sum(values) / len(values) for kind, values in sorted(right.items())}


@torch.no_grad()
def patches_of_objects(tower, world, scenes):
    """Return (float32[objects, Dv + 1], objects): the mean patch under each object, and a 1.

    The patches are those of hidden layer -2, which the connector reads.
    """
    across = TOWER["image_size"] // TOWER["patch_size"]
    rows, things = [], []
    for name, scene in scenes.items():
        output = tower(pixel_values=load_pixels(world, [name]), output_hidden_states=True)
        grid = output.hidden_states[-2][0, 1:].unflatten(0, (across, across))   # without CLS
        for thing in scene["objects"]:
            x0, y0, x1, y1 = (min(across - 1, max(0, int(v * across / SIDE))) for v in thing["box"])
            patch = grid[y0:y1 + 1, x0:x1 + 1].mean((0, 1))                     # (Dv,)
            rows.append(torch.cat([patch, torch.ones(1)]))
            things.append(thing)
    return torch.stack(rows), things


def linear_probe(folder, world):
    """Return {fact: share right} of least squares from the patches under an object to the fact."""
    tower = CLIPVisionModel.from_pretrained(folder)
    truth = read_json(world / "truth.json")
    train = [name for name in truth if name.startswith("train")][:1500]
    test = [name for name in truth if name.startswith("test")]
    x, train_things = patches_of_objects(tower, world, {name: truth[name] for name in train})
    z, test_things = patches_of_objects(tower, world, {name: truth[name] for name in test})
    facts = {"color": list(COLORS), "shape": list(SHAPES), "size": SIZES,
             "cell": range(len(CELLS)), "word": WORDS}
    shares = {}
    for fact, values in facts.items():
        known = [i for i, thing in enumerate(train_things) if fact in thing]
        asked = [i for i, thing in enumerate(test_things) if fact in thing]
        if not known or not asked:
            continue
        classes = [values.index(train_things[i][fact]) for i in known]
        y = torch.eye(len(values))[classes]
        a = x[known]
        weights = torch.linalg.solve(a.T @ a + 1e-2 * torch.eye(a.shape[1]), a.T @ y)
        guesses = (z[asked] @ weights).argmax(1).tolist()
        right = [values.index(test_things[i][fact]) == guess for i, guess in zip(asked, guesses)]
        shares[fact] = sum(right) / len(right)
    return shares


def blind_gqa(world):
    """Return GQA's accuracy of one answer to all, and of the best answer to each kind."""
    asked = read_json(world / "eval/gqa/testdev_balanced_questions.json").values()
    of_all, of_kinds = Counter(), defaultdict(Counter)
    for question in asked:
        of_all[question["answer"]] += 1
        of_kinds[question["types"]["detailed"]][question["answer"]] += 1
    best_of_kinds = sum(max(counts.values()) for counts in of_kinds.values())
    return {"one answer": max(of_all.values()) / len(asked),
            "an answer a kind": best_of_kinds / len(asked)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--world", type=Path, default=Path("data/pocket"))
    parser.add_argument("--questions", type=int, default=600)
    args = parser.parse_args()
    if not (args.world / "pocket.json").is_file():
        raise ValueError(f"{args.world} holds no pocket world; python pocket.py makes one")
    measured = {f"{name}, reading": reading(args.world / name, args.questions) for name in LLMS}
    measured["vision-tower, linear probe"] = linear_probe(args.world / "vision-tower", args.world)
    measured["blind on GQA"] = blind_gqa(args.world)
    for name, shares in measured.items():
        print(f"{name}: " + "  ".join(f"{key} {100 * v:.1f}" for key, v in shares.items()))
    print("blind on POPE: F1 66.7, accuracy 50.0 (always yes)")
    print("blind on MME: 50 of 200 a task (always yes)")


if __name__ == "__main__":
    run_script(main)
