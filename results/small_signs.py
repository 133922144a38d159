"""
Signs that are too small for one square picture, with and without tiles (LLaVA-NeXT's "anyres").

    python results/small_signs.py draw WORLD OUT    # a pocket world with signs of half the size
    python results/small_signs.py table             # out/pocket/seed*/small-signs-*
                                                    # -> results/pocket/small-signs.json

The vision tower sees a picture of 192 pixels at 96 pixels, and a small sign's letters are 4 pixels
high there. With a grid of 2 x 2 tiles it sees each quarter at 96 pixels, and the letters are 9
pixels high, as those of the usual signs are without tiles. results/small_signs.sh trains and asks.
"""
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import read_json, run_script, write_json
from support.pocket_world import draw_scene, sign_of

TASKS = ("textvqa", "gqa", "pope")


def with_small_sign(scene):
    """Return the scene with a sign of half the width and height, around the same middle."""
    objects = []
    for thing in scene["objects"]:
        x0, y0, x1, y1 = thing["box"]
        if "word" in thing:
            x0, x1 = (3 * x0 + x1) // 4, (x0 + 3 * x1) // 4
            y0, y1 = (3 * y0 + y1) // 4, (y0 + 3 * y1) // 4
        objects.append({**thing, "box": [x0, y0, x1, y1]})
    return {**scene, "objects": objects}


def draw(world, out):
    """Copy a world's pictures and benchmarks to the folder `out`, with small signs everywhere."""
    for folder in ("images", "eval"):
        shutil.copytree(world / folder, out / folder, dirs_exist_ok=True)
    for name, scene in read_json(world / "truth.json").items():
        if sign_of(scene) is None:
            continue
        picture = draw_scene(with_small_sign(scene))
        picture.save(out / "images" / name)
        # The names that pocket.py gives the test pictures in GQA, TextVQA and POPE.
        for path in (f"gqa/images/n{name[-10:-4]}.jpg", f"textvqa/train_images/{name[:-4]}.jpg",
                     f"pope/val2014/pocket_{name[:-4]}.jpg"):
            if name.startswith("test") and (out / "eval" / path).exists():
                picture.save(out / "eval" / path, quality=95)


def table():
    """Collect the results of all seeds, print means, and write them to a JSON file."""
    rows = []
    for run in sorted(Path("out/pocket").glob("seed*/small-signs-*")):
        tasks = read_json(run / "eval/results.json")["tasks"]
        rows.append({"seed": int(run.parent.name.removeprefix("seed")),
                     "git_commit": read_json(run / "config.json")["git_commit"],
                     "pictures": run.name.removeprefix("small-signs-"),
                     "textvqa": tasks["textvqa"]["accuracy"], "gqa": tasks["gqa"]["accuracy"],
                     "pope": 100 * tasks["pope"]["mean_f1"]})
    write_json(rows, "results/pocket/small-signs.json")
    for pictures in sorted({row["pictures"] for row in rows}):
        own = [row for row in rows if row["pictures"] == pictures]
        means = [f"{task} {sum(row[task] for row in own) / len(own):.1f}" for task in TASKS]
        print(f"{pictures}, {len(own)} seeds: " + ", ".join(means))


def main():
    match sys.argv[1:]:
        case ["draw", world, out]:
            draw(Path(world), Path(out))
        case ["table"]:
            table()
        case _:
            raise ValueError("call it with: draw WORLD OUT, or with: table")


if __name__ == "__main__":
    run_script(main)
