"""
Records and batches: a record of a LLaVA-format JSON file becomes ids, labels and pixels.

    record --messages_of--> messages     --conversation.encode--> ids, labels --collate--> batch
                            image names  --support/pictures.py--> pixels

Letters as in model.py.

    python data.py --check DATA.json --images DIR [--tokenizer NAME --num_patches P]
"""
import itertools
import math
import os

import common
from common import BadSample
from conversation import IGNORE, IMAGE, IMAGE_ID, encode
from support.hub import load_tokenizer
from support.log import show_sample
from support.pictures import features_path, image_path, open_image, tile_pixels
from support.records import image_names, messages_of, read_records, turns_of
from support.templates import TEMPLATES
from support.tiles import check_tiles, num_tokens
# torch is imported where it is used, so that --help answers at once.

# --------------------------------------------------------------------------------------------------
# the dataset

class Conversations:
    """A map-style dataset over LLaVA-format JSON files; several files are read as one.

    image: {"size", "mean", "std"[, "mode"]} for tile_pixels of support/pictures.py.
    max_length: a sample keeps its first max_length tokens; None keeps all.
    image_names: for each record its image names; none for a record that is malformed.
    word_of_id: {id: index of the shared word that the id is}, for "word_index".
    features: a folder of patches to use instead of pixels, see support/features.py.
    tiles: see model.Config. With tiles an image is n rows of "images" and not one.
    [i] -> {"id": str, "input_ids": int64[T], "labels": int64[T], "word_index": int64[T],
        "images": float32[n, 3, S, S], "picture_sizes": [(width, height), ...]}, or a BadSample that
        names file, record and id. train.py decides what to do with it. "word_index" is which shared
        word each trained token is, or -1. With features "images" are float16[n, P, Dv].
    """

    def __init__(self, paths, image_folder, tokenizer, num_patches, image, template="chat",
                 max_length=2048, word_of_id=None, features="", tiles=()):
        self.image_folder = str(image_folder)
        self.tokenizer = tokenizer
        self.num_patches = num_patches
        self.image = image
        self.template = template
        self.max_length = max_length
        self.word_of_id = word_of_id or {}
        self.features = features
        self.tiles = tiles
        check_tiles(tiles, image["size"])
        paths = [paths] if isinstance(paths, (str, os.PathLike)) else paths
        self.places, self.records = zip(*[pair for path in paths for pair in read_records(path)])
        self.image_names, self.lengths = [], []
        for record in self.records:
            try:
                names = image_names(record)
                length = sum(len(turn["content"].split()) for turn in turns_of(record))
            except BadSample:           # reported when the record is used
                names, length = [], 1
            self.image_names.append(names)
            # Positive with an image, negative without; global_batches needs it.
            self.lengths.append(max(1, length) * (1 if names else -1))
        if tokenizer:           # a template that cannot work at all is no fault of a record
            trial = [{"role": "user", "content": IMAGE}, {"role": "assistant", "content": "a"}]
            encode(trial, tokenizer, num_patches, template)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        try:
            return self.sample(i)
        except BadSample as error:      # returned, because a worker would raise it with a traceback
            return error

    def sample(self, i):
        """Return sample i. Raises BadSample. Without a tokenizer its ids and labels are empty."""
        import torch

        record = self.records[i]
        try:
            messages, names = messages_of(record, image_first=self.template == "chat")
            pictures = [self.read_image(image_path(self.image_folder, name)) for name in names]
            sizes = [picture_size for _, picture_size in pictures]
            counts = [num_tokens(picture_size, self.num_patches, self.tiles, self.image["size"])
                      for picture_size in sizes]    # the ids of each image
            ids, labels = self.ids_and_labels(messages, counts) if self.tokenizer else ([], [])
        except ValueError as error:
            where = f"{self.places[i]} (id {str(record.get('id'))[:60]!r})"
            kind = getattr(error, "kind", "untrainable")
            raise BadSample(kind, f"{where}: {error}") from None
        word_index = [self.word_of_id.get(label, -1) for label in labels]
        blank = torch.zeros(0, 3, self.image["size"], self.image["size"])
        return {"id": str(record.get("id", i)),
                "input_ids": torch.tensor(ids, dtype=torch.int64),
                "labels": torch.tensor(labels, dtype=torch.int64),
                "word_index": torch.tensor(word_index, dtype=torch.int64),
                "images": torch.cat([pixels for pixels, _ in pictures] or [blank]),
                "picture_sizes": sizes if self.tiles else []}

    def read_image(self, path):
        """Return (a picture's pixels float32[n, 3, S, S], (width, height) of the picture).

        With `features` it returns (cached patches float16[1, P, Dv], None) instead.
        """
        if self.features:
            from safetensors.torch import load_file

            file = features_path(self.features, path)
            if not os.path.isfile(file):
                open_image(path)        # raises BadSample, as support/features.py did
            return load_file(file)["patches"][None], None
        image = open_image(path)
        return tile_pixels(image, **self.image, tiles=self.tiles), image.size

    def word_frequencies(self, num_words, limit=10_000):
        """Return the frequency of each shared word in the answers, sum 1: float32[num_words].

        At most `limit` records are read. They are spread evenly, so that the result depends only
        on the data.
        """
        import torch

        counts = torch.zeros(num_words)
        for record in self.records[::math.ceil(len(self.records) / limit)]:
            try:
                messages, _ = messages_of(record, image_first=self.template == "chat")
                labels = self.ids_and_labels(messages, self.num_patches)[1]
            except ValueError:                      # sample() reports the record later
                continue
            words = [self.word_of_id[label] for label in labels if label in self.word_of_id]
            counts += torch.bincount(torch.tensor(words, dtype=torch.int64), minlength=num_words)
        return counts / counts.sum().clamp(min=1)

    def ids_and_labels(self, messages, num_patches):
        """Return (ids, labels), at most max_length of each. num_patches: see conversation.encode.

        Raises ValueError if an image is cut or if no trained token is left.
        """
        ids, labels = encode(messages, self.tokenizer, num_patches, self.template)
        T = self.max_length or len(ids)
        if IMAGE_ID in ids[T:]:
            raise ValueError(f"an image does not fit into the first {T} of {len(ids)} tokens")
        if all(label == IGNORE for label in labels[1:T]):       # the first token is never predicted
            raise ValueError(f"no trained token among the first {T} of {len(ids)}")
        return ids[:T], labels[:T]


# --------------------------------------------------------------------------------------------------
# batches

def collate(samples, pad_id, pad_to=1, pack=False):
    """Return a batch of samples, padded on the right to a T that is a multiple of pad_to.

    {"ids": [str],
     "input_ids", "labels", "word_index", "attention_mask", "position_ids": int64[B, T],
     "pixel_values": float32[N, 3, S, S], "picture_sizes": [(width, height), ...] with tiles,
     "bad": [str]}
    pack: the samples follow each other in one row, B = 1. Positions restart with each sample. These
    positions tell transformers where a sample begins, so that no sample sees the one before it.
    Images are in the order of their places in input_ids. A BadSample is left out, and its sentence
    is in "bad". The mask comes from lengths and not from values, because "!" is id 0 for Qwen.
    """
    import torch

    good = [s for s in samples if not isinstance(s, BadSample)]
    lengths = [len(s["input_ids"]) for s in good]
    rows, starts = range(len(good)), [0] * len(good)        # a row for each sample, from column 0
    if pack:                                                # one row: each begins where one ends
        starts = [0, *itertools.accumulate(lengths)][:len(good)]
        rows = [0] * len(good)
    B = len(set(rows))
    longest = max((start + n for start, n in zip(starts, lengths)), default=0)
    T = math.ceil(longest / pad_to) * pad_to
    ids = torch.full((B, T), pad_id)                                    # (B, T)
    labels = torch.full((B, T), IGNORE)                                 # (B, T)
    word_index = torch.full((B, T), -1)                                 # (B, T)
    mask = torch.zeros(B, T, dtype=torch.int64)                         # (B, T)
    # A packed row may be longer than the LLM's positions, so its padding gets position 0.
    positions = torch.arange(T).repeat(B, 1) * (not pack)               # (B, T)
    for s, n, row, start in zip(good, lengths, rows, starts):
        place = row, slice(start, start + n)
        ids[place] = s["input_ids"]
        labels[place] = s["labels"]
        labels[place][:1] = IGNORE      # never predicted, and not from the sample before it
        word_index[place] = s.get("word_index", torch.tensor(-1))
        mask[place] = 1
        positions[place] = torch.arange(n)
    with_images = [s for s in good if len(s["images"])]
    images = torch.cat([s["images"] for s in with_images] or [torch.zeros(0, 3, 0, 0)])
    return {"ids": [s["id"] for s in good],
            "input_ids": ids, "labels": labels, "word_index": word_index,
            "attention_mask": mask, "position_ids": positions,
            "pixel_values": images,                                     # (N, 3, S, S)
            "picture_sizes": sum([s.get("picture_sizes", []) for s in good], []),
            "bad": [str(s) for s in samples if isinstance(s, BadSample)]}


def without_images(batch):
    """Return the batch with its images masked; positions count as if the images were not there.

    The trained tokens are the same. The first one is predicted from the place before it. If only
    the image stands there (template "plain" without BOS), its last place stays, with zeros in it.
    """
    is_image = batch["input_ids"] == IMAGE_ID                           # (B, T)
    front = is_image.cumprod(1).bool()
    last_of_front = front & ~front.roll(-1, 1)
    seen = batch["attention_mask"] * (~is_image | last_of_front)
    return batch | {"attention_mask": seen,
                    "position_ids": (seen.cumsum(1) - 1).clamp(min=0),
                    "pixel_values": batch["pixel_values"] * 0}


def dummy_batch(batch):
    """Return a batch of two tokens, none of them trained, to use instead of an empty batch."""
    import torch

    two = torch.zeros(1, 2, dtype=torch.int64)
    return batch | {"input_ids": two, "labels": two + IGNORE,
                    "attention_mask": two + 1, "position_ids": two}


def global_batches(dataset, batch_size, epoch, seed, group, group_batches=1):
    """Return the order of an epoch: one list of sample indices for each optimizer step.

    It is a function of (seed, epoch). group is LLaVA's group_by_modality_length: a full batch has
    only records with an image, or only text. It is sorted by length, so batch[rank::world] gives
    each rank about the same work. Samples that fill no batch come last, in one or two short ones.
    group_batches: how many batches are sorted by length together; more leave less padding.
    """
    import torch

    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)

    def shuffled(items):
        return [items[j] for j in torch.randperm(len(items), generator=generator).tolist()]

    def pieces(items, size):
        return [items[j:j + size] for j in range(0, len(items), size)]

    if not group:
        return pieces(shuffled(range(len(dataset))), batch_size)
    lengths, grouped = dataset.lengths, []
    with_image = [i for i, n in enumerate(lengths) if n > 0]
    text_only = [i for i, n in enumerate(lengths) if n <= 0]
    for indices in (with_image, text_only):
        for piece in pieces(shuffled(indices), batch_size * group_batches):
            grouped += pieces(sorted(piece, key=lambda i: -abs(lengths[i])), batch_size)
    full = shuffled([batch for batch in grouped if len(batch) == batch_size])
    rest = [batch for batch in grouped if len(batch) < batch_size]
    if 0 < sum(map(len, rest)) < batch_size:
        rest = [sum(rest, [])]
    return full + rest


def plan(dataset, cfg):
    """Return every step of the run as a list of sample indices.

    It depends only on data and settings, so a resume needs no more than the number of the step.
    """
    epochs = [global_batches(dataset, cfg.global_batch, epoch, cfg.seed, cfg.group,
                             cfg.group_batches) for epoch in range(cfg.epochs)]
    return sum(epochs, [])[:cfg.max_steps or None]


def micro_batches(indices, rank, world, batch_size):
    """Return this rank's part of a step in batches; every rank gets the same number of them."""
    own = indices[rank::world]
    count = math.ceil(len(indices[::world]) / batch_size)
    return [own[i * batch_size:(i + 1) * batch_size] for i in range(count)]


def make_loader(dataset, batches, vlm, cfg, device):
    """Return an iterator over this rank's batches, read by cfg.workers processes."""
    import torch
    from support.ranks import length_multiple

    pad_to = length_multiple(cfg.pad_to, device, vlm.max_positions)
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=cfg.workers,
        # Ctrl-C reaches the whole process group, and the current step still needs its data.
        pin_memory=device.type == "cuda", worker_init_fn=lambda _: os.setpgid(0, 0),
        collate_fn=lambda samples: collate(samples, vlm.pad_id, pad_to, cfg.pack),
        multiprocessing_context="fork" if cfg.workers else None)
    return iter(loader)


# --------------------------------------------------------------------------------------------------
# python data.py --check

def main(argv=None):
    """Read and encode every sample. Return the exit code, which is 1 if one cannot be used."""
    parser = common.argument_parser(__doc__)
    add = parser.add_argument
    add("--check", nargs="+", required=True, metavar="DATA.json", help="LLaVA-format JSON files")
    add("--images", required=True, metavar="DIR", help="the folder that image paths start from")
    add("--tokenizer", help="hub name or folder; without one the texts are not encoded")
    add("--num_patches", type=int, default=576, help="P, patches of a square picture")
    add("--tiles", default="()", help="the setting of train.py: ((336, 672), ...)")
    add("--image_size", type=int, default=336, help="S, pixels of a tile; with --tiles only")
    add("--max_length", type=int, default=2048, help="tokens, image patches included")
    add("--template", default="chat", choices=TEMPLATES)
    add("--workers", type=int, default=os.cpu_count(), help="processes")
    add("--offline", action="store_true", help=common.OFFLINE)
    args = parser.parse_args(argv)
    for flag in ("num_patches", "image_size", "max_length"):
        if getattr(args, flag) < 1:
            parser.error(f"--{flag} must be at least 1")
    if args.offline:
        common.go_offline()
    print("checking", *args.check, flush=True)
    import torch
    from tqdm import tqdm
    from support.settings import parse_value

    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    # The size does not change which pictures are refused, so a small one is used for speed.
    tiles = parse_value(args.tiles)
    image = {"size": args.image_size if tiles else 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    dataset = Conversations(args.check, args.images, tokenizer, args.num_patches, image,
                            args.template, args.max_length, tiles=tiles)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=args.workers)
    shown, problems = tokenizer is None, {}
    for sample in tqdm(loader, unit=" records", disable=None):     # None: only on a terminal
        if isinstance(sample, BadSample):
            problems.setdefault(sample.kind, []).append(str(sample))
        elif not shown:
            print(show_sample(sample["input_ids"], sample["labels"], tokenizer))
            shown = True
    for kind, sentences in problems.items():
        more = ["..."] if len(sentences) > 20 else []
        print(f"\n{kind}: {len(sentences)}", *sentences[:20], *more, sep="\n  ")
    count = sum(map(len, problems.values()))
    print(f"\n{len(dataset):,} records, {count:,} cannot be used")
    return 1 if problems else 0


if __name__ == "__main__":
    common.run_script(main)
