"""The options of cam.py, and the checks that need no network."""

import os
from pathlib import Path

from engine.config.option_types import boolean, choice, choices, float_in_range, int_at_least
from engine.config.options import add_common_options, add_single_device_options
from engine.config.parser import Parser
from engine.errors import UserError, suggest_closest
from saliency import CAM_METHODS

PRETRAINED = "resnet50"  # torchvision's, where no classifier is named
OTHER_FORMATS = (".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".pdf", ".svg")  # which are not written
NORMS = ("cifar10", "cifar100", "tiny-imagenet", "imagenet", "half")  # of engine.data.image_set.STATISTICS


def build_parser() -> Parser:
    parser = Parser("Draw class activation maps of one or more images, by one or more classifiers.")
    parser.group("what")
    parser.option("--image_path", nargs="+", metavar="PATH", help="files, folders, patterns")
    parser.option(
        "--model_path",
        nargs="+",
        metavar="PATH",
        shown=f"torchvision's {PRETRAINED}",
        help="files of weights, run folders (best.pt), torchvision's NAME, or NAME=FILE",
    )
    add_common_options(parser, "model")
    parser.option("--weights", default="IMAGENET1K_V1", metavar="NAME", help="of torchvision's, where no file is named")
    parser.option("--method", type=choices([*CAM_METHODS, "casm"]), nargs="+", default=["cam"], help="several allowed")
    add_common_options(parser, "casm")
    parser.option(
        "--target_class",
        nargs="+",
        default=["predicted"],
        metavar="CLASS",
        help="predicted, top3 (or another number), an index, or a class name or part of it; several allowed",
    )
    add_common_options(parser, "layer")
    parser.option("--list_layers", type=boolean, default=False, help="names and shapes of the layers, then exit")
    parser.option("--labels", metavar="FILE", shown="from the file or the weights", help="class names, one a line")
    parser.option(
        "--resize",
        type=choice(["keep", "square", "whole"]),
        default="keep",
        help="keep: shorter side to 256, centre of 224; square: to 256x256, centre of 224; whole: to 224x224. Networks "
        "for small images see all of the middle square, or of the picture, at their own size",
    )
    add_common_options(parser, "on_bad_image", image_size={"shown": "the classifier's; large images 224"})
    parser.option("--norm", type=choice(NORMS), shown="from the file", help="whose mean and std")
    parser.option("--batch_size", type=int_at_least(1), default=32, help="scorecam: masked images at a time")
    parser.group("pictures")
    parser.option("--alpha", type=float_in_range(0, 1), default=0.4, help="weight of the map over the picture")
    parser.option("--colormap", default="jet", metavar="NAME", help="of matplotlib's")
    parser.option(
        "--output", "-o", default="cam_output", metavar="PLACE", help="a folder, or a .png where there is one picture"
    )
    parser.option("--raw", type=boolean, default=False, help="also a .npy of the map: float32, the size of the picture")
    parser.option(
        "--figure", metavar="FILE.png", help="one picture of all: a row an image, a column a model and method"
    )
    parser.option("--show", type=boolean, default=False, help="open a window")
    add_single_device_options(parser, amp="off", workers=False)
    return parser


def check_options(parser: Parser, typed: dict) -> dict:
    """All options, with `method` without casm, and `model_path` filled in. Ends with a usage error where the options
    that were typed do not go together; prints which of them have no effect.
    """
    from matplotlib import colormaps

    options = {**parser.defaults, **typed}
    if not (options["image_path"] or options["list_layers"]):
        parser.error("--image_path FILE: which picture shall be looked at?")
    if "casm" in options["method"] and not options["casm"]:
        parser.error("--method casm needs --casm FILE, made by python -m saliency.casm train")
    if options["casm"] and "method" not in typed and not {"model_path", "model"} & typed.keys():
        options["method"] = []  # the trained maps alone
    methods = options["method"] = [name for name in dict.fromkeys(options["method"]) if name != "casm"]
    if options["colormap"] not in colormaps:
        hint = suggest_closest(options["colormap"], colormaps)
        parser.error(f"--colormap {options['colormap']}: matplotlib has no such{hint}")
    if options["figure"] and not is_png(options["figure"]):
        parser.error(f"--figure {options['figure']}: the picture is a .png")
    if Path(options["output"]).suffix.lower() in OTHER_FORMATS:
        parser.error(f"--output {options['output']}: a folder, or a .png")
    if options["layer"] and methods == ["cam"]:
        parser.error("--layer has no effect on cam, which takes what is averaged; say --method gradcam, for instance")
    unused = [] if "scorecam" in methods else ["batch_size"]
    unused += [] if methods else ["model_path", "model", "weights", "target_class", "layer"]
    if unused := [f"--{name}" for name in unused if name in typed]:
        print(f"note: without effect on {' '.join(methods) or 'casm'}: {', '.join(unused)}")
    if not options["model_path"]:
        options |= {"model_path": [options["model"] or PRETRAINED], "model": None}
    return options


def is_png(path: str) -> bool:
    """Whether a path names one picture, not a folder."""
    return path.lower().endswith(".png")


def check_outputs(files: list[Path], *, output: str, figure: str | None) -> None:
    """Raises UserError where nothing can be written, and for a path that is one of the pictures. Writes nothing."""
    for option, text in (("output", output), ("figure", figure)):
        if not text:
            continue
        path = Path(text)
        folder = path.parent if is_png(text) else path
        existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            reason = "cannot be written into" if existing.is_dir() else "is a file, not a folder"
            raise UserError(f"--{option} {path}: {existing} {reason}; name another place")
        if path.is_dir() and folder != path:
            raise UserError(f"--{option} {path}: that is a folder; name a file, or a folder that does not end in .png")
        if path.is_file() and any(path.samefile(file) for file in files if file.exists()):
            raise UserError(f"--{option} {path}: that is one of the pictures to be looked at; name another file")
