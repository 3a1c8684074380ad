"""Option types: the range of every numeric option of every command, and paths."""

import argparse
from importlib import import_module
from pathlib import Path

import pytest

import train

MODULES = [
    "train",
    "imagenet_train",
    "detection.options",
    "evaluation.options",
    "explanation.options",
    "mixing.show.__main__",
]
MODULES += [f"saliency.casm.commands.{name}" for name in ("train", "score", "eval", "plot")]
TOO_LARGE = str(10**30)


def is_numeric(convert) -> bool:
    """Return whether an option type converts text to numbers."""
    try:
        value = convert("1")
    except (argparse.ArgumentTypeError, ValueError):
        return False
    return type(value[0] if isinstance(value, list) else value) in (int, float)


def get_error(parser, capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parser.read(list(words))
    text = capsys.readouterr().err
    assert stop.value.code == 2 and text.count("\n") == 1
    return text


@pytest.mark.parametrize("module", MODULES)
def test_every_numeric_option_takes_finite_numbers_only(module, capsys):
    parser = import_module(module).build_parser()
    numeric = [action for action in parser._actions if action.type and is_numeric(action.type)]
    assert numeric
    for action in numeric:
        name, count = action.option_strings[0], action.nargs if isinstance(action.nargs, int) else 1
        is_integer = isinstance(action.type("1"), (int, list))
        for word in ["nan", "inf", "1e400", "²", *([TOO_LARGE] if is_integer else [])]:
            error = get_error(parser, capsys, name, *[word] * count)
            assert "expected" in error or "choose from" in error


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--ema 1", "below 1"),
        ("--momentum 1", "below 1"),
        ("--pct_start 1", "below 1"),
        ("--label_smoothing 1", "below 1"),
        ("--dropout 1", "below 1"),
        ("--bank_momentum 1", "below 1"),
        ("--lr 0", "above 0"),
        ("--max_lr 0", "above 0"),
        ("--gammas 0.1 0", "above 0"),
        ("--agent_lr 0", "above 0"),
        (f"--seed {2**63}", f"at most {2**63 - 1}"),
    ],
)
def test_values_with_which_nothing_is_learned_are_refused(words, expected, capsys):
    assert expected in get_error(train.build_parser(), capsys, *words.split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [("--m_part 1", "at least 2"), ("--n_labels 5", "at most 4"), ("--gamma 1.5", "between 0 and 1")],
)
def test_bounds_of_a_method_are_known_before_anything_is_loaded(words, expected, capsys):
    assert expected in get_error(train.build_parser(), capsys, *words.split())


def test_a_positional_argument_that_is_not_given_is_not_among_the_typed_options():
    """argparse converts its default, which marks that it is missing."""
    assert import_module("saliency.casm.commands.train").build_parser().read([]) == {}


@pytest.mark.parametrize("module", [*MODULES, "evaluation.compare.__main__"])
def test_every_path_option_expands_the_home_folder(module):
    parser = import_module(module).build_parser()
    paths = [a for a in parser._actions if isinstance(a.metavar, str) and a.metavar[:4] in ("DIR", "FILE", "PATH")]
    assert paths or "casm" in module
    for action in paths:
        value = parser.read([f"{action.option_strings[0]}=~/images"])[action.dest]
        assert [*value, value][0 if isinstance(value, list) else -1] == str(Path.home() / "images"), action.dest
    if module == "evaluation.options":
        assert parser.read(["--model_path=vgg16=~/a.pt"]) == {"model_path": [f"vgg16={Path.home() / 'a.pt'}"]}
        assert parser.read(["--ood", "mine=~/a"]) == {"ood": [f"mine={Path.home() / 'a'}"]}
        assert parser.read(["--model_path=~/lr=0.1/a.pt"]) == {"model_path": [str(Path.home() / "lr=0.1" / "a.pt")]}


def test_key_value_reads_literals_and_words(capsys):
    words = "--model_args a=0.1 b=(3,3) c=True d=false e=none f=gelu".split()
    args = train.build_parser().read(words)["model_args"]
    assert args == {"a": 0.1, "b": [3, 3], "c": True, "d": False, "e": None, "f": "gelu"}
    assert "expected KEY=VALUE, got 'patch_size'" in get_error(
        train.build_parser(), capsys, "--model_args", "patch_size"
    )
