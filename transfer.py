"""
Move a trained LangBridge to another LLM, without training.

    python transfer.py SRC TGT [--out DIR] [--eval DATA.json]

SRC is a checkpoint folder, after pretraining ("Pretrain-LB" in the paper) or after SFT ("SFT-LB"); TGT is any causal LLM,
a hub name or a folder. What moves is the connector: its tensors and the list of words. What is replaced is the LLM, its
tokenizer and E, the rows of the new LLM's own input embeddings for the same words. The checkpoint that comes out is ready
for `train.py --stage=sft --init=DIR`, or for use as it is. --eval measures both ends on captioned images.
"""
import argparse
import math
import os
import sys
from dataclasses import replace

import checkpoint
import common
import vocab


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="checkpoint folder with a LangBridge")
    parser.add_argument("target", help="LLM to move to: hub name or folder")
    parser.add_argument("--out", help="folder to write (default: SRC-to-TGT)")
    parser.add_argument("--eval", metavar="DATA.json", help="LLaVA-format captions to measure source and target on")
    parser.add_argument("--images", help="folder of their images (default: images/ beside DATA.json)")
    parser.add_argument("--limit", type=int, default=128, help="pictures of DATA.json to use, in sixteens (default 128)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", help="default: cuda if there is one, else cpu; cuda:0,cuda:1 cuts the LLM over two")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--offline", action="store_true", help=common.OFFLINE)
    return parser.parse_args()


if __name__ == "__main__":                   # before the slow imports: --help answers at once
    ARGS = read_arguments()
    if ARGS.offline:
        common.go_offline()

import torch

import data


def rms(x):
    """Root mean square of all entries, as a float"""
    return x.float().square().mean().sqrt().item()


def shuffled(batch):
    """The same batch with every image given to the next sample: int and float tensors as data.collate makes them"""
    return {**batch, "pixel_values": batch["pixel_values"].roll(1, 0)}


def caption_batches(vlm, path, images, whole, limit, batch_size=16):
    """Up to `limit` records of LLaVA-format captions in the form that the connector was trained on.

    -> (batches on the CPU, number of UTF-8 bytes in their answers)
    """
    dataset = data.Conversations([path], images, vlm.tokenizer, vlm.num_patches,
                                 {**vlm.image_settings, "mode": whole.get("image_mode", "crop")},
                                 template=whole.get("template", "chat"))
    first = {}                                                      # one record of each image: a neighbour's is another one
    for i, record in enumerate(dataset.records):
        if isinstance(record.get("image"), str):
            first.setdefault(record["image"], i)
    number = min(limit, len(first)) // batch_size * batch_size
    if number < batch_size:
        sys.exit(f"{path} has {len(first)} different images, --limit is {limit}: neither may be less than {batch_size}")
    chosen = list(first.values())[:number]
    batches = [data.collate([dataset.sample(i) for i in chosen[j:j + batch_size]], vlm.pad_id)
               for j in range(0, len(chosen), batch_size)]
    answers = [turn["value"] for i in chosen for turn in dataset.records[i]["conversations"]
               if data.ROLES.get(turn["from"]) == "assistant"]
    return batches, sum(len(text.encode()) for text in answers)


def single_tokens(vlm):
    """bool[K]: the word is one token of this LLM's tokenizer."""
    return torch.tensor([len(ids) == 1 for ids in vocab.word_ids(vlm.words, vlm.tokenizer)])


def measure(vlm, batches, num_bytes):
    """What the report says of one VLM: a dict of floats.

    Bits per byte of the captions (their end included) with the right image, a wrong one and none: comparable between
    LLMs of different tokenizers, which a loss per token is not (karpathy/nanochat, loss_eval.py).
    """
    device, single = vlm.llm.device, single_tokens(vlm)
    batches = [{k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()} for batch in batches]
    views = {"right": lambda batch: batch, "wrong": shuffled, "none": data.without_images}
    with torch.no_grad():
        report = {f"bits_per_byte_{name}": sum(vlm(view(b))[0].item() for b in batches) / math.log(2) / num_bytes
                  for name, view in views.items()}
        patches = vlm.patch_features(batches[0]["pixel_values"]).float()            # (N, P, Dv)
        mass = vlm.connector.weights(patches).abs().sum((0, 1))                     # (K,)
        ids = batches[0]["input_ids"]
        report["mass_on_single_tokens"] = (mass[single].sum() / mass.sum()).item()
        report["rms_image_embeds"] = rms(vlm.connector(patches))
        report["rms_text_embeds"] = rms(vlm.llm.get_input_embeddings()(ids[ids >= 0]))
    return report


def print_report(report):
    """The report as a table, source and target side by side."""
    ends = {end: report[end] for end in ("source", "target") if end in report}
    print(f"words: {report['words']:,}, of which one token of the target {report['single_tokens']:,}, "
          f"built from pieces {report['words'] - report['single_tokens']:,}")
    if ends:
        print(f"{'':26}" + "".join(f"{end:>12}" for end in ends))
        for key in next(iter(ends.values())):
            print(f"{key:26}" + "".join(f"{values[key]:12.4f}" for values in ends.values()))


def main(args):
    config, whole = checkpoint.read_config(args.source)
    if config.connector != "langbridge":
        sys.exit(f"{args.source} has an MLP connector: its output lives in the embedding space of {config.llm} and means "
                 "nothing to another LLM. Only a LangBridge, whose output is in words, can move.")
    out = args.out or f"{os.path.normpath(args.source)}-to-{os.path.basename(os.path.normpath(args.target))}"
    if os.path.exists(f"{out}/config.json") and not args.overwrite:
        sys.exit(f"{out} exists; name another --out or say --overwrite")
    if os.path.realpath(out) == os.path.realpath(args.source):
        sys.exit(f"SRC and --out are both {out}: what moves stays where it was, too")
    device = common.choose_device(args.device)
    dtype = getattr(torch, args.dtype)
    images = args.images or os.path.join(os.path.dirname(args.eval or ""), "images")
    words = vocab.load_words(f"{args.source}/words.json")

    report = {"words": len(words), "connector_from": whole["stage"]}
    if args.eval:
        vlm = checkpoint.load(args.source, device, dtype)
        report["source"] = measure(vlm, *caption_batches(vlm, args.eval, images, whole, args.limit))
        del vlm                                                     # two LLMs need not fit at the same time

    vlm = checkpoint.build(replace(config, llm=args.target), words, device, dtype)      # E of the target is made here
    checkpoint.load_connector(vlm.connector, args.source)
    report["single_tokens"] = int(single_tokens(vlm).sum())
    if args.eval:
        report["target"] = measure(vlm, *caption_batches(vlm, args.eval, images, whole, args.limit))
    kept = {key: whole[key] for key in ("template", "image_mode") if key in whole}
    checkpoint.save(vlm, out, "transfer", with_llm=False, **kept, source={"stage": whole["stage"], "llm": whole["llm"],
               "embeddings_hash": whole["embeddings_hash"]})
    common.write_json(report, f"{out}/transfer.json")
    print_report(report)
    print(f"wrote {out}")


if __name__ == "__main__":
    try:
        main(ARGS)
    except (ValueError, OSError) as error:                          # a user's mistake: its first line says which
        sys.exit(f"transfer.py: {str(error).strip().splitlines()[0]}")
