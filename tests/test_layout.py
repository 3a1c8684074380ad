"""The import rules of docs/architecture.md: which package may import which, and the layers inside engine."""

import ast
from collections.abc import Iterable
from pathlib import Path

import pytest
from support import ROOT

PACKAGES = ("models", "mixing", "saliency", "engine", "evaluation", "explanation", "detection")
SCRIPTS = {"train", "imagenet_train", "evaluate", "detect", "cam"}
MAY_IMPORT = {  # package -> other packages of this repository that it may import
    "models": set(),
    "saliency": set(),
    "mixing": set(),
    "engine": set(),
    "evaluation": {"engine", "saliency", "models"},
    "explanation": {"engine", "saliency", "models"},
    "detection": {"engine", "models"},
}
THIRD_PARTY = {"torch", "numpy", "cv2", "torchvision", "gco", "matplotlib", "tqdm", "PIL", "pycocotools", "triton"}
THIRD_PARTY |= {"timm"}
NUMERIC = {"models": {"torch"}, "mixing": {"torch"}, "saliency": {"torch", "numpy", "cv2"}}
EXCEPTIONS = {  # path prefix -> additional packages that it may import
    "saliency/casm": {"models", "engine"},
    "saliency/casm/classifier_eval.py": {"torchvision"},
    "mixing/export/": {"saliency"},  # by name, to read the text of its modules; not in an import statement
    "mixing/show/": {"models", "engine", "saliency", "matplotlib", "numpy", "torchvision"},
    "models/library": {"torchvision", "timm"},
    "models/pretrained.py": {"torchvision", "timm"},
    "mixing/solvers/__init__.py": {"gco"},
    "mixing/solvers/graphcut.py": {"numpy"},
    "mixing/kernels/": {"triton"},
}
LAYERS = (  # of engine, from the lowest: a module may import from its own layer and from lower ones
    "engine.errors",
    "engine.config",
    "engine.runtime",
    "engine.drawing",
    "engine.data",
    "engine.inference",
    "engine.training",
    "engine.launch",
)


def get_module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def list_names(path: Path, nodes: Iterable[ast.AST]) -> set[str]:
    """Return the modules that the import statements among `nodes` name; `from package import module` counts too."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def find_imports(path: Path) -> set[str]:
    """Return all modules that a file imports, at its top or in a function."""
    return list_names(path, ast.walk(ast.parse(path.read_text())))


def find_top_level_imports(path: Path) -> set[str]:
    """Return the modules that are imported as soon as the file is."""
    return list_names(path, ast.parse(path.read_text()).body)


def is_installed(path: Path) -> bool:
    """Return whether a file of mixing or saliency is part of the package that pip installs."""
    name = path.relative_to(ROOT).as_posix()
    return not name.startswith(("mixing/show/", "saliency/casm/"))


def test_only_the_installed_packages_have_relative_imports():
    """pip installs mixing and saliency under another name, so their modules name each other relatively."""
    for package in PACKAGES:
        for path in list_files(package):
            nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
            relative = [bool(node.level) for node in nodes if node.level or node.module.split(".")[0] == package]
            installed = package in ("mixing", "saliency") and is_installed(path)
            assert all(level == installed for level in relative), path


def test_the_names_of_the_package_need_nothing_but_mixing_saliency_and_torch():
    allowed = {"saliency_mixing.mixing", "saliency_mixing.saliency", "saliency_mixing.sources", "torch", "typing"}
    allowed |= {"importlib", "collections"}
    for path in list_files("package/saliency_mixing"):
        imports = {name.removeprefix("package.") for name in find_imports(path)}
        assert all(any(f"{name}.".startswith(f"{start}.") for start in allowed) for name in imports), path


def list_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def find_layer(module: str) -> int | None:
    return next((n for n, name in enumerate(LAYERS) if module == name or module.startswith(f"{name}.")), None)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_is_allowed(package):
    assert list_files(package)
    for path in list_files(package):
        name = path.relative_to(ROOT).as_posix()
        extra = set().union(*(allowed for prefix, allowed in EXCEPTIONS.items() if name.startswith(prefix)))
        tops = {module.split(".")[0] for module in find_imports(path)}
        assert not tops & SCRIPTS, f"{name} imports a script"
        assert tops & set(PACKAGES) <= MAY_IMPORT[package] | {package} | extra, f"{name} imports {tops & set(PACKAGES)}"
        if package in NUMERIC:
            assert tops & THIRD_PARTY <= NUMERIC[package] | extra, f"{name} imports {tops & THIRD_PARTY}"


def test_engine_never_imports_from_a_higher_layer():
    for path in list_files("engine"):
        own = find_layer(get_module_name(path))
        for module in find_imports(path):
            imported = find_layer(module)
            assert own is None or imported is None or imported <= own, f"{get_module_name(path)} imports {module}"


def test_there_are_no_circular_imports():
    modules = {get_module_name(path): path for package in PACKAGES for path in list_files(package)}
    graph = {name: find_top_level_imports(path) & modules.keys() - {name} for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circular import: {' -> '.join([*trail[trail.index(name) :], name])}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(modules):
        visit(name, ())


def test_saliency_does_not_import_casm():
    """The saliency sources work without engine and models; only saliency/casm imports these."""
    for path in list_files("saliency"):
        if "casm" not in path.parts:
            assert not any(module.startswith("saliency.casm") for module in find_imports(path)), path


def test_scripts_do_not_import_each_other():
    for script in SCRIPTS:
        tops = {module.split(".")[0] for module in find_imports(ROOT / f"{script}.py")}
        assert not tops & SCRIPTS, script


def test_only_one_file_imports_gco():
    users = [path for package in PACKAGES for path in list_files(package) if "gco" in find_imports(path)]
    assert [path.relative_to(ROOT).as_posix() for path in users] == ["mixing/solvers/__init__.py"]
