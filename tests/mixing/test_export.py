"""A method as one file: it imports torch alone, reads well, and mixes as the package does, bit for bit."""

import ast
import os
import re
import subprocess
import sys
import tokenize
from collections import OrderedDict
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from io import StringIO
from types import ModuleType

import pytest
import torch
from support import ROOT, run_installed, same_state
from torch.nn import functional as F

import saliency
from mixing import MIXERS, mixer_class
from mixing.export import modules
from mixing.export.__main__ import METHODS, SOURCES, main, write_file
from mixing.export.bundle import Bundle
from mixing.export.text import write_body

PUBLISHED = {method: mixer_class(method).default_source for method in METHODS}
CASES = [(method, "gradient" if source and source not in SOURCES else source) for method, source in PUBLISHED.items()]
CASES += [("saliencymix", name) for name in SOURCES if name != "fine_grained"]
CASES += [("comixup", "fine_grained"), ("sage", "uniform"), ("rlmix", "spectral_residual")]
OPTIONS = {  # small, and such that each solver is reached
    "cutout": {"cutout_length": 4},
    "puzzlemix": {"block_num": (2, 8), "adv_p": 0.5, "clean_lam": 0.5},
    "comixup": {"m_block_num": 4, "m_part": 3, "m_niter": 1},
    "sage": {"rand_pos": 0.02},
    "rmix": {"random_patches": (4,), "clean_lam": 0.5},
    "attentivemix": {"num_patches": 4},
    "rlmix": {"random_patches": (4,), "num_patches": 4, "agent_trajectory_size": 2, "agent_epochs": 1},
}
SHAPES = [(4, 3, 16, 16), (5, 3, 16, 24), (1, 3, 16, 16)]  # an odd batch with H != W; one image
HIDDEN = ("mixing", "saliency", "engine", "models", "numpy", "cv2", "triton", "saliency_mixing")
LONGEST = {"cutout": 170, "mixup": 230, "cutmix": 290, "manifold": 280, "saliencymix": 480, "rmix": 600, "sage": 800}
LONGEST |= {"smmix": 540, "maskmix": 260, "s2mix": 530}
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


@cache
def export(method: str, source: str | None) -> str:
    return write_file(method, source, method)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Return a function that imports the file of a method where nothing but torch can be imported."""

    def run(method: str, source: str | None) -> ModuleType:
        path = tmp_path / f"{method}.py"
        path.write_text(export(method, source))
        spec = spec_from_file_location(f"single_file_{method}", path)
        module = module_from_spec(spec)
        with monkeypatch.context() as hidden:
            for name in HIDDEN:
                hidden.setitem(sys.modules, name, None)
            spec.loader.exec_module(module)
        return module

    return run


def build_network() -> torch.nn.Module:
    torch.manual_seed(3)
    layers = {"layer1": torch.nn.Conv2d(3, 4, 3, padding=1), "layer2": torch.nn.BatchNorm2d(4), "relu": torch.nn.ReLU()}
    layers |= {"pool": torch.nn.AdaptiveAvgPool2d(2), "flat": torch.nn.Flatten(), "linear": torch.nn.Linear(16, 5)}
    network = torch.nn.Sequential(OrderedDict(layers))
    network.stages = ("layer1", "layer2")
    return network


def train(method: str, shape: tuple[int, ...], mixer_type: type, source_type: type | None) -> list:
    """Return all that three steps of a method with these classes give."""
    model, options = build_network(), {"mix_prob": 1.0, **OPTIONS.get(method, {})}
    if method == "cutout":
        del options["mix_prob"]
    if method == "puzzlemix":
        options |= {"mean": MEAN, "std": STD, "adv_p": 0.5 if source_type.has_gradient else 0.0}
    mixer, source = mixer_type(**options), None
    if source_type:
        is_gradient, is_static = source_type.__name__ == "Gradient", source_type.__name__ != "Uniform"
        source = (
            source_type(model, **mixer.gradient_options) if is_gradient else source_type(*[MEAN, STD][: 2 * is_static])
        )
    results = []
    torch.manual_seed(1)
    for _ in range(3):
        images, targets = torch.randn(shape), torch.eye(5)[torch.arange(shape[0]) % 5]
        model.zero_grad()
        mixed, soft = mixer(images, targets, source)
        mixed.requires_grad_(mixer_class(method).wants_mixed_grad)
        clean = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        with mixer.during(model) if method == "manifold" else torch.enable_grad():
            (mixer.mixed_weight * F.cross_entropy(model(mixed), soft)).backward()
        if mixer_class(method).wants_mixed_grad:
            mixer.after_backward(mixed.grad)
        results.append([mixed.detach(), soft, mixer.weight, mixer.partner, clean, mixer.mixed_weight])
        results.append([p.grad.clone() for p in model.parameters()])
    return [*results, torch.rand(2)]


@pytest.mark.parametrize(("method", "source"), CASES)
def test_a_file_mixes_as_the_package_does(method, source, load):
    module = load(method, source)
    ours = [mixer_class(method), source and saliency.source_class(source)]
    theirs = [cls and getattr(module, cls.__name__) for cls in ours]
    assert not set(theirs) - {None} & set(ours)
    for shape in SHAPES:
        assert same_state(train(method, shape, *ours), train(method, shape, *theirs)), shape


def test_the_cases_train_on_clean_images_and_teach_the_agent():
    """What is compared above is not trivial: the clean gradient is there, blocks move, the agent has learned."""
    for method in ("puzzlemix", "comixup", "sage", "rmix"):
        results = train(method, SHAPES[0], mixer_class(method), saliency.source_class("gradient"))
        assert len(results[0][4]) == 6, method
    learned = []
    agent = import_module("mixing.solvers.rlmix_agent").Agent
    keep, agent.learn = agent.learn, lambda self, *args: (learned.append(self), keep(self, *args))
    try:
        train("rlmix", SHAPES[0], mixer_class("rlmix"), saliency.source_class("gradient"))
    finally:
        agent.learn = keep
    assert learned


@pytest.mark.parametrize(("method", "source"), CASES)
def test_the_usage_runs(method, source, load, monkeypatch):
    monkeypatch.setitem(sys.modules, method, load(method, source))
    usage = export(method, source).split("Usage:\n\n")[1].split('"""')[0]
    assert 9 <= len(usage.strip().splitlines()) <= 16
    model = build_network()
    names = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1), "num_classes": 5, "epochs": 1}
    names |= {"mean": MEAN, "std": STD, "loader": [(torch.randn(4, 3, 16, 16), torch.arange(4))] * 2}
    before = model.layer1.weight.clone()
    exec(re.sub("^    ", "", usage, flags=re.M), names)
    assert names["loss"].isfinite() and not torch.equal(before, model.layer1.weight)


@pytest.mark.parametrize(("method", "source"), CASES)
def test_a_file_holds_only_what_it_uses(method, source):
    """No unused definition, import or parameter, and no word on files, modules or options that are not there."""
    text = export(method, source)
    tree = ast.parse(text)
    assert len(text.splitlines()) <= LONGEST.get(method, 1250) + (60 if source == "gradient" else 0)
    nodes = list(ast.walk(tree))
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    tops = {name.split(".")[0] for node in imports for name in [getattr(node, "module", None) or node.names[0].name]}
    assert tops - {"torch"} <= sys.stdlib_module_names and not any(getattr(node, "level", 0) for node in imports)
    exported = {mixer_class(method).__name__, source and saliency.source_class(source).__name__}
    read = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    read |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    for statement in tree.body:
        names = [one.id for one in ast.walk(statement) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)]
        named = isinstance(statement, (ast.FunctionDef, ast.ClassDef))
        names = [statement.name] if named else names if isinstance(statement, (ast.Assign, ast.AnnAssign)) else []
        assert set(names) <= read | exported, names
    arguments = {one.arg for node in nodes if isinstance(node, ast.arguments) for one in [*node.args, *node.kwonlyargs]}
    assert not arguments & {"kernels", "solver"}
    written = re.sub(r"Written by `python -m mixing\.export [^`]*` of saliency-mixing \d+\.\d+\.\d+\.\n", "", text)
    assert len(written) < len(text)
    tokens = tokenize.generate_tokens(StringIO(written).readline)
    prose = [token.string for token in tokens if token.type in (tokenize.COMMENT, tokenize.STRING)]
    foreign = r"\b(?:mixing|saliency|engine|models)[./]\w|\w\.py\b|[^-\w]--[a-z]|PartialMix|build_source"
    assert not [text for text in prose if re.search(foreign, text)]
    known = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))} | read
    named = {name for text in prose for name in re.findall(r"(\w+)\(\)", text.split("Usage:")[0])}
    assert named <= known | {"deepcopy", *dir(torch.nn.Module)}, named - known


def test_an_import_under_another_name_and_a_dataclass_are_written_whole(tmp_path, monkeypatch):
    lines = ["import torch.nn.functional as functional", "from dataclasses import dataclass", "", "", "@dataclass"]
    lines += ["class Item:", "    unread: int", "    value: int = 2", "", "", "class Example:", "    def run(self, x):"]
    lines += ["        return functional.relu(x) * Item(1).value"]
    (tmp_path / "example.py").write_text("\n".join(['"""An example."""', "", *lines, ""]))
    monkeypatch.setattr(modules, "ROOT", tmp_path)
    parts, names = ("example",), {}
    exec(write_body(Bundle([(parts, "Example")], ""), [parts], parts), names)
    assert names["Example"]().run(torch.tensor([-1.0, 3.0])).tolist() == [0, 6]


def test_the_files_are_formatted_as_our_code(tmp_path):
    for method, source in CASES:
        (tmp_path / f"{method}_{source}.py").write_text(export(method, source))
    for command in (["check"], ["format", "--check"]):
        words = [sys.executable, "-m", "ruff", *command, "--no-cache", "--config", ROOT / "pyproject.toml", tmp_path]
        done = subprocess.run(words, capture_output=True, text=True)
        assert not done.returncode, done.stdout


def test_a_file_is_printed_or_written(tmp_path, capsys):
    main(["mixup_hidden"])
    printed = capsys.readouterr().out
    assert printed == export("manifold", None) and printed.startswith("# SPDX-License-Identifier: MIT\n")
    path, other = tmp_path / "own.py", tmp_path / "own.py.tmp"
    other.write_text("mine")
    for _ in range(2):  # the file of an earlier call is replaced
        main(["saliencymix", "--source", "static", "--output", str(path)])
    assert path.read_text() == export("saliencymix", "fine_grained").replace(
        "from saliencymix import", "from own import"
    )
    assert {*tmp_path.iterdir()} == {path, other} and other.read_text() == "mine"
    main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [name for name in MIXERS if name != "none"]
    assert "puzzlemix    gradient               keep the salient blocks of two images" in lines[6]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["puzlemix"], "unknown method 'puzlemix': did you mean puzzlemix?"),
        (["PuzzleMix"], "unknown method 'PuzzleMix': did you mean puzzlemix?"),
        (["none"], "unknown method 'none': choose from cutout, "),
        ([], "name a method, or --list them"),
        (["cutmix", "--source", "uniform"], "--source uniform: cutmix needs no saliency; leave the option out"),
        (["sage", "--source", "spectal"], "unknown source 'spectal': did you mean spectral?"),
        (["sage", "--source", "fg"], f"unknown source 'fg': choose from {', '.join(SOURCES)}"),
        (["sage", "--source", "bank"], "--source bank cannot be written as one file: it learns in every training step"),
        (["sage", "--source", "casm"], "--source casm cannot be written as one file: it needs a trained mask network"),
        (["snapmix"], "cam, the source of snapmix, cannot be written as one file: it looks for a layer in any network"),
        (["sage", "--output", "photos.py"], "--output photos.py: this file exists and was not written by this command"),
        (["sage", "--output", "no/such.py"], "--output no/such.py: there is no folder no; make it first"),
        (["sage", "--output", "my-files/"], "--output my-files/: this is a folder; name a file in it"),
        (["sage", "--output", "my-sage.py"], "--output my-sage.py: Python cannot import 'my-sage'; use letters, "),
        (["sage", "--output", "/proc/sage.py"], "--output /proc/sage.py: "),
    ],
)
def test_what_cannot_be_written_is_refused_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mine = "# a file of the user, on the command\nWritten by `python -m mixing.export sage`.\n"
    (tmp_path / "photos.py").write_text(mine)
    (tmp_path / "my-files").mkdir()
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"python -m mixing.export: error: {message}")
    assert (tmp_path / "photos.py").read_text() == mine and len([*tmp_path.rglob("*")]) == 2


@pytest.mark.parametrize("word", ["cutmix", "--list"])
def test_a_reader_that_has_exited_stops_the_command_quietly(word, monkeypatch, capfd):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit, match="1"):
            main([word])
    assert not capfd.readouterr().err


def test_the_installed_package_writes_the_same_file(installed_package, tmp_path):
    code = "import runpy, sys; sys.argv = ['export', 'cutmix']\n"
    code += "runpy.run_module('saliency_mixing.mixing.export', run_name='__main__', alter_sys=True)\n"
    code += "from saliency_mixing.mixing.export.__main__ import build_parser\nprint(build_parser().prog)"
    printed = run_installed(installed_package, code, tmp_path)
    assert printed == export("cutmix", None) + "python -m saliency_mixing.mixing.export\n"
