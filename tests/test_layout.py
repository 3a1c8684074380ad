"""Who may import whom: the table and the floors of the plan in docs/architecture.md, held by walking the imports."""

import ast
from pathlib import Path

import pytest
from support import ROOT

PACKAGES = ("models", "mixing", "saliency", "engine", "evaluation", "explanation", "detection")
SCRIPTS = {"train", "imagenet_train", "evaluate", "detect", "cam"}
MAY_IMPORT = {  # package -> which of ours it may import besides itself
    "models": set(),
    "saliency": set(),
    "mixing": set(),
    "engine": set(),
    "evaluation": {"engine", "saliency", "models"},
    "explanation": {"engine", "saliency", "models"},
    "detection": {"engine", "models"},
}
THIRD_PARTY = {"torch", "numpy", "cv2", "torchvision", "gco", "matplotlib", "tqdm", "PIL", "pycocotools"}
NUMERIC = {"models": {"torch"}, "mixing": {"torch"}, "saliency": {"torch", "numpy", "cv2"}}
EXCEPTIONS = {  # path prefix -> what it may import besides
    "saliency/casm": {"models", "engine"},
    "saliency/casm/classifier_eval.py": {"torchvision"},
    "mixing/show.py": {"models", "engine", "saliency", "matplotlib", "numpy", "torchvision"},
    "mixing/solvers/graphcut.py": {"gco", "numpy"},
}
FLOORS = (  # of engine, from the ground up: a module imports from its own floor and from those below
    "engine.errors",
    "engine.config",
    "engine.runtime",
    "engine.drawing",
    "engine.data",
    "engine.inference",
    "engine.training",
    "engine.launch",
)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> set[str]:
    """Every module that a file imports, at its head or inside a function; `from package import module` counts too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def head_imports(path: Path) -> set[str]:
    """The modules of ours that are imported as soon as the file is."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def floor(module: str) -> int | None:
    return next((n for n, name in enumerate(FLOORS) if module == name or module.startswith(f"{name}.")), None)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_the_table_allows(package):
    assert files(package)
    for path in files(package):
        name = path.relative_to(ROOT).as_posix()
        extra = set().union(*(allowed for prefix, allowed in EXCEPTIONS.items() if name.startswith(prefix)))
        tops = {module.split(".")[0] for module in imported_modules(path)}
        assert not tops & SCRIPTS, f"{name} imports a script"
        assert tops & set(PACKAGES) <= MAY_IMPORT[package] | {package} | extra, f"{name} imports {tops & set(PACKAGES)}"
        if package in NUMERIC:
            assert tops & THIRD_PARTY <= NUMERIC[package] | extra, f"{name} imports {tops & THIRD_PARTY}"


def test_engine_imports_never_run_up():
    for path in files("engine"):
        own = floor(module_name(path))
        for module in imported_modules(path):
            above = floor(module)
            assert own is None or above is None or above <= own, f"{module_name(path)} imports {module}"


def test_there_is_no_circle():
    modules = {module_name(path): path for package in PACKAGES for path in files(package)}
    graph = {name: head_imports(path) & modules.keys() - {name} for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"a circle: {' -> '.join([*trail[trail.index(name) :], name])}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(modules):
        visit(name, ())


def test_saliency_knows_casm_only_by_name():
    """The sources of saliency stand alone; only saliency/casm reaches into engine and models."""
    for path in files("saliency"):
        if "casm" not in path.parts:
            assert not any(module.startswith("saliency.casm") for module in imported_modules(path)), path


def test_no_script_imports_another():
    for script in SCRIPTS:
        tops = {module.split(".")[0] for module in imported_modules(ROOT / f"{script}.py")}
        assert not tops & SCRIPTS, script


def test_gco_is_imported_in_one_file_only():
    users = [path for package in PACKAGES for path in files(package) if "gco" in imported_modules(path)]
    assert [path.relative_to(ROOT).as_posix() for path in users] == ["mixing/solvers/graphcut.py"]
