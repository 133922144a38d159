"""The README's file names, flags and commands against the tree: text drifts, and this holds it."""
import os
import re

import pytest

import train
from conftest import ROOT

PAGES = {name: open(os.path.join(ROOT, name), encoding="utf-8").read()
         for name in ("README.md", "docs/paper.md", "docs/results.md", "docs/cluster.md", "docs/promises.md",
                      "docs/gallery.md")}
README = "\n".join(PAGES.values())
COMMANDS = [line.strip() for block in re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.S)
            for line in block.replace("\\\n", " ").splitlines() if line.strip() and not line.strip().startswith("#")]


def test_there_are_commands():
    assert any("speedrun.sh" in c for c in COMMANDS) and any("tests/run.sh" in c for c in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_scripts_configs_and_flags_that_exist(command):
    command = command.split(" #")[0]
    for path in re.findall(r"(?<![\w/])[\w./-]+\.(?:py|sh)(?!\w)", command):
        assert os.path.isfile(os.path.join(ROOT, path)), path
    scripts = re.findall(r"(?<![\w/])(\w+)\.py", command)
    if not scripts:
        return
    source = open(os.path.join(ROOT, scripts[0] + ".py"), encoding="utf-8").read()
    flags = re.findall(r"(?<=\s)--([\w-]+)", command[command.index(scripts[0] + ".py"):])
    for flag in flags:
        known = flag in train.Settings.__annotations__ if scripts[0] == "train" else f'"--{flag}"' in source
        assert known, f"{scripts[0]}.py has no --{flag}"


def test_every_file_named_in_the_text_is_in_the_tree():
    for page, content in PAGES.items():
        text = re.sub(r"```.*?```", "", content, flags=re.S)
        for path in re.findall(r"`((?:config|tests|results|docs|benchmarks|tools|support)/[\w./-]+|[\w-]+\.(?:py|sh|txt|md))[` ]", text):
            assert os.path.exists(os.path.join(ROOT, path)), (page, path)
        for path in re.findall(r"\]\(((?!http)[^)#]+)\)", content):
            assert os.path.exists(os.path.join(ROOT, os.path.dirname(page), path)), (page, path)


def test_the_readme_stays_short():
    assert len(PAGES["README.md"].split()) < 1800
