"""Image sets in folders: a folder for each class, and Tiny-ImageNet in every layout it is kept in."""

from pathlib import Path
from typing import NamedTuple

from engine.cli import UserError

ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


class Found(NamedTuple):
    """The files of one part, before any is read. A label is the position of its class in the sorted names."""

    files: list[Path]
    labels: list[int]
    classes: list[str]
    where: Path


def find_folder(data_dir: Path, val_dir: Path | None) -> tuple[Found, Found]:
    """train/<class>/* and val/ or test/ in the same form, below data_dir; val_dir: the evaluation part itself."""
    train_dir = data_dir / "train"
    test_dir = next((data_dir / name for name in ("val", "test") if (data_dir / name).is_dir()), data_dir / "val")
    test_dir = val_dir or test_dir
    for place in (train_dir, test_dir):
        if not place.is_dir():
            raise UserError(
                f"no folder {place}; a class-per-folder set has {data_dir}/train/<class>/*.jpg and "
                f"{data_dir}/val/<class>/*.jpg (or test/)\nname its place with --data_dir{listing(data_dir)}"
            )
    return same_classes(labelled(class_folders(train_dir), train_dir), labelled(class_folders(test_dir), test_dir))


def find_tiny_imagenet(data_dir: Path, val_dir: Path | None) -> tuple[Found, Found]:
    """The unzipped original, or a copy with sorted validation images. wnids.txt has another order and is not read."""
    places = [data_dir / name for name in ("tiny-imagenet-200", "tiny-imagenet", ".")]
    places += [Path("tiny-imagenet-200"), Path("tiny-imagenet")]
    place = next((path for path in places if (path / "train").is_dir()), None)
    if place is None:
        raise UserError(
            f"tiny-imagenet not found: looked for train/<wnid>/images/*.JPEG and val/ in {', '.join(map(str, places))}"
            f"\nunpack tiny-imagenet-200.zip there, or name its place with --data_dir{listing(data_dir)}"
        )
    train = labelled(class_folders(place / "train"), place / "train")
    test = find_tiny_validation(val_dir or place / "val")
    if len(test.classes) == 1 < len(train.classes):
        raise UserError(
            f"{test.where} shows a single class, {test.classes[0]!r}: this reads images/ as a class\n"
            "it needs val_annotations.txt beside images/, or a folder for each class"
        )
    return same_classes(train, test)


def find_tiny_validation(val: Path) -> Found:
    """images/* with val_annotations.txt, images/<wnid>/*, <wnid>/images/* or <wnid>/*."""
    annotations = val / "val_annotations.txt"
    loose = sorted(path for path in (val / "images").glob("*") if path.suffix.lower() in ENDINGS)
    if annotations.is_file() and loose:
        wnid_of = dict(line.split("\t")[:2] for line in annotations.read_text().splitlines() if "\t" in line)
        folders: dict[str, list[Path]] = {}
        for file in loose:
            if file.name in wnid_of:
                folders.setdefault(wnid_of[file.name], []).append(file)
        return labelled(folders, val)
    sorted_images = (val / "images").is_dir() and any(path.is_dir() for path in (val / "images").iterdir())
    root = val / "images" if sorted_images else val
    if not root.is_dir() or not any(path.is_dir() for path in root.iterdir()):
        raise UserError(
            f"{val}: cannot tell the classes of the validation images; it needs val_annotations.txt beside images/, "
            f"or a folder for each class{listing(val)}"
        )
    return labelled(class_folders(root), root)


def class_folders(root: Path) -> dict[str, list[Path]]:
    """Class name -> its files, sorted; <class>/images/* counts as <class>/*. Raises UserError where there are none."""
    folders = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir() and any(path.iterdir())):
        inner = folder / "images" if (folder / "images").is_dir() else folder
        folders[folder.name] = sorted(path for path in inner.iterdir() if path.suffix.lower() in ENDINGS)
    empty = [name for name, files in folders.items() if not files]
    if not folders or empty:
        what = f"no images in {', '.join(empty[:5])}" if folders else "no class folders"
        raise UserError(f"{root}: {what}; expected {root}/<class>/*.jpg (or .png, .JPEG ...){listing(root)}")
    return folders


def labelled(folders: dict[str, list[Path]], where: Path) -> Found:
    classes = sorted(folders)
    pairs = [(file, label) for label, name in enumerate(classes) for file in folders[name]]
    return Found([file for file, _ in pairs], [label for _, label in pairs], classes, where)


def same_classes(train: Found, test: Found) -> tuple[Found, Found]:
    if train.classes != test.classes:
        raise UserError(
            f"the classes of {train.where} and {test.where} differ: {', '.join(train.classes[:5])} ... "
            f"({len(train.classes)}) against {', '.join(test.classes[:5])} ... ({len(test.classes)})\n"
            "both need the same class folders"
        )
    return train, test


def listing(folder: Path) -> str:
    """What is in a folder, for the end of a message."""
    if not folder.is_dir():
        return f"; there is no folder {folder}"
    names = sorted(path.name for path in folder.iterdir())
    shown = ", ".join(names[:6]) + (" ..." if len(names) > 6 else "") if names else "nothing"
    return f"; {folder} holds {shown}"
