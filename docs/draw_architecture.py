"""Draw docs/architecture.png from the imports of the code: python docs/draw_architecture.py

A box is a command or a package with its lines of Python; an arrow points from a package to one that it imports.
"""

import ast
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).parents[1]
FLOORS = [
    "launch",
    "training",
    "inference",
    "data",
    "drawing",
    "runtime",
    "config",
    "errors",
]  # of engine, from the top
CONTENT = {
    "mixing": "the methods,\none file each",
    "evaluation": "accuracy, calibration,\nrobustness, export",
    "explanation": "activation maps\nof pictures",
    "detection": "Faster R-CNN,\nVOC and COCO data",
    "saliency.casm": "learned masks",
    "saliency": "where is\nthe object?",
    "models": "networks\nby name",
    "engine.launch": "exit codes of the scripts",
    "engine.training": "the step, the run, its folder",
    "engine.inference": "trained classifiers, predictions, metrics",
    "engine.data": "data sets, image files, batches",
    "engine.drawing": "figures and tables",
    "engine.runtime": "device, processes, checkpoints",
    "engine.config": "options and recipes",
    "engine.errors": "errors of the user",
}
COLORS = {"mixing": "tab:blue", "evaluation": "tab:green", "explanation": "tab:purple", "detection": "tab:red"}
COLORS["saliency.casm"] = "tab:orange"
PLACES = {  # centre and size of each box
    "train.py\nimagenet_train.py": (1.2, 9.1, 2.0, 0.8),
    "evaluate.py": (3.6, 9.1, 2.0, 0.8),
    "cam.py": (6.0, 9.1, 2.0, 0.8),
    "detect.py": (8.4, 9.1, 2.0, 0.8),
    "python -m\nsaliency.casm": (10.8, 9.1, 2.0, 0.8),
    "mixing": (1.2, 7.2, 2.0, 1.1),
    "evaluation": (3.6, 7.2, 2.0, 1.1),
    "explanation": (6.0, 7.2, 2.0, 1.1),
    "detection": (8.4, 7.2, 2.0, 1.1),
    "saliency.casm": (10.8, 7.2, 2.0, 1.1),
    "saliency": (0.75, 4.6, 1.35, 1.5),
    "models": (2.25, 4.6, 1.35, 1.5),
    "engine": (7.4, 2.75, 8.4, 5.4),
}
OWN_PACKAGE = {  # of each command
    "train.py\nimagenet_train.py": "mixing",
    "evaluate.py": "evaluation",
    "cam.py": "explanation",
    "detect.py": "detection",
    "python -m\nsaliency.casm": "saliency.casm",
}


def find_package(module: str) -> str:
    """The box that a module belongs to."""
    parts = module.split(".")
    if parts[:2] == ["saliency", "casm"] or parts[0] == "engine":
        return ".".join(parts[:2])
    return parts[0]


def read_imports() -> tuple[dict[str, int], set[tuple[str, str]]]:
    """Lines of Python of each package, and every (package, imported package); mixing.show, a command, is left out."""
    lines: dict[str, int] = {}
    arrows = set()
    for path in ROOT.rglob("*.py"):
        names = path.relative_to(ROOT).with_suffix("").parts
        package = find_package(".".join(names))
        if package not in CONTENT or names[:2] == ("mixing", "show"):
            continue
        text = path.read_text()
        lines[package] = lines.get(package, 0) + len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                imported = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            arrows |= {(package, find_package(name)) for name in imported}
    return lines, {(a, b) for a, b in arrows if a != b and b in CONTENT}


def draw_box(axes, name: str, text: str, color: str, face: str) -> None:
    x, y, width, height = PLACES[name]
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(FancyBboxPatch(corner, width, height, "round,pad=0,rounding_size=0.12", ec=color, fc=face, lw=1.6))
    axes.text(x, y, text, ha="center", va="center", fontsize=10)


def draw_arrow(axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 13, "color": color, "lw": 1.5, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, **style))


def draw(path: Path) -> None:
    lines, arrows = read_imports()
    figure, axes = plt.subplots(figsize=(12, 9.4))
    axes.set(xlim=(0, 12), ylim=(0, 9.7))
    axes.axis("off")
    for command, package in OWN_PACKAGE.items():
        color = COLORS[package]
        draw_box(axes, command, command, color, "white")
        x = PLACES[command][0]
        draw_arrow(axes, (x, 8.7), (x, 7.75), color)
        draw_box(
            axes, package, f"{package.replace('.', '/')}/\n{CONTENT[package]}\n{lines[package]:,} lines", color, "white"
        )
    for package in ("saliency", "models"):
        text = f"{package}/\n{CONTENT[package]}\n{lines[package]:,} lines"
        draw_box(axes, package, text, "black", "white")
    draw_box(axes, "engine", "", "black", "whitesmoke")

    left, width, height = PLACES["engine"][0] - 4.0, 8.0, 0.52
    for row, floor in enumerate(FLOORS):
        y = 4.68 - row * 0.61
        axes.add_patch(FancyBboxPatch((left, y - height / 2), width, height, "square,pad=0", ec="grey", fc="white"))
        name = f"engine.{floor}"
        axes.text(left + 0.15, y, f"engine/{floor}{'' if (ROOT / 'engine' / floor).is_dir() else '.py'}", va="center")
        axes.text(left + 2.5, y, CONTENT[name], va="center", fontsize=10)
        axes.text(left + width - 0.15, y, f"{lines[name]:,} lines", va="center", ha="right", fontsize=10)
    axes.text(
        7.4, 5.19, "engine: each floor imports only from those below it", ha="center", fontsize=10, style="italic"
    )

    # What the packages import. Each arrow to saliency or models runs along a height of its own.
    for row, (package, color) in enumerate(list(COLORS.items())[1:]):
        x, y, _, box_height = PLACES[package]
        bottom = y - box_height / 2
        targets = {target.split(".")[0] for source, target in arrows if source == package}
        if "engine" in targets:
            draw_arrow(axes, (x + 0.3, bottom), (x + 0.3, 5.45), color)
        for shift, target in ((0.0, "models"), (-0.35, "saliency")):
            if target in targets:
                rail = (6.5 if target == "models" else 6.0) - 0.1 * row
                end = PLACES[target][0] + 0.42 - 0.28 * row
                axes.plot([x + shift, x + shift, end], [bottom, rail, rail], color=color, lw=1.5)
                draw_arrow(axes, (end, rail), (end, 5.35), color)
    notes = (
        "The commands also import engine;",
        "train.py and imagenet_train.py also",
        "import saliency and models.",
        "",
        "mixing, saliency, models and engine",
        "import only themselves.",
        "",
        "pip installs mixing and saliency",
        "as saliency_mixing, without",
        "mixing/show and saliency/casm.",
    )
    axes.text(0.05, 3.6, "\n".join(notes), va="top", fontsize=9)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    draw(ROOT / "docs" / "architecture.png")
