"""Download the paper's data into the layout of docs/paper.md. Start it again to go on.

    bash tools/get_data.sh [--only ocr_vqa,coco] [--root DIR] [--dry-run]

Archives are unpacked and removed. At the end ROOT has llava_v1_5_mix665k_filtered.json, the records
whose picture is there, and llava_v1_5_mix665k_missing.json, the others with the reason. What is
finished stands in ROOT/get_data.json, and a second run leaves it alone.

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


def hub(repository, file):
    """Return the address of a file in a dataset of the Hugging Face hub."""
    return f"https://huggingface.co/datasets/{repository}/resolve/main/{file}"


VG = "https://cs.stanford.edu/people/rak248/VG_100K_2"
MIX = "llava_v1_5_mix665k"
# name: [(address, folder under ROOT, GB)]
SOURCES = {
    "pretrain": [
        (hub("liuhaotian/LLaVA-Pretrain", "blip_laion_cc_sbu_558k.json"), "LLaVA-Pretrain", 0.2),
        (hub("liuhaotian/LLaVA-Pretrain", "images.zip"), "LLaVA-Pretrain/images", 27)],
    "mix665k": [(hub("liuhaotian/LLaVA-Instruct-150K", f"{MIX}.json"), "", 1.1)],
    "coco": [("http://images.cocodataset.org/zips/train2017.zip", "coco", 19.4)],
    "gqa": [("https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip", "gqa", 20.3)],
    "textvqa": [
        ("https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip", "textvqa", 7)],
    "vg": [(f"{VG}/images.zip", "vg", 9.8), (f"{VG}/images2.zip", "vg", 5.5)],
    "ocr_vqa": [(hub("weizhiwang/llava_v15_instruction_images", "ocr_vqa_images_llava_v15.zip"),
                 "ocr_vqa", 8.5)],
    "sharegpt4v": [                                     # texts, for the counts of words only
        (hub("Lin-Chen/ShareGPT4V", "share-captioner_coco_lcs_sam_1246k_1107.json"), "", 1.5),
        (hub("Lin-Chen/ShareGPT4V", "sharegpt4v_instruct_gpt4-vision_cap100k.json"), "", 0.2)],
    "cc3m": [(hub("liuhaotian/LLaVA-CC3M-Pretrain-595K", "chat.json"),
              "LLaVA-CC3M-Pretrain-595K", 0.3)],
}
MD5 = {"train2017.zip": "cced6f7f71b7629ddf16f17bbcfab6b2"}         # published by COCO
PICTURE_SOURCES = ("coco", "gqa", "textvqa", "vg", "ocr_vqa")       # the folders of MIX's pictures
TRIES = 6                                               # in a row without a new byte
TIMEOUT = 60                                            # seconds without a byte
GIVE_UP = 100                                           # after so many failed pictures, stop
LATER = {408, 425, 429, 500, 502, 503, 504}             # a host that answers so may answer later


class NotThere(ValueError):
    """A file that trying again will not bring."""


# --------------------------------------------------------------------------------------------------
# one file

class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects and keeps the SHA-256 that the Hugging Face hub sends with one."""
    sha256 = None

    def redirect_request(self, request, file, code, message, headers, address):
        etag = headers.get("X-Linked-Etag", "").strip('"')
        if len(etag) == 64:                             # a small file has a hash of git instead
            self.sha256 = etag
        return super().redirect_request(request, file, code, message, headers, address)


def open_address(address, start):
    """Return (response, SHA-256 or None) of an address, from byte `start` on if the host can."""
    headers = {"User-Agent": "Mozilla/5.0 (langbridge get_data)"}
    if start:
        headers["Range"] = f"bytes={start}-"
    redirects = Redirects()
    request = urllib.request.Request(address, headers=headers)
    response = urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT)
    return response, redirects.sha256


def download(address, path):
    """Download a file to `path`; path.part keeps what came until then, also for the next run.

    NotThere for an answer that will stay the same: 404, 403, a web page. ValueError after TRIES
    tries in which no byte came, or if the bytes are not those of the checksum.
    """
    part = f"{path}.part"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    tries, most = 0, 0
    while tries < TRIES:
        tries += 1
        start = os.path.getsize(part) if os.path.exists(part) else 0
        try:
            response, sha256 = open_address(address, start)
            with response:
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
                check_sum(part, address, sha256)
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
    for name, want in (("md5", MD5.get(os.path.basename(address))), ("sha256", sha256)):
        if want:
            digest = hashlib.new(name)
            with open(part, "rb") as file:
                for block in iter(lambda: file.read(1 << 20), b""):
                    digest.update(block)
            found = digest.hexdigest()
            if found != want:
                os.remove(part)
                raise ValueError(f"{address}: the {name} is {found}, published is {want}")


def unpack(path, folder):
    """Unpack a zip archive. ValueError before that if a name in it leads out of the folder."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                inside(folder, name)
            archive.extractall(folder)                  # writes files only, and no links
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        os.remove(path)
        raise ValueError(f"{path} is no whole zip archive ({error}); start again") from None


def to_jpeg(path, jpeg):
    """Turn the picture at `path` into `jpeg`, a JPEG in RGB or grey. BadSample if it is none."""
    image = open_image(path)
    if max(image.size) == 1:                    # the shop sends one pixel for a picture it has not
        raise BadSample("broken image", "the host sends a picture of one pixel")
    with Image.open(path) as original:
        is_jpeg = original.format == "JPEG" and original.mode in ("RGB", "L")
    if is_jpeg:                                 # it is not compressed once more
        os.replace(path, jpeg)
        return
    with common.replacing(jpeg) as temporary:
        image.save(temporary, "JPEG", quality=95)
    if path != jpeg:
        os.remove(path)


# --------------------------------------------------------------------------------------------------
# all of them

class Data:
    """The data under a root: what is finished, and which pictures cannot be had."""

    def __init__(self, args):
        self.root, self.mirror, self.workers = os.path.abspath(args.root), args.mirror, args.workers
        self.address_list = f"{self.root}/ocr_vqa/dataset.json"
        self.state_file = f"{self.root}/get_data.json"
        self.done, self.missing = {}, {}                # {address: True}, {picture: reason}
        self.changed = False
        if os.path.isfile(self.state_file):
            state = common.read_json(self.state_file)
            try:
                self.done, self.missing = dict(state["done"]), dict(state["missing"])
            except (TypeError, LookupError, ValueError):
                raise ValueError(f"{self.state_file} was not written by this script: "
                                 "move it away") from None

    def save(self):
        self.changed = True
        common.write_json({"done": self.done, "missing": self.missing}, self.state_file)

    def mirrored(self, address):
        """Return the address to ask: HOST/PATH of a mirror, if there is one."""
        return f"{self.mirror.rstrip('/')}/{address.split('//')[1]}" if self.mirror else address

    def todo(self, name):
        """Return [(address, path to download it to, GB)] of a source's files that are not there."""
        if name == "ocr_vqa" and os.path.isfile(self.address_list):
            return []
        todo = []
        for address, folder, gb in SOURCES[name]:
            path = os.path.join(self.root, folder, os.path.basename(address))
            result = os.path.dirname(path) if path.endswith(".zip") else path
            if address not in self.done or not os.path.exists(result):
                todo.append((address, path, gb))
        return todo

    def get(self, name):
        """Download and unpack the files of a source, and the pictures of OCR-VQA."""
        if name == "ocr_vqa" and not os.path.isfile(f"{self.root}/{MIX}.json"):
            raise ValueError(f"{MIX}.json, which names the pictures, is not there")
        for address, path, _ in self.todo(name):
            print(f"{name}: {address}", flush=True)
            if not os.path.isfile(path):
                download(self.mirrored(address), path)
            if path.endswith(".zip"):
                unpack(path, os.path.dirname(path))
                os.remove(path)
            self.done[address] = True
            self.save()
        if name == "ocr_vqa":
            self.get_pictures()

    def get_pictures(self):
        """Make a JPEG of each OCR-VQA picture that the mix names, downloaded if need be."""
        addresses = {}
        if os.path.isfile(self.address_list):
            addresses = common.read_json(self.address_list)
        if not isinstance(addresses, dict):
            raise ValueError(f"{self.address_list} is not that of OCR-VQA: an object with an entry "
                             "for each picture")
        names = {record.get("image", "") for record in common.read_json(f"{self.root}/{MIX}.json")}
        names = {name for name in names if name.startswith("ocr_vqa/")}
        checked = self.done.setdefault("ocr_vqa pictures", [])
        todo = sorted(names - set(checked) - self.missing.keys())
        failures = []                                   # the next run tries these again

        def problem_of(name):
            """Return None if a picture is a JPEG now, else the error."""
            if len(failures) >= GIVE_UP:
                return failures[0]
            try:
                self.get_picture(name, addresses)
            except ValueError as error:
                if not isinstance(error, (NotThere, BadSample)):
                    failures.append(error)
                return error

        left = 0
        with ThreadPoolExecutor(self.workers) as pool:
            results = zip(todo, pool.map(problem_of, todo))
            for i, (name, problem) in enumerate(tqdm(results, total=len(todo)), 1):
                if problem is None:
                    checked.append(name)
                elif problem in failures:
                    left += 1
                else:
                    self.missing[name] = str(problem)
                if i % 5000 == 0 or i == len(todo):
                    self.save()
        if left:
            raise ValueError(f"{left} pictures are still to be had; start again ({failures[0]})")

    def get_picture(self, name, addresses):
        """Make a JPEG of one picture. NotThere or BadSample, and no file, if it cannot be had."""
        stem = os.path.splitext(f"{self.root}/{name}")[0]
        unpacked = [stem + end for end in (".jpg", ".gif", ".png", ".jpeg")]
        path = next(filter(os.path.isfile, unpacked), None)
        if path is None:
            entry = addresses.get(os.path.basename(stem))
            address = entry.get("imageURL") if isinstance(entry, dict) else None
            if not address or not isinstance(address, str):
                raise NotThere("dataset.json does not name it" if addresses else
                               "the archive does not hold it")
            path = f"{stem}.raw"
            download(self.mirrored(address), path)
        try:
            to_jpeg(path, f"{stem}.jpg")
        except BadSample:
            os.remove(path)
            raise

    def write_filtered(self):
        """Write the records of the mix whose picture is there, and the others with the reason."""
        records = common.read_json(f"{self.root}/{MIX}.json")
        kept, left_out = [], []
        for record in records:
            image = record.get("image")
            if not image or os.path.isfile(f"{self.root}/{image}"):
                kept.append(record)
            else:
                reason = self.missing.get(image, "the archive does not hold it")
                left_out.append({"id": record.get("id"), "image": image, "reason": reason})
        common.write_json(left_out, f"{self.root}/{MIX}_missing.json")
        common.write_json(kept, f"{self.root}/{MIX}_filtered.json", None)
        print(f"{MIX}_filtered.json: {len(kept):,} of {len(records):,} records; "
              f"{MIX}_missing.json lists the other {len(left_out):,}")


def main(argv=None):
    parser = common.argument_parser(__doc__)
    add = parser.add_argument
    add("--only", metavar="NAMES", help=f"with commas between; default all: {','.join(SOURCES)}")
    add("--root", default="data", help="folder to fill (default: data)")
    add("--dry-run", action="store_true", help="say what there is to do; download nothing")
    add("--mirror", metavar="ADDRESS", help="ask ADDRESS/HOST/PATH in place of http://HOST/PATH")
    add("--workers", type=int, default=16, help="pictures of OCR-VQA at a time")
    args = parser.parse_args(argv)
    chosen = set(args.only.split(",")) if args.only else set(SOURCES)
    for name in chosen - SOURCES.keys():
        raise ValueError(f"there is no source {name!r}; there are {', '.join(SOURCES)}")
    if "ocr_vqa" in chosen:
        chosen.add("mix665k")                           # it names the pictures
    chosen = [name for name in SOURCES if name in chosen]
    data = Data(args)

    need = largest = 0                                  # GB
    for name in chosen:
        rest = 0
        for _, path, gb in data.todo(name):
            there = [p for p in (path, f"{path}.part") if os.path.isfile(p)]
            rest += gb - sum(map(os.path.getsize, there)) / 1e9
            largest = max(largest, gb)
        need += rest
        print(f"{name:12} {rest:8.2f} GB")
    if os.path.isfile(data.address_list):
        print("ocr_vqa      pictures one by one, from the addresses in dataset.json")
    disk = need + largest                               # an archive lies beside its files once
    print(f"{need:.1f} GB to download, {disk:.1f} GB of disk to unpack it")
    if args.dry_run:
        return 0
    os.makedirs(data.root, exist_ok=True)
    free = shutil.disk_usage(data.root).free / 1e9
    if disk > free:
        raise ValueError(f"{data.root} needs {disk:,.1f} GB and its disk has {free:,.1f} GB free")

    failed = {}                                         # name: sentence
    for name in chosen:
        try:
            data.get(name)
        except ValueError as error:
            failed[name] = str(error)
            print(f"{name}: {error}", flush=True)
    lacking = [name for name in ("mix665k", *PICTURE_SOURCES) if name in failed or data.todo(name)]
    if lacking:
        print(f"{MIX}_filtered.json is not written yet: {', '.join(lacking)} not finished")
    elif data.changed or not os.path.isfile(f"{data.root}/{MIX}_filtered.json"):
        data.write_filtered()
    for name in chosen:
        print(f"{name:12} {'failed: ' + failed[name] if name in failed else 'finished'}")
    return 1 if failed else 0


if __name__ == "__main__":
    common.run_script(main)
