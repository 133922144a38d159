"""The report of transfer.py: what source and target make of captioned images."""
import math

import torch

import data
import vocab
from support import records

BATCH_SIZE = 16


def caption_batches(vlm, path, images, metadata, limit):
    """Return batches of up to `limit` captioned images, and the number of bytes in their captions.

    The captions have the form that the connector was trained on. The report also gives each caption
    the image of its neighbour. So every image comes once, and all take equally many tokens: with
    tiles only the first tile, the squashed picture.
    """
    mode = "squash" if vlm.config.tiles else metadata.get("image_mode", "crop")
    settings = {**vlm.image_settings, "mode": mode}
    dataset = data.Conversations([path], images, vlm.tokenizer, vlm.num_patches, settings,
                                 template=metadata.get("template", "chat"))
    first_record = {}
    for i, names in enumerate(dataset.image_names):
        if len(names) == 1:
            first_record.setdefault(names[0], i)
    number = min(limit, len(first_record)) // BATCH_SIZE * BATCH_SIZE
    if number < BATCH_SIZE:
        raise ValueError(f"{path} has {len(first_record)} different images and --limit is {limit}: "
                         f"neither may be less than {BATCH_SIZE}")
    chosen = list(first_record.values())[:number]
    parts = [chosen[start:start + BATCH_SIZE] for start in range(0, number, BATCH_SIZE)]
    batches = [data.collate([dataset.sample(i) for i in part], vlm.pad_id) for part in parts]
    turns = [turn for i in chosen for turn in records.turns_of(dataset.records[i])]
    captions = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    return batches, sum(len(caption.encode()) for caption in captions)


@torch.no_grad()
def measure(vlm, batches, num_bytes):
    """Return the report's numbers of one VLM, {name: float}.

    Bits per byte of the captions are given with the right image, a wrong one and none. Unlike a
    loss per token they can be compared between LLMs with different tokenizers.
    """
    views = {"right": lambda batch: batch,
             "wrong": lambda batch: batch | {"pixel_values": batch["pixel_values"].roll(1, 0)},
             "none": data.without_images}
    report = {}
    for name, view in views.items():
        nats = sum(vlm(view(batch))[0].item() for batch in batches)
        report[f"bits_per_byte_{name}"] = nats / math.log(2) / num_bytes
    patches = vlm.patch_features(batches[0]["pixel_values"]).float()        # (N, P, Dv)
    if vlm.words:
        weights = vlm.connector.weights(patches).abs().sum((0, 1)).cpu()    # (N, P, K) -> (K,)
        single = single_tokens(vlm)
        report["mass_on_single_tokens"] = (weights[single].sum() / weights.sum()).item()
    ids, mask = batches[0]["input_ids"], batches[0]["attention_mask"]
    text_ids = ids[(ids >= 0) & (mask == 1)].to(vlm.llm.device)
    for name, x in (("image", vlm.connector(patches)),
                    ("text", vlm.llm.get_input_embeddings()(text_ids))):
        report[f"rms_{name}_embeds"] = x.float().square().mean().sqrt().item()
    return report


def single_tokens(vlm):
    """Return for each word whether it is one token of this LLM's tokenizer: bool[K]."""
    return torch.tensor([len(ids) == 1 for ids in vocab.word_ids(vlm.words, vlm.tokenizer)])


def print_report(report):
    """Print the report as a table, source and target side by side."""
    if "single_tokens" in report:
        from_pieces = report["words"] - report["single_tokens"]
        print(f"words: {report['words']:,}, of which one token of the target "
              f"{report['single_tokens']:,}, built from pieces {from_pieces:,}")
    if "image_newline" in report:
        print(f"image_newline: {report['image_newline']}")
    if "source" in report:                          # and then "target", with --eval
        print(f"{'':26}{'source':>12}{'target':>12}")
        for key, number in report["source"].items():
            print(f"{key:26}{number:12.4f}{report['target'][key]:12.4f}")
