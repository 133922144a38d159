"""
A picture file becomes the pixels that a vision tower takes.

    file --open_image--> PIL image --tile_pixels--> float32[n, 3, S, S]

S is the side of a square in pixels. n is 1, or with tiles the number of squares, see tiles.py.
"""
import hashlib
import io
import os
import re
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common import BadSample
from support.tiles import cut_tiles
# torch is imported where it is used, so that --help does not wait for it.

# EPS is not among the formats, because Pillow would start Ghostscript to read it.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
# How other files begin that are found under the name of a picture.
OTHER_FILES = {"empty": rb"\Z", "AVIF": rb"....ftypavi", "HEIC": rb"....ftyp(hei|hev|mif|msf)",
               "a video": rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI", "SVG": rb"\s*(<\?xml.*?)?<svg",
               "JPEG XL": rb"\xff\x0a|\0{3}\x0cJXL", "JPEG 2000": rb"\xff\x4f|\0{3}\x0cjP",
               "PDF": rb"%PDF", "PostScript": rb"%!PS", "PSD": rb"8BPS", "ICO": rb"\0\0\x01\0",
               "a web page": rb"\s*<(!doctype|html)", "a Git LFS pointer": rb"version https://"}


def inside(folder, name):
    """Return the real path of a file name in the folder. Raises BadSample if it leads out of it."""
    root = os.path.realpath(folder)
    try:
        path = os.path.realpath(os.path.join(root, name))
    except ValueError as error:                             # a null byte
        raise BadSample("malformed", f"image {name[:200]!r} is not a file name: {error}") from None
    above = os.path.commonpath([path, root])
    if above != root:
        link = " through a link" if path != os.path.normpath(os.path.join(root, name)) else ""
        raise BadSample("malformed", f"image {name!r} leads{link} out of the image folder {folder} "
                                     f"to {path}: put the file itself into the image folder, or "
                                     f"take {above} as the image folder")
    return path


def image_path(folder, name):
    """Return the path of an image in the folder. Raises BadSample if there is no such file."""
    path = inside(folder, name)
    if not os.path.isfile(path):
        path = os.path.join(folder, name)[:200]
        raise BadSample("missing image", f"image {path!r} does not exist or is not a file")
    return path


def features_path(folder, path):
    """Return the file that holds the cached patches of the picture `path`."""
    digest = hashlib.sha256(os.path.realpath(path).encode()).hexdigest()
    return f"{folder}/{digest[:2]}/{digest}.safetensors"


def open_image(source):
    """Return a picture as a PIL image: RGB, upright by its EXIF, an animation's first frame.

    source: a path, or the bytes of a file. Transparency is dropped as in LLaVA, not blended.
    Raises BadSample if it is not a complete picture.
    """
    name = "" if isinstance(source, bytes) else f" {str(source)!r}"
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
        image = Image.open(io.BytesIO(without_png_metadata(content)), formats=FORMATS)
        image.load()
        rgb = to_rgb(image)
        try:
            orientation = image.getexif().get(0x0112)
        except Exception:                                   # damaged EXIF does not cost the picture
            orientation = None
        rgb.info = {}                                       # exif_transpose would rewrite the EXIF
        rgb.getexif()[0x0112] = orientation
        return ImageOps.exif_transpose(rgb)
    except UnidentifiedImageError:
        kinds = [kind for kind, start in OTHER_FILES.items()
                 if re.match(start, content, re.DOTALL | re.IGNORECASE)]
        reason = (f"it is {(kinds + ['damaged or of another format'])[0]}; the formats that are "
                  f"read are {', '.join(FORMATS)}")
    except Exception as error:                              # Pillow's readers raise nearly anything
        reason = error
    raise BadSample("broken image", f"image{name} cannot be read: {reason}")


def without_png_metadata(content):
    """Return a PNG file without the colour profile and comments. Pillow refuses damaged ones."""
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        return content
    kept, at = [content[:8]], 8
    while at < len(content):
        end = at + 12 + int.from_bytes(content[at:at + 4], "big")
        chunk = content[at:end]
        kind, is_whole = chunk[4:8], zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        if kind[:1].isupper() or kind in (b"tRNS", b"eXIf") and is_whole:
            kept.append(chunk)
        at = end
    return b"".join(kept)


def to_rgb(image):
    """Return a loaded PIL image as RGB. ValueError if it is not certain which value is white."""
    def is_uniform(image):
        return all(low == high for low, high in image.getextrema())

    if image.mode.startswith("I"):
        grey = np.asarray(image)
        is_deep = image.mode == "I" and image.format == "TIFF"      # more than 16 bits, or signed
        if is_deep or 0 < grey.max() < 4096 or getattr(image, "tag_v2", {}).get(262) == 0:
            raise ValueError(f"its grey values go from {grey.min()} to {grey.max()}, and it is not "
                             "certain which is white: save it with 8 bits")
        image = Image.fromarray((grey >> 8).astype(np.uint8))       # 16 bits
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, and it is not certain which is "
                         "white: save it with 8 bits")
    rgb = image.convert("RGB")
    if image.has_transparency_data and is_uniform(rgb) and not is_uniform(image.convert("RGBA")):
        raise ValueError("what it shows is in its transparency: save it on a background")
    return rgb


def transform(image, size, mean, std, mode="pad"):
    """Return a PIL RGB image as float32[3, S, S], S = size, as transformers' CLIPImageProcessor.

    mode: "crop" scales the short edge to S and cuts out the middle (LLaVA's stage 1); "pad" first
        centres the image on a square of the mean colour (LLaVA's stage 2 and evaluation);
        "squash" changes the aspect ratio.
    """
    short, long = sorted(image.size)
    # A picture of 200,000 x 1 pixels would take many GB on the way, so it is made smaller first.
    if mode == "crop" and long > 100 * short:
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    elif mode == "pad" and long > 13_000:
        image = image.reduce(long // 13_000 + 1)
    w, h = image.size
    if mode == "crop":
        scaled = int(size * max(w, h) / min(w, h))
        w, h = (size, scaled) if w <= h else (scaled, size)
        left, top = (w - size) // 2, (h - size) // 2
        image = image.resize((w, h), Image.Resampling.BICUBIC)
        image = image.crop((left, top, left + size, top + size))
    elif mode == "pad":
        side = max(w, h)
        canvas = Image.new("RGB", (side, side), tuple(int(m * 255) for m in mean))
        canvas.paste(image, ((side - w) // 2, (side - h) // 2))
        image = canvas
    return normalized(image.resize((size, size), Image.Resampling.BICUBIC), mean, std)


def normalized(image, mean, std):
    """Return a PIL RGB image of S x S pixels as float32[3, S, S]."""
    import torch
    x = np.asarray(image, dtype=np.float32) / 255                       # (S, S, 3)
    x = (x - np.float32(mean)) / np.float32(std)
    return torch.from_numpy(x.transpose(2, 0, 1).copy())                # (3, S, S)


def tile_pixels(image, size, mean, std, mode="pad", tiles=()):
    """Return what the vision tower sees of a PIL RGB image: float32[n, 3, S, S], n = 1 or tiles."""
    if not tiles:
        return transform(image, size, mean, std, mode)[None]            # (1, 3, S, S)
    import torch
    return torch.stack([normalized(tile, mean, std) for tile in cut_tiles(image, size, tiles)])
