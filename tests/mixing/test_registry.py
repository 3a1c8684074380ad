"""The registries of methods and sources, and the flags for their parameters."""

import re
import subprocess
import sys

import pytest
from support import ROOT

import mixing
import saliency
import train
from mixing import MIXERS, compose_options, hyper_parameters
from saliency import SOURCES

SET_BY_RECIPES = {"method_options"}


@pytest.fixture(scope="module")
def helps():
    """Return option -> help text without the default in brackets."""
    actions = train.build_parser()._actions
    return {action.dest: re.sub(r" ?\[.*\]$", "", action.help or "") for action in actions}


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_every_hyper_parameter_of_a_method_has_a_flag_and_a_help_text(name, helps):
    for key in hyper_parameters(name).keys() - {"mean", "std"}:
        assert helps.get(key), f"{name} {key}"


def test_every_option_of_a_source_has_a_flag_and_a_help_text(helps):
    options = saliency.list_source_options()
    assert {"saliency_size", "bank_size", "bank_momentum", "casm"} <= set(options)
    for key in options:
        assert helps.get(key), key


def test_every_option_of_compose_mixer_has_a_flag_and_a_help_text(helps):
    for key in set(compose_options([])) - SET_BY_RECIPES:
        assert helps.get(key), key


@pytest.mark.parametrize("name", sorted(MIXERS))
def test_the_reported_hyper_parameters_are_those_of_the_mixer(name):
    by_method = {"cutmix": {"mixup_alpha": 0.2, "cutmix_box": "real"}, "mixup": {"mixup_alpha": 0.3}}
    (values,) = mixing.collect_hyper_parameters([name], method_options=by_method, mix_prob=None).values()
    mixer = mixing.compose_mixer([name], method_options=by_method, mix_prob=None)
    assert values.keys() == hyper_parameters(name).keys() - mixing.SETTINGS
    for key, value in values.items():
        assert key == "adv_eps" or getattr(mixer, key, value) == value, key  # the mixer keeps adv_eps in another unit
    wanted = hyper_parameters(name) | by_method.get(name, {})
    wanted = {key: value for key, value in wanted.items() if key not in mixing.SETTINGS}
    assert values == wanted
    assert mixing.collect_hyper_parameters([name], method_options=by_method, mixup_alpha=0.7)[name] == {
        key: 0.7 if key == "mixup_alpha" else value for key, value in wanted.items()
    }


def test_packages_import_their_public_names_lazily():
    code = "import sys, mixing, saliency, models; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    for package, names in (
        (mixing, ["Mixer", "Chain", "Choice", "PartialMix", "compose_mixer", *(cls for _, cls in MIXERS.values())]),
        (saliency, ["Source", "ActivationMaps", *(cls for _, cls in SOURCES.values())]),
    ):
        assert all(getattr(package, name).__name__ == name for name in names)
        with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
            package.Nonsense  # noqa: B018
