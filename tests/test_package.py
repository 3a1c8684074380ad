"""The package that pip installs: what the wheel holds, and that it works outside of the repository."""

import ast
import re
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support import ROOT, run_installed

from mixing import MIXERS

INIT = ROOT / "package" / "saliency_mixing" / "__init__.py"


@pytest.fixture
def run(installed_package, tmp_path):
    """Return a function that runs code with the installed package outside of the repository."""
    return lambda code: run_installed(installed_package, code, tmp_path)


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


def test_public_names_are_imported_on_first_use(run):
    (typed,) = [node for node in ast.parse(INIT.read_text()).body if isinstance(node, ast.If)]
    names = sorted(alias.name for node in typed.body for alias in node.names)
    code = "import sys, saliency_mixing as package\nassert 'torch' not in sys.modules\n"
    code += "from saliency_mixing import *\n"
    code += "print(sorted(name for name in package.__all__ if globals()[name] is getattr(package, name)))\n"
    code += "assert {*package.__all__, '__version__'} <= {*dir(package)}"
    assert ast.literal_eval(run(code)) == names
    assert {cls for _, cls in MIXERS.values()} <= {*names}
