"""What the README promises."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import evaluate
import train
from engine.configure import check_together, fill_in, translate
from engine.recipes import RECIPES
from mixing import MIXERS

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [
    line.split("  #")[0].replace("METHOD", "mixup").strip()
    for block in BLOCKS
    for line in block.splitlines()
    if line.startswith("python ")
]


def test_there_are_commands():
    assert len(COMMANDS) > 8 and {command.split()[1] for command in COMMANDS} == {"train.py", "evaluate.py"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_accepted(command):
    _, script, *words = shlex.split(command)
    if words == ["--help"]:
        return
    parser = (train if script == "train.py" else evaluate).build_parser()
    typed, _ = translate(parser.read(words))
    if script == "train.py":
        check_together(fill_in(typed, {}, parser.defaults), typed)


def test_the_example_runs():
    [code] = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(code, names)
    assert not torch.equal(names["mixed"], names["images"]) and names["loss"].ndim == 0


def test_every_method_and_recipe_is_described():
    assert all(f"`{name}`" in README for name in [*MIXERS, *RECIPES])


def test_the_recipe_table_is_true():
    rows = {
        row[0]: row[1:]
        for row in (re.split(r" *\| *", line.strip("| ")) for line in README.splitlines() if "|" in line)
    }
    for column, name in enumerate(("saliencymix", "puzzle", "rmix", "shapes")):
        recipe = RECIPES[name]
        assert rows["model, data"][column] == f"{recipe['model']}, {recipe['dataset']}"
        assert rows["epochs, batch"][column] == f"{recipe['epochs']}, {recipe['batch_size']}"
        assert float(rows["weight decay"][column]) == recipe["weight_decay"]


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (Path(__file__).parents[1] / target).is_file(), target
