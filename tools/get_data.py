"""Download the paper's data into the layout of docs/paper.md. Start it again to go on.

    bash tools/get_data.sh [--only ocr_vqa,coco] [--root DIR] [--dry-run]

Archives are unpacked and removed. At the end ROOT has llava_v1_5_mix665k_filtered.json, the records
whose picture is there, and llava_v1_5_mix665k_missing.json, the others with the reason. What is
finished stands in ROOT/get_data.json, and a second run leaves it alone. Remove its line there to
get a file again.

OCR-VQA: if ROOT/ocr_vqa/dataset.json is there, the pictures come from the addresses in it. That
file lies in the Google Drive folder that https://ocr-vqa.github.io names, and a script cannot get
it from there. Without it, an archive that another user made of the same pictures is taken.
"""
import hashlib
import http.client
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common
from common import BadSample
from support.pictures import inside, open_image

HUB = "https://huggingface.co/datasets"
VG = "https://cs.stanford.edu/people/rak248/VG_100K_2"
MIX = "llava_v1_5_mix665k"
ADDRESSES = "ocr_vqa/dataset.json"
OCR_VQA = f"{HUB}/weizhiwang/llava_v15_instruction_images/resolve/main/ocr_vqa_images_llava_v15.zip"
OCR_VQA_JPEGS = "pictures of OCR-VQA"                   # a step of its own, see get_pictures
FILES = [       # (source, address, folder under ROOT, GB)
    ("pretrain", f"{HUB}/liuhaotian/LLaVA-Pretrain/resolve/main/blip_laion_cc_sbu_558k.json",
     "LLaVA-Pretrain", 0.2),
    ("pretrain", f"{HUB}/liuhaotian/LLaVA-Pretrain/resolve/main/images.zip",
     "LLaVA-Pretrain/images", 27),
    ("mix665k", f"{HUB}/liuhaotian/LLaVA-Instruct-150K/resolve/main/{MIX}.json", "", 1.1),
    ("coco", "http://images.cocodataset.org/zips/train2017.zip", "coco", 19.4),
    ("gqa", "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip", "gqa", 20.3),
    ("textvqa", "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip", "textvqa", 7),
    ("vg", f"{VG}/images.zip", "vg", 9.8),
    ("vg", f"{VG}/images2.zip", "vg", 5.5),
    ("ocr_vqa", OCR_VQA, "ocr_vqa", 8.5),
    ("ocr_vqa", OCR_VQA_JPEGS, "ocr_vqa", 0),
    ("sharegpt4v", f"{HUB}/Lin-Chen/ShareGPT4V/resolve/main/"   # texts, for the counts of words
     "share-captioner_coco_lcs_sam_1246k_1107.json", "", 1.5)]
SOURCES = list(dict.fromkeys(source for source, *_ in FILES))
MD5 = {"train2017.zip": "cced6f7f71b7629ddf16f17bbcfab6b2"}         # published by COCO
FOR_MIX = ("mix665k", "coco", "gqa", "textvqa", "vg", "ocr_vqa")    # MIX and its pictures
TRIES = 6                                               # in a row without a new byte
TIMEOUT = 60                                            # seconds without a byte
GIVE_UP = 100                                           # after so many failed pictures, stop
LATER = {408, 425, 429, 500, 502, 503, 504}             # a host that answers so may answer later


class NotThere(ValueError):
    """A file that trying again will not bring."""


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects and keeps the SHA-256 that the Hugging Face hub sends with one."""
    sha256 = None

    def redirect_request(self, request, file, code, message, headers, address):
        etag = headers.get("X-Linked-Etag", "").strip('"')
        if len(etag) == 64:                             # a small file has a hash of git instead
            self.sha256 = etag
        return super().redirect_request(request, file, code, message, headers, address)


def download(address, path, mirror=None):
    """Download a file to `path`; path.part keeps what came until then, also for the next run.

    mirror: an address that is asked for HOST/PATH in place of http://HOST/PATH.
    NotThere for an answer that will stay the same: 404, 403, a web page. ValueError after TRIES
    tries in which no byte came, or if the bytes are not those of the checksum.
    """
    part = f"{path}.part"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    asked = f"{mirror}/{address.split('//')[1]}" if mirror else address
    tries, most = 0, 0
    while tries < TRIES:
        tries += 1
        start = os.path.getsize(part) if os.path.exists(part) else 0
        request = urllib.request.Request(asked, headers={"User-Agent": "Mozilla/5.0 (langbridge)"})
        if start:
            request.add_header("Range", f"bytes={start}-")
        redirects = Redirects()
        opener = urllib.request.build_opener(redirects)
        try:
            with opener.open(request, timeout=TIMEOUT) as response:
                if response.headers.get_content_type() == "text/html":
                    raise NotThere(f"{address} sends a web page")
                start = start if response.status == 206 else 0      # 200: from the beginning
                length = response.headers.get("Content-Length")
                with open(part, "r+b" if start else "wb") as file:
                    file.seek(start)
                    shutil.copyfileobj(response, file, 1 << 20)
                    size = file.tell()
            if size > most:                             # a host without ranges begins again
                tries, most = 0, size
            if length is None or size == start + int(length):
                check_sum(part, address, redirects.sha256)
                os.replace(part, path)
                return
            reason = "the connection was cut"
        except urllib.error.HTTPError as error:
            reason = f"the host answers {error.code}"
            if error.code == 416:                       # more bytes than the file has: start anew
                os.remove(part)
            elif error.code not in LATER:
                raise NotThere(f"{address}: {reason}") from None
        # Not every OSError: a full disk is one, too.
        except (urllib.error.URLError, TimeoutError, ConnectionError,
                http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        time.sleep(2 ** tries)
    raise ValueError(f"{address}: {reason}, {TRIES} times; start again to go on")


def check_sum(part, address, sha256):
    """Raise ValueError, and remove the file, if it does not have the published checksum."""
    md5 = MD5.get(os.path.basename(address))
    kind, published = ("sha256", sha256) if sha256 else ("md5", md5)
    if published:
        with open(part, "rb") as file:
            found = hashlib.file_digest(file, kind).hexdigest()
        if found != published:
            os.remove(part)
            raise ValueError(f"{address}: the {kind} is {found}, published is {published}")


def unpack(path, folder):
    """Unpack a zip archive and remove it. ValueError if a name in it leads out of the folder."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                inside(folder, name)
            archive.extractall(folder)                  # writes files only, and no links
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        os.remove(path)
        raise ValueError(f"{path} is no whole zip archive ({error}); start again") from None
    os.remove(path)


def get_pictures(args, missing):
    """Make a JPEG of each OCR-VQA picture that the mix names, downloaded if need be.

    missing: {name: reason} of the pictures that cannot be had, which grows here. ValueError if
    there are pictures that a next run may get.
    """
    if not os.path.isfile(f"{args.root}/{MIX}.json"):
        raise ValueError(f"{MIX}.json, which names the pictures, is not there")
    has_list = os.path.isfile(f"{args.root}/{ADDRESSES}")
    entries = common.read_json(f"{args.root}/{ADDRESSES}") if has_list else {}
    if not isinstance(entries, dict):
        raise ValueError(f"{ADDRESSES} is not that of OCR-VQA: an object with an entry for each "
                         "picture")
    names = {record.get("image", "") for record in common.read_json(f"{args.root}/{MIX}.json")}
    names = sorted(name for name in names - missing.keys() if name.startswith("ocr_vqa/"))
    absent = f"the {'list' if has_list else 'archive'} does not hold it"
    failures = []                                       # the next run tries these again

    def is_settled(name):
        """Make a JPEG of one picture. Return whether no later run need try it again."""
        if len(failures) >= GIVE_UP:
            return False
        stem = os.path.splitext(f"{args.root}/{name}")[0]
        entry = entries.get(os.path.basename(stem))
        address = entry.get("imageURL") if isinstance(entry, dict) else None
        unpacked = [stem + end for end in (".jpg", ".gif", ".png", ".jpeg")]
        path = next(filter(os.path.isfile, unpacked), f"{stem}.raw")
        try:
            if path.endswith(".raw"):
                if not address or not isinstance(address, str):
                    raise NotThere(absent)
                download(address, path, args.mirror)
            to_jpeg(path, f"{stem}.jpg")
        except (NotThere, BadSample) as error:
            missing[name] = str(error)
        except ValueError as error:
            failures.append(error)
            return False
        return True

    with ThreadPoolExecutor(args.workers) as pool:
        left = len(names) - sum(tqdm(pool.map(is_settled, names), total=len(names)))
    if left:
        raise ValueError(f"{left} pictures are still to be had; start again ({failures[0]})")


def to_jpeg(path, jpeg):
    """Turn the picture at `path` into `jpeg`, a JPEG in RGB or grey. BadSample if it is none."""
    try:
        image = open_image(path)
        if max(image.size) == 1:            # the shop sends one pixel for a picture it has not
            raise BadSample("broken image", "the host sends a picture of one pixel")
    except BadSample:
        os.remove(path)
        raise
    with Image.open(path) as original:
        is_jpeg = original.format == "JPEG" and original.mode in ("RGB", "L")
    if is_jpeg:                                 # it is not compressed once more
        os.replace(path, jpeg)
        return
    with common.replacing(jpeg) as temporary:
        image.save(temporary, "JPEG", quality=95)
    if path != jpeg:
        os.remove(path)


def unfinished(sources, root, done):
    """Return [(source, address, path to download it to, GB)] of the FILES that are not done."""
    # With a list of addresses the pictures of OCR-VQA come one by one.
    skipped = OCR_VQA if os.path.isfile(f"{root}/{ADDRESSES}") else None
    return [(source, address, os.path.join(root, folder, os.path.basename(address)), gb)
            for source, address, folder, gb in FILES
            if source in sources and address not in done and address != skipped]


def write_filtered(root, missing):
    """Write the records of the mix whose picture is there, and the others with the reason."""
    records = common.read_json(f"{root}/{MIX}.json")
    kept, left_out = [], []
    for record in records:
        image = record.get("image")
        if not image or os.path.isfile(f"{root}/{image}"):
            kept.append(record)
        else:
            reason = missing.get(image, "the archive does not hold it")
            left_out.append({"id": record.get("id"), "image": image, "reason": reason})
    common.write_json(left_out, f"{root}/{MIX}_missing.json")
    common.write_json(kept, f"{root}/{MIX}_filtered.json", None)
    print(f"{MIX}_filtered.json: {len(kept):,} of {len(records):,} records; "
          f"{MIX}_missing.json lists the other {len(left_out):,}")


def read_arguments(argv):
    parser = common.argument_parser(__doc__)
    add = parser.add_argument
    add("--only", metavar="NAMES", help=f"with commas between; default all: {','.join(SOURCES)}")
    add("--root", default="data", help="folder to fill (default: data)")
    add("--dry-run", action="store_true", help="say what there is to do; download nothing")
    add("--mirror", metavar="ADDRESS", help="ask ADDRESS/HOST/PATH in place of http://HOST/PATH")
    add("--workers", type=int, default=16, help="pictures of OCR-VQA at a time")
    args = parser.parse_args(argv)
    chosen = set(args.only.split(",") if args.only else SOURCES)
    for name in chosen.difference(SOURCES):
        raise ValueError(f"there is no source {name!r}; there are {', '.join(SOURCES)}")
    if "ocr_vqa" in chosen:
        chosen.add("mix665k")                           # it names the pictures
    args.only = [name for name in SOURCES if name in chosen]
    args.root = os.path.abspath(args.root)
    return args


def main(argv=None):
    args = read_arguments(argv)
    state_file = f"{args.root}/get_data.json"
    state = {"done": {}, "missing": {}}                 # {address: True}, {picture: reason}
    if os.path.isfile(state_file):
        state = common.read_json(state_file)
    try:
        done, missing = dict(state["done"]), dict(state["missing"])
    except (TypeError, LookupError, ValueError):
        raise ValueError(f"{state_file} was not written by this script: move it away") from None
    todo = unfinished(args.only, args.root, done)

    need = largest = 0                                  # GB
    for source, address, path, gb in todo:
        there = [p for p in (path, f"{path}.part") if os.path.isfile(p)]
        need += gb - sum(map(os.path.getsize, there)) / 1e9
        largest = max(largest, gb)
        print(f"{source:12} {gb:6.1f} GB  {address}")
    disk = need + largest                               # an archive lies beside its files once
    print(f"{need:.1f} GB to download, {disk:.1f} GB of disk to unpack it")
    if args.dry_run:
        return 0
    os.makedirs(args.root, exist_ok=True)
    free = shutil.disk_usage(args.root).free / 1e9
    if disk > free:
        raise ValueError(f"{args.root} needs {disk:,.1f} GB and its disk has {free:,.1f} GB free")

    failed = {}                                         # source: sentence
    for source, address, path, _ in todo:
        if source in failed:                            # without an archive no picture is in it
            continue
        print(f"{source}: {address}", flush=True)
        try:
            if address == OCR_VQA_JPEGS:
                get_pictures(args, missing)
            elif not os.path.isfile(path):
                download(address, path, args.mirror)
            if path.endswith(".zip"):
                unpack(path, os.path.dirname(path))
            done[address] = True
        except ValueError as error:
            failed[source] = str(error)
            print(f"{source}: {error}", flush=True)
        common.write_json({"done": done, "missing": missing}, state_file)
    lacking = {source for source, *_ in unfinished(FOR_MIX, args.root, done)}
    if lacking:
        print(f"{MIX}_filtered.json is not written yet: {', '.join(sorted(lacking))} not finished")
    elif todo or not os.path.isfile(f"{args.root}/{MIX}_filtered.json"):
        write_filtered(args.root, missing)
    for source in args.only:
        print(f"{source:12} {'failed: ' + failed[source] if source in failed else 'finished'}")
    return 1 if failed else 0


if __name__ == "__main__":
    common.run_script(main)
