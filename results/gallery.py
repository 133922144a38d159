"""
Write a gallery: photographs with the strongest word of each patch, and captions by each checkpoint.

    python results/gallery.py NAME=CHECKPOINT [...] --photos DIR [--out docs/gallery] [--number 12]

DIR/photos.json is a list of {"image", "licence", "flickr_url"}. The rule of choice: the first
photographs of the list that are under CC BY ("Attribution License"), whatever they show. The words
are those of the first checkpoint, and all checkpoints should share its connector.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from matplotlib.figure import Figure

import common
import conversation
import words
from results.photos import ASKED, PROMPT, load_named, write_captions
from support import pictures

SIDE = 512                      # pixels of a picture in the gallery


def draw(vlm, pixels, picture):
    """Return a Figure: the photograph beside itself with the strongest word of each patch."""
    side = int(vlm.num_patches ** 0.5)
    state = {"modes": words.read(vlm, pixels), "side": side}
    figure = Figure((2 * SIDE / words.DPI, SIDE / words.DPI), dpi=words.DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(picture)
    left.set_axis_off()
    words.draw_state(right, state, picture, SIDE // side)
    return figure


def main():
    parser = common.argument_parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="NAME=CHECKPOINT")
    add("--photos", required=True, metavar="DIR")
    add("--out", default="docs/gallery")
    add("--number", type=int, default=12)
    args = parser.parse_args()
    photos = [photo for photo in common.read_json(f"{args.photos}/photos.json")
              if photo["licence"] == "Attribution License"][:args.number]
    images = [pictures.open_image(f"{args.photos}/{photo['image']}") for photo in photos]
    os.makedirs(args.out, exist_ok=True)
    captions = {}
    for name, vlm, metadata in load_named(args.checkpoints):
        mode = metadata["image_mode"]                                   # of the training
        pixels = torch.stack([pictures.transform(image, **vlm.image_settings, mode=mode)
                              for image in images])
        if not captions:                                                # the first checkpoint
            for photo, image, x in zip(photos, images, pixels):
                shown = words.square(image, mode, vlm.image_settings["mean"], SIDE)
                path = f"{args.out}/{os.path.basename(photo['image'])}"
                draw(vlm, x, shown).savefig(path, dpi=words.DPI, pil_kwargs={"quality": 80})
        captions[name] = write_captions(vlm, [ASKED] * len(pixels), "chat", pixels)
    lines = ["# Gallery", "", "Made by `python results/gallery.py`. The photographs are the first "
             f"{len(photos)} of a list of COCO photographs under CC BY 2.0, whatever they show. "
             "The model has seen none of them. It sees the square in the middle. On each patch "
             "stands the word of most weight. Each LLM was asked by the same sentence "
             f"(\"{PROMPT.replace(conversation.IMAGE, '(image)').replace(chr(10), ' ')}\"), and "
             "its answer is greedy.", ""]
    for i, photo in enumerate(photos):
        file = os.path.basename(photo["image"])
        lines += [f"![{file}](gallery/{file})", ""]
        lines += [f"- {name}: {texts[i] or '(nothing)'}" for name, texts in captions.items()]
        lines += [f"- photograph: [Flickr]({photo['flickr_url']}), CC BY 2.0, COCO {file}", ""]
    common.write_text("\n".join(lines), f"{args.out}.md")
    print(f"wrote {args.out}.md")


if __name__ == "__main__":
    common.run_script(main)
