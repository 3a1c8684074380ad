"""Find image files in folders: one folder per class, and Tiny-ImageNet and ImageNet in their common layouts."""

import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from engine.data.label_lists import format_examples, read_labels
from engine.data.listing import filter_images, filter_unknown, list_folders, list_images, walk_files
from engine.errors import UserError
from engine.runtime.text import format_count

IMAGENET_FOLDERS = (".", "imagenet", "ILSVRC2012", "ILSVRC/Data/CLS-LOC")
UNKNOWN_ENDING = "not read: no ending of an image that can be read; convert such images to .png"
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
        self.upright = False  # whether the EXIF orientation of these images is applied
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
        chosen.text, chosen.spans, chosen.upright = self.text, self.spans[index], self.upright
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
    notes: tuple[str, ...] = ()  # lines on files and folders that were not read

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
    return check_same_classes(find_class_folders(train_dir), find_validation_images(test_dir, val_labels))


def find_training_images(flag: str, folder: Path) -> DataFiles:
    """Find train/<class>/* in `folder` or in one of the usual folders inside it. flag: the option that named it."""
    candidates = [folder / name for name in (*IMAGENET_FOLDERS, "tiny-imagenet-200", "tiny-imagenet")]
    root = next((path for path in candidates if (path / "train").is_dir()), None)
    if root is None:
        raise UserError(
            f"{flag} {folder}: no train/<class>/*.jpg in it\nmake the copies with --resize_to{describe_folder(folder)}"
        )
    return find_class_folders(root / "train")


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
    if val_labels and not val_labels.is_file():
        raise UserError(f"--val_labels {val_labels}: no such file\ngive a text file with lines `file class`")
    if not val_labels and (not loose or list_folders(val)):
        return find_class_folders(val)
    if not val_labels:
        raise UserError(
            f"{val} has images outside class folders ({len(loose):,}), so their classes are unknown\n"
            f"move each image to {val}/<class>/, or give --val_labels FILE with lines `file class`"
        )
    return label_images(val, "", val_labels, needs_all=True)


def label_images(root: Path, folder: str, labels_file: Path, needs_all: bool) -> DataFiles:
    """Label the images in a folder of root by a list of lines `file class`; see read_labels().

    needs_all: raise UserError if the list names files that do not exist.
    """
    names, where = list_images(root / folder), root / folder
    labels, absent = read_labels(labels_file, names, where)
    if absent and (needs_all or not labels):
        raise UserError(
            f"{labels_file}, {format_examples(absent, '; ')}\n"
            "correct the list, or name the right folder with --val_data_dir"
        )
    notes = [f"{labels_file}: {format_count(len(absent), 'line')} ignored: {absent[0]}"] if absent else []
    files = list(walk_files(where))
    left_out = {
        ("image", f"not listed in {labels_file} and left out"): [name for name in names if name not in labels],
        ("image", f"in subfolders left out, as {labels_file} is for the images beside them"): [
            name for name in filter_images(files) if os.sep in name
        ],
        ("file", UNKNOWN_ENDING): filter_unknown(files),
    }
    notes += describe_left_out(where, left_out)
    folders: dict[str, list[str]] = {}
    for name in sorted(labels):
        folders.setdefault(labels[name], []).append(os.path.join(folder, name))
    return label_files(folders, root, notes)


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
    train = find_class_folders(root / "train")
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
    if annotations.is_file() and list_images(val / "images"):
        return label_images(val, "images", annotations, needs_all=False)
    root = val / "images" if list_folders(val / "images") else val
    if not list_folders(root):
        raise UserError(
            f"{val}: the classes of the validation images are unknown\n"
            f"add val_annotations.txt beside images/, or make a folder for each class{describe_folder(val)}"
        )
    return find_class_folders(root)


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
    # the images of a flat val/ must not count as a class
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
    """Return whether a folder has class folders. In val/ and test/, their images may be in subfolders of any depth."""
    folders = [root / name for name in list_folders(root)]
    if root.name in ("val", "test"):
        return any(filter_images([file]) for folder in folders for file in walk_files(folder))
    return any(list_images(folder) or list_images(folder / "images") for folder in folders)


def find_class_folders(root: Path) -> DataFiles:
    """Find <class>/**/*: the folders in root are the classes, and all image files below them are read.

    Empty folders are no classes. Raises UserError if a folder has files but no images, or if there are no folders.
    """
    folders, unknown, empty = {}, [], []
    for name in list_folders(root):
        files = [f"{name}/{file}" for file in walk_files(root / name)]
        unknown += filter_unknown(files)
        if files:
            folders[name] = filter_images(files)
        else:
            empty.append(name)
    without = [name for name, files in folders.items() if not files]
    if not folders or without:
        what = f"no images in {', '.join(without[:5])}" if folders else "no class folders"
        raise UserError(f"{root}: {what}; expected {root}/<class>/*.jpg (or .png, .JPEG ...){describe_folder(root)}")
    left_out = {
        ("empty class folder", "ignored"): empty,
        ("image", "not read: not in a class folder"): list_images(root),
        ("file", UNKNOWN_ENDING): unknown,
    }
    return label_files(folders, root, describe_left_out(root, left_out))


def describe_left_out(root: Path, left_out: dict[tuple[str, str], list[str]]) -> tuple[str, ...]:
    """Return a note for each reason why something in a folder is left out. left_out: (noun, reason) -> names."""
    return tuple(
        f"{root}: {format_count(len(names), noun)} {why} ({format_examples(names)})"
        for (noun, why), names in left_out.items()
        if names
    )


def label_files(folders: dict[str, list[str]], root: Path, notes: Iterable[str] = ()) -> DataFiles:
    classes = sorted(folders)
    counts = torch.tensor([len(folders[name]) for name in classes])
    labels = torch.arange(len(classes)).repeat_interleave(counts)
    return DataFiles(
        FileList(root, (file for name in classes for file in folders[name])), labels, classes, tuple(notes)
    )


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
