"""Show where classifiers look: python cam.py --image_path photo.jpg --model_path runs/cifar10/resnet20/my_run"""

import os
import re
from pathlib import Path

import models
from engine.cli import Parser, UserError, closest, each_of, number, one_of, run, whole, yes_no
from engine.options import one_device_options
from saliency import CAM_METHODS

PRETRAINED = "resnet50"  # torchvision's, where no classifier is named
VIEWS = ("keep", "square", "whole")
LARGE = 128  # side in pixels of what a classifier sees, above which the centre of a larger image is cut out
SHOWN = 640  # longest side in pixels of a picture in the figure
TOGETHER = 32  # images that go through a network at once


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
        type=each_of([*CAM_METHODS, "casm"]),
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
    parser.option("--list_layers", type=yes_no, default=False, help="names and shapes of the layers, then exit")
    parser.option(
        "--labels", "--class_list", metavar="FILE", shown="from the file or the weights", help="class names, one a line"
    )
    parser.option(
        "--resize",
        type=one_of(VIEWS),
        default="keep",
        metavar="NAME",
        help="keep: shorter side to 256, centre of 224; square: to 256x256, centre of 224; whole: to 224x224. Networks "
        "for small images see all of the middle square, or of the picture, at their own size",
    )
    parser.option("--image_size", type=whole(8), shown="the classifier's", metavar="PIXELS", help="in place of 224")
    parser.option("--batch_size", type=whole(1), default=32, help="scorecam: masked images at a time")
    parser.group("pictures")
    parser.option("--alpha", type=number(0, 1), default=0.4, help="weight of the map over the picture")
    parser.option("--colormap", default="jet", metavar="NAME", help="of matplotlib's")
    parser.option(
        "--output", "-o", default="cam_output", metavar="PLACE", help="a folder, or a .png where there is one picture"
    )
    parser.option("--raw", type=yes_no, default=False, help="also a .npy of the map: float32, the size of the picture")
    parser.option(
        "--figure", metavar="FILE.png", help="one picture of all: a row an image, a column a model and method"
    )
    parser.option("--show", type=yes_no, default=False, help="open a window")
    one_device_options(parser, amp="off", workers=False)
    return parser


def main(argv: list[str] | None = None) -> list[dict]:
    """Draw; returns for each map what is printed of it."""
    parser = build_parser()
    typed = parser.read(argv)
    options = {**parser.defaults, **typed}
    check(parser, options, typed)

    from engine.device import choose_device, choose_precision, prepare
    from engine.pictures import find_pictures

    device = choose_device(options["device"])
    prepare(device, seed=0, deterministic=False)
    precision, _ = choose_precision(options["amp"], device)
    if options["list_layers"]:
        return [print_layers(one, options) for one in load_classifiers(options)]
    files = find_pictures(options["image_path"])
    lookers = [looker for one in load_classifiers(options) for looker in lookers_of(one, options, device, precision)]
    if "casm" in options["method"]:
        lookers.append(casm_looker(options, device, precision))
    if options["output"].endswith(".png") and len(files) * len(lookers) * count_of(options["target_class"]) > 1:
        raise UserError(
            f"--output {options['output']}: there are several pictures; name a folder, or use --figure FILE"
        )
    rows = []
    for start in range(0, len(files), TOGETHER):
        rows += look(files[start : start + TOGETHER], lookers, labels_of(files), options)
    if options["figure"]:
        draw_figure(rows, files, lookers, options)
        print(f"written: {options['figure']}")
    if options["show"]:
        show([options["figure"]] if options["figure"] else [row["output"] for row in rows])
    return [{key: value for key, value in row.items() if key != "picture"} for row in rows]


def check(parser: Parser, options: dict, typed: dict) -> None:
    """End with a usage error where the options do not go together."""
    from matplotlib import colormaps

    if not options["image_path"] and not options["list_layers"]:
        parser.error("--image_path FILE: which picture shall be looked at?")
    if "casm" in options["method"] and not options["casm"]:
        parser.error("--method casm needs --casm FILE, made by python -m saliency.casm train")
    if options["casm"] and "casm" not in options["method"]:
        options["method"] = [*(options["method"] if "method" in typed else []), "casm"]
    if options["colormap"] not in colormaps:
        parser.error(
            f"--colormap {options['colormap']}: matplotlib has no such{closest(options['colormap'], colormaps)}"
        )
    if options["figure"] and not options["figure"].endswith(".png"):
        parser.error(f"--figure {options['figure']}: the picture is a .png")
    if options["layer"] and options["method"] == ["cam"]:
        parser.error("--layer has no effect on cam, which takes what is averaged; say --method gradcam, for instance")


def load_classifiers(options: dict) -> list:
    """Those of the command line, with names that tell them apart and class names; torchvision's where none is named."""
    from engine.classes import read_titles
    from engine.classifier import load_classifier, tell_apart

    if options["method"] == ["casm"] and not options["model_path"]:
        return []
    words = options["model_path"] or [options["model"] or PRETRAINED]
    size = {"image_size": options["image_size"]} if options["image_size"] else {}
    model = options["model"] if options["model_path"] else None
    found = [load_classifier(word, models, model=model, weights=options["weights"], **size) for word in words]
    tell_apart(found)
    for one in found:
        if options["labels"]:
            one.titles = read_titles(options["labels"])
            if len(one.titles) != one.count:
                raise UserError(
                    f"--labels {options['labels']}: {len(one.titles)} names, {one.name} has {one.count} classes"
                )
    return found


def print_layers(classifier, options: dict) -> dict:
    """The layers whose maps can be taken, in the order of the forward pass."""
    from saliency.cam import layers

    found = layers(classifier.network, options["image_size"] or classifier.image_size)
    print(f"{classifier.name}: layer and shape (channels, height, width)")
    for name, shape, default in found:
        print(f"  {name:40} {' x '.join(map(str, shape))}{'   the last before the average' if default else ''}")
    return {"model": classifier.name, "layers": [name for name, _, _ in found]}


class Looker:
    """One column: a classifier and a method. pixels (B, S, S, 3) uint8 and targets (B,) -> maps (B, S, S) in 0..1."""

    def __init__(self, name: str, method: str, classifier, maps_of, view, device):
        self.name, self.method, self.classifier, self.maps_of = name, method, classifier, maps_of
        self.view, self.device = view, device

    def images(self, pixels):
        """uint8 (B, S, S, 3) -> as the network sees them, (B, 3, S, S) on the device."""
        from engine.classifier import normalised

        images = pixels.to(self.device).permute(0, 3, 1, 2).float() / 255
        return normalised(images, self.classifier.mean, self.classifier.std)

    def chances(self, images):
        """(B, K): what the classifier takes the images for."""
        import torch

        with torch.no_grad():
            return self.classifier.network(images).float().softmax(1)


def lookers_of(classifier, options: dict, device, precision) -> list[Looker]:
    from engine.progress import over
    from saliency.cam import ActivationMaps, enlarged

    classifier.network.to(device).requires_grad_(False)
    view = view_of(options["image_size"] or classifier.image_size, options["resize"])
    found = []
    for method in options["method"]:
        if method == "casm":
            continue
        settings = {"layer": None if method == "cam" else options["layer"], "batch_size": options["batch_size"]}
        maps = ActivationMaps(classifier.network, method, precision=precision, progress=over, **settings)
        draw = lambda images, targets, maps=maps: enlarged(maps(images, targets), tuple(images.shape[-2:]))  # noqa: E731
        found.append(Looker(classifier.name, method, classifier, draw, view, device))
    return found


def casm_looker(options: dict, device, precision) -> Looker:
    """The masks of a trained decoder, which ask for no class."""
    import torch

    from engine.classifier import Classifier
    from engine.loop import autocast
    from saliency.casm.network import load_casm

    saved = load_casm(options["casm"])
    network = saved.network.to(device).eval().requires_grad_(False)
    count = len(saved.classes) or 1000
    known = Classifier(
        saved.name, network.classifier, saved.mean, saved.std, saved.classes, count, titles=saved.classes
    )

    @torch.no_grad()
    def masks(images, targets):
        with autocast(images.device, precision):
            return network.masks(images)[:, 0].float()

    view = view_of(options["image_size"] or saved.image_size, options["resize"])
    return Looker(saved.name, "casm", known, masks, view, device)


def view_of(size: int, resize: str):
    """How a picture is cut out for a network that takes images of this side."""
    from engine.image_files import CentreView, WholeView
    from engine.phases import large_side

    larger = large_side(size) if size > LARGE else size
    return {
        "keep": CentreView(size, larger),
        "square": WholeView(size, larger),
        "whole": WholeView(size, size),
    }[resize]


def labels_of(files: list[Path]) -> dict[Path, str]:
    """What each picture is called in the names of the files made of it: no two alike."""
    for name_of in (
        lambda file: file.stem,
        lambda file: file.name,
        lambda file: f"{file.parent.name}_{file.name}",
        str,
    ):
        names = [plain(name_of(file)) for file in files]
        if len(set(names)) == len(names):
            break
    return dict(zip(files, names, strict=True))


def plain(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^\w.+-]+", "_", name).strip("_")[:80] or "_"


def look(files: list[Path], lookers: list[Looker], labels: dict[Path, str], options: dict) -> list[dict]:
    """Draw, save and print the maps of some pictures; a row each, with the picture for the figure."""
    import numpy as np
    import torch

    from engine.pictures import open_picture, seen_by

    pictures = [open_picture(file) for file in files]
    rows = []
    for looker in lookers:
        crops, boxes = zip(*(seen_by(picture, looker.view) for picture in pictures), strict=True)
        images = looker.images(torch.from_numpy(np.stack(crops)))
        chances = looker.chances(images)
        words = ["predicted"] if looker.method == "casm" else options["target_class"]
        columns = [column for word in words for column in targets_of(word, looker.classifier, chances)]
        for targets in columns:  # (B,) each
            try:
                maps = looker.maps_of(images, targets).cpu().numpy()
            except ValueError as error:
                raise UserError(f"{looker.name}, --method {looker.method}: {error}") from error
            for place, file in enumerate(files):
                told = describe(looker, chances[place], int(targets[place]))
                row = {"image": str(file), "model": looker.name, "method": looker.method, **told}
                row |= save(pictures[place], maps[place], boxes[place], row, labels[file], options)
                rows.append(row)
    order = {str(file): place for place, file in enumerate(files)}
    rows.sort(key=lambda row: order[row["image"]])
    for row in rows:
        print(told_as(row), flush=True)
    return rows


def count_of(words: list[str]) -> int:
    """How many maps an image gets."""
    return sum(int(word[3:]) if re.fullmatch(r"top\d+", word) else 1 for word in words)


def targets_of(word: str, classifier, chances) -> list:
    """The classes that a word means for the images with these chances (B, K): (B,) long each."""
    if word == "predicted":
        return [chances.argmax(1)]
    if re.fullmatch(r"top\d+", word):
        number = int(word[3:])
        if not 1 <= number <= classifier.count:
            raise UserError(f"--target_class {word}: {classifier.name} has {classifier.count} classes")
        return list(chances.topk(number, 1).indices.T)
    return [chances.argmax(1).fill_(class_of(word, classifier))]


def class_of(word: str, classifier) -> int:
    """The index that a word means: an index, the name of a class, or a part of one name alone."""
    if word.isdigit() and word not in classifier.titles:
        if int(word) < classifier.count:
            return int(word)
        raise UserError(f"--target_class {word}: {classifier.name} has the classes 0 to {classifier.count - 1}")
    names = [title.lower() for title in classifier.titles]
    if not names:
        raise UserError(
            f"--target_class {word}: {classifier.name} does not name its classes\ngive an index, or the names with "
            "--labels FILE"
        )
    fits = [number for number, name in enumerate(names) if word.lower() == name]
    fits = fits or [number for number, name in enumerate(names) if word.lower() in re.split(r", *", name)]
    fits = fits or [number for number, name in enumerate(names) if word.lower() in name]
    if len(fits) == 1:
        return fits[0]
    if not fits:
        raise UserError(
            f"--target_class {word}: no class of {classifier.name} is called so{closest(word.lower(), names)}"
        )
    listed = ", ".join(f"{classifier.titles[number]} ({number})" for number in fits[:8]) + (", ..." if fits[8:] else "")
    raise UserError(f"--target_class {word}: {len(fits)} classes fit: {listed}\ngive the whole name or the index")


def describe(looker: Looker, chances, target: int) -> dict:
    best = int(chances.argmax())
    return {
        "predicted_index": best,
        "predicted": looker.classifier.title(best),
        "predicted_probability": float(chances[best]),
        "target_index": target,
        "target": looker.classifier.title(target),
        "target_probability": float(chances[target]),
    }


def save(picture, heat, box, row: dict, label: str, options: dict) -> dict:
    """Write the overlay, and the map if asked for; their places, and the overlay for the figure."""
    import cv2
    import numpy as np

    from engine.draw import overlaid
    from engine.files import write_atomic
    from engine.pictures import spread_out

    place = Path(options["output"])
    if place.suffix != ".png":
        name = f"{label}_{plain(row['model'])}_{row['method']}_{plain(row['target'])}.png"
        place = make_folder(place) / name
    whole = spread_out(heat, box, *picture.shape[:2])
    drawn = overlaid(picture, whole, options["alpha"], options["colormap"], box)
    _, coded = cv2.imencode(".png", drawn[..., ::-1])
    write_atomic(place, lambda side: side.write_bytes(coded.tobytes()))
    found = {"output": str(place)}
    if options["raw"]:
        found["raw"] = str(place.with_suffix(".npy"))
        with open(found["raw"], "wb") as file:
            np.save(file, whole)
    if options["figure"]:
        found["picture"] = smaller(picture), smaller(drawn)
    return found


def make_folder(place: Path) -> Path:
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {place}: cannot be made ({error.strerror})") from error
    return place


def smaller(picture):
    """uint8 (H, W, 3), scaled down to SHOWN pixels where it is larger."""
    import cv2

    scale = SHOWN / max(picture.shape[:2])
    size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA) if scale < 1 else picture


def told_as(row: dict) -> str:
    """A row as it is printed."""
    text = f"{row['image']}  {row['model']}  {row['predicted']} {row['predicted_probability']:.1%}"
    if row["method"] == "casm":
        return f"{text}  casm  {row['output']}"
    return f"{text}  {row['method']} of {row['target']} {row['target_probability']:.1%}  {row['output']}"


def draw_figure(rows: list[dict], files: list[Path], lookers: list[Looker], options: dict) -> None:
    from engine import draw

    lines = [[row for row in rows if row["image"] == str(file)] for file in files]
    several = len({looker.method for looker in lookers}) > 1
    titles = [row["model"] + (f"\n{row['method']}" if several else "") for row in lines[0]]
    texts = [[f"{row['target']} {row['target_probability']:.0%}" for row in line] for line in lines]
    draw.comparison(
        options["figure"],
        names=[file.name for file in files],
        pictures=[line[0]["picture"][0] for line in lines],
        columns=titles,
        overlays=[[row["picture"][1] for row in line] for line in lines],
        texts=texts,
    )


def show(places: list[str]) -> None:
    """Open a window with these pictures, where there is a display; without one, say so."""
    from matplotlib import image, pyplot

    if (
        os.name == "posix"
        and os.uname().sysname == "Linux"
        and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
    ):
        print("note: --show: there is no display here; the pictures are in their files")
        return
    try:
        for place in places:
            figure = pyplot.figure(place, layout="constrained")
            axes = figure.subplots()
            axes.imshow(image.imread(place))
            axes.axis("off")
        pyplot.show()
    except Exception as error:
        print(f"note: --show: no window could be opened ({type(error).__name__}); the pictures are in their files")


if __name__ == "__main__":
    run(main)
