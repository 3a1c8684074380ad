"""Declare the options of cam.py and check them before any network is loaded."""

from pathlib import Path

from engine.config.option_types import boolean, choice, choices, float_in_range, int_at_least
from engine.config.options import FIGURE_FORMATS, add_common_options, add_single_device_options
from engine.config.parser import Parser, check_figure_path
from engine.errors import UserError, suggest_closest
from engine.runtime.files import check_output_folder, find_overwritten
from saliency import CAM_METHODS, FIXED_LAYER

PRETRAINED = "resnet50"  # the default classifier, from torchvision
OTHER_FORMATS = (
    ".jpg",
    ".jpeg",
    ".gif",
    ".bmp",
    ".webp",
    ".tif",
    ".tiff",
    ".pdf",
    ".svg",
)  # not written
NORMS = ("cifar10", "cifar100", "cifar", "tiny-imagenet", "imagenet", "half")  # keys of image_set.STATISTICS


def build_parser() -> Parser:
    parser = Parser("Draw class activation maps of one or more classifiers on one or more images.")
    parser.group("images")
    parser.option("--image_path", nargs="+", metavar="PATH", help="image files, folders, or patterns such as '*.jpg'")
    parser.option(
        "--resize",
        type=choice(["keep", "square", "whole"]),
        default="keep",
        help="keep: shorter side to 256, centre 224x224; square: squeeze to 256x256, centre 224x224; whole: squeeze to "
        "224x224. Networks for small images see the centre square (keep) or the whole image at their own size",
    )
    add_common_options(parser, "on_bad_image", image_size={"shown": "the classifier's; large images 224"})
    parser.option("--norm", type=choice(NORMS), shown="from the file", help="mean and std of this data set")
    parser.group("classifiers")
    parser.option(
        "--model_path",
        nargs="+",
        metavar="PATH",
        shown=f"torchvision's {PRETRAINED}",
        help="files, run folders (best.pt), torchvision:NAME or timm:NAME (pretrained), or NAME=FILE",
    )
    add_common_options(parser, "model", "model_args")
    parser.option(
        "--weights", default="IMAGENET1K_V1", metavar="NAME", help="torchvision's weights, if no file is given"
    )
    parser.option("--labels", metavar="FILE", shown="from the file or the weights", help="class names, one per line")
    parser.group("maps")
    parser.option(
        "--method",
        type=choices([*CAM_METHODS, "casm"]),
        nargs="+",
        shown="cam; gradcam for networks without cam",
        help="one or more methods",
    )
    add_common_options(parser, "casm")
    parser.option(
        "--target_class",
        nargs="+",
        default=["predicted"],
        metavar="CLASS",
        help="classes to map: predicted, top3 (or another number), an index, or a name or part of it",
    )
    add_common_options(parser, "layer")
    parser.option("--list_layers", type=boolean, default=False, help="print the layers with their shapes, and exit")
    parser.option("--batch_size", type=int_at_least(1), default=32, help="scorecam: masked images per forward pass")
    parser.group("output")
    parser.option("--alpha", type=float_in_range(0, 1), default=0.4, help="opacity of the map over the image")
    parser.option(
        "--colormap", default="inferno", metavar="NAME", help="a colormap of matplotlib, such as viridis, turbo or jet"
    )
    parser.option(
        "--output", "-o", default="cam_output", metavar="PATH", help="folder, or a .png file if there is only one map"
    )
    parser.option(
        "--raw", type=boolean, default=False, help="also save each map as .npy: float32, as large as the image"
    )
    parser.option(
        "--figure",
        metavar="FILE",
        help="also draw all maps in one .png, .pdf or .svg figure: row per image, column per map",
    )
    add_common_options(parser, "dpi")
    parser.option("--show", type=boolean, default=False, help="show the results in windows")
    add_single_device_options(parser, amp="off", workers=False)
    return parser


def check_options(parser: Parser, typed: dict) -> dict:
    """Return all options, with `model_path` filled in and casm removed from `method`.

    Ends with a usage error for typed options that contradict each other. Prints which of them have no effect.
    """
    from matplotlib import colormaps

    options = {**parser.defaults, **typed}
    if not (options["image_path"] or options["list_layers"]):
        parser.error("--image_path is missing: give an image file, a folder or a pattern")
    if "casm" in (options["method"] or ()) and not options["casm"]:
        parser.error("--method casm: needs --casm FILE, made by python -m saliency.casm train")
    if options["casm"] and "method" not in typed and not {"model_path", "model"} & typed.keys():
        options["method"] = []  # draw only the trained masks
    if options["method"]:
        options["method"] = [name for name in dict.fromkeys(options["method"]) if name != "casm"]
    methods = ["cam"] if options["method"] is None else options["method"]
    if options["colormap"] not in colormaps:
        hint = suggest_closest(options["colormap"], colormaps)
        parser.error(f"--colormap {options['colormap']}: not a colormap of matplotlib{hint}")
    if options["figure"]:
        check_figure_path(parser, "--figure", options["figure"], FIGURE_FORMATS)
    if Path(options["output"]).suffix.lower() in OTHER_FORMATS:
        parser.error(
            f"--output {options['output']}: must be a folder or end in .png; a map has the pixels of its image, and "
            "--figure also writes .pdf and .svg"
        )
    if options["layer"] and methods and not set(methods) - FIXED_LAYER.keys():
        fixed = " and ".join(f"{name}, which uses {FIXED_LAYER[name]}" for name in methods)
        parser.error(f"--layer: no effect on {fixed}; use --method gradcam")
    unused = [] if "scorecam" in methods else ["batch_size"]
    unused += [] if methods else ["model_path", "model", "model_args", "weights", "target_class", "layer"]
    if unused := [f"--{name}" for name in unused if name in typed]:
        print(f"note: no effect with {' '.join(methods) or 'casm'}: {', '.join(unused)}")
    if "dpi" in typed and not options["figure"]:
        print("note: --dpi: no effect without --figure, since a map has the pixels of its image")
    if not options["model_path"]:
        options |= {"model_path": [options["model"] or PRETRAINED], "model": None}
    return options


def is_png(path: str) -> bool:
    """Return whether a path names an image file and not a folder."""
    return path.lower().endswith(".png")


def check_outputs(files: list[Path], *, output: str, figure: str | None) -> None:
    """Raise UserError if an output path cannot be written or is one of the input images. Nothing is written."""
    for option, text in (("output", output), ("figure", figure)):
        if not text:
            continue
        path = Path(text)
        folder = path.parent if option == "figure" or is_png(text) else path
        check_output_folder(folder, f"--{option} {path}")
        if path.is_dir() and folder != path:
            raise UserError(f"--{option} {path}: a folder; give a file, or a folder that does not end in .png")
        if find_overwritten([path], files):
            raise UserError(f"--{option} {path}: this is one of the input images; choose another file")
