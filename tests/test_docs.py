"""What the README and docs/ promise: commands are accepted, examples run, tables agree with the code, links resolve."""

import ast
import math
import re
import shlex
from importlib import import_module

import pytest
import torch
from support import ROOT, run_installed, shapes_command

import cam
import detect
import evaluate
import imagenet_train
import train
from detection.recipes import RECIPES as DETECTION_RECIPES
from engine.config.legacy_options import translate_legacy
from engine.config.modern_recipes import Typed
from engine.config.phases import build_phases, parse_phases
from engine.config.recipes import IMAGENET_RECIPES, RECIPES
from engine.config.resolve import RULES, check_combinations, fill_in_options
from evaluation.compare import __main__ as comparison
from evaluation.corruptions import CORRUPTIONS
from mixing import MIXERS, mixer_class
from mixing.export import __main__ as export
from mixing.show import __main__ as show
from saliency import SOURCES
from saliency.casm.__main__ import COMMANDS as COMMANDS_OF_CASM

PAGES = {page.relative_to(ROOT).as_posix(): page.read_text() for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
README = PAGES["README.md"]
SCRIPTS = {"train.py": train, "imagenet_train.py": imagenet_train, "evaluate.py": evaluate, "cam.py": cam}
SCRIPTS["detect.py"] = detect


def find_commands(text: str) -> list[str]:
    """The commands of a page: the lines of its bash blocks, loops unrolled once, and the code in its table cells."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", "").replace("; done", "\n")
    lines = [line.split("; do ")[-1].split("  #")[0].strip() for line in blocks.splitlines()]
    lines += [code for row in text.splitlines() if row.startswith("|") for code in re.findall(r"`(python [^`]+)`", row)]
    lines = [line.replace("METHOD", "mixup").replace("$method", "mixup").replace("$seed", "0") for line in lines]
    lines = [line.replace("SEED", "0") for line in lines]
    return [line for line in lines if re.match(r"(python|torchrun|srun torchrun) ", line)]


COMMANDS = sorted({command for text in PAGES.values() for command in find_commands(text)})


def test_the_pages_show_commands_of_every_script():
    scripts = {word for command in COMMANDS for word in command.split() if word in SCRIPTS}
    assert len(COMMANDS) > 60 and scripts == {*SCRIPTS}
    assert len(README.splitlines()) <= 200


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_accepted(command):
    words = shlex.split(command)
    if words[1:3] == ["-m", "mixing.show"]:
        assert show.build_parser().read(words[3:])
        return
    if words[1] == "-m" and words[2].endswith("mixing.export"):
        words = words[3 : words.index(">")] if ">" in words else words[3:]
        typed = export.build_parser().parse_args(words)
        assert not typed.name or export.choose_source(typed.name, typed.source)
        return
    if words[1:3] == ["-m", "evaluation.compare"]:
        assert len(words) == 3 or comparison.build_parser().read(words[3:])["runs"]
        return
    if words[1].startswith(("benchmarks/", "docs/")):
        assert (ROOT / words[1]).is_file()
        return
    if words[1:3] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[3:] if word.startswith("tests"))
        return
    if words[1:3] == ["-m", "saliency.casm"]:
        if len(words) == 3:  # only its name
            return
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


def find_examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGES[page], re.S)


def test_the_loop_of_the_readme_runs_where_the_package_is_installed(installed_package, tmp_path):
    (loop,) = find_examples("README.md")
    setup = """
import sys, torch
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(7200, 10))
optimizer, num_classes = torch.optim.SGD(model.parameters(), lr=0.1), 10
mean, std, loader = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), [(torch.randn(8, 3, 32, 32), torch.arange(8))]
before = model[0].weight.clone()
"""
    check = """
assert mixed.shape == (8, 3, 32, 32) and targets.sum(1).allclose(torch.ones(8))
assert not torch.equal(before, model[0].weight)
assert not {"mixing", "saliency", "engine", "cv2", "torchvision"} & {*sys.modules}
print("ran")
"""
    assert run_installed(installed_package, setup + loop + check, tmp_path) == "ran\n"


def test_the_loop_with_a_bank_finds_what_the_network_looks_at(installed_package, monkeypatch):
    """A linear network sees the left half of each image. Half of the images are flipped, so it is their right half."""
    monkeypatch.syspath_prepend(installed_package)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 10))
    with torch.no_grad():
        model[1].weight.view(10, 3, 16, 16)[..., 8:] = 0
    flip = torch.tensor([True, False] * 4)
    names = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.0), "num_classes": 10}
    names |= {"num_images": 8, "device": "cpu"}
    names["loader"] = [(torch.rand(8, 3, 16, 16), torch.arange(8), torch.arange(8), flip) for _ in range(5)]
    exec(*find_examples("docs/methods.md"), names)
    left = names["bank"].maps[..., :8].float().mean((1, 2)) / 2
    assert left[flip].max() < 0.2 and left[~flip].min() > 0.8


def test_the_example_of_activation_maps_runs():
    names = {}
    exec(*find_examples("docs/cam.md"), names)
    assert names["heat"].shape == (4, 64, 64) and names["heat"].amax((1, 2)).eq(1).all()


def test_the_example_of_loading_a_classifier_runs(tmp_path, monkeypatch, capsys):
    train.main(shapes_command(tmp_path / "runs", "--log_off", "false", name="demo", epochs=1))
    monkeypatch.chdir(tmp_path)
    names = {}
    capsys.readouterr()
    exec(*find_examples("docs/evaluate.md"), names)
    titles = ast.literal_eval(capsys.readouterr().out)
    assert names["logits"].shape == (4, 10) and len(titles) == 4 and set(titles) <= set(names["classifier"].classes)


def test_the_method_of_the_page_mixes_stripes():
    names = {"__package__": "mixing"}
    exec(*find_examples("docs/adding_a_method.md"), names)
    saliency = torch.zeros(2, 4, 8)
    saliency[0, 1, 6], saliency[1, 3, 0] = 1, 1
    boxes = names["place_stripes"](saliency, torch.tensor(0.5))
    assert boxes.tolist() == [[0, 4, 4, 8], [0, 4, 0, 4]]
    images, targets = torch.stack([torch.zeros(3, 4, 8), torch.ones(3, 4, 8)]), torch.eye(2)
    mixer = names["StripeMix"]()
    torch.manual_seed(0)
    mixed, soft = mixer(images, targets, lambda images, targets: saliency)
    torch.testing.assert_close(soft[:, 1], mixed.mean((1, 2, 3)))
    assert mixer.weight.shape == (2, 1, 4, 8)


def test_the_source_of_the_page_finds_a_spot():
    names = {"__package__": "saliency"}
    exec(*find_examples("docs/adding_a_source.md"), names)
    image = torch.zeros(1, 3, 16, 20)
    image[:, :, 5, 7] = 1
    assert names["Contrast"]()(image, torch.eye(1)).flatten(1).argmax(1).item() == 5 * 20 + 7


def test_every_method_is_described_with_its_file():
    for name, (module, _) in MIXERS.items():
        path = f"mixing/{module.removeprefix('.')}.py"
        assert name == "none" or re.search(rf"^\| `{name}` \|.*\]\({path}\)", README, re.M), (
            f"the methods table of README.md has no row for `{name}` that links to {path}"
        )
        assert f"`{name}`" in PAGES["docs/methods.md"] or name == "none", f"docs/methods.md does not describe `{name}`"


@pytest.mark.parametrize(("page", "source", "label"), [("README.md", 4, 5), ("docs/methods.md", 5, 6)])
def test_the_tables_of_methods_have_their_sources_and_which_keep_the_label(page, source, label):
    text = PAGES[page].split("\n## Methods\n")[-1]
    lines = [line.split("|")[1:-1] for line in text.splitlines() if re.match(r"\| \[?`\w+`", line)]
    rows = {re.search(r"`(\w+)`", line[0])[1]: [cell.strip() for cell in line] for line in reversed(lines)}
    for name in [name for name in MIXERS if name != "none"]:
        assert rows[name][source].split(";")[0].strip("`") == (mixer_class(name).default_source or ""), name
        assert (rows[name][label] == "own") == mixer_class(name).keeps_labels, name


def test_every_recipe_and_source_is_described():
    assert all(f"`{name}`" in PAGES["docs/train.md"] for name in [*RECIPES, *SOURCES])
    assert all(f"`{name}`" in PAGES["docs/imagenet.md"] for name in IMAGENET_RECIPES)


def test_the_options_that_may_change_on_a_resume_are_listed():
    sentence = re.search(r"These options may change on a resume:\s+(.*?)\. ", PAGES["docs/train.md"], re.S)[1]
    per_call = {"checkpoint", "config", "evaluate", "force_config", "debug", "list_models", "wandb_key"}
    assert set(re.findall(r"--(\w+)", sentence)) == RULES.changeable - per_call - {"resize_to", "resize_dest"}


def test_the_phases_are_the_recipe_s():
    phases, begin = parse_phases(IMAGENET_RECIPES["fast100"]["phases"]), 0
    for phase in phases:
        share = (phase.crop / 224) ** 2
        plain = f"{(phase.end - begin) * share:.1f}".removesuffix(".0")
        row = rf"\| {begin}-{phase.end} \| {phase.images}, {phase.crop} \| {phase.batch_size} \| [^|]* \| {plain} \|"
        assert re.search(row, PAGES["docs/imagenet.md"]), row
        begin = phase.end


def test_the_recipe_table_is_true():
    rows = {
        row[0]: row[1:]
        for row in (
            re.split(r" *\| *", line.strip("| ")) for line in PAGES["docs/train.md"].splitlines() if "|" in line
        )
    }
    for column, name in enumerate(("saliencymix", "puzzle", "rmix", "shapes")):
        recipe = RECIPES[name]
        assert rows["model, data"][column] == f"{recipe['model']}, {recipe['dataset']}"
        assert rows["epochs, batch"][column] == f"{recipe['epochs']}, {recipe['batch_size']}"
        assert float(rows["weight decay"][column]) == recipe["weight_decay"]
    for column, name in enumerate(("openmixup", "vit_cifar", "deit", "fine_tune")):
        recipe = (RECIPES | IMAGENET_RECIPES)[name](Typed())
        assert rows["network, data"][column].startswith(f"{recipe['model']}, {recipe['dataset']}")
        assert rows["epochs, images a step"][column] == f"{recipe['epochs']}, {recipe['batch_size']}"
        for row, key in (("rate", "lr"), ("decay", "weight_decay")):
            assert float(re.match(r"[\d.e-]+", rows[row][column]).group()) == recipe[key]


def test_the_corruptions_are_described():
    page = PAGES["docs/evaluate.md"].lower()
    for name, function in CORRUPTIONS.items():
        text = " ".join(function.__doc__.split()).partition(". ")[0].rstrip(".")
        assert f"| `{name}` | {text} |".lower() in page


def make_anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of the headings of a page."""
    headings = [
        line.lstrip("# ").lower() for line in re.sub(r"```.*?```", "", text, flags=re.S).splitlines() if line[:1] == "#"
    ]
    return {re.sub(r"[^a-z0-9 _-]", "", heading).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", re.sub(r"```.*?```", "", PAGES[page], flags=re.S)):
        file, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in make_anchors(path.read_text()), target


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_left_to_be_filled_in(page):
    prose = re.sub(r"```.*?```|`[^`]*`", "", PAGES[page], flags=re.S)
    assert not re.findall(r"\b[A-Z]+_[A-Z_]{3,}\b|<!-- expect|TODO", prose)


def test_every_page_is_in_the_index():
    index = PAGES["docs/README.md"]
    assert all(
        f"({page.removeprefix('docs/')})" in index
        for page in PAGES
        if page.startswith("docs/") and page != "docs/README.md"
    )


def test_the_table_of_detection_recipes_is_what_they_are():
    section = PAGES["docs/detection.md"].split("\n## Recipes\n")[1].split("\n## ")[0]
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
