"""tools/get_data.sh against a server on 127.0.0.1 that is slow, cuts, refuses, lies and sends other things than pictures."""
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from conftest import ROOT
from tools import get_data

HUB = "huggingface.co/datasets"
GQA = "downloads.cs.stanford.edu/nlp/data/gqa/images.zip"
COCO = "images.cocodataset.org/zips/train2017.zip"
PICTURES = "ecx.images-amazon.com/images/I"


def picture(kind="JPEG", mode="RGB", size=(8, 6)):
    data = io.BytesIO()
    Image.new(mode, size, 3 if mode in "LP" else (200, 30, 30, 0)[:len(mode)]).save(data, kind)
    return data.getvalue()


def archive(files, link=None):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as z:
        for name, body in files.items():
            z.writestr(name, body)
        if link:
            info = zipfile.ZipInfo(link)
            info.external_attr = 0o120777 << 16
            z.writestr(info, "/etc/passwd")
    return data.getvalue()


def record(i, image):
    turns = [{"from": "human", "value": ("<image>\n" if image else "") + "what?"}, {"from": "gpt", "value": "this"}]
    return {"id": str(i), **({"image": image} if image else {}), "conversations": turns}


BOOKS = {"good": "jpg", "gif": "gif", "cmyk": "jpg", "grey": "jpg", "png": "jpg", "gone": "jpg", "forbidden": "jpg", "page": "jpg",
         "pixel": "gif", "text": "jpg", "busy": "jpg", "down": "jpg", "cut": "jpg", "unknown": "jpg"}
NEVER = {"gone": "answers 404", "forbidden": "answers 403", "page": "sends a web page", "pixel": "one pixel", "text": "cannot be read",
         "unknown": "does not hold it"}
MIX = [record(0, "coco/train2017/1.jpg"), record(1, "gqa/images/1.jpg"), record(2, "textvqa/train_images/1.jpg"),
       record(3, "vg/VG_100K/1.jpg"), record(4, "vg/VG_100K_2/2.jpg"), record(5, "coco/train2017/lost.jpg"), record(6, None),
       *(record(10 + i, f"ocr_vqa/images/{name}.jpg") for i, name in enumerate(BOOKS))]


class Server(ThreadingHTTPServer):
    """files: {path: bytes}. behaviour: {path: name of what it does at first}. seen: every (path, Range)."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.behaviour, self.seen, self.sums = {}, {}, [], {}
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, *_):                         # a client that goes away is no news
        pass


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        path, server = self.path.lstrip("/"), self.server
        before = sum(seen[0] == path for seen in server.seen)
        server.seen.append((path, self.headers.get("Range")))
        how = server.behaviour.get(path, "")
        if how.startswith("always ") or how.startswith("first ") and before < 1 or how.startswith("twice ") and before < 2:
            code = int(how.split()[1])
            self.send_response(code)
            if code == 302:
                self.send_header("Location", f"/cdn/{path}")
                self.send_header("X-Linked-Etag", f'"{server.sums.get(path, "")}"')
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if how == "slow" and before < 1:
            threading.Event().wait(3)                   # not time.sleep, which the tests replace
        body = server.files.get(path.removeprefix("cdn/"))
        if body is None:
            return self.send_error(404)
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if "no ranges" not in how else 0
        if start >= len(body) > 0:
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", "text/html; charset=utf-8" if how == "page" else "application/octet-stream")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        cuts = how == "cuts" and before < get_data.TRIES + 2 or how == "no ranges" and before < 2
        end = start + max(1, len(body) // 10) if cuts else len(body)
        self.wfile.write(body[start:end])
        self.close_connection = True


@pytest.fixture
def server():
    server = Server()
    books = {name: f"{PICTURES}/{name}.{end}" for name, end in BOOKS.items() if name != "unknown"}
    server.books = json.dumps({name: {"imageURL": f"http://{path}"} for name, path in books.items()})
    kinds = {"gif": picture("GIF", "P"), "cmyk": picture("JPEG", "CMYK"), "grey": picture("JPEG", "L"), "png": picture("PNG", "RGBA"),
             "pixel": picture("GIF", "P", (1, 1)), "text": b"not a picture at all", "page": b"<html>robot?</html>"}
    server.files = {path: kinds.get(name, picture()) for name, path in books.items()}
    server.behaviour = {books["gone"]: "always 404", books["forbidden"]: "always 403", books["page"]: "page",
                        books["busy"]: "twice 429", books["down"]: "first 503", books["cut"]: "cuts"}
    jpeg = picture()
    server.files |= {
        f"{HUB}/liuhaotian/LLaVA-Instruct-150K/resolve/main/llava_v1_5_mix665k.json": json.dumps(MIX).encode(),
        f"{HUB}/liuhaotian/LLaVA-Pretrain/resolve/main/blip_laion_cc_sbu_558k.json": json.dumps([record(0, "00000/1.jpg")]).encode(),
        f"{HUB}/liuhaotian/LLaVA-Pretrain/resolve/main/images.zip": archive({"00000/1.jpg": jpeg}),
        f"{HUB}/Lin-Chen/ShareGPT4V/resolve/main/share-captioner_coco_lcs_sam_1246k_1107.json": b"[]",
        f"{HUB}/weizhiwang/llava_v15_instruction_images/resolve/main/ocr_vqa_images_llava_v15.zip": archive(
            {"images/good.jpg": jpeg, "images/gif.jpg": picture("GIF", "P"), "images/png.gif": picture("PNG", "RGBA"),
             "images/cut.jpg": jpeg[:-40]}),
        "images.cocodataset.org/zips/train2017.zip": archive({"train2017/": b"", "train2017/1.jpg": jpeg}),
        "downloads.cs.stanford.edu/nlp/data/gqa/images.zip": archive({"images/1.jpg": jpeg}),
        "dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip": archive({"train_images/1.jpg": jpeg}),
        "cs.stanford.edu/people/rak248/VG_100K_2/images.zip": archive({"VG_100K/1.jpg": jpeg}),
        "cs.stanford.edu/people/rak248/VG_100K_2/images2.zip": archive({"VG_100K_2/2.jpg": jpeg})}
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def get(server, tmp_path, monkeypatch, capsys):
    """get(*flags) -> (exit status, what it prints), in this process and without waiting."""
    monkeypatch.setattr(get_data.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(get_data, "TIMEOUT", 2)
    monkeypatch.setitem(get_data.MD5, "train2017.zip", hashlib.md5(server.files[COCO]).hexdigest())
    small = [(*file[:3], 1e-3) for file in get_data.FILES]
    monkeypatch.setattr(get_data, "FILES", small)       # the disk of this machine may have no 100 GB free

    def call(*flags):
        status = get_data.main(["--root", str(tmp_path / "data"), "--mirror", server.address, *flags])
        return status, capsys.readouterr().out
    return call


def tree(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def test_everything_arrives_and_a_second_run_does_nothing(server, get, tmp_path):
    """With the addresses of dataset.json. Hosts cut, are busy and redirect; what cannot be had is listed and left out."""
    root = tmp_path / "data"
    (root / "ocr_vqa").mkdir(parents=True)
    (root / "ocr_vqa" / "dataset.json").write_text(server.books)
    server.behaviour |= {COCO: "cuts", GQA: "no ranges",
                         "dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip": "slow"}
    hub = f"{HUB}/liuhaotian/LLaVA-Instruct-150K/resolve/main/llava_v1_5_mix665k.json"
    server.behaviour[hub], server.sums[hub] = "always 302", hashlib.sha256(server.files[hub]).hexdigest()
    status, text = get()
    assert status == 0, text
    for name in ("LLaVA-Pretrain/blip_laion_cc_sbu_558k.json", "LLaVA-Pretrain/images/00000/1.jpg",
                 "coco/train2017/1.jpg", "gqa/images/1.jpg", "textvqa/train_images/1.jpg", "vg/VG_100K/1.jpg",
                 "vg/VG_100K_2/2.jpg", "share-captioner_coco_lcs_sam_1246k_1107.json"):
        assert (root / name).is_file(), name
    images = {p.name for p in (root / "ocr_vqa" / "images").iterdir()}
    assert images == {f"{name}.jpg" for name in BOOKS if name not in NEVER}
    for name in images:
        with Image.open(root / "ocr_vqa" / "images" / name) as image:
            assert image.format == "JPEG" and image.mode in ("RGB", "L") and image.size == (8, 6)
    assert (root / "ocr_vqa" / "images" / "good.jpg").read_bytes() == picture()             # as sent, not compressed again
    assert not list(root.rglob("*.zip")) + list(root.rglob("*.part")) + list(root.rglob("*.raw")) + list(root.rglob("*.tmp"))
    assert [r for p, r in server.seen if p == COCO and r]                                   # the rest of it was asked for
    assert sum(p.endswith("train_val_images.zip") for p, _ in server.seen) > 1              # the slow one, again

    left_out = {r["image"]: r["reason"] for r in json.loads((root / "llava_v1_5_mix665k_missing.json").read_text())}
    assert left_out.keys() == {"coco/train2017/lost.jpg"} | {f"ocr_vqa/images/{name}.jpg" for name in NEVER}
    for name, reason in NEVER.items():
        assert reason in left_out[f"ocr_vqa/images/{name}.jpg"]
    kept = json.loads((root / "llava_v1_5_mix665k_filtered.json").read_text())
    assert kept == [r for r in MIX if r.get("image") not in left_out] and f"{len(kept)} of {len(MIX)} records" in text

    before, server.seen = tree(root), []
    status, text = get()
    assert status == 0 and tree(root) == before and server.seen == [] and "finished" in text


def test_without_the_list_the_archive_is_taken_and_mended(server, get, tmp_path):
    status, text = get("--only", "ocr_vqa")
    images = tmp_path / "data" / "ocr_vqa" / "images"
    assert status == 0 and {p.name for p in images.iterdir()} == {"good.jpg", "gif.jpg", "png.jpg"}
    assert {Image.open(p).format for p in images.iterdir()} == {"JPEG"}
    assert "filtered.json is not written yet: coco, gqa, textvqa, vg not finished" in text
    assert not (tmp_path / "data" / "llava_v1_5_mix665k_filtered.json").exists()
    state = json.loads((tmp_path / "data" / "get_data.json").read_text())
    assert "cannot be read" in state["missing"]["ocr_vqa/images/cut.jpg"] and "archive" in state["missing"]["ocr_vqa/images/busy.jpg"]


def test_a_host_that_is_down_for_a_while_is_asked_again_by_the_next_run(server, get, tmp_path):
    (tmp_path / "data" / "ocr_vqa").mkdir(parents=True)
    (tmp_path / "data" / "ocr_vqa" / "dataset.json").write_text(server.books)
    down = f"{PICTURES}/down.jpg"
    server.behaviour[down] = "always 503"
    status, text = get("--only", "ocr_vqa")
    assert status == 1 and "1 pictures are still to be had" in text and "answers 503" in text
    assert sum(path == down for path, _ in server.seen) == get_data.TRIES
    server.behaviour.pop(down)
    server.seen = []
    status, text = get("--only", "ocr_vqa")
    assert status == 0 and {path for path, _ in server.seen} == {down}                      # and nothing else
    assert (tmp_path / "data" / "ocr_vqa" / "images" / "down.jpg").is_file()


def test_a_dead_host_is_not_asked_for_all_pictures(server, get, tmp_path, monkeypatch):
    (tmp_path / "data" / "ocr_vqa").mkdir(parents=True)
    (tmp_path / "data" / "ocr_vqa" / "dataset.json").write_text(server.books)
    server.behaviour = dict.fromkeys((path for path in server.files if path.startswith(PICTURES)), "always 503")
    monkeypatch.setattr(get_data, "GIVE_UP", 2)
    status, text = get("--only", "ocr_vqa", "--workers", "1")
    asked = {path for path, _ in server.seen if path.startswith(PICTURES)}
    assert status == 1 and f"{len(BOOKS)} pictures are still to be had" in text and len(asked) == 2


def test_without_the_mix_no_picture_is_asked_for_and_the_others_go_on(server, get, tmp_path):
    (tmp_path / "data" / "ocr_vqa").mkdir(parents=True)
    (tmp_path / "data" / "ocr_vqa" / "dataset.json").write_text(server.books)
    server.behaviour[f"{HUB}/liuhaotian/LLaVA-Instruct-150K/resolve/main/llava_v1_5_mix665k.json"] = "always 404"
    status, text = get("--only", "ocr_vqa,gqa")
    assert status == 1 and "ocr_vqa: llava_v1_5_mix665k.json, which names the pictures, is not there" in text
    assert not any("ocr_vqa" in path or PICTURES in path for path, _ in server.seen) and any(path == GQA for path, _ in server.seen)


FAILS = {"404": (GQA, "always 404", None, "answers 404"), "403": (GQA, "always 403", None, "answers 403"),
         "a page": (GQA, "page", None, "sends a web page"), "no zip": (GQA, "", b"error: quota", "is no whole zip archive"),
         "out of the root": (GQA, "", archive({"images/1.jpg": picture(), "../../evil.jpg": b"x"}), "leads out of"),
         "an absolute name": (GQA, "", archive({"images/1.jpg": picture(), "/tmp/evil.jpg": b"x"}), "leads out of"),
         "other bytes": (COCO, "", archive({"train2017/9.jpg": b"x"}), "published is")}


@pytest.mark.parametrize("case", FAILS)
def test_one_bad_host_is_named_and_the_others_go_on(case, server, get, tmp_path):
    path, behaviour, body, sentence = FAILS[case]
    server.behaviour[path] = behaviour
    if body:
        server.files[path] = body
    status, text = get("--only", "coco,gqa,textvqa")
    failed = "gqa" if path == GQA else "coco"
    root = tmp_path / "data"
    line, = [line for line in text.splitlines() if line.startswith(f"{failed} ") and "failed" in line]
    assert status == 1 and sentence in line and (root / "textvqa" / "train_images" / "1.jpg").is_file()
    assert {p.name for p in tmp_path.iterdir()} == {"data"} and not os.path.exists("/tmp/evil.jpg")
    assert not [p for p in (root / failed).rglob("*") if p.suffix == ".jpg"]


@pytest.mark.parametrize("name, content, sentence", [
    ("get_data.json", "[]", "get_data.json was not written by this script"),
    ("get_data.json", '{"done": []}', "get_data.json was not written by this script"),
    ("ocr_vqa/dataset.json", "[]", "dataset.json is not that of OCR-VQA"),
    ("ocr_vqa/dataset.json", "<html>", "is not a whole JSON file")])
def test_files_of_another_form(name, content, sentence, get, tmp_path):
    (tmp_path / "data/ocr_vqa").mkdir(parents=True)
    (tmp_path / "data" / name).write_text(content)
    if name == "get_data.json":                             # nothing can be done without it
        with pytest.raises(ValueError, match=sentence):
            get("--only", "mix665k")
    else:                                                   # the other sources go on
        status, text = get("--only", "ocr_vqa,gqa")
        assert status == 1 and sentence in text and "gqa          finished" in text


def test_entries_without_an_address_are_missing_pictures(get, tmp_path):
    (tmp_path / "data/ocr_vqa").mkdir(parents=True)
    (tmp_path / "data/ocr_vqa/dataset.json").write_text(json.dumps({"good": {"imageURL": 3}, "gif": 7, "png": {}}))
    status, _ = get("--only", "ocr_vqa")
    missing = json.loads((tmp_path / "data/get_data.json").read_text())["missing"]
    assert status == 0 and missing["ocr_vqa/images/good.jpg"] == "the list does not hold it"


def test_pictures_are_not_called_missing_before_their_archive_is_there(server, get, tmp_path):
    server.behaviour[f"{HUB}/weizhiwang/llava_v15_instruction_images/resolve/main/ocr_vqa_images_llava_v15.zip"] = "always 404"
    status, text = get("--only", "ocr_vqa")
    assert status == 1 and "answers 404" in text
    assert json.loads((tmp_path / "data" / "get_data.json").read_text())["missing"] == {}


def test_a_link_in_an_archive_is_unpacked_as_a_file(server, get, tmp_path):
    server.files[GQA] = archive({"images/1.jpg": picture()}, link="images/out")
    assert get("--only", "gqa")[0] == 0
    assert not [path for path in tmp_path.rglob("*") if path.is_symlink()]


def test_other_bytes_than_the_hub_told_are_refused(server, get, tmp_path):
    hub = f"{HUB}/liuhaotian/LLaVA-Instruct-150K/resolve/main/llava_v1_5_mix665k.json"
    server.behaviour[hub], server.sums[hub] = "always 302", "0" * 64
    status, text = get("--only", "mix665k")
    assert status == 1 and f"the sha256 is {hashlib.sha256(server.files[hub]).hexdigest()}" in text
    assert not list((tmp_path / "data").rglob("*mix665k*"))


def test_a_kill_in_the_middle_is_gone_on_from(server, get, tmp_path):
    """What the part file holds is not asked for again; a part that is longer than the file is thrown away."""
    whole = server.files[GQA]
    (tmp_path / "data" / "gqa").mkdir(parents=True)
    part = tmp_path / "data" / "gqa" / "images.zip.part"
    part.write_bytes(whole[:40])
    assert get("--only", "gqa")[0] == 0
    assert {r for _, r in server.seen} == {"bytes=40-"}
    assert (tmp_path / "data" / "gqa" / "images" / "1.jpg").read_bytes() == picture()
    part = tmp_path / "data" / "vg" / "images.zip.part"
    part.parent.mkdir()
    part.write_bytes(whole * 9)
    assert get("--only", "vg")[0] == 0 and (tmp_path / "data" / "vg" / "VG_100K" / "1.jpg").is_file()


def test_too_small_a_disk_is_found_before(server, get, monkeypatch):
    monkeypatch.setattr(get_data, "FILES", [("gqa", "https://x/images.zip", "gqa", 1e7)])
    with pytest.raises(ValueError, match=r"needs 20,000,000\.0 GB and its disk has"):
        get("--only", "gqa")
    assert server.seen == []


def test_the_command(server, tmp_path):
    """--dry-run asks no host; a wrong name is one sentence; then the real thing."""
    def bash(*flags):
        env = {**os.environ, "PYTHON": sys.executable}
        return subprocess.run(["bash", "tools/get_data.sh", "--root", str(tmp_path / "d"), "--mirror", server.address, *flags],
                              cwd=ROOT, capture_output=True, text=True, env=env)
    dry = bash("--dry-run")
    assert dry.returncode == 0 and "GB" in dry.stdout and not (tmp_path / "d").exists(), dry.stderr
    assert server.seen == []
    wrong = bash("--only", "imagenet")
    assert wrong.returncode == 1 and "there is no source 'imagenet'" in wrong.stderr and "Traceback" not in wrong.stderr
    done = bash("--only", "sharegpt4v")
    assert done.returncode == 0 and (tmp_path / "d" / "share-captioner_coco_lcs_sam_1246k_1107.json").is_file(), done.stderr
