"""eval.py with a stub for the model: resume, ranks, prompts, data check, tables, and MM-Vet's judge on loopback."""

import base64
import io
import json
import os
import subprocess
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import eval as program  # noqa: E402
from benchmarks import mmvet, pope  # noqa: E402
from benchmarks.reading import LETTER, SHORT  # noqa: E402

CHATML = ("{% for m in messages %}"
          "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def byte_tokenizer():
    """Bytes as tokens and the control tokens of a real LLM"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>",
                                   chat_template=CHATML)


def fake_modules(stub):
    """What eval.py needs of checkpoint.py and generate.py"""
    return {"checkpoint": types.SimpleNamespace(load=lambda *a, **k: stub),
            "generate": types.SimpleNamespace(generate=lambda vlm, *a, **k: vlm.generate(*a, **k))}


class Stub:
    """Answers yes to a bright picture; a mean of the picture and a hash of the prompt tell whether each got its own."""
    def __init__(self, die_after=None):
        self.tokenizer = byte_tokenizer()
        self.fingerprint = {"vision_tower": {"weights": "1"}}
        self.config = types.SimpleNamespace(tiles=())
        self.image_settings = {"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
        self.calls, self.die_after = [], die_after

    def num_tokens(self, picture_size):
        return 4

    def generate(self, ids, pixel_values, max_new_tokens, image_index, picture_sizes=None):
        if self.die_after == len(self.calls):
            raise KeyboardInterrupt
        self.calls.append([len(row) for row in ids])
        assert len(set(image_index)) == (len(pixel_values) if pixel_values is not None else 0)  # no image comes twice
        means, answers = [pixel_values[image].mean().item() for image in image_index], []
        for row in ids:
            assert row.count(-200) in (0, 4)
            said = "Yes" if -200 not in row or means.pop(0) > 0 else "No"
            answers.append(self.tokenizer(f" {said}, {sum(row) % 97}é ", add_special_tokens=False).input_ids)
        assert not means
        return answers


def save(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines if isinstance(lines, str) else "".join(json.dumps(line) + "\n" for line in lines),
                    encoding="utf-8")


def picture(path, bright):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 8), (250, 250, 250) if bright else (5, 5, 5)).save(path)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Data of three tasks, a checkpoint folder, and run(...) -> the output folder"""
    data, checkpoint = tmp_path / "data", tmp_path / "ckpt"
    save(checkpoint / "config.json", "{}")
    for i in range(4):
        picture(data / f"pope/val2014/{i}.jpg", bright=i % 2)
    questions = []
    for offset, split in enumerate(pope.SPLITS):
        labels = [{"question_id": n, "image": f"{n % 4}.jpg",
                   "text": f"Is there a {'very ' * (n % 3)}{n} in the image?",
                   "label": "yes" if n % 2 else "no"} for n in range(1, 9)]
        save(data / f"pope/coco/coco_pope_{split}.json", labels)
        questions += [{**label, "question_id": label["question_id"] + 10_000_000 * offset, "category": split,
                       "text": f"{label['text']}\n{SHORT}"} for label in labels]
    save(data / "pope/llava_pope_test.jsonl", questions)
    science = [{"id": str(i), "conversations": [{"from": "human",
                                                 "value": "<image>\n" * (i % 2) + f"Which {i}?\nA. ice\nB. steam"},
                                                {"from": "gpt",
                                                 "value": "A"}]} | ({"image": f"{i}/image.png"} if i % 2 else {})
               for i in range(5)]
    save(data / "scienceqa/llava_test_CQM-A.json", json.dumps(science))
    save(data / "scienceqa/problems.json", json.dumps({str(i): {"choices": ["ice", "steam"],
                                                                "answer": 0} for i in range(5)}))
    save(data / "scienceqa/pid_splits.json", json.dumps({"test": [str(i) for i in range(5)]}))
    for i in (1, 3):
        picture(data / f"scienceqa/test/{i}/image.png", bright=True)
    jpeg = io.BytesIO()
    Image.new("L", (9, 5)).save(jpeg, "JPEG")  # not square, not RGB
    rows = [[1, "What?", "Look\\nhere", "cat", "dog", "A"], [1000001, "What?", "", "dog", "cat", "B"]]
    picture64 = base64.b64encode(jpeg.getvalue()).decode()
    save(data / "mmbench/mmbench_dev_20230712.tsv", "index\tquestion\thint\tA\tB\tC\tD\tanswer\timage\n" + "".join(
        "\t".join([*map(str, row[:5]), "", "", row[5], picture64]) + "\n" for row in rows))

    def run(*flags, stub=None, out="out", tasks="pope"):
        for name, module in fake_modules(stub or Stub()).items():
            monkeypatch.setitem(sys.modules, name, module)
        program.main([str(checkpoint), "--tasks", tasks, "--data", str(data), "--out", str(tmp_path / out), "--device",
                      "cpu", *flags])
        return tmp_path / out
    run.data, run.checkpoint = data, checkpoint
    return run


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_and_results(world, capsys):
    stub = Stub()
    out = world("--batch_size", "5", stub=stub, tasks="pope,scienceqa,mmbench")
    asked, answers = lines(world.data / "pope/llava_pope_test.jsonl"), lines(out / "pope.jsonl")
    assert [(a["question_id"], a["prompt"]) for a in answers] == [(q["question_id"], q["text"]) for q in asked]
    assert {*answers[0]} == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert answers[0]["model_id"] == "ckpt"
    for a, q in zip(answers, asked):  # each question saw its own picture, though batches are sorted by length
        assert a["text"].startswith("Yes" if q["image"] in ("1.jpg", "3.jpg") else "No") and a["text"].endswith("é")
    assert stub.calls[0] == sorted(stub.calls[0], reverse=True) and len(stub.calls[0]) == 5
    science = lines(out / "scienceqa.jsonl")
    assert science[1]["prompt"] == f"<image>\nWhich 1?\nA. ice\nB. steam\n{LETTER}"
    assert science[0]["prompt"] == f"Which 0?\nA. ice\nB. steam\n{LETTER}"
    bench = lines(out / "mmbench.jsonl")
    assert bench[0]["prompt"] == "Look\\nhere\nWhat?\nA. cat\nB. dog" and bench[1]["prompt"] == "What?\nA. dog\nB. cat"
    assert bench[0]["option_char"] == ["A", "B"] and bench[0]["options"] == ["cat", "dog"]
    results = json.loads((out / "results.json").read_text())
    assert results["tasks"]["pope"]["mean_accuracy"] == 1 and results["tasks"]["scienceqa"]["img_total"] == 2
    printed = capsys.readouterr().out
    assert "| MMBench | POPE | SciQA |" in printed and "yes_ratio" in printed
    assert not list(out.glob("*.rank*")) and not list(out.glob("*.tmp"))
    world(tasks="pope", stub=(again := Stub()))  # nothing left to answer, the other tasks stay in the results
    assert again.calls == [] and json.loads((out / "results.json").read_text()) == results


@pytest.mark.parametrize("size, batches", [(5, ["bacde", "fg"]), (2, ["ba", "c", "de", "fg"])])
def test_questions_of_an_image_are_one_batch(size, batches):
    questions = [{"question_id": name, "prompt": "", "image": image}
                 for name, image in zip("adbcfge", ("1", "2", "1", "1", None, None, "2"))]
    groups = program.group_by_image(questions)
    assert ["".join(q["question_id"] for q in group) for group in groups] == ["abc", "de", "fg"]
    lengths = {(name, ""): n for name, n in zip("abcdefg", [5, 9, 5, 7, 2, 6, 6])}
    found = list(program.make_batches(groups, lengths, size))
    assert ["".join(q["question_id"] for q in batch) for batch in found] == batches


@settings(max_examples=200, deadline=None, database=None)
@given(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), max_size=6), st.integers(1, 5))
def test_batches_have_all_questions_and_no_more_tokens_than_the_longest_ones(sizes, size):
    groups = [[{"question_id": f"{g}/{i}", "prompt": ""} for i in range(len(group))] for g, group in enumerate(sizes)]
    lengths = {(f"{g}/{i}", ""): n for g, group in enumerate(sizes) for i, n in enumerate(group)}
    found = [[lengths[program.question_key(q)] for q in batch] for batch in program.make_batches(groups, lengths, size)]
    assert sorted(sum(found, [])) == sorted(lengths.values())
    for batch in found:
        assert 0 < len(batch) * max(batch) <= size * max(lengths.values())
    if len(set(lengths.values())) == 1:                 # alike prompts: batches of `size`
        assert max(map(len, found)) <= size


def test_resume_after_a_kill(world):
    whole = (world(out="whole") / "pope.jsonl").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        world("--batch_size", "3", stub=Stub(die_after=3))
    piece = next(world.checkpoint.parent.glob("out/pope.rank0.jsonl"))
    assert len(lines(piece)) == 9
    piece.write_bytes(piece.read_bytes()[:-20])  # half a line, as a kill in the middle of a write leaves it
    stub = Stub()
    out = world("--batch_size", "4", stub=stub)
    assert sum(map(len, stub.calls)) == 24 - 8 and (out / "pope.jsonl").read_bytes() == whole
    (out / "pope.jsonl").write_bytes(whole[:len(whole) // 2])
    assert (world() / "pope.jsonl").read_bytes() == whole


def test_only_answers_of_the_same_checkpoint_and_settings_are_reused(world):
    world()
    for flags, change in ((["--dtype", "bfloat16"], None), ([], world.checkpoint / "words.json")):
        if change:
            change.write_text("[]")
        with pytest.raises(ValueError, match="--overwrite"):
            world(*flags, stub=(stub := Stub()))
        assert stub.calls == []
    world("--overwrite", stub=(stub := Stub()))
    assert sum(map(len, stub.calls)) == 24


def test_limit_is_labelled_partial_and_kept_apart(world, capsys):
    out = world("--limit", "5")
    assert "PARTIAL (first 5 of 24 questions, no benchmark score)" in capsys.readouterr().out.split("| ckpt |")[1]
    assert not (out / "results.json").exists() and len(lines(out / "pope.first5.jsonl")) == 5
    assert json.loads((out / "results.first5.json").read_text())["tasks"]["pope"]["partial"].startswith("first 5 of 24")
    world("--limit", "99")                                          # all of them
    assert "PARTIAL" not in capsys.readouterr().out


def test_data_check_comes_before_the_model(world, capsys):
    (world.data / "pope/val2014/2.jpg").unlink()
    (world.data / "pope/coco/coco_pope_random.json").unlink()
    with pytest.raises(ValueError, match="missing"):
        world(tasks="pope,gqa", stub="never loaded")
    said = capsys.readouterr().out
    for words in ("1 of 4 images, such as pope/val2014/2.jpg", "coco_pope_random.json", "AoiDragon/POPE",
                  "gqa/testdev_balanced_questions.json"):
        assert words in said


def test_labels_that_do_not_fit_stop_it_before_the_model(world):
    path = world.data / "pope/coco/coco_pope_random.json"
    path.write_text(path.read_text() + path.read_text().splitlines()[0].replace("1.jpg", "2.jpg"))
    with pytest.raises(ValueError, match="coco_pope_random.json"):
        world(stub="never loaded")


def test_two_ranks_write_what_one_writes(world):
    whole = (world(out="whole") / "pope.jsonl").read_bytes()
    runner = world.checkpoint.parent / "runner.py"
    runner.write_text(f"import sys, types\nsys.path[:0] = [{ROOT!r}, {os.path.dirname(os.path.abspath(__file__))!r}]\n"
                      "import test_eval\n"
                      "sys.modules.update(test_eval.fake_modules(test_eval.Stub()))\n"
                      "test_eval.program.main()\n")
    out = world.checkpoint.parent / "two"
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           str(runner),
                           str(world.checkpoint), "--tasks", "pope,scienceqa", "--data", str(world.data), "--out",
                           str(out),
                           "--device", "cpu", "--batch_size", "3"], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert (out / "pope.jsonl").read_bytes() == whole and not list(out.glob("*.rank*"))


def test_pictures_are_read_while_the_batch_before_is_answered(world, monkeypatch):
    """The model of the first batch waits until a picture of the second one is read, and of no later one."""
    from support import pictures
    read, second = [], threading.Event()
    open_image = pictures.open_image

    def and_record(image):
        read.append(image)
        if len(read) == 3:                              # a batch of 12 questions has two pictures
            second.set()
        return open_image(image)
    monkeypatch.setattr(pictures, "open_image", and_record)

    class Waiting(Stub):
        def generate(self, *args, **kwargs):
            if not self.calls:
                assert second.wait(20), "the next batch's pictures are not read ahead"
                time.sleep(0.2)
                assert len(read) <= 4, "more than one batch is read ahead"
            return super().generate(*args, **kwargs)
    out = world("--batch_size", "12", stub=Waiting())
    assert len(read) == 4 and len(set(read)) == 4
    assert [a["text"] for a in lines(out / "pope.jsonl")] == [a["text"] for a in lines(world(out="other") / "pope.jsonl")]


# ---- prompts

def test_prompt_of_the_llm_itself():
    vlm = Stub()
    ids = program.prompt_ids(vlm, {"text": "What?", "image": "x.png"})
    text = "".join("<image>" if i == -200 else vlm.tokenizer.decode([i]) for i in ids)
    assert text == "<|im_start|>user\n" + "<image>" * 4 + "\nWhat?<|im_end|>\n<|im_start|>assistant\n"


# ---- tables and comparisons

def test_table_and_compare(world, capsys):
    a, b = world(out="a"), world(out="b")
    items = json.loads((b / "pope.scores.json").read_text())
    (b / "pope.scores.json").write_text(json.dumps({k: int(i > 5) for i, k in enumerate(items)}))  # six wrong
    (a / "mmvet.scores.json").write_text(json.dumps({f"v{i}": 0.5 for i in range(30)}))
    (b / "mmvet.scores.json").write_text(json.dumps({f"v{i}": 0.6 for i in range(30)}))
    capsys.readouterr()
    program.main(["--compare", str(a), str(b)])
    said = capsys.readouterr().out
    assert "| POPE | 24 | 100.00 | 75.00 | -25.00 | 6 | 0 | 0.031 | McNemar, exact |" in said  # 2 / 2 ** 6
    assert "| MM-Vet | 30 | 50.00 | 60.00 | +10.00 |" in said
    program.main(["--table", str(a), str(b / "results.json")])
    assert capsys.readouterr().out.count("| ckpt |") == 2
    program.main(["--table", str(a), str(b / "results.json"), "--mean"])            # two seeds of one thing
    assert "| ckpt | 100.0 ± 0.0 |" in capsys.readouterr().out
    program.main(["--table", str(a), "--mean"])                                      # one seed has no deviation
    assert "| ckpt (one seed, ± standard error) | 100.0 ± 0.0 |" in capsys.readouterr().out
    (a / "pope.scores.json").write_text('{"1": 1}')
    with pytest.raises(ValueError, match="same questions"):
        program.main(["--compare", str(a), str(b)])


# ---- MM-Vet's judge

@pytest.fixture
def judge(tmp_path, monkeypatch):
    """judge(script) -> the path of the grade file; script(number of the request, body) -> content, or what to do"""
    monkeypatch.setattr(mmvet, "WAITS", (0,) * 5)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    save(tmp_path / "q.json", json.dumps({f"v1_{i}": {"question": f"Q{i}", "answer": "bread<AND>cakes",
                                                      "capability": ["rec"]}
                                          for i in range(2)}))
    save(tmp_path / "p.jsonl", [{"question_id": i, "prompt": f"Q{i}", "text": f"T{i}"} for i in range(2)])
    judge_runs = []

    def run(script, *flags):
        requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/chat/completions" and self.headers["Authorization"] == "Bearer sk-secret"
                requests.append(body)
                reply = script(len(requests), body)
                if isinstance(reply, int):
                    self.send_error(reply)
                    return
                if not isinstance(reply, bytes):
                    reply = json.dumps({"model": "m-1", "choices": [{"message": {"content": reply}}]}).encode()
                try:
                    self.send_response(200)
                    self.end_headers()
                    self.wfile.write(reply)
                except BrokenPipeError:  # too slow: nobody listens any more
                    pass

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
        try:
            program.main(["--score", "mmvet", "--questions", str(tmp_path / "q.json"), "--predictions",
                          str(tmp_path / "p.jsonl"),
                          "--judge", "m", *flags])
        finally:
            server.shutdown()
            server.server_close()
        judge_runs.append(requests)
        return requests
    run.grades = tmp_path / "p.mm-vet-grades.json"
    return run


def test_judge_answers_well(judge, capsys):
    requests = judge(lambda n, body: ["1.0", "0.5 because", "0", "0.2"][n - 1], "--runs", "2")
    result = json.loads(capsys.readouterr().out)
    assert result["totals"] == pytest.approx([75, 10]) and result["std"] == pytest.approx(32.5)
    assert requests[0]["messages"][0]["content"].endswith("\nQ0 | bread <AND> cakes | T0 | ")
    assert (requests[0]["temperature"], requests[0]["max_tokens"], requests[0]["model"]) == (0, 3, "m")
    grades = json.loads(judge.grades.read_text())
    assert grades["v1_0"]["score"] == [1, 0] and grades["v1_0"]["model"] == ["m-1", "m-1"]
    assert "secret" not in judge.grades.read_text()
    assert judge(lambda n, body: 500, "--runs", "2") == []  # all grades are there already


def test_judge_answers_wrongly(judge, capsys):
    replies = ["two", "1.5", "nan", "-1", "", "0.9", "maybe", "0.7"]  # the sixth is fetched and never read: grade 0
    requests = judge(lambda n, body: replies[n - 1])
    assert json.loads(capsys.readouterr().out)["total"] == pytest.approx(35)
    assert [r["temperature"] for r in requests] == [0, 0, 0.5, 1, 1.5, 2, 0, 0]
    asks = [r["messages"][0]["content"].endswith("\nPredict the correctness of the answer (digit): ") for r in requests]
    assert asks == [False] + [True] * 5 + [False, True]


def test_judge_recovers_from_trouble(judge, capsys):
    def script(n, body):
        time.sleep(2.5 if n == 1 else 0)
        return {2: 503, 3: b"<html>", 5: b'{"choices": []}'}.get(n, "1")
    assert len(judge(script, "--timeout", "1.5")) >= 6
    out, err = capsys.readouterr()
    assert json.loads(out)["total"] == 100 and "503" in err and "imeout" in err and "secret" not in err


def test_judge_gives_up_and_resumes(judge, capsys):
    with pytest.raises(ValueError) as stop:
        judge(lambda n, body: "1" if n == 1 else 429)
    assert "429" in str(stop.value) and "secret" not in str(stop.value) and capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="401"):
        judge(lambda n, body: 401)
    assert len(judge(lambda n, body: "0")) == 1  # the first grade was kept
    assert json.loads(capsys.readouterr().out)["total"] == 50


def test_judge_not_there_at_all(judge, monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionRefusedError
    monkeypatch.setattr(mmvet.urllib.request, "urlopen", refuse)
    with pytest.raises(ValueError, match="no reply"):
        judge(lambda n, body: "1")
