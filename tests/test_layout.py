"""Who may import whom: the table of the design, held by walking the import statements."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"models", "mixing", "saliency", "engine", "detection"}
SCRIPTS = {"train", "imagenet_train", "evaluate", "detect", "cam"}
MAY = {  # package -> which of ours it may import
    "models": {"models"},
    "saliency": {"saliency"},
    "mixing": {"mixing"},
    "engine": {"engine"},
    "detection": {"detection", "models", "engine"},
}
NUMERIC = {"models": {"torch"}, "mixing": {"torch"}, "saliency": {"torch", "numpy", "cv2"}}
EXCEPTIONS = {  # file -> what it may import besides
    "saliency/casm": {"models", "engine"},
    "saliency/casm/judges.py": {"torchvision"},
    "mixing/show.py": {"models", "engine", "saliency", "matplotlib", "numpy", "torchvision"},
    "mixing/graphcut.py": {"gco", "numpy"},
}


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", sorted(p for p in MAY if (ROOT / p).is_dir()))
def test_a_package_imports_only_what_the_table_allows(package):
    for path in files(package):
        name = path.relative_to(ROOT).as_posix()
        extra = set().union(*(allowed for prefix, allowed in EXCEPTIONS.items() if name.startswith(prefix)))
        names = imported(path)
        assert not names & SCRIPTS, f"{name} imports a script"
        assert names & OURS <= MAY[package] | extra, f"{name} imports {names & OURS}"
        if package in NUMERIC:
            foreign = names & {"torch", "numpy", "cv2", "torchvision", "gco", "matplotlib", "tqdm", "PIL"}
            assert foreign <= NUMERIC[package] | extra, f"{name} imports {foreign}"


def test_no_script_imports_another():
    for script in SCRIPTS:
        path = ROOT / f"{script}.py"
        if path.exists():
            assert not imported(path) & SCRIPTS, script


def test_gco_is_imported_in_one_file_only():
    users = [p.relative_to(ROOT).as_posix() for package in OURS for p in files(package) if "gco" in imported(p)]
    assert users in ([], ["mixing/graphcut.py"])
