"""Find image files in folders: one folder per class, and Tiny-ImageNet and ImageNet in their common layouts."""

import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from engine.errors import UserError

IMAGE_EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
IMAGENET_FOLDERS = (".", "imagenet", "ILSVRC2012", "ILSVRC/Data/CLS-LOC")
DEFAULT_DIR = Path("data")  # default of --data_dir; only with it are folders in the working directory tried too


class FileList:
    """A list of many paths, stored in two tensors.

    Indexing with an int returns a Path; indexing with a tensor returns a FileList of those paths that shares the text.
    A list of a million Python strings would be copied into every worker process, because reference counts change and
    copy-on-write then copies the pages.
    """

    def __init__(self, root: str | os.PathLike, names: Iterable[str]):
        """names: relative to root."""
        self.root, text, ends = os.fspath(root), bytearray(), array("q", [0])
        for name in names:
            text += os.fsencode(name)
            ends.append(len(text))
        self.text = torch.frombuffer(text, dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
        ends = torch.frombuffer(ends, dtype=torch.int64)
        self.spans = torch.stack([ends[:-1], ends[1:]], 1)  # (N, 2): start and end of each name in text

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int | torch.Tensor) -> "Path | FileList":
        if not isinstance(index, torch.Tensor):
            return Path(self.path(index))
        chosen = FileList(self.root, ())
        chosen.text, chosen.spans = self.text, self.spans[index]
        return chosen

    def __iter__(self) -> Iterator[Path]:
        return (self[index] for index in range(len(self)))

    def names(self) -> list[str]:
        """Return all names, relative to the root."""
        text = self.text.numpy().tobytes()
        return [os.fsdecode(text[begin:end]) for begin, end in self.spans.tolist()]

    def path(self, index: int) -> str:
        begin, end = self.spans[index].tolist()
        return os.path.join(self.root, os.fsdecode(self.text[begin:end].numpy().tobytes()))


class DataFiles(NamedTuple):
    """The image files of one split of a data set. A label is the index of its class in the sorted class names."""

    files: FileList
    labels: torch.Tensor  # (N,) long
    classes: list[str]

    @property
    def root(self) -> Path:
        return Path(self.files.root)


def find_splits(
    dataset: str, data_dir: Path, val_dir: Path | None, val_labels: Path | None
) -> tuple[DataFiles, DataFiles]:
    """Find the training and test images of a data set of files.

    val_labels: see find_folder(); Tiny-ImageNet comes with its own labels.
    """
    if dataset == "tiny-imagenet":
        return find_tiny_imagenet(data_dir, val_dir)
    return (find_imagenet if dataset == "imagenet" else find_folder)(data_dir, val_dir, val_labels)


def find_folder(data_dir: Path, val_dir: Path | None, val_labels: Path | None = None) -> tuple[DataFiles, DataFiles]:
    """Find data_dir/train/<class>/*, and val_dir/<class>/* or else data_dir/val/ or data_dir/test/ in the same form.

    val_labels: a file of lines `file class`, for test images that are not sorted into class folders.
    """
    train_dir = data_dir / "train"
    test_dir = next((data_dir / name for name in ("val", "test") if (data_dir / name).is_dir()), data_dir / "val")
    test_dir = val_dir or test_dir
    for folder in (train_dir, test_dir):
        if not folder.is_dir():
            raise UserError(
                f"no folder {folder}; expected {data_dir}/train/<class>/*.jpg and {data_dir}/val/<class>/*.jpg (or "
                f"test/)\ngive the folder that holds them with --data_dir{describe_folder(data_dir)}"
            )
    return check_same_classes(
        label_files(list_class_folders(train_dir), train_dir), find_validation_images(test_dir, val_labels)
    )


def find_training_images(flag: str, folder: Path) -> DataFiles:
    """Find train/<class>/* in `folder` or in one of the usual folders inside it. flag: the option that named it."""
    candidates = [folder / name for name in (*IMAGENET_FOLDERS, "tiny-imagenet-200", "tiny-imagenet")]
    root = next((path for path in candidates if (path / "train").is_dir()), None)
    if root is None:
        raise UserError(
            f"{flag} {folder}: no train/<class>/*.jpg in it\nmake the copies with --resize_to{describe_folder(folder)}"
        )
    return label_files(list_class_folders(root / "train"), root / "train")


def find_imagenet(data_dir: Path, val_dir: Path | None, val_labels: Path | None = None) -> tuple[DataFiles, DataFiles]:
    """Find train/<wnid>/* and val/<wnid>/*, or a flat val/ with val_labels, in data_dir or its usual subfolders."""
    candidates = [data_dir / name for name in IMAGENET_FOLDERS]
    candidates += [Path("imagenet")] if data_dir == DEFAULT_DIR else []
    root = next((path for path in candidates if (path / "train").is_dir()), None)
    if root is None:
        raise UserError(
            f"imagenet not found: looked for train/<wnid>/*.JPEG and val/ in {', '.join(map(str, candidates))}\n"
            f"unpack ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar there, or name their folder with "
            f"--data_dir{describe_folder(data_dir)}"
        )
    return find_folder(root, val_dir, val_labels)


def find_validation_images(val: Path, val_labels: Path | None) -> DataFiles:
    """Find val/<class>/*, or val/* with the file that lists their classes. Raises UserError if neither exists."""
    loose = list_images(val)
    if val_labels and not loose:
        raise UserError(
            f"--val_labels {val_labels}: {val} has no images outside class folders\nleave out --val_labels if each "
            f"class has a folder{describe_folder(val)}"
        )
    if not val_labels and (not loose or list_folders(val)):
        return label_files(list_class_folders(val), val)
    if not val_labels:
        raise UserError(
            f"{val} has images outside class folders ({len(loose):,}), so their classes are unknown\n"
            f"move each image to {val}/<class>/, or give --val_labels FILE with lines `file class`"
        )
    return read_val_labels(val, set(loose), val_labels)


def read_val_labels(val: Path, present: set[str], val_labels: Path) -> DataFiles:
    """Read the classes of images from lines `file wnid` or from ImageNet's LOC_val_solution.csv.

    The latter has lines `name,wnid x1 y1 x2 y2 ...`, with names that have no extension. present: names of the files in
    val.
    """
    try:
        lines = val_labels.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--val_labels {val_labels}: cannot be read ({error})\ngive a text file with lines `file class`"
        ) from error
    folders: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line == "ImageId,PredictionString":
            continue
        file, wnid = split_label(line)
        if not wnid:
            raise UserError(f"{val_labels}, line {number}: {line!r} does not have the form `file class`\nfix that line")
        file = next((name for name in (file, f"{file}.JPEG") if name in present), None)
        if file is None:
            raise UserError(
                f"{val_labels}, line {number}: {line!r} names a file that is not in {val}\n"
                "fix that line, or name the right folder with --val_data_dir"
            )
        folders.setdefault(wnid, []).append(file)
    return label_files({wnid: sorted(files) for wnid, files in folders.items()}, val)


def split_label(line: str) -> tuple[str, str]:
    """Split a line into file and class. The class is empty if the line does not have both."""
    if "," in line:
        file, _, rest = line.partition(",")
        return file.strip(), next(iter(rest.split()), "")
    file, _, wnid = line.strip().replace("\t", " ").rpartition(" ")
    return file.strip(), wnid if file else ""


def find_tiny_imagenet(data_dir: Path, val_dir: Path | None) -> tuple[DataFiles, DataFiles]:
    """Find Tiny-ImageNet as unzipped, or with validation images sorted into class folders.

    wnids.txt is not read: its order differs from the sorted class names.
    """
    candidates = [data_dir / name for name in ("tiny-imagenet-200", "tiny-imagenet", ".")]
    candidates += [Path("tiny-imagenet-200"), Path("tiny-imagenet")] if data_dir == DEFAULT_DIR else []
    root = next((path for path in candidates if (path / "train").is_dir()), None)
    if root is None:
        raise UserError(
            f"tiny-imagenet not found: looked for train/<wnid>/images/*.JPEG and val/ in "
            f"{', '.join(map(str, candidates))}\nunpack tiny-imagenet-200.zip there, or name its folder "
            f"with --data_dir{describe_folder(data_dir)}"
        )
    train = label_files(list_class_folders(root / "train"), root / "train")
    test = find_tiny_validation(val_dir or root / "val")
    if len(test.classes) == 1 < len(train.classes):
        raise UserError(
            f"{test.root} has a single class, {test.classes[0]!r}: the folder images/ was read as a class\n"
            "add val_annotations.txt beside images/, or make a folder for each class"
        )
    return check_same_classes(train, test)


def find_tiny_validation(val: Path) -> DataFiles:
    """Find images/* with val_annotations.txt, images/<wnid>/*, <wnid>/images/* or <wnid>/*."""
    annotations = val / "val_annotations.txt"
    loose = list_images(val / "images")
    if annotations.is_file() and loose:
        wnids = dict(line.split("\t")[:2] for line in annotations.read_text().splitlines() if "\t" in line)
        folders: dict[str, list[str]] = {}
        for name in loose:
            if name in wnids:
                folders.setdefault(wnids[name], []).append(f"images/{name}")
        return label_files(folders, val)
    root = val / "images" if list_folders(val / "images") else val
    if not list_folders(root):
        raise UserError(
            f"{val}: the classes of the validation images are unknown\n"
            f"add val_annotations.txt beside images/, or make a folder for each class{describe_folder(val)}"
        )
    return label_files(list_class_folders(root), root)


def find_tiny_evaluation(data_dir: Path, val_dir: Path | None) -> DataFiles:
    """Find the validation images in any layout and folder that find_tiny_imagenet() supports."""
    candidates = [data_dir / name / "val" for name in ("tiny-imagenet-200", "tiny-imagenet", ".")]
    candidates += [Path("tiny-imagenet-200/val"), Path("tiny-imagenet/val")] if data_dir == DEFAULT_DIR else []
    val = val_dir or next((path for path in candidates if path.is_dir()), None)
    if val is None:
        raise UserError(
            f"tiny-imagenet not found: looked for {', '.join(map(str, candidates))}\n"
            f"unpack tiny-imagenet-200.zip there, or name its folder with --data_dir{describe_folder(data_dir)}"
        )
    found = find_tiny_validation(val)
    if found.classes == ["images"]:
        raise UserError(
            f"{found.root} has a single class, 'images': the folder images/ was read as a class\n"
            "add val_annotations.txt beside images/, or make a folder for each class"
        )
    return found


def find_evaluation_images(dataset: str, data_dir: Path, val_dir: Path | None, val_labels: Path | None) -> DataFiles:
    """Find the test images; the training images need not exist.

    They are in val_dir, or else in the first of val/, test/ and data_dir itself that has class folders or, with
    val_labels, images. For imagenet, the usual subfolders of data_dir are tried too.
    """
    if dataset == "tiny-imagenet":
        return find_tiny_evaluation(data_dir, val_dir)
    if val_dir:
        return find_validation_images(val_dir, val_labels)
    roots = [data_dir]
    if dataset == "imagenet":
        roots = [data_dir / name for name in IMAGENET_FOLDERS] + ([Path("imagenet")] if data_dir == DEFAULT_DIR else [])
    candidates = [root / name for name in ("val", "test") for root in roots]
    # the images of a flat val/ must not be taken for a class
    candidates += [root for root in roots if not (root / "val").is_dir() and not (root / "test").is_dir()]
    found = next((path for path in candidates if (val_labels and list_images(path)) or has_class_folders(path)), None)
    # find_validation_images() explains how to label images without class folders
    found = found or next(filter(list_images, candidates), None)
    if found is None:
        raise UserError(
            f"no evaluation images found: looked for <class>/*.jpg (or .png, .JPEG ...) in "
            f"{', '.join(map(str, candidates))}\nname the folder of the data set with --data_dir, or the folder that "
            f"holds the class folders with --val_data_dir{describe_folder(data_dir)}"
        )
    return find_validation_images(found, val_labels)


def has_class_folders(root: Path) -> bool:
    return any(list_images(root / name) or list_images(root / name / "images") for name in list_folders(root))


def list_class_folders(root: Path) -> dict[str, list[str]]:
    """Return class name -> sorted files relative to root. <class>/images/* counts as <class>/*.

    Empty folders are skipped. Raises UserError if a folder has files but no images, or if there are no folders.
    """
    folders = {}
    for name in list_folders(root):
        entries = os.listdir(root / name)
        if not entries:
            continue
        inner = f"{name}/images" if "images" in entries and (root / name / "images").is_dir() else name
        files = list_images(root / inner) if inner != name else filter_images(entries)
        folders[name] = [f"{inner}/{file}" for file in files]
    empty = [name for name, files in folders.items() if not files]
    if not folders or empty:
        what = f"no images in {', '.join(empty[:5])}" if folders else "no class folders"
        raise UserError(f"{root}: {what}; expected {root}/<class>/*.jpg (or .png, .JPEG ...){describe_folder(root)}")
    return folders


def list_folders(root: Path) -> list[str]:
    """Return the sorted names of the folders in a folder; an empty list if it does not exist."""
    if not root.is_dir():
        return []
    with os.scandir(root) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def list_images(root: Path) -> list[str]:
    """Return the sorted names of the image files in a folder; an empty list if it does not exist."""
    return filter_images(os.listdir(root)) if root.is_dir() else []


def filter_images(names: list[str]) -> list[str]:
    return sorted(name for name in names if os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS)


def label_files(folders: dict[str, list[str]], root: Path) -> DataFiles:
    classes = sorted(folders)
    counts = torch.tensor([len(folders[name]) for name in classes])
    labels = torch.arange(len(classes)).repeat_interleave(counts)
    return DataFiles(FileList(root, (file for name in classes for file in folders[name])), labels, classes)


def check_same_classes(train: DataFiles, test: DataFiles) -> tuple[DataFiles, DataFiles]:
    if train.classes != test.classes:
        missing = [describe_missing(one, other) for one, other in ((train, test), (test, train))]
        raise UserError(
            f"the classes of {train.root} ({len(train.classes)}) and {test.root} ({len(test.classes)}) differ: only "
            f"the first has {missing[0]}, only the second has {missing[1]}\nuse the same class folders in both"
        )
    return train, test


def describe_missing(one: DataFiles, other: DataFiles) -> str:
    """Describe the classes of `one` that `other` lacks: the first five and their number."""
    names = sorted(set(one.classes) - set(other.classes))
    return f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''} ({len(names)})" if names else "none"


def describe_folder(folder: Path) -> str:
    """Describe what a folder contains, to end an error message."""
    if not folder.is_dir():
        return f"; {folder} does not exist"
    names = sorted(os.listdir(folder))
    shown = ", ".join(names[:6]) + (" ..." if len(names) > 6 else "") if names else "nothing"
    return f"; {folder} contains {shown}"
