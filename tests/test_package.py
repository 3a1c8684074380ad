"""The package that pip installs: what the wheel holds, and that it works outside of the repository."""

import ast
import inspect
import re
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from support import ROOT, run_installed

from mixing import MIXERS

INIT = ROOT / "package" / "saliency_mixing" / "__init__.py"
IMAGES, TARGETS = torch.rand(4, 3, 32, 32), torch.eye(10)[:4]


@pytest.fixture
def package(installed_package, monkeypatch):
    """The installed package in this process, where the folders of the repository are on the path, too."""
    monkeypatch.syspath_prepend(installed_package)
    return import_module("saliency_mixing")


def list_modules(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


def test_the_package_holds_mixing_and_the_sources_without_engine(installed_package):
    assert {path.name.split("-")[0] for path in installed_package.iterdir()} == {"saliency_mixing"}
    modules = list_modules(installed_package / "saliency_mixing")
    ours = {f"mixing/{name}" for name in list_modules(ROOT / "mixing") if not name.startswith("show/")}
    ours |= {f"saliency/{name}" for name in list_modules(ROOT / "saliency") if not name.startswith("casm/")}
    assert modules == ours | list_modules(ROOT / "package" / "saliency_mixing")
    assert (installed_package / "saliency_mixing" / "py.typed").is_file()


def test_requirements_and_extras_agree(installed_package):
    """The bounds stand in requirements*.txt, for the scripts and tests, and in pyproject.toml, for the package."""
    (package,) = distributions(path=[str(installed_package)])
    assert package.version == ast.literal_eval(re.search("__version__ = (.*)", INIT.read_text())[1])
    groups: dict[str | None, set[str]] = {}
    for line in package.requires:
        requirement, extra = re.match(r"""(.*?)(?:(?:;| and) extra == "(\w+)")?$""", line).groups()
        groups.setdefault(extra, set()).add(str(Requirement(requirement)))
    texts = {}
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = [line.partition("  #")[0] for line in (ROOT / name).read_text().splitlines()]
        texts[name] = {str(Requirement(line)) for line in lines if not line.startswith("-r")}
    everything = set().union(*texts.values())
    assert groups[None] == {"torch>=2.6"} and groups[None] < texts["requirements.txt"]
    extras = {name: lines for name, lines in groups.items() if name not in (None, "dev")}
    assert set().union(*extras.values()) < everything
    (reference,) = [Requirement(line) for line in groups["dev"] if line.startswith("saliency-mixing")]
    assert reference.extras == extras.keys()
    assert set().union(*groups.values()) == everything | {str(reference)}


def test_public_names_are_imported_on_first_use(installed_package, tmp_path):
    (typed,) = [node for node in ast.parse(INIT.read_text()).body if isinstance(node, ast.If)]
    names = sorted(alias.name for node in typed.body for alias in node.names)
    code = "import sys, saliency_mixing as package\nassert 'torch' not in sys.modules\n"
    code += "from saliency_mixing import *\n"
    code += "print(sorted(name for name in package.__all__ if globals()[name] is getattr(package, name)))\n"
    code += "assert {*package.__all__, '__version__'} <= {*dir(package)}"
    assert ast.literal_eval(run_installed(installed_package, code, tmp_path)) == names
    assert {cls for _, cls in MIXERS.values()} <= {*names}


def test_the_constructors_build_the_sources_of_their_names(package):
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    network.append(torch.nn.Linear(8, 10))
    statistics = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}
    sage = package.SAGE(update_ratio=1.0, kernel_size=3).gradient_options
    built = [
        ("gradient", package.gradient_source(network, **sage)),
        ("fine_grained", package.static_source(**statistics)),
    ]
    static = ("spectral_residual", "spectral_residual_full", "float_bytes")
    built += [(name, package.static_source(**statistics, method=name)) for name in static]
    built += [(name, package.cam_source(network, name)) for name in ("cam", "gradcam", "gradcam++", "layercam")]
    for name, source in built:
        named = package.build_source(name, model=network, **statistics, **sage)
        assert type(source) is type(named)
        assert torch.equal(source(IMAGES, TARGETS), named(IMAGES, TARGETS))
    for function, name in (("gradient_source", "gradient"), ("attention_source", "attention"), ("bank_source", "bank")):
        own = inspect.signature(getattr(package, function)).parameters
        named = inspect.signature(import_module("saliency_mixing.saliency").source_class(name)).parameters
        assert {key: value.default for key, value in own.items()} == {key: named[key].default for key in own}


def test_wrong_arguments_of_the_constructors_are_refused(package):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    with pytest.raises(ValueError, match="unknown method 'gradcam'; choose from fine_grained"):
        package.static_source((0.5,) * 3, (0.5,) * 3, "gradcam")
    with pytest.raises(ValueError, match="unknown method 'attention'; choose from cam, gradcam"):
        package.cam_source(network, "attention")
    with pytest.raises(ValueError, match="reduction must be rms or mean_abs, got 'max'"):
        package.gradient_source(network, reduction="max")
    with pytest.raises(ValueError, match="casm is not part of saliency_mixing.* put its folder on PYTHONPATH"):
        package.build_source("casm", casm="masks.pt")
    with pytest.raises(ValueError, match="PuzzleMix needs a saliency source as its third argument"):
        package.PuzzleMix()(IMAGES, TARGETS)


def test_an_editable_install_works_without_engine(tmp_path):
    """There, the folders of the package are those of the repository, and the other ones are not on the path."""
    code = f"import saliency_mixing as package\npackage.__path__.append({str(ROOT)!r})\n"
    code += "from saliency_mixing.mixing.export.__main__ import write_file\nwrite_file('cutout', None, 'cutout')\n"
    code += "try:\n    package.build_source('casm', casm='masks.pt')\nexcept ValueError as error:\n    print(error)"
    assert "casm is not part of saliency_mixing" in run_installed(ROOT / "package", code, tmp_path)
