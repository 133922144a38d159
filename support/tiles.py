"""
Tiles: a large picture is cut into squares, and the LLM sees all of them (LLaVA-NeXT's "anyres").

S is the side of a tile in pixels, P the patches of a tile. You can skip this file without tiles.
"""
import math
from typing import NamedTuple

from PIL import Image


class Layout(NamedTuple):
    """How a picture is cut into tiles, and which patches of them the LLM sees.

    The tiles after the first one form a grid. The picture does not fill this grid. Patches that
    show only the border are left out: as many rows at the top as at the bottom, or columns.
    """
    columns: int        # tiles beside each other
    rows: int           # tiles above each other
    top: int            # rows of patches that are left out at the top, and again at the bottom
    left: int           # columns of patches that are left out on the left, and on the right
    num_tokens: int     # of the first tile, of the grid, and one newline for each row of the grid


def tile_layout(picture_size, tiles, size, side):
    """Return the Layout of a picture: picture_size (width, height) in pixels.

    tiles: the sizes of grids to choose from, (width, height) in pixels. size: S of a tile. side:
    patches along a side of a tile. Source: LLaVA-NeXT, select_best_resolution and unpad_image.
    """
    width, height = picture_size

    def quality(tile):
        """Return the pixels that the picture keeps in this grid, then the pixels not wasted."""
        scale = min(tile[0] / width, tile[1] / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, used - tile[0] * tile[1]

    grid = max(tiles, key=quality)                                      # the first of equals
    columns, rows = grid[0] // size, grid[1] // size
    W, H = columns * side, rows * side                                  # patches of the grid
    top = left = 0
    # The division rounds down as LLaVA-NeXT's does, so one row of the border may stay.
    if width * H > W * height:                                          # borders above and below
        top = (H - height * W // width) // 2
    else:
        left = (W - width * H // height) // 2
    return Layout(columns, rows, top, left, side ** 2 + (H - 2 * top) * (W - 2 * left + 1))


def num_tokens(picture_size, num_patches, tiles, size):
    """Return how many image embeds an image has, as VLM.arrange_images makes them.

    picture_size: (width, height) in pixels. Without it, and without tiles, an image is one square
    of num_patches.
    """
    if not (tiles and picture_size):
        return num_patches
    return tile_layout(picture_size, tiles, size, math.isqrt(num_patches)).num_tokens


def check_tiles(tiles, size):
    """Raise a ValueError if `tiles` are not sizes of grids of squares of `size` pixels."""
    for tile in tiles if isinstance(tiles, tuple) else [tiles]:
        is_pair = type(tile) is tuple and [type(x) for x in tile] == [int, int]
        if not is_pair or min(tile) < size or any(x % size for x in tile):
            raise ValueError(f"tiles holds {tile!r}; a grid is (width, height) in pixels, in "
                             f"multiples of {size}, for example (({size}, {2 * size}),)")


def most_squares(tiles, size):
    """Return the largest number of squares of `size` pixels that a picture becomes."""
    return 1 + max((width * height // size ** 2 for width, height in tiles), default=0)


def cut_tiles(image, size, tiles):
    """Return the tiles of a PIL image, a list of PIL images of S x S pixels.

    The first tile is the whole picture, squashed. The others are the picture on a black grid, row
    by row. Source: LLaVA-NeXT, process_anyres_image.
    """
    layout = tile_layout(image.size, tiles, size, side=1)
    W, H = layout.columns * size, layout.rows * size
    w, h = image.size
    scale_w, scale_h = W / w, H / h
    if scale_w < scale_h:
        w, h = W, min(math.ceil(h * scale_w), H)
    else:
        w, h = min(math.ceil(w * scale_h), W), H
    canvas = Image.new("RGB", (W, H))                                   # black
    canvas.paste(image.resize((w, h), Image.Resampling.BICUBIC), ((W - w) // 2, (H - h) // 2))
    corners = [(x, y) for y in range(0, H, size) for x in range(0, W, size)]
    grid = [canvas.crop((x, y, x + size, y + size)) for x, y in corners]
    return [image.resize((size, size), Image.Resampling.BICUBIC), *grid]


def join_tiles(image_embeds, picture_sizes, tiles, size, newline):
    """Return what the LLM sees of each image: float[squares, P, D] -> list of float[P_i, D].

    picture_sizes: the (width, height) of each image in pixels. newline: float[D].
    Each image has one square for the whole picture, and then one for each of its tiles. The LLM
    sees the patches of the first square. After them it sees those of the tiles as one grid, row by
    row, without the patches that show only border. Each row of the grid ends with `newline`.
    Source: LLaVA-NeXT, "spatial_unpad".
    """
    import torch

    side = math.isqrt(image_embeds.shape[1])
    images, start = [], 0
    for picture_size in picture_sizes:
        layout = tile_layout(picture_size, tiles, size, side)
        end = start + 1 + layout.rows * layout.columns
        square, grid = image_embeds[start], image_embeds[start + 1:end]
        grid = grid.unflatten(1, (side, side)).unflatten(0, (layout.rows, layout.columns))
        grid = grid.transpose(1, 2).flatten(2, 3).flatten(0, 1)         # (rows, columns, D)
        rows, columns, _ = grid.shape
        grid = grid[layout.top:rows - layout.top, layout.left:columns - layout.left]
        grid = torch.cat([grid, newline.expand(len(grid), 1, -1)], dim=1)
        images.append(torch.cat([square, grid.flatten(0, 1)]))          # (P_i, D)
        start = end
    return images
