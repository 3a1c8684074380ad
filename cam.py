"""Show where classifiers look: python cam.py --image_path photo.jpg --model_path runs/cifar10/resnet20/my_run"""

import os
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import models
from engine.config.options import add_single_device_options
from engine.config.parser import Parser, boolean, choice, choices, float_in_range, int_at_least
from engine.errors import UserError, suggest_closest
from engine.launch import run_main
from saliency import CAM_METHODS

PRETRAINED = "resnet50"  # torchvision's, where no classifier is named
VIEWS = ("keep", "square", "whole")
LARGE = 128  # side in pixels of what a classifier sees, above which the centre of a larger image is cut out
NO_PICTURES = (".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".pdf", ".svg")  # are written here
NORMS = ("cifar10", "cifar100", "tiny-imagenet", "imagenet", "half")  # of engine.data.image_set.STATISTICS
WINDOWS = 10  # that --show opens at most


def build_parser() -> Parser:
    parser = Parser("Draw class activation maps of one or more images, by one or more classifiers.")
    parser.group("what")
    parser.option("--image_path", "--image", nargs="+", metavar="PATH", help="files, folders, patterns")
    parser.option(
        "--model_path",
        "--checkpoint",
        nargs="+",
        metavar="PATH",
        shown=f"torchvision's {PRETRAINED}",
        help="files of weights, run folders (best.pt), torchvision's NAME, or NAME=FILE",
    )
    parser.option("--model", "--arch", metavar="NAME", shown="from the file", help="its network, ours or torchvision's")
    parser.option("--weights", default="IMAGENET1K_V1", metavar="NAME", help="of torchvision's, where no file is named")
    parser.option(
        "--method",
        type=choices([*CAM_METHODS, "casm"]),
        nargs="+",
        default=["cam"],
        metavar="NAME",
        help=f"{', '.join(CAM_METHODS)}, casm; several allowed",
    )
    parser.option("--casm", metavar="FILE", help="trained maps, for --method casm")
    parser.option(
        "--target_class",
        "--class",
        nargs="+",
        default=["predicted"],
        metavar="CLASS",
        help="predicted, top3 (or another number), an index, or a class name or part of it; several allowed",
    )
    parser.option("--layer", metavar="NAME", shown="what is averaged", help="whose maps are taken, but by cam")
    parser.option("--list_layers", type=boolean, default=False, help="names and shapes of the layers, then exit")
    parser.option(
        "--labels", "--class_list", metavar="FILE", shown="from the file or the weights", help="class names, one a line"
    )
    parser.option(
        "--resize",
        type=choice(VIEWS),
        default="keep",
        metavar="NAME",
        help="keep: shorter side to 256, centre of 224; square: to 256x256, centre of 224; whole: to 224x224. Networks "
        "for small images see all of the middle square, or of the picture, at their own size",
    )
    parser.option(
        "--image_size", type=int_at_least(8), shown="the classifier's", metavar="PIXELS", help="in place of 224"
    )
    parser.option(
        "--norm",
        type=choice(NORMS),
        metavar="NAME",
        shown="from the file",
        help=f"whose mean and std: {', '.join(NORMS)}",
    )
    parser.option("--batch_size", type=int_at_least(1), default=32, help="scorecam: masked images at a time")
    parser.option(
        "--on_bad_image", type=choice(["stop", "skip"]), default="stop", metavar="NAME", help="stop, or skip the file"
    )
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


def main(argv: list[str] | None = None) -> list[dict]:
    """Draw; returns for each map what is printed of it."""
    parser = build_parser()
    typed = parser.read(argv)
    options = {**parser.defaults, **typed}
    check(parser, options, typed)

    from engine.runtime.device import choose_device, choose_precision, setup_backends
    from explanation.images import chunk, find_images, iter_images, unique_stems

    device = choose_device(options["device"])
    setup_backends(device, seed=0, deterministic=False)
    precision, _ = choose_precision(options["amp"], device)
    if options["list_layers"]:
        return [print_layers(one, options) for one in load_classifiers(options)]
    files = find_images(options["image_path"])
    check_places(options, files)
    lookers = [make_looker(one, options, device, precision) for one in load_classifiers(options)]
    if options["casm"]:
        lookers.append(make_casm_looker(options, device, precision))
    if is_file(options["output"]) and len(files) * sum(looker.count for looker in lookers) > 1:
        raise UserError(
            f"--output {options['output']}: there are several pictures; name a folder, or --figure FILE.png"
        )
    labels, lines = dict(zip(files, unique_stems(files), strict=True)), []
    for group in chunk(iter_images(files, options["on_bad_image"], tell)):
        seen = [looker.look([picture for _, picture in group]) for looker in lookers]  # all, before any is drawn
        for (file, picture), *sights in zip(group, *seen, strict=True):
            lines.append(draw(file, picture, sum(sights, []), labels[file], options))
    if not lines:
        raise UserError(f"none of the {len(files)} pictures can be read")
    rows = [row for of_picture, _ in lines for row in of_picture]
    if options["figure"]:
        draw_figure(options["figure"], lines)
    if options["show"]:
        show([options["figure"]] if options["figure"] else [row["output"] for row in rows])
    return rows


def check(parser: Parser, options: dict, typed: dict) -> None:
    """End with a usage error where the options do not go together; say which have no effect."""
    from matplotlib import colormaps

    if not (options["image_path"] or options["list_layers"]):
        parser.error("--image_path FILE: which picture shall be looked at?")
    if "casm" in options["method"] and not options["casm"]:
        parser.error("--method casm needs --casm FILE, made by python -m saliency.casm train")
    if options["casm"] and "method" not in typed and not {"model_path", "model"} & typed.keys():
        options["method"] = []  # the trained maps alone
    options["method"] = [name for name in dict.fromkeys(options["method"]) if name != "casm"]
    if options["colormap"] not in colormaps:
        near = suggest_closest(options["colormap"], colormaps)
        parser.error(f"--colormap {options['colormap']}: matplotlib has no such{near}")
    if options["figure"] and not is_file(options["figure"]):
        parser.error(f"--figure {options['figure']}: the picture is a .png")
    if Path(options["output"]).suffix.lower() in NO_PICTURES:
        parser.error(f"--output {options['output']}: a folder, or a .png")
    if options["layer"] and options["method"] == ["cam"]:
        parser.error("--layer has no effect on cam, which takes what is averaged; say --method gradcam, for instance")
    unused = [] if "scorecam" in options["method"] else ["batch_size"]
    unused += [] if options["method"] else ["model_path", "model", "weights", "target_class", "layer"]
    if unused := [f"--{name}" for name in unused if name in typed]:
        print(f"note: without effect on {' '.join(options['method']) or 'casm'}: {', '.join(unused)}")


def is_file(place: str) -> bool:
    """Whether it is meant as one picture, and not as a folder."""
    return place.lower().endswith(".png")


def check_places(options: dict, files: list[Path]) -> None:
    """Raises UserError where nothing can be written, and for a picture of the user's. Writes nothing."""
    for name in ("output", "figure"):
        if not options[name]:
            continue
        place = Path(options[name])
        folder = place.parent if is_file(options[name]) else place
        there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            what = "cannot be written into" if there.is_dir() else "is a file, not a folder"
            raise UserError(f"--{name} {place}: {there} {what}; name another place")
        if place.is_dir() and folder != place:
            raise UserError(f"--{name} {place}: that is a folder; name a file, or a folder that does not end in .png")
        if place.is_file() and any(place.samefile(file) for file in files if file.exists()):
            raise UserError(f"--{name} {place}: that is one of the pictures to be looked at; name another file")


def load_classifiers(options: dict) -> list:
    """Those of the command line, with names that tell them apart and class names; torchvision's where none is named."""
    from engine.data.image_set import STATISTICS
    from engine.inference.classifier import load_classifier, make_names_unique
    from explanation.images import slugify

    if not (options["method"] or options["list_layers"]):
        return []
    words = list(dict.fromkeys(options["model_path"] or [options["model"] or PRETRAINED]))
    known = {"model": options["model"] if options["model_path"] else None, "weights": options["weights"]}
    found = [load_classifier(word, models, image_size=options["image_size"], **known) for word in words]
    make_names_unique(found)
    often = Counter(slugify(one.name).lower() for one in found)
    for place, one in enumerate(found, 1):
        name_classes(one, options["labels"])
        if often[slugify(one.name).lower()] > 1:  # cut short, they would name the same files
            one.name = f"{place} {one.name}"
        if options["norm"]:
            one.mean, one.std = STATISTICS[options["norm"]]
        elif one.path and not one.options and not one.torchvision and one.image_size <= LARGE:
            print(f"note: {one.path} does not say how its images were normalised; taken: as imagenet (--norm)")
    return found


def name_classes(classifier, labels: str | None) -> None:
    """Call its classes what a file calls them."""
    from engine.data.class_names import read_titles

    if labels:
        classifier.titles = read_titles(labels)
        if len(classifier.titles) != classifier.count:
            told = f"{len(classifier.titles)} names, {classifier.name} has {classifier.count} classes"
            raise UserError(f"--labels {labels}: {told}\none name a line, in the order of the classes")


def print_layers(classifier, options: dict) -> dict:
    """The layers whose maps can be taken, in the order of the forward pass."""
    from explanation.explainer import run_network
    from saliency.cam.tracing import layers

    side = options["image_size"] or classifier.image_size
    found = run_network(classifier.name, side, lambda: layers(classifier.network, side))
    print(f"{classifier.name}: layer and shape (channels, height, width)")
    for name, shape, default in found:
        print(f"  {name:40} {' x '.join(map(str, shape))}{'   the last before the average' if default else ''}")
    return {"model": classifier.name, "layers": [name for name, _, _ in found]}


def make_looker(classifier, options: dict, device, precision):
    """A classifier with the methods of the command line."""
    from engine.runtime.progress import progress_bar
    from explanation.explainer import Explainer, run_network
    from saliency.cam.maps import ActivationMaps, stretched

    wanted = [one for word in options["target_class"] for one in classes_of(word, classifier)]
    view = view_of(options["image_size"] or classifier.image_size, options["resize"])
    known = {"batch_size": options["batch_size"], "precision": precision}
    known |= {"model": classifier.network.to(device).requires_grad_(False)}
    known |= {"progress": partial(progress_bar, desc="scorecam", unit="batch")}

    def maps_by(method: str):
        layer = None if method == "cam" else options["layer"]
        maps = run_network(classifier.name, view.size, lambda: ActivationMaps(method=method, layer=layer, **known))
        return lambda images, targets: stretched(maps(images, targets))

    return Explainer(
        classifier, {name: maps_by(name) for name in options["method"]}, list(dict.fromkeys(wanted)), view, device
    )


def make_casm_looker(options: dict, device, precision):
    """The masks of a trained decoder, which ask for no class."""
    import torch

    from engine.inference.classifier import Classifier
    from engine.runtime.device import autocast
    from explanation.explainer import Explainer
    from saliency.casm.network import load_casm

    saved = load_casm(options["casm"])
    network = saved.network.to(device).eval().requires_grad_(False)
    count = len(saved.classes) or 1000
    classifier = Classifier(saved.name, network.classifier, saved.mean, saved.std, count=count, titles=saved.classes)
    name_classes(classifier, options["labels"])

    @torch.no_grad()
    def masks(images, targets):
        with autocast(images.device, precision):
            return network.masks(images)[:, 0].float()

    view = view_of(options["image_size"] or saved.image_size, options["resize"])
    return Explainer(classifier, {"casm": masks}, [-1], view, device)


def view_of(size: int, resize: str):
    """How a picture is cut out for a network that takes images of this side."""
    from engine.config.phases import default_eval_resize
    from engine.data.views import CenterCrop, SquashedView

    larger = default_eval_resize(size) if size > LARGE else size
    views = {"keep": CenterCrop(size, larger), "square": SquashedView(size, larger), "whole": SquashedView(size, size)}
    return views[resize]


def classes_of(word: str, classifier) -> list[int]:
    """The classes that a word of --target_class means, as a Looker wants them."""
    from engine.data.class_names import find_class

    if word.lower() == "predicted":
        return [-1]
    if top := re.fullmatch(r"top([0-9]+)", word.lower()):
        if not 1 <= int(top[1]) <= classifier.count:
            raise UserError(f"--target_class {word}: of {classifier.name} there are top1 to top{classifier.count}")
        return [-rank for rank in range(1, int(top[1]) + 1)]
    try:
        return [find_class(word, classifier.titles, classifier.count)]
    except ValueError as error:
        raise UserError(f"--target_class {word}: {classifier.name}: {error}") from error


def draw(file: Path, picture, sights: list, label: str, options: dict) -> tuple[list[dict], list]:
    """Write and print the maps of a picture: a row for each. Where there is a figure, also small copies of the picture
    and of what was drawn.
    """
    from engine.drawing.figures import overlay_heatmap
    from explanation.overlay import downscale_for_display, draw_frame, place_on_image, save_image, save_map

    rows, copies = [], [downscale_for_display(picture)] if options["figure"] else []
    for sight in sights:
        inside = place_on_image(sight.heat, sight.box, stretch=sight.method != "casm")
        overlay = overlay_heatmap(picture, inside, options["alpha"], options["colormap"], sight.box)
        place = place_of(sight, label, options["output"])
        row = {"image": str(file), **describe(sight), "output": str(place)}
        again = any(row["output"] == other["output"] for other in rows)  # of a class that was named twice
        rows.append(row)
        copies += [downscale_for_display(overlay)] if options["figure"] else []
        if again:
            continue
        save_image(place, overlay)
        if options["raw"]:
            row["raw"] = str(place.with_suffix(".npy"))
            save_map(Path(row["raw"]), draw_frame(inside, sight.box, *picture.shape[:2]))
        tell(told_as(row))
    return rows, copies


def place_of(sight, label: str, output: str) -> Path:
    """Where an overlay goes. label: what the picture is called in names of files."""
    from explanation.images import slugify

    if is_file(output):
        return Path(output)
    name = slugify(sight.classifier.title(sight.target))
    alike = sum(slugify(title).lower() == name.lower() for title in sight.classifier.titles)  # ImageNet has two cranes
    name += f"_{sight.target}" if alike > 1 else ""
    return Path(output) / f"{label}_{slugify(sight.classifier.name)}_{sight.method}_{name}.png"


def describe(sight) -> dict:
    found = {"model": sight.classifier.name, "method": sight.method}
    for name, index in (("predicted", int(sight.chances.argmax())), ("target", sight.target)):
        found |= {f"{name}_index": index, name: sight.classifier.title(index)}
        found |= {f"{name}_probability": float(sight.chances[index])}
    return found


def told_as(row: dict) -> str:
    """A row as it is printed."""
    text = f"{row['image']}  {row['model']}  {row['predicted']} {row['predicted_probability']:.1%}"
    of = "" if row["method"] == "casm" else f" of {row['target']} {row['target_probability']:.1%}"
    return f"{text}  {row['method']}{of}  {row['output']}"


def tell(text: str) -> None:
    """Print; names of files need not be text."""
    print(text.encode(errors="replace").decode(), flush=True)


def draw_figure(place: str, lines: list[tuple[list[dict], list]]) -> None:
    """A row a picture, of what draw() gave."""
    from engine.drawing.figures import draw_comparison

    first = lines[0][0]
    several = len({row["method"] for row in first}) > 1
    draw_comparison(
        place,
        columns=[row["model"] + (f"\n{row['method']}" if several else "") for row in first],
        names=[Path(rows[0]["image"]).name for rows, _ in lines],
        pictures=[copies[0] for _, copies in lines],
        overlays=[copies[1:] for _, copies in lines],
        texts=[[f"{row['target']} {row['target_probability']:.0%}" for row in rows] for rows, _ in lines],
    )
    print(f"written: {place}")


def show(places: list[str]) -> None:
    """Open windows with these pictures, where there is a display; without one, say so."""
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        print("note: --show: there is no display here; the pictures are in their files")
        return
    if len(places) > WINDOWS:
        print(f"note: --show: the first {WINDOWS} of {len(places)} pictures; --figure FILE.png puts all into one")
    try:
        from matplotlib import image, pyplot

        for place in places[:WINDOWS]:
            axes = pyplot.figure(place, layout="constrained").subplots()
            axes.imshow(image.imread(place))
            axes.axis("off")
        pyplot.show()
    except Exception as error:
        print(f"note: --show: no window could be opened ({type(error).__name__}); the pictures are in their files")


if __name__ == "__main__":
    run_main(main)
