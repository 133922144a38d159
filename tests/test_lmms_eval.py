"""tools/lmms_eval_model.py by its interface, with a stand-in for lmms-eval's base class, and by lmms-eval itself.

The latter needs LMMS_PYTHON=/path/to/python, a Python with lmms-eval and this project's requirements.
"""
import importlib.util
import json
import os
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

import checkpoint
import eval
import generate
import model
import vocab
from conftest import ROOT
from support import pictures


@pytest.fixture(scope="module")
def ours(tiny, world, tmp_path_factory):
    """A checkpoint with random weights."""
    torch.manual_seed(4)
    words = vocab.load_words(f"{world}/words.json")
    vlm = checkpoint.build(model.Config(tiny.clip, tiny.qwen, "langbridge", 24, len(words), "softmax"), words)
    with torch.no_grad():
        for p in vlm.connector.parameters():
            p.mul_(6)
    folder = str(tmp_path_factory.mktemp("lmms") / "ours")
    checkpoint.save(vlm, folder, "pretrain", ("connector",))
    return folder


@pytest.fixture(scope="module")
def adapter(ours):
    """The adapter's class, over the base class of lmms-eval or a stand-in with what it gives: task_dict and cache_hook."""
    if not importlib.util.find_spec("lmms_eval"):
        class lmms:
            def __init__(self):
                self.task_dict, self.cache_hook = {}, types.SimpleNamespace(add_partial=lambda *_: None)
        for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["lmms_eval.api.model"].lmms = lmms
    sys.path.insert(0, os.path.join(ROOT, "tools"))
    import lmms_eval_model
    return lmms_eval_model


QUESTIONS = ["what colour is it?", "is there a star in the image? yes or no", "what is this?", "and with no image?"]


def documents():
    sizes = [(24, 24), (60, 20), (20, 40)]
    with_image = [{"image": Image.new("RGB", size, colour), "question": question, "answer": answer} for size, colour, question, answer
                  in zip(sizes, ("red", "blue", "green"), QUESTIONS, ("red", "no", "a square"))]
    return [*with_image, {"image": None, "question": QUESTIONS[3], "answer": "yes"}]


def to_visual(doc):
    return [doc["image"]] if doc["image"] else []


def requests_for(lm, second):
    """lmms-eval's requests for all documents; second(document) is their second argument."""
    docs = documents()
    lm.task_dict = {"t": {"test": docs}}
    return [types.SimpleNamespace(args=(doc["question"], second(doc), to_visual, i, "t", "test")) for i, doc in enumerate(docs)]


def our_answers(folder, docs, max_new_tokens, tmp_path):
    """What eval.py of this project answers, one question at a time."""
    vlm, answers = checkpoint.load(folder), []
    for i, doc in enumerate(docs):
        path = None
        if doc["image"]:
            path = str(tmp_path / f"{i}.png")
            doc["image"].save(path)
        question = {"image": path, "text": doc["question"]}
        with ThreadPoolExecutor(1) as pool:
            images = eval.load_images([question], vlm, pool)
            answers += eval.answer_batch(vlm, [question], [eval.prompt_ids(vlm, question)], images, max_new_tokens)
    return answers


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_are_those_of_eval_in_the_order_of_the_requests(batch_size, adapter, ours, tmp_path):
    lm = adapter.LangBridge(ours, batch_size=str(batch_size), device="cpu")
    want = our_answers(ours, documents(), 8, tmp_path)
    assert len(set(want)) > 1
    got = lm.generate_until(requests_for(lm, lambda doc: {"max_new_tokens": 8, "temperature": 0, "do_sample": False}))
    assert got == want
    short = our_answers(ours, documents(), 3, tmp_path)
    stop = want[3][2]                                           # the requests have settings of their own
    text_only = {"max_new_tokens": 8, "until": [stop]}
    got = lm.generate_until(requests_for(lm, lambda doc: {"max_new_tokens": 3} if doc["image"] else text_only))
    assert got == [*short[:3], want[3].split(stop)[0].strip()] and got[0] != want[0] and got[3] != want[3]


def test_the_loss_of_a_continuation(adapter, ours):
    """Against the logits one by one; what greedy decoding says is_greedy, and has the lowest loss of four choices."""
    lm = adapter.LangBridge(ours, device="cpu")
    got = lm.loglikelihood(requests_for(lm, lambda doc: lambda doc: doc["answer"]))
    vlm, doc = lm.vlm, documents()[1]
    s = vlm.image_settings
    pixels = pictures.transform(doc["image"], s["size"], s["mean"], s["std"], "pad")[None]
    prompt = eval.prompt_ids(vlm, {"image": True, "text": doc["question"]})
    end = vlm.tokenizer.eos_token_id
    answer = vlm.tokenizer(doc["answer"], add_special_tokens=False).input_ids + [end]
    with torch.no_grad():
        logits = vlm.llm(inputs_embeds=vlm.splice(torch.tensor([prompt + answer]), pixels)).logits[0].log_softmax(-1)
    want = -sum(logits[len(prompt) - 1 + k, i] for k, i in enumerate(answer)).item() / len(answer)
    assert got[1][0] == pytest.approx(want, abs=1e-4) and got[1][1] is False and len(got) == 4

    greedy, = generate.generate(vlm, [prompt], pixels, 40)
    if len(greedy) < 40:                                        # it ended by itself
        text = vlm.tokenizer.decode(greedy)
        choices = [text, "no", "a red circle", "two small triangles"]
        lm.task_dict = {"t": {"test": [doc]}}
        results = lm.loglikelihood([types.SimpleNamespace(args=(doc["question"], choice, to_visual, 0, "t", "test"))
                                    for choice in choices])
        assert min(range(4), key=lambda k: results[k][0]) == 0


def test_what_it_does_not_do_is_said(adapter, ours):
    lm = adapter.LangBridge(ours, device="cpu")
    lm.task_dict = {"t": {"test": [{}]}}
    video = types.SimpleNamespace(args=("what?", {}, lambda doc: ["film.mp4"], 0, "t", "test"))
    with pytest.raises(ValueError, match="images only"):
        lm.generate_until([video])
    with pytest.raises(NotImplementedError, match="one round"):
        lm.generate_until_multi_round([video])


TASK = """\
task: pocket_answers
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function task_functions.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 8, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


@pytest.mark.skipif(not os.environ.get("LMMS_PYTHON"), reason="LMMS_PYTHON names no Python with lmms-eval")
def test_lmms_eval_itself_on_a_task_of_pocket_files(ours, tmp_path):
    """By the command line; the answers that it logs are ours.

    No task of choices: version 0.7.3 makes a text of what any model's loglikelihood returns (unwrap_generation_output of its
    api/instance.py) and then fails.
    """
    make = f"""
import datasets
from PIL import Image
documents = [((24, 24), "red", {QUESTIONS[0]!r}, "red"), ((60, 20), "blue", {QUESTIONS[1]!r}, "no"),
             ((20, 40), "green", {QUESTIONS[2]!r}, "a square")]
rows = [dict(image=Image.new("RGB", size, colour), question=question, answer=answer)
        for size, colour, question, answer in documents]
datasets.Dataset.from_list(rows).to_parquet("{tmp_path}/pocket.parquet")
"""
    python, env = os.environ["LMMS_PYTHON"], {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([python, "-c", make], check=True, env=env)
    (tmp_path / "task_functions.py").write_text("def visual(doc):\n    return [doc['image'].convert('RGB')]\n")
    text = TASK.format(data=f"{tmp_path}/pocket.parquet")
    (tmp_path / "answers.yaml").write_text(text)
    done = subprocess.run(
        [python, "tools/lmms_eval_model.py", "--model_args", f"checkpoint={ours}", "--device", "cpu", "--batch_size", "2",
         "--include_path", str(tmp_path), "--tasks", "pocket_answers", "--log_samples",
         "--output_path", str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    log, = (tmp_path / "out").rglob("*samples_pocket_answers.jsonl")
    said = {line["doc_id"]: line["filtered_resps"] for line in map(json.loads, log.read_text().splitlines())}
    assert [said[i] for i in range(3)] == our_answers(ours, documents()[:3], 8, tmp_path)
    assert "exact_match" in done.stdout
