"""The command line of CASM: python -m saliency.casm train|score|eval|plot"""

import sys
from importlib import import_module

from engine.errors import suggest_closest
from engine.launch import run_main

COMMANDS = {  # name -> (module, help text)
    "train": ("saliency.casm.commands.train", "train a mask decoder on the features of a classifier"),
    "score": ("saliency.casm.commands.score", "compare masks with ground-truth boxes: F1, localization error (LE), OM"),
    "eval": ("saliency.casm.commands.eval", "measure how classifiers do on masked-in, masked-out and inpainted images"),
    "plot": ("saliency.casm.commands.plot", "draw images: original, masked in, masked out and inpainted"),
}
USAGE = """usage: python -m saliency.casm COMMAND [DATA] [options]

Classifier-agnostic saliency map extraction (CASM, Zolna et al., arXiv 1805.08249). A decoder learns to draw, without
labels or boxes, a mask over everything that any classifier could use to recognize an image. Commands:
"""


def main() -> None:
    arguments = sys.argv[1:]
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(USAGE)
        print("\n".join(f"  {name:6} {text}" for name, (_, text) in COMMANDS.items()))
        print("\nRun python -m saliency.casm COMMAND --help for the options of a command.")
    elif name in COMMANDS:
        import_module(COMMANDS[name][0]).main(arguments[1:])
    else:
        hint = suggest_closest(name, COMMANDS)
        names = ", ".join(COMMANDS)
        print(f"python -m saliency.casm: unknown command {name!r}; choose from {names}{hint}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run_main(main)
