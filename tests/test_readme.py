"""What the README promises."""

import math
import re
import shlex
from importlib import import_module

import pytest
import torch
from support import ROOT

import cam
import detect
import evaluate
import imagenet_train
import train
from detection.recipes import RECIPES as DETECTION_RECIPES
from engine.config.legacy_options import translate_legacy
from engine.config.phases import build_phases, parse_phases
from engine.config.recipes import IMAGENET_RECIPES, RECIPES
from engine.config.resolve import check_combinations, fill_in_options
from evaluation.corruptions import CORRUPTIONS
from mixing import MIXERS, show
from saliency.casm.__main__ import COMMANDS as COMMANDS_OF_CASM

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [
    line.split("  #")[0].replace("METHOD", "mixup").strip()
    for block in BLOCKS
    for line in block.replace("\\\n", "").splitlines()
    if re.match(r"(python|torchrun|srun torchrun) ", line)
]
SCRIPTS = {"train.py": train, "imagenet_train.py": imagenet_train, "evaluate.py": evaluate, "cam.py": cam}
SCRIPTS["detect.py"] = detect


def test_there_are_commands():
    scripts = {word for command in COMMANDS for word in command.split() if word.endswith(".py")}
    assert len(COMMANDS) > 20 and scripts == {*SCRIPTS}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_accepted(command):
    words = shlex.split(command)
    if words[1:3] == ["-m", "mixing.show"]:
        assert show.build_parser().read(words[3:])
        return
    if words[1:3] == ["-m", "saliency.casm"]:
        command = import_module(COMMANDS_OF_CASM[words[3]][0])
        assert command.build_parser().read(words[4:])
        return
    script = next(word for word in words if word.endswith(".py"))
    words = words[words.index(script) + 1 :]
    if words == ["--help"]:
        return
    parser = SCRIPTS[script].build_parser()
    typed, _ = translate_legacy(parser.read(words))
    if script not in ("evaluate.py", "cam.py"):
        if script == "detect.py":
            options = detect.resolve_options(parser, typed, {})
        else:
            options = fill_in_options(typed, {}, parser.defaults)
            check_combinations(options, typed)
        told = command.split(script)[0].replace('"$SLURM_NNODES"', "2").replace("1:2", "2")
        processes = [int(count) for count in re.findall(r"--(?:nproc_per_node|nnodes) (\d+)", told)]
        phases = build_phases(options) if script == "imagenet_train.py" else []
        for size in [phase.batch_size for phase in phases] or [options["batch_size"]]:
            assert size % math.prod(processes) == 0, f"{size} images for {processes} processes"


def test_the_examples_run():
    maps, plain, timm, lightning = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(maps, names)
    assert names["heat"].shape == (4, 64, 64) and names["heat"].amax((1, 2)).eq(1).all()

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
    assert all(f"`{name}`" in README for name in [*MIXERS, *RECIPES, *IMAGENET_RECIPES])


def test_the_phases_are_the_recipe_s():
    phases, begin = parse_phases(IMAGENET_RECIPES["fast100"]["phases"]), 0
    for phase in phases:
        share = (phase.crop / 224) ** 2
        plain = f"{(phase.end - begin) * share:.1f}".removesuffix(".0")
        row = rf"\| {begin}-{phase.end} \| {phase.images}, {phase.crop} \| {phase.batch_size} \| [^|]* \| {plain} \|"
        assert re.search(row, README), row
        begin = phase.end


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


def test_the_corruptions_are_described():
    page = (ROOT / "docs" / "evaluate.md").read_text().lower()
    for name, function in CORRUPTIONS.items():
        text = " ".join(function.__doc__.split()).partition(". ")[0].rstrip(".")
        assert f"| `{name}` | {text} |".lower() in page


def test_links_lead_somewhere():
    headings = {re.sub(r"[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in README.splitlines()}
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert target[1:] in headings if target[0] == "#" else (ROOT / target).is_file(), target
    assert not re.findall(r"\b[A-Z]+_[A-Z_]{3,}\b", re.sub(r"```.*?```", "", README, flags=re.S)), (
        "left to be filled in"
    )


def test_the_table_of_detection_recipes_is_what_they_are():
    section = README.split("## Detect objects")[1].split("\n## ")[0]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    names = [re.match(r"`(\w+)`", cell)[1] for cell in table[0][1:]]
    assert names == [*DETECTION_RECIPES]
    rows = {row[0]: dict(zip(names, row[1:], strict=True)) for row in table[2:]}
    for name, recipe in DETECTION_RECIPES.items():
        drops = " and ".join(f"{drop:,}" for drop in recipe["schedule"])
        assert rows["batch, learning rate"][name] == f"{recipe['batch_size']}, {recipe['lr']:g}"
        assert rows["steps, rate x0.1 at"][name] == f"{recipe['iters']:,}, {drops}"
        decay = f"{recipe['weight_decay']:.0e}".replace("e-0", "e-")
        assert rows["weight decay, warm-up"][name] == f"{decay}, {recipe['warmup_iters']:,}"
        layers = "all" if recipe["trainable_layers"] == 5 else f"top {recipe['trainable_layers']}"
        layers += "" if recipe["norm"] == "frozen" else f" with {recipe['norm']}"
        assert rows["neck, layers that learn"][name] == f"{recipe['neck']}, {layers}"
        sizes = recipe["min_size"]
        side = f"{sizes[0]}" if len(sizes) == 1 else f"{min(sizes)} to {max(sizes)}, test {sizes[-1]}"
        assert rows["shorter side"][name] == side
        assert rows["objects marked difficult"][name] == ("trained on" if recipe["use_difficult"] else "left out")
