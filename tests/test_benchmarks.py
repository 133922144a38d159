"""The scores: worked examples of the official tools, their corner cases, and what must be refused. Made-up data."""

import ast
import csv
import json
import os
import subprocess
import sys

import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import eval as program  # noqa: E402
from benchmarks import BENCHMARKS, gqa, mmbench, mme, pope, scienceqa, textvqa  # noqa: E402
from benchmarks.reading import LETTER, SHORT as SHORT_SENTENCE, stderr  # noqa: E402
from benchmarks.tables import mcnemar, sign_flip  # noqa: E402

SHORT = "\n" + SHORT_SENTENCE


def save(path, value):
    """A list becomes JSON lines, a dict one JSON object, a string itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(v) + "\n" for v in value) if isinstance(value, list) else json.dumps(value)
    path.write_text(value if isinstance(value, str) else lines, encoding="utf-8")
    return str(path)


def answer(question_id, text, prompt="q"):
    return {"question_id": question_id, "prompt": prompt, "text": text, "answer_id": "x", "model_id": "m",
            "metadata": {}}


@pytest.fixture
def run(capsys):
    """run(task, questions, predictions, truth) -> the JSON that --score prints, or the sentence of its error"""
    def run(task, questions, predictions, truth=None, *flags):
        argv = ["--score", task, "--questions", str(questions), "--predictions", str(predictions), *flags]
        try:
            program.main(argv + (["--truth", str(truth)] if truth else []))
        except (ValueError, OSError) as error:
            assert capsys.readouterr().out == "" and "\n" not in str(error)
            return str(error)
        return json.loads(capsys.readouterr().out)
    return run


# ---- GQA

def gqa_question(gold, kind, **more):
    return {"question": "Is it?", "answer": gold, "imageId": "n1", "isBalanced": True, "groups": {"global": None},
            "types": {"structural": kind, "semantic": "attr"}, "semantic": [], **more}


def gqa_files(tmp_path):
    table = [("verify", "yes", "Yes."), ("query", "bicycle", "Bicycle"), ("query", "refrigerator", "a refrigerator"),
             ("choose", "striped", "Striped.."), ("logical", "no", "No, one is red")]
    questions = {str(i): gqa_question(gold, kind) for i, (kind, gold, _) in enumerate(table)}
    return save(tmp_path / "q.json", questions), [answer(str(i), text) for i, (_, _, text) in enumerate(table)]


def test_gqa(tmp_path, run):
    questions, answers = gqa_files(tmp_path)
    result = run("gqa", questions, save(tmp_path / "p.jsonl", answers[::-1]))  # order must not matter
    assert (result["accuracy"], result["open"], result["correct"], result["total"]) == (60, 50, 3, 5)
    assert result["binary"] == pytest.approx(200 / 3)
    assert result["by_structural_type"]["query"] == {"accuracy": 50, "count": 2}


def test_gqa_only_balanced_questions_count(tmp_path, run):
    questions = {"1": gqa_question("yes", "verify"), "2": gqa_question("no", "verify", isBalanced=False)}
    q = save(tmp_path / "q.json", questions)
    result = run("gqa", q, save(tmp_path / "p", [answer(1, "yes")]))
    assert (result["accuracy"], result["total"]) == (100, 1)
    # An answer to another question may be there, and changes nothing.
    result = run("gqa", q, save(tmp_path / "p", [answer("1", "yes"), answer("2", "yes")]))
    assert (result["accuracy"], result["total"]) == (100, 1)
    assert "question 3 is unknown" in run("gqa", q, save(tmp_path / "p", [answer("1", "yes"), answer("3", "yes")]))


# ---- TextVQA

TEXTVQA = [("Sony", ["sony"] * 2 + ["the sony"] + ["sony corp"] * 7, 0.9),
           ("Four.", ["4"] + ["four"] * 3 + ["for"] * 6, 1.0),
           ("It's OK", ["it's ok"] * 2 + ["its ok"] * 8, 0.6), ("2,50", ["2.50"] * 5 + ["$2.50"] * 5, 0.0),
           ("NASA", ["nasa", "n.a.s.a."] + ["usa"] * 8, 0.6)]


def test_textvqa(tmp_path, run):
    data = [{"image_id": "i", "question": f"Whose is {i}?", "answers": humans} for i,
            (_, humans, _) in enumerate(TEXTVQA)]
    q = save(tmp_path / "q.json", {"data": data})
    prompts = ["Whose is 0?\nReference OCR token: A, B" + SHORT, "Reference OCR token: \nWhose is 1?" + SHORT,
               "Whose is 2?" + SHORT,
               "OCR tokens: A\nQuestion: Whose is 3? Short answer:", "WHOSE IS 4?\nReference OCR token: " + SHORT]
    answers = [answer("i", text, prompt) for (text, _, _), prompt in zip(TEXTVQA, prompts)]
    assert run("textvqa", q, save(tmp_path / "p", answers[::-1]))["accuracy"] == 62
    assert [textvqa.soft_accuracy(text, humans) for text, humans, _ in TEXTVQA] == [value for _, _, value in TEXTVQA]
    assert "Whose is 9".lower() in run("textvqa", q, save(tmp_path / "p",
                                                          answers[1:] + [answer("i", "x", "Whose is 9?\nx")]))
    assert "i / whose? is unknown" in run("textvqa", q, save(tmp_path / "p", answers[1:] + [answer("i", "x", "Whose?")]))
    assert "whose is 0" in run("textvqa", q, save(tmp_path / "p", answers[1:]))
    data[0]["answers"].pop()
    assert "ten answers" in run("textvqa", save(tmp_path / "q.json", {"data": data}), save(tmp_path / "p", answers))


# ---- MME

MME = [("z1", "Yes.", "No."), ("z2", "Yes", "Yes"), ("z3", "There is a pen", "Nothing like that")]


def mme_files(tmp_path, task="count"):
    questions, answers, labels = [], [], ""
    for image, *texts in MME:
        for what, gold, text in zip(("pen", "cat"), ("Yes", "No"), texts):
            prompt = f"Is there a {what}?{SHORT}"
            questions.append({"question_id": f"{task}/{image}.png", "image": f"{task}/{image}.png", "text": prompt,
                              "category": task})
            answers.append(answer(f"{task}/{image}.png", text, prompt))
            space = "  " if image == "z2" else " "  # seven official questions have two
            labels = f"{image}.png\tIs there a {what}?{space}Please answer yes or no.\t{gold}\n" + labels  # any order
    save(tmp_path / "truth" / f"{task}.txt", labels)
    return save(tmp_path / "q.jsonl", questions), answers, tmp_path / "truth"


def test_mme(tmp_path, run):
    questions, answers, truth = mme_files(tmp_path)
    save(truth / "scene.txt", "not even a label file")  # a task that nobody asks
    result = run("mme", questions, save(tmp_path / "p", answers[::-1]), truth)
    assert result["per_task"]["count"]["acc"] == pytest.approx(4 / 6)
    assert result["per_task"]["count"]["acc_plus"] == pytest.approx(1 / 3)
    assert result["perception"] == result["total"] == pytest.approx(100) and result["cognition"] == 0
    assert result["unparsed"] == 1


def test_mme_labels_one_to_one(tmp_path, run):
    questions, answers, truth = mme_files(tmp_path)
    p, path = save(tmp_path / "p", answers), truth / "count.txt"
    whole = path.read_text()
    for wrong in (whole.split("\n", 1)[1], whole + "z4.png\tIs it?\tYes\n", whole + whole.split("\n")[0],
                  whole + "z1.png\tIs"):
        path.write_text(wrong)
        assert "count.txt" in run("mme", questions, p, truth)
    path.unlink()
    assert "count.txt" in run("mme", questions, p, truth)


# ---- MMBench

def mmbench_file(path, rows):
    """rows: (index, options, answer)"""
    with open(path, "w", newline="", encoding="utf-8") as f:
        out = csv.writer(f, delimiter="\t", lineterminator="\n")
        out.writerow("index question hint A B C D answer category image source l2-category split".split())
        for index, options, gold in rows:
            out.writerow([index, 'say "what"\tis it\n?', "", *(list(options) + [""] * 4)[:4], gold, "c", "/9j/", "s",
                          "l2", "dev"])
    return str(path)


def test_mmbench(tmp_path, run):
    rows = [(1, ["ice", "tea"], "A"), (1000001, ["tea", "ice"], "B"),
            (2, ["cat", "dog", "hen"], "C"), (1000002, ["hen", "cat", "dog"], "A"),
            (2000002, ["dog", "hen", "cat"], "B"),
            (3, ["silk", "cloth"], "B"), (1000003, ["cloth", "silk"], "A")]
    texts = ["A", "B", "C", "A", "C", "B. cloth", "(A)"]
    q = mmbench_file(tmp_path / "q.tsv", rows)
    answers = [answer(row[0], text) for row, text in zip(rows, texts)]
    result = run("mmbench", q, save(tmp_path / "p", answers[::-1]))
    assert result["circular"] == pytest.approx(200 / 3) and result["vanilla"] == 100
    assert [result["strict"][k] for k in ("circular", "vanilla")] == pytest.approx([100 / 3, 200 / 3])
    assert result["rows"] == pytest.approx(600 / 7) and result["by_category"]["c"]["count"] == 3
    assert "1000002" in run("mmbench", q, save(tmp_path / "p", answers[:3] + answers[4:]))
    (tmp_path / "q.tsv").write_text((tmp_path / "q.tsv").read_text()[:-10])
    assert "q.tsv, line" in run("mmbench", q, save(tmp_path / "p", answers))


def test_mmbench_options_stop_at_the_first_missing_one():
    assert mmbench.options_of({"A": "NA", "B": "null", "C": "None", "D": "x"}) == {"A": "NA", "B": "null"}


# ---- MM-Vet

def mmvet_files(tmp_path):
    sets = [["ocr", "math"], ["rec"], ["rec", "ocr"], ["rec", "know", "gen"]]
    questions = {f"v1_{i}": {"imagename": "v.png", "question": "?", "answer": "x", "capability": s} for i,
                 s in enumerate(sets)}
    grades = {f"v1_{i}": {"model": ["j"], "content": ["1"], "score": [s]} for i, s in enumerate((1.0, 0.0, 0.5, 0.6))}
    return save(tmp_path / "q.json", questions), [answer(i, f"t{i}") for i in range(4)], grades


def test_mmvet(tmp_path, run):
    questions, answers, grades = mmvet_files(tmp_path)
    p = save(tmp_path / "p.jsonl", answers)
    result = run("mmvet", questions, p, save(tmp_path / "g.json", grades))
    assert result["total"] == pytest.approx(52.5) and result["std"] == 0
    assert {k: round(v, 1) for k, v in result["capabilities"].items()} == {"rec": 36.7, "ocr": 75, "math": 100,
        "know": 60, "gen": 60}
    assert result["integrations"]["math_ocr"] == 100 and result["integrations"]["gen_know_rec"] == 60
    for grade in grades.values():
        grade["score"] = grade["score"] + [0.0]
    result = run("mmvet", questions, p, save(tmp_path / "g.json", grades))
    assert result["total"] == pytest.approx(26.25) and result["std"] == pytest.approx(26.25) and result["runs"] == 2
    for wrong in ([0.5], [], [0.5, 1.1], [0.5, "1"], [0.5, True]):
        grades["v1_2"]["score"] = wrong
        assert "v1_2" in run("mmvet", questions, p, save(tmp_path / "g.json", grades))
    del grades["v1_2"]
    assert "v1_2" in run("mmvet", questions, p, save(tmp_path / "g.json", grades))


def test_mmvet_file_for_the_judge(tmp_path, run):
    questions, answers, _ = mmvet_files(tmp_path)
    p = save(tmp_path / "answers.jsonl", answers)
    result = run("mmvet", questions, p)
    assert result == {"judge_file": str(tmp_path / "answers.mm-vet.json")}
    assert json.load(open(result["judge_file"])) == {f"v1_{i}": f"t{i}" for i in range(4)}
    assert run("mmvet", questions, p) == result
    answers[0]["text"] = "other"
    assert "--overwrite" in run("mmvet", questions, save(tmp_path / "answers.jsonl", answers))
    assert run("mmvet", questions, p, None, "--overwrite") == result


# ---- POPE

POPE = {"random": [("yes", "Yes"), ("no", "No."), ("yes", "NO"), ("no", "nothing")],
        "popular": [("yes", "yes, not blurry"), ("no", "No"), ("yes", "Yes")],
        "adversarial": [("yes", "Yes"), ("no", "isn't there")]}


def pope_files(tmp_path):
    questions, answers = [], []
    for offset, (split, rows) in zip((10_000_000, 20_000_000, 0), POPE.items()):
        labels = [{"question_id": i, "image": f"{i}.jpg", "text": "Is there a imange?", "label": gold} for i,
                  (gold, _) in enumerate(rows, 1)]
        save(tmp_path / "coco" / f"coco_pope_{split}.json", labels)
        for label, (_, text) in zip(labels, rows):
            question_id = label["question_id"] + offset
            questions.append({**label, "question_id": question_id, "text": label["text"] + SHORT, "category": split})
            del questions[-1]["label"]
            answers.append(answer(question_id, text))
    return save(tmp_path / "q.jsonl", questions), answers, tmp_path / "coco"


def test_pope(tmp_path, run):
    questions, answers, truth = pope_files(tmp_path)
    result = run("pope", questions, save(tmp_path / "p", answers[::-1]), truth)
    want = {"random": (0.75, 2 / 3, 1, 0.8, 0.75), "popular": (2 / 3, 1, 0.5, 2 / 3, 1 / 3),
            "adversarial": (0.5, 0.5, 1, 2 / 3, 1)}
    for split, figures in want.items():
        assert [result[split][k] for k in ("accuracy", "precision", "recall", "f1",
                                           "yes_ratio")] == pytest.approx(figures)
    assert result["mean_f1"] == pytest.approx(0.7111, abs=1e-4) and result["unparsed"] == 3
    assert run("pope", questions, save(tmp_path / "p", [{**a, "text": "no"} for a in answers]), truth)["mean_f1"] == 0


def test_pope_labels_one_to_one(tmp_path, run):
    questions, answers, truth = pope_files(tmp_path)
    p, path = save(tmp_path / "p", answers), truth / "coco_pope_random.json"
    labels = [json.loads(line) for line in path.read_text().splitlines()]
    same = run("pope", questions, p, truth)
    save(path, labels[::-1])
    assert run("pope", questions, p, truth) == same
    for wrong in (labels[1:], labels + [{**labels[0], "question_id": 5, "image": "5.jpg"}], labels + labels[:1],
                  [{**label, "text": "Is there an image?"} for label in labels]):
        save(path, wrong)
        assert "coco_pope_random.json" in run("pope", questions, p, truth)


# ---- ScienceQA

SCIENCE = [(False, 2, 0, "A"), (True, 2, 0, "A. ice"), (True, 3, 0, "A."), (True, 2, 1, "The answer is B"),
           (False, 2, 1, "The answer is B, foam.")]


def science_files(tmp_path):
    questions, answers, problems = [], [], {}
    for i, (image, choices, gold, text) in enumerate(SCIENCE):
        value = "<image>\n" * image + f"Which of {i}?\nA. ice\nB. steam"
        questions.append({"id": str(i), "conversations": [{"from": "human", "value": value},
                                                          {"from": "gpt", "value": "ABC"[gold]}],
                          **({"image": f"{i}/image.png"} if image else {})})
        problems[str(i)] = {"question": f"Which of {i}?", "choices": ["x"] * choices, "answer": gold}
        answers.append(answer(str(i), text, f"{value}\n{LETTER}"))
    problems["train"] = {"choices": ["x"], "answer": 0}  # the file holds the other splits as well
    save(tmp_path / "truth" / "problems.json", problems)
    save(tmp_path / "truth" / "pid_splits.json", {"test": [str(i) for i in range(5)], "train": ["train"]})
    return save(tmp_path / "q.json", json.dumps(questions)), answers, tmp_path / "truth"


def test_scienceqa(tmp_path, run):
    questions, answers, truth = science_files(tmp_path)
    result = run("scienceqa", questions, save(tmp_path / "p", answers[::-1]), truth)
    assert (result["accuracy"], result["correct"], result["total"]) == (60, 3, 5)
    assert (result["img_correct"], result["img_total"], result["unparsed"]) == (1, 3, 2)
    assert result["img_accuracy"] == pytest.approx(100 / 3)
    answers[0]["text"] = "E"  # beyond the choices: parsed, and wrong
    result = run("scienceqa", questions, save(tmp_path / "p", answers), truth)
    assert result["unparsed"] == 2 and result["correct"] == 2
    for k, prompt in ((1, answers[1]["prompt"][8:]), (0, "<image>\n" + answers[0]["prompt"]),
                      (4, answers[3]["prompt"])):
        assert f"question {k}" in run("scienceqa", questions, save(
            tmp_path / "p", answers[:k] + [{**answers[k], "prompt": prompt}] + answers[k + 1:]), truth)
    assert "question 2" in run("scienceqa", questions, save(tmp_path / "p", answers[:2] + answers[3:]), truth)
    save(truth / "pid_splits.json", {"test": ["0", "1", "2", "3"]})
    assert "pid_splits.json" in run("scienceqa", questions, save(tmp_path / "p", answers), truth)


# ---- what the scores read in an answer

OPTIONS = {"A": "a red cat", "B": "Blue", "C": "green"}


def match(text):
    return mmbench.match(text, OPTIONS)


READ = {
    gqa.normalize: {"yes. ": "yes. ", " yes": " yes", "T-Shirt...": "t-shirt", "": "", "yes!": "yes!"},
    textvqa.normalize: {
        "what's": "what 's", "whats": "what's", "red,blue": "redblue", "red, blue": "red blue", "e-mail": "e mail",
        "e - mail": "e mail", "a-b -c": "ab c", "1,234.50": "1234.50", "an": "", '"YES!"': "yes", "Sony": "sony",
        "Four.": "4", "It's OK": "it 's ok", "2,50": "250", "n.a.s.a.": "nasa", "3.5": "3.5", "v2.0": "v2.0",
        "no.5": "no.5", "st.": "st", "u.s.a.": "usa", "3.": "3", "none": "0", "ten eleven": "10 eleven",
        "the theatre": "theatre", "a\tb\nc": "b c", "dont": "don't", "maam": "ma'am", "twas": "'twas", "its": "its",
        "ill": "ill", "shell": "shell", "couldntve": "couldntve", "couldnt've": "couldn't've",
        "couldn'tve": "couldn't've", "y'allll": "y'all'll", "yall'd've": "y'all'd've", "y'alld've": "y'all'd've",
        "y'all'dve": "y'all'd've", "somebody'd": "somebodyd", "'ows'at": "'ow's'at", "shouldve": "should've",
        "hes": "he's", "oclock": "o'clock", "yall": "y'all", "$5 & 10%": "$5 & 10%", "a:b": "a:b",
        "caf\u00e9": "caf\u00e9", "x?y": "xy", "x/y": "x y", "x/ y": "x y", "(a)": "", "the-end": "end",
        "." * 40: "." * 8, "1.a": "1a", "let's": "let 's", "notve": "not've"},
    mme.parse: {
        "Not sure": "no", "Nope": "no", "Know": "no", "Nothing": "no", "**No**": "no", "**Yes**": "other",
        "Yesterday": "yes", "The answer is yes": "other", "Y": "other", "1. No": "other", "": "other", "YES": "yes",
        " yes": "yes", "  yes": "other", "\nno": "no", "no\tyes": "no"},
    match: {
        "A": "A", "(B).": "B", "**C**": "C", "C: green": "C", "a": None, "D": None, "Z": "Z", "A or B": None,
        "I can't process this file.": "Z", "Cannot determine the answer, A": "Z", "A is what I would say here": None,
        "A one two three": "A", "A one two three four": None, "The answer is a cat": "A",
        "the correct ANSWER is **b** of all those": "B", "answer is D": None, "it is blue": "B",
        "blue or green": None, "it is blue " + "x" * 30: None, "": None, "A. x y z w: the answer is C": "C",
        "B, surely, for the reason that the answer is B without any doubt at all": "B"},
    pope.parse: {
        "": "yes", "NO": "yes", "Not sure": "yes", "Nope": "yes", "There isn't one": "yes", '"No"': "yes",
        ".No": "yes", "no\nyes": "yes", "Yes, no doubt": "no", "I do not see. Yes": "no", "Yes. No": "yes",
        "No, it is": "no"},
    scienceqa.parse: {
        "A": "A", "A. ice": "A", "B.  carp": "B", "A.": "FAILED", "(A)": "FAILED", "a": "FAILED", " A": "FAILED",
        "A\n": "FAILED", "A. ": "A", "A) ice": "FAILED", "A: ice": "FAILED", "ice": "FAILED", "": "FAILED",
        "The answer is A": "FAILED", "the answer is A.": "FAILED", "The answer is B, not A.": "B",
        "The answer is Apple": "A", "The answer is A\n": "FAILED", "The answer is A. The answer is B.": "FAILED",
        "F. x": "FAILED", "The answer is Q.": "Q", "So. The answer is C.": "C"},
}


@pytest.mark.parametrize("function", READ)
def test_what_is_read_in_an_answer(function):
    assert {text: function(text) for text in READ[function]} == READ[function]


# ---- what every task refuses

def test_answers_missing_double_unknown_or_torn(tmp_path, run):
    questions, answers = gqa_files(tmp_path)
    assert "question 3 has no answer" in run("gqa", questions, save(tmp_path / "p", answers[:3] + answers[4:]))
    assert "question 1 is there twice" in run("gqa", questions, save(tmp_path / "p", answers + answers[1:2]))
    assert "question 77 is unknown" in run("gqa", questions, save(tmp_path / "p", answers + [answer("77", "x")]))
    whole = "".join(json.dumps(a) + "\n" for a in answers)
    scored = run("gqa", questions, save(tmp_path / "p.jsonl", whole + "\n"))
    assert scored["total"] == 5                     # an empty last line is nothing
    for torn in (whole + '{"question_id": "0", "te', whole + "3\n"):
        assert "p.jsonl, line 6" in run("gqa", questions, save(tmp_path / "p.jsonl", torn))
    (tmp_path / "p.jsonl").write_bytes(whole.encode() + '"\u00e9'.encode()[:-1])
    assert "p.jsonl, line 6" in run("gqa", questions, tmp_path / "p.jsonl")
    save(tmp_path / "p.jsonl", [{"question_id": "0"}])
    assert "p.jsonl, line 1: no field 'text'" in run("gqa", questions, tmp_path / "p.jsonl")
    assert "nowhere.jsonl" in run("gqa", questions, tmp_path / "nowhere.jsonl")
    save(tmp_path / "q.json", '{\n"0": {"question":')
    assert "q.json is not" in run("gqa", questions, save(tmp_path / "p", answers))
    save(tmp_path / "q.json", '{"0": 3}')
    assert "q.json: a record of another form" in run("gqa", questions, save(tmp_path / "p", answers))


def test_line_separators_inside_an_answer_do_not_end_a_line(tmp_path, run):
    questions, answers = gqa_files(tmp_path)
    answers[2]["text"] = "refrig\u2028erator\x85"
    path = tmp_path / "p"
    path.write_text("".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers), encoding="utf-8")
    assert run("gqa", questions, path)["total"] == 5


def test_command_line_needs_no_torch_and_prints_one_object(tmp_path):
    questions, answers = gqa_files(tmp_path)
    predictions = save(tmp_path / "p", answers)
    code = ("import sys; sys.modules['torch'] = sys.modules['transformers'] = None; import eval;"
            f"eval.main(['--score', 'gqa', '--questions', {questions!r}, '--predictions', {predictions!r}])")
    done = subprocess.run([sys.executable, "-c", code], cwd=os.path.dirname(program.__file__), capture_output=True,
                          text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["accuracy"] == 60 and done.stderr == ""
    for argv in (["--score", "pope"], ["--score", "cider"], ["--score", "pope", "--questions", "q", "--predictions",
                                                             "p"], []):
        done = subprocess.run([sys.executable, program.__file__, *argv], capture_output=True, text=True)
        assert done.returncode in (1, 2) and done.stdout == ""
        assert done.stderr.count("\n") == 1 and "usage" not in done.stderr


# ---- paired tests

def test_paired_tests():
    assert mcnemar(0, 0) == 1 and mcnemar(5, 5) == 1
    assert mcnemar(1, 9) == pytest.approx(22 / 1024)  # two sides of 1 + 10 out of 2 ** 10
    assert sign_flip([0.1] * 20) < 0.001 and sign_flip([0.1,
                                                                      -0.1] * 10) > 0.9 and sign_flip([]) == 1


def test_standard_errors():
    assert stderr([0, 1] * 50) == pytest.approx(5)
    assert stderr([]) == 0


# ---- what differs between benchmarks stands in their files

def test_eval_has_no_branch_on_a_benchmark():
    with open(program.__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    strings = {node.value for node in ast.walk(tree)
               if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not strings & set(BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_benchmark_declares_what_eval_needs(name):
    benchmark = BENCHMARKS[name]
    for constant in "HEADLINE SCALE MAX_NEW_TOKENS ASK IMAGES SOURCE".split():
        assert hasattr(benchmark, constant)
    assert callable(benchmark.read) and callable(benchmark.score)
    assert f"{name}.py" in os.listdir(os.path.dirname(benchmark.__file__))
