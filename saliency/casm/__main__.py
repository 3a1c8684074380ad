"""python -m saliency.casm train|score|eval|plot"""

import sys
from importlib import import_module

from engine.errors import suggest_closest
from engine.launch import run_main

COMMANDS = {  # name -> (module, what it does)
    "train": ("saliency.casm.commands.train", "train a mask decoder beside a classifier"),
    "score": ("saliency.casm.commands.score", "hold maps against true boxes"),
    "eval": ("saliency.casm.commands.eval", "classify what the masks leave of the images, and what they hide"),
    "plot": ("saliency.casm.commands.plot", "draw images, masked in, masked out and inpainted"),
}


def main() -> None:
    words = sys.argv[1:]
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        print("usage: python -m saliency.casm COMMAND ...\n\nClassifier-agnostic saliency maps.\n")
        print("\n".join(f"  {name:6} {what}" for name, (_, what) in COMMANDS.items()))
        print("\npython -m saliency.casm COMMAND --help lists the options of a command.")
    elif name in COMMANDS:
        import_module(COMMANDS[name][0]).main(words[1:])
    else:
        hint = suggest_closest(name, COMMANDS)
        print(f"python -m saliency.casm: {name!r} is none of {', '.join(COMMANDS)}{hint}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run_main(main)
