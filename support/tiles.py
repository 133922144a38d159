"""
Tiles: a large picture is cut into squares, and the LLM sees all of them (LLaVA-NeXT's "anyres").

S is the side of a tile in pixels, P the patches of a tile. You can skip this file without tiles.
"""
import math

from PIL import Image


def tile_layout(picture_size, tiles, size, side):
    """Return (columns, rows, top, left): how a picture is cut, and which patches the LLM sees.

    The tiles after the first one form a grid of `columns` x `rows`. The picture does not fill it.
    Of the grid's patches `top` rows at the top and as many at the bottom show only the border and
    are left out, or `left` columns on the left and on the right.
    picture_size: (width, height) in pixels. tiles: the sizes of grids to choose from, in pixels.
    size: S of a tile. side: patches along a side of a tile.
    Source: LLaVA-NeXT, select_best_resolution and unpad_image.
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
    # The division rounds down as LLaVA-NeXT's does, so one row of the border may stay.
    if width * H > W * height:                                          # borders above and below
        return columns, rows, (H - height * W // width) // 2, 0
    return columns, rows, 0, (W - width * H // height) // 2


def num_tokens(picture_size, num_patches, tiles, size):
    """Return how many image embeds an image has, as VLM.arrange_images makes them.

    picture_size: (width, height) in pixels. Without it, and without tiles, it is one square.
    """
    if not (tiles and picture_size):
        return num_patches
    side = math.isqrt(num_patches)
    columns, rows, top, left = tile_layout(picture_size, tiles, size, side)
    # One newline ends each row of the grid.
    return num_patches + (rows * side - 2 * top) * (columns * side - 2 * left + 1)


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
    columns, rows, _, _ = tile_layout(image.size, tiles, size, side=1)
    W, H = columns * size, rows * size
    scale = min(W / image.width, H / image.height)
    w, h = min(math.ceil(image.width * scale), W), min(math.ceil(image.height * scale), H)
    canvas = Image.new("RGB", (W, H))                                   # black
    canvas.paste(image.resize((w, h), Image.Resampling.BICUBIC), ((W - w) // 2, (H - h) // 2))
    corners = [(x, y) for y in range(0, H, size) for x in range(0, W, size)]
    grid = [canvas.crop((x, y, x + size, y + size)) for x, y in corners]
    return [image.resize((size, size), Image.Resampling.BICUBIC), *grid]


def join_tiles(image_embeds, picture_sizes, tiles, size, newline):
    """Return what the LLM sees of each image: float[squares, P, D] -> list of float[P_i, D].

    picture_sizes: the (width, height) of each image in pixels. newline: float[D].
    The LLM sees the first square, the whole picture, and then the patches of the grid of tiles row
    by row, without those that show only border. Each row ends with `newline`.
    Source: LLaVA-NeXT, "spatial_unpad".
    """
    import torch
    side = math.isqrt(image_embeds.shape[1])
    images, start = [], 0
    for picture_size in picture_sizes:
        columns, rows, top, left = tile_layout(picture_size, tiles, size, side)
        end = start + 1 + rows * columns
        square, grid = image_embeds[start], image_embeds[start + 1:end]
        grid = grid.unflatten(1, (side, side)).unflatten(0, (rows, columns))
        grid = grid.transpose(1, 2).flatten(2, 3).flatten(0, 1)         # (H, W, D)
        grid = grid[top:rows * side - top, left:columns * side - left]
        grid = torch.cat([grid, newline.expand(len(grid), 1, -1)], dim=1)
        images.append(torch.cat([square, grid.flatten(0, 1)]))          # (P_i, D)
        start = end
    return images
