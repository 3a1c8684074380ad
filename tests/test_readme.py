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
from mixing import MIXERS, show

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [
    line.split("  #")[0].replace("METHOD", "mixup").strip()
    for block in BLOCKS
    for line in block.splitlines()
    if line.startswith("python ")
]


def test_there_are_commands():
    assert len(COMMANDS) > 8 and {command.split()[1] for command in COMMANDS} == {"train.py", "evaluate.py", "-m"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_accepted(command):
    _, script, *words = shlex.split(command)
    if words == ["--help"]:
        return
    if script == "-m":
        assert words[0] == "mixing.show" and show.build_parser().read(words[1:])
        return
    parser = (train if script == "train.py" else evaluate).build_parser()
    typed, _ = translate(parser.read(words))
    if script == "train.py":
        check_together(fill_in(typed, {}, parser.defaults), typed)


def test_the_examples_run():
    plain, timm, lightning = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(plain, names)
    assert not torch.equal(names["mixed"], names["images"]) and all(
        p.grad is not None for p in names["model"].parameters()
    )
    exec(timm, names)
    mixed, soft = names["mixup_fn"](names["images"], names["labels"])
    assert mixed.shape == names["images"].shape and soft.shape == (8, 10)

    exec(lightning, names)
    module = names["Classifier"](names["model"])
    optimizer, zeroed = names["optimizer"], []
    module.optimizers = lambda: optimizer
    module.manual_backward = lambda loss: (zeroed.append(module.model[0].weight.grad is None), loss.backward())
    before = module.model[0].weight.clone()
    module.training_step((names["images"], names["labels"]), 0)
    assert zeroed == [False], "the clean gradient is there before the mixed one"
    assert not torch.equal(before, module.model[0].weight) and module.mixer.mixed_weight == 0.7


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


def test_links_lead_somewhere():
    headings = {re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in README.splitlines()}
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert target[1:] in headings if target[0] == "#" else (Path(__file__).parents[1] / target).is_file(), target
    assert not re.findall(r"\b[A-Z]+_[A-Z_]{3,}\b", re.sub(r"```.*?```", "", README, flags=re.S)), (
        "left to be filled in"
    )
