"""Download the paper's data into the layout of docs/paper.md. Start it again to go on.

    bash tools/get_data.sh [--only ocr_vqa,coco] [--root DIR] [--dry-run]

Archives are unpacked and removed. At the end ROOT has llava_v1_5_mix665k_filtered.json, the records
whose picture is there, and llava_v1_5_mix665k_missing.json, the others with the reason. What is
finished stands in ROOT/get_data.json, and a second run leaves it alone.

OCR-VQA: if ROOT/ocr_vqa/dataset.json is there, the pictures come from the addresses in it. That
file lies in the Google Drive folder that https://ocr-vqa.github.io names, and a script cannot get
it from there. Without it, an archive that another user made of the same pictures is taken.
"""
import argparse
import hashlib
import http.client
import io
import os
import shutil
import stat
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import common

HUB = "https://huggingface.co/datasets"
VG = "https://cs.stanford.edu/people/rak248/VG_100K_2"
# name: (address, folder under ROOT, GB, MD5 where published). The GB serve where a host does not
# tell the size. The hub tells each file's SHA-256.
SOURCES = {
    "pretrain": [
        (f"{HUB}/liuhaotian/LLaVA-Pretrain/resolve/main/blip_laion_cc_sbu_558k.json",
         "LLaVA-Pretrain", 0.2, None),
        (f"{HUB}/liuhaotian/LLaVA-Pretrain/resolve/main/images.zip",
         "LLaVA-Pretrain/images", 27, None)],
    "mix665k": [
        (f"{HUB}/liuhaotian/LLaVA-Instruct-150K/resolve/main/llava_v1_5_mix665k.json",
         "", 1.1, None)],
    "coco": [
        ("http://images.cocodataset.org/zips/train2017.zip", "coco", 19.4,
         "cced6f7f71b7629ddf16f17bbcfab6b2")],
    "gqa": [("https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip", "gqa", 20.3, None)],
    "textvqa": [
        ("https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip", "textvqa", 7, None)],
    "vg": [(f"{VG}/images.zip", "vg", 9.8, None), (f"{VG}/images2.zip", "vg", 5.5, None)],
    "ocr_vqa": [
        (f"{HUB}/weizhiwang/llava_v15_instruction_images/resolve/main/"
         "ocr_vqa_images_llava_v15.zip", "ocr_vqa", 8.5, None)],
    "sharegpt4v": [                                     # texts for the counts of words only
        (f"{HUB}/Lin-Chen/ShareGPT4V/resolve/main/"
         "share-captioner_coco_lcs_sam_1246k_1107.json", "", 1.5, None),
        (f"{HUB}/Lin-Chen/ShareGPT4V/resolve/main/"
         "sharegpt4v_instruct_gpt4-vision_cap100k.json", "", 0.2, None)],
    "cc3m": [(f"{HUB}/liuhaotian/LLaVA-CC3M-Pretrain-595K/resolve/main/chat.json",
              "LLaVA-CC3M-Pretrain-595K", 0.3, None)],
}
MIX = "llava_v1_5_mix665k"
PICTURE_SOURCES = ("coco", "gqa", "textvqa", "vg", "ocr_vqa")       # the folders of its pictures
TRIES = 6                                               # in a row without a new byte
TIMEOUT = 60                                            # seconds without a byte
GIVE_UP = 100                                           # pictures that failed so: no more now
LATER = {408, 425, 429, 500, 502, 503, 504}             # a host that answers so may answer later


class NotThere(ValueError):
    """A file that trying again will not bring."""


# --------------------------------------------------------------------------------------------------
# one file

class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects and keeps the SHA-256 that the Hugging Face hub tells with one."""
    sha256 = None

    def redirect_request(self, request, file, code, message, headers, address):
        self.sha256 = (headers.get("X-Linked-Etag") or "").strip('"') or self.sha256
        return super().redirect_request(request, file, code, message, headers, address)


def open_address(address, start=0, method="GET"):
    """Return (response, SHA-256 or None) of an address, from byte `start` on if the host can."""
    headers = {"User-Agent": "Mozilla/5.0 (langbridge get_data)"}
    if start:
        headers["Range"] = f"bytes={start}-"
    redirects = Redirects()
    request = urllib.request.Request(address, headers=headers, method=method)
    response = urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT)
    return response, redirects.sha256 if len(redirects.sha256 or "") == 64 else None


def size_of(address, default):
    """Return the bytes of a file by its host's word, `default` if the host does not answer."""
    try:
        with open_address(address, method="HEAD")[0] as response:
            return int(response.headers.get("Content-Length") or default)
    except (OSError, ValueError, http.client.HTTPException):
        return int(default)


def download(address, path, md5=None):
    """Download a file to `path`; path.part keeps what came until then, also for the next run.

    NotThere for an answer that will stay the same: 404, 403, a web page. ValueError after TRIES
    tries in which no byte came, or if the bytes are not those of the checksum.
    """
    part = f"{path}.part"
    os.makedirs(os.path.dirname(path), exist_ok=True)
    tries, reason, most = 0, "", 0
    while tries < TRIES:
        start = os.path.getsize(part) if os.path.exists(part) else 0
        wait = min(60, 2 ** tries)
        tries += 1
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
                check_sum(part, address, md5, sha256)
                os.replace(part, path)
                return
            reason = "the connection was cut"
        except urllib.error.HTTPError as error:
            reason = f"the host answers {error.code}"
            if error.code == 416:                       # more bytes than the file has: start anew
                os.remove(part)
            elif error.code not in LATER:
                raise NotThere(f"{address}: {reason}") from None
            after = error.headers.get("Retry-After") or ""
            wait = min(60, int(after)) if after.isdigit() else wait
        # Not every OSError: a full disk is one, too.
        except (urllib.error.URLError, TimeoutError, ConnectionError,
                http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        time.sleep(wait)
    raise ValueError(f"{address}: {reason}, {TRIES} times; start again to go on")


def check_sum(part, address, md5, sha256):
    """Raise ValueError, and remove the file, if it has not the published checksum."""
    for name, want in (("md5", md5), ("sha256", sha256)):
        if want:
            with open(part, "rb") as file:
                found = hashlib.file_digest(file, name).hexdigest()
            if found != want:
                os.remove(part)
                raise ValueError(f"{address}: the {name} is {found}, published is {want}")


def unpack(path, folder):
    """Unpack a zip archive. Files that are there with the right size stay.

    ValueError before anything is written if a name leads out of the folder, if it is a link, or if
    the disk is too small.
    """
    from support.pictures import inside
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if not m.is_dir()]
            for member in members:
                inside(folder, member.filename)
                if stat.S_ISLNK(member.external_attr >> 16):
                    raise ValueError(f"{path} holds the link {member.filename!r}")
            todo = [m for m in members if not has_size(f"{folder}/{m.filename}", m.file_size)]
            check_space(folder, sum(m.file_size for m in todo))
            for member in todo:
                target = inside(folder, member.filename)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                with common.replacing(target) as name, open(name, "wb") as file:
                    with archive.open(member) as source:
                        shutil.copyfileobj(source, file, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        os.remove(path)
        raise ValueError(f"{path} is no whole zip archive ({error}); start again") from None


def has_size(path, size):
    """Return whether a file is there and has so many bytes."""
    return os.path.isfile(path) and os.path.getsize(path) == size


def check_space(folder, need):
    """Raise ValueError if the disk of a folder has less than `need` bytes free."""
    os.makedirs(folder, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise ValueError(f"{folder} needs {need / 1e9:,.1f} GB and its disk has {free / 1e9:,.1f} "
                         "GB free")


def to_jpeg(body):
    """Return the bytes of a picture as those of a JPEG in RGB or grey. BadSample if it is none."""
    from PIL import Image
    from common import BadSample
    from support.pictures import open_image
    image = open_image(body)
    if max(image.size) == 1:                    # the shop sends one pixel for a picture it has not
        raise BadSample("broken image", "the host sends a picture of one pixel")
    with Image.open(io.BytesIO(body)) as original:
        if original.format == "JPEG" and original.mode in ("RGB", "L"):
            return body
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=95)
    return jpeg.getvalue()


# --------------------------------------------------------------------------------------------------
# all of them

class Data:
    """The data under a root: what is finished, what failed, and which pictures cannot be had."""

    def __init__(self, args):
        self.root, self.mirror, self.workers = os.path.abspath(args.root), args.mirror, args.workers
        self.state_file = f"{self.root}/get_data.json"
        state = common.read_json(self.state_file) if os.path.isfile(self.state_file) else {}
        parts = [state.get(key, {}) if isinstance(state, dict) else None
                 for key in ("done", "missing")]
        if not all(isinstance(part, dict) for part in parts):
            raise ValueError(f"{self.state_file} was not written by this script: move it away")
        self.done, self.missing = parts
        self.failed = {}                                # name: sentence
        self.changed = False

    def save(self):
        self.changed = True
        common.write_json({"done": self.done, "missing": self.missing}, self.state_file)

    def address(self, address):
        """Return the address to ask: HOST/PATH of a mirror, if there is one."""
        return f"{self.mirror.rstrip('/')}/{address.split('//')[1]}" if self.mirror else address

    def has_list(self):
        """Return whether the addresses of the OCR-VQA pictures are there."""
        return os.path.isfile(f"{self.root}/ocr_vqa/dataset.json")

    def todo(self, name):
        """Return the files of a source that are still to be had."""
        if name == "ocr_vqa" and self.has_list():
            return []
        return [(address, os.path.join(self.root, folder), gb, md5)
                for address, folder, gb, md5 in SOURCES[name] if not self.is_there(address, folder)]

    def is_there(self, address, folder):
        path = os.path.join(self.root, folder)
        path = path if address.endswith(".zip") else f"{path}/{os.path.basename(address)}"
        return address in self.done and os.path.exists(path)

    def get(self, name):
        """Download and unpack the files of a source, and the pictures of OCR-VQA."""
        for address, folder, _, md5 in self.todo(name):
            print(f"{name}: {address}", flush=True)
            path = f"{folder}/{os.path.basename(address)}"
            if not os.path.isfile(path):
                download(self.address(address), path, md5)
            size = os.path.getsize(path)
            if path.endswith(".zip"):
                unpack(path, folder)
                os.remove(path)
            self.done[address] = size
            self.save()
        if name == "ocr_vqa":
            self.get_pictures()

    def get_pictures(self):
        """Make a JPEG of each OCR-VQA picture that the mix names, downloaded if need be."""
        from common import BadSample
        from tqdm import tqdm
        addresses = common.read_json(f"{self.root}/ocr_vqa/dataset.json") if self.has_list() else {}
        if not isinstance(addresses, dict):
            raise ValueError(f"{self.root}/ocr_vqa/dataset.json is not that of OCR-VQA: an object "
                             "with an entry for each picture")
        names = {record.get("image", "") for record in common.read_json(f"{self.root}/{MIX}.json")}
        names = sorted(name for name in names if name.startswith("ocr_vqa/"))
        checked = self.done.setdefault("ocr_vqa pictures", [])
        todo = sorted(set(names) - set(checked) - self.missing.keys())
        if not todo:
            return
        later = []

        def get_one(name):
            """Return (name, None) or (name, why it cannot be had); (None, None) if it may later."""
            if len(later) >= GIVE_UP:
                return None, None
            stem = f"{self.root}/{os.path.splitext(name)[0]}"
            raws = [stem + end for end in (".jpg", ".gif", ".png", ".jpeg")]
            raw = next(filter(os.path.isfile, raws), f"{stem}.raw")
            try:
                if raw.endswith(".raw"):
                    entry = addresses.get(os.path.basename(stem))
                    address = entry.get("imageURL") if isinstance(entry, dict) else None
                    if not address or not isinstance(address, str):
                        raise NotThere("dataset.json does not name it" if addresses else
                                       "the archive does not hold it")
                    download(self.address(address), raw)
                with open(raw, "rb") as file:
                    body = file.read()
                jpeg = to_jpeg(body)
                if jpeg is not body or raw != f"{stem}.jpg":
                    with common.replacing(f"{stem}.jpg") as temporary:
                        with open(temporary, "wb") as file:
                            file.write(jpeg)
            except (NotThere, BadSample) as error:
                if os.path.isfile(raw):
                    os.remove(raw)                      # broken
                return name, str(error)
            except ValueError as error:
                later.append(str(error))
                return None, None
            if raw != f"{stem}.jpg":
                os.remove(raw)
            return name, None

        with ThreadPoolExecutor(self.workers) as pool:
            for i, (name, reason) in enumerate(tqdm(pool.map(get_one, todo), total=len(todo))):
                if reason:
                    self.missing[name] = reason
                elif name:
                    checked.append(name)
                if i % 5000 == 0:
                    self.save()
        self.save()
        if later:
            left = len(set(todo) - set(checked) - self.missing.keys())
            raise ValueError(f"{left} pictures are still to be had; start again ({later[0]})")

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
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", metavar="NAMES", help=f"with commas between; default all: {','.join(SOURCES)}")
    add("--root", default="data", help="folder to fill (default: data)")
    add("--dry-run", action="store_true", help="say what there is to do; download nothing")
    add("--mirror", metavar="ADDRESS", help="ask ADDRESS/HOST/PATH in place of http://HOST/PATH")
    add("--workers", type=int, default=16, help="pictures of OCR-VQA at a time")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error("--workers must be at least 1")
    chosen = args.only.split(",") if args.only else list(SOURCES)
    for name in chosen:
        if name not in SOURCES:
            raise ValueError(f"there is no source {name!r}; there are {', '.join(SOURCES)}")
    if "ocr_vqa" in chosen and "mix665k" not in chosen:
        chosen.insert(0, "mix665k")                     # it names the pictures
    chosen.sort(key=list(SOURCES).index)
    here = Data(args)

    need = largest = 0
    for name in chosen:
        sizes, there = [], 0
        for address, folder, gb, _ in here.todo(name):
            path = f"{folder}/{os.path.basename(address)}"
            sizes.append(size_of(here.address(address), gb * 1e9))
            there += sum(os.path.getsize(p) for p in (path, f"{path}.part") if os.path.isfile(p))
        need += sum(sizes) - there
        largest = max([largest, *sizes])                # an archive lies beside its files once
        print(f"{name:12} " + (f"{(sum(sizes) - there) / 1e9:8.2f} GB" if sizes else "is there"))
    if here.has_list():
        print("ocr_vqa      pictures one by one, from the addresses in dataset.json")
    print(f"{need / 1e9:.1f} GB to download, {(need + largest) / 1e9:.1f} GB of disk to unpack it")
    if args.dry_run:
        return 0
    check_space(here.root, need + largest)
    for name in chosen:
        try:
            here.get(name)
        except ValueError as error:
            here.failed[name] = str(error)
            print(f"{name}: {error}", flush=True)

    lacking = [name for name in ("mix665k", *PICTURE_SOURCES)
               if name in here.failed or here.todo(name)]
    if lacking:
        print(f"{MIX}_filtered.json is not written yet: {', '.join(lacking)} not finished")
    elif here.changed or not os.path.isfile(f"{here.root}/{MIX}_filtered.json"):
        here.write_filtered()
    for name in chosen:
        print(f"{name:12} {'failed: ' + here.failed[name] if name in here.failed else 'finished'}")
    return 1 if here.failed else 0


if __name__ == "__main__":
    common.run_script(main)
