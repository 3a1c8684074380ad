"""Data sets: what lies where on disk, and their parts as uint8 images with labels. See engine/batches.py for how they are fed."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from engine.cli import UserError
from engine.image_files import ImageFiles, class_folders, listing
from engine.shapes import CLASSES as SHAPE_NAMES
from engine.shapes import draw_shapes

STATISTICS = {  # mean and std of pixels in 0..1
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "tiny-imagenet": ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
SHAPES_COUNTS = (5000, 1000)
KNOWN_COUNTS = {"cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000), "tiny-imagenet": (100_000, 10_000)}
CIFAR = {  # folder, training files, test file, file of names, key of the labels, key of the names, sizes in bytes
    "cifar10": (
        "cifar-10-batches-py",
        [f"data_batch_{i}" for i in range(1, 6)],
        "test_batch",
        "batches.meta",
        "labels",
        "label_names",
        {
            "data_batch_1": 31035704,
            "data_batch_2": 31035320,
            "data_batch_3": 31035999,
            "data_batch_4": 31035696,
            "data_batch_5": 31035623,
            "test_batch": 31035526,
            "batches.meta": 158,
        },
    ),
    "cifar100": (
        "cifar-100-python",
        ["train"],
        "test",
        "meta",
        "fine_labels",
        "fine_label_names",
        {"train": 155249918, "test": 31049707, "meta": 1557},
    ),
}


@dataclass
class Part:
    """One part of a data set: pixels as a uint8 tensor (N, H, W, 3), or as files to be read batch by batch."""

    pixels: torch.Tensor | ImageFiles
    labels: torch.Tensor  # (N,) long
    classes: list[str]
    where: str
    notes: dict[str, torch.Tensor] = field(default_factory=dict)  # boxes and masks, where the set has them

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: torch.Tensor) -> "Part":
        """The images at these positions, in this order."""
        return replace(
            self,
            pixels=self.pixels[index],
            labels=self.labels[index],
            notes={k: v[index] for k, v in self.notes.items()},
        )

    def summary(self, name: str) -> str:
        counts = torch.bincount(self.labels, minlength=len(self.classes))
        return (
            f"{name}: {len(self):,} images of {len(self.classes)} classes, {counts.min():,} to {counts.max():,} a class, "
            f"from {self.where}"
        )


@dataclass
class Data:
    """train, test and, where asked for, valid; with the mean and std to normalise by."""

    train: Part
    test: Part
    valid: Part | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    warnings: list[str] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        return self.train.classes


def load_data(
    dataset: str,
    *,
    data_dir: str,
    val_data_dir: str | None = None,
    download: bool = False,
    image_size: int | None = None,
    norm: str = "own",
    num_classes: int | None = None,
    limit: int = 0,
    labels_per_class: int = 0,
    valid_labels_per_class: int = 0,
    seed: int = 0,
    on_bad_image: str = "stop",
    workers: int = 0,
    progress: Callable = lambda items, **kwargs: items,
) -> Data:
    """Read a data set. Raises UserError, with what was looked for and the remedy, when it cannot.

    progress: wraps an iterable in a progress bar (tqdm's signature).
    """
    if dataset in CIFAR:
        train, test = load_cifar(dataset, Path(data_dir), Path(val_data_dir or data_dir), download)
        if image_size not in (None, 32):
            raise UserError(f"--image_size {image_size}: the images of {dataset} have 32 pixels a side")
    elif dataset == "shapes":
        train, test = load_shapes(image_size or 32, num_classes or 10)
    else:
        size = image_size or 64
        find = find_tiny_imagenet if dataset == "tiny-imagenet" else find_folder
        train, test = find(Path(data_dir), Path(val_data_dir) if val_data_dir else None)
        check_classes(train, test)
        train, test = (part_of_files(part, size, on_bad_image) for part in (train, test))
    warnings = []
    if dataset in KNOWN_COUNTS and (len(train), len(test)) != KNOWN_COUNTS[dataset]:
        known = KNOWN_COUNTS[dataset]
        warnings.append(
            f"{dataset} usually has {known[0]:,} training and {known[1]:,} test images, here are {len(train):,} and {len(test):,}"
        )
    if num_classes and num_classes != len(train.classes):
        raise UserError(f"--num_classes {num_classes}: the data in {train.where} has {len(train.classes)} classes")
    train, valid = split(train, labels_per_class, valid_labels_per_class, seed)
    if limit:
        train, test = (part.take(torch.arange(min(limit, len(part)))) for part in (train, test))
        warnings.append(f"--limit {limit}: results are partial")
    if dataset == "tiny-imagenet":
        train, test, valid = (part and decoded(part, workers, progress) for part in (train, test, valid))
    side = train.pixels.shape[1] if isinstance(train.pixels, torch.Tensor) else train.pixels.size
    mean, std = statistics(dataset, norm)
    return Data(train, test, valid, mean, std, side, warnings)


def statistics(name: str, norm: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std by --norm; the sets without statistics of their own use ImageNet's (folder) or 0.5 (shapes)."""
    own = {"folder": "imagenet", "shapes": "half"}.get(name, name)
    return STATISTICS[own if norm == "own" else norm]


def split(train: Part, labels_per_class: int, valid_labels_per_class: int, seed: int) -> tuple[Part, Part | None]:
    """Keep labels_per_class training images of each class (0: the rest), and valid_labels_per_class others for validation."""
    if not labels_per_class and not valid_labels_per_class:
        return train, None
    generator = torch.Generator().manual_seed(seed)
    kept, held = [], []
    for label, name in enumerate(train.classes):
        of_class = (train.labels == label).nonzero().flatten()
        wanted = labels_per_class + valid_labels_per_class
        if wanted > len(of_class):
            raise UserError(
                f"{wanted} images of class {name!r} are asked for (--labels_per_class {labels_per_class}, "
                f"--valid_labels_per_class {valid_labels_per_class}), there are {len(of_class)}"
            )
        shuffled = of_class[torch.randperm(len(of_class), generator=generator)]
        held.append(shuffled[:valid_labels_per_class])
        rest = shuffled[valid_labels_per_class:]
        kept.append(rest[:labels_per_class] if labels_per_class else rest)
    valid = train.take(torch.cat(held).sort().values) if valid_labels_per_class else None
    return train.take(torch.cat(kept).sort().values), valid


# shapes


def load_shapes(size: int, num_classes: int) -> tuple[Part, Part]:
    if num_classes > len(SHAPE_NAMES):
        raise UserError(f"--num_classes {num_classes}: shapes has {len(SHAPE_NAMES)} classes")
    parts = []
    for seed, count in enumerate(SHAPES_COUNTS):
        drawn = draw_shapes(count, size, num_classes=num_classes, seed=seed)
        images, labels = drawn.pop("images"), drawn.pop("labels")
        parts.append(Part(images, labels, SHAPE_NAMES[:num_classes], f"a generator (seed {seed})", drawn))
    return parts[0], parts[1]


# CIFAR


class ArrayUnpickler(pickle.Unpickler):
    """The CIFAR files are pickles of numpy arrays, text and numbers; anything else in one is refused."""

    allowed = {
        ("numpy.core.multiarray", "_reconstruct"): ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"): ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"): ("numpy", "ndarray"),
        ("numpy", "dtype"): ("numpy", "dtype"),
        ("_codecs", "encode"): ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which no CIFAR file does")
        module, name = self.allowed[module, name]
        try:
            return super().find_class(module, name)
        except ModuleNotFoundError:  # numpy 1
            return super().find_class(module.replace("_core", "core"), name)


def load_cifar(name: str, train_dir: Path, test_dir: Path, download: bool) -> tuple[Part, Part]:
    folder, train_files, test_file, meta_file, label_key, names_key, sizes = CIFAR[name]
    found = find_cifar(name, train_dir, download)
    classes = [n if isinstance(n, str) else n.decode() for n in read_cifar(found / meta_file, sizes)[names_key]]
    batches = [read_cifar(found / file, sizes) for file in train_files]
    place = found if test_dir == train_dir else find_cifar(name, test_dir, download)
    train = cifar_part(batches, label_key, classes, found)
    return train, cifar_part([read_cifar(place / test_file, sizes)], label_key, classes, place)


def cifar_part(batches: list[dict], label_key: str, classes: list[str], where: Path) -> Part:
    pixels = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = [label for batch in batches for label in batch[label_key]]
    return Part(torch.from_numpy(np.ascontiguousarray(pixels)), torch.tensor(labels), classes, str(where))


def find_cifar(name: str, data_dir: Path, download: bool) -> Path:
    folder, train_files, test_file, meta_file, *_ = CIFAR[name]
    needed = [*train_files, test_file, meta_file]
    places = [data_dir / folder, data_dir]
    for place in places:
        missing = [file for file in needed if not (place / file).is_file()]
        if not missing:
            return place
        if len(missing) < len(needed) and place.name == folder:
            raise UserError(
                f"{name} in {place} is incomplete: {', '.join(missing)} missing\ndelete the folder and try again, or put them there"
            )
    if download:
        try:
            import torchvision

            getattr(torchvision.datasets, name.upper())(str(data_dir), download=True)
            return data_dir / folder
        except Exception as error:
            reason = (
                f"; downloading it failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
            )
    else:
        reason = ""
    raise UserError(
        f"{name} not found: looked for {', '.join(needed)} in {' and '.join(map(str, places))}{reason}\n"
        f"unpack the python version of {name} so that {places[0]} holds these files, or name its place with --data_dir; "
        "--dataset shapes needs no files"
    )


def read_cifar(path: Path, sizes: dict[str, int]) -> dict:
    try:
        with open(path, "rb") as file:
            content = ArrayUnpickler(file, encoding="latin1").load()
        if "data" in content and content["data"].shape[1:] != (3072,):
            raise ValueError(f"images of {content['data'].shape[1:]} numbers")
        return content
    except Exception as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}): expected {sizes[path.name]:,} bytes, found "
            f"{path.stat().st_size if path.exists() else 0:,}\ndelete it and unpack or download the archive again"
        ) from error


# class-per-folder sets and Tiny-ImageNet


@dataclass
class Found:
    """Files of one part, before they are read."""

    files: list[Path]
    labels: list[int]
    classes: list[str]
    where: Path


def part_of_files(found: Found, size: int, on_bad_image: str) -> Part:
    return Part(
        ImageFiles(found.files, size, on_bad_image), torch.tensor(found.labels), found.classes, str(found.where)
    )


def check_classes(train: Found, test: Found) -> None:
    if train.classes != test.classes:
        raise UserError(
            f"the classes of {train.where} and {test.where} differ: {', '.join(train.classes[:5])} ... "
            f"({len(train.classes)}) against {', '.join(test.classes[:5])} ... ({len(test.classes)})\n"
            "both need the same class folders"
        )


def labelled(folders: dict[str, list[Path]], where: Path) -> Found:
    classes = sorted(folders)
    pairs = [(file, label) for label, name in enumerate(classes) for file in folders[name]]
    return Found([file for file, _ in pairs], [label for _, label in pairs], classes, where)


def find_folder(data_dir: Path, val_dir: Path | None) -> tuple[Found, Found]:
    """train/<class>/* with val/ or test/ in the same form, below data_dir; val_dir: the evaluation part itself."""
    train_dir = data_dir / "train"
    test_dir = val_dir or next(
        (data_dir / name for name in ("val", "test") if (data_dir / name).is_dir()), data_dir / "val"
    )
    for place in (train_dir, test_dir):
        if not place.is_dir():
            raise UserError(
                f"no folder {place}; a class-per-folder set has {data_dir}/train/<class>/*.jpg and {data_dir}/val/<class>/*.jpg "
                f"(or test/)\nname its place with --data_dir and --val_data_dir{listing(data_dir)}"
            )
    return labelled(class_folders(train_dir), train_dir), labelled(class_folders(test_dir), test_dir)


def find_tiny_imagenet(data_dir: Path, val_dir: Path | None) -> tuple[Found, Found]:
    """The unzipped original and its re-arranged copies. Class index: position in the sorted names of the folders under train/."""
    names = ("tiny-imagenet-200", "tiny-imagenet", ".")
    places = [data_dir / name for name in names] + [Path("tiny-imagenet-200"), Path("tiny-imagenet")]
    place = next((p for p in places if (p / "train").is_dir()), None)
    if place is None:
        raise UserError(
            f"tiny-imagenet not found: looked for train/<wnid>/images/*.JPEG and val/ in {', '.join(map(str, places))}\n"
            f"unpack tiny-imagenet-200.zip there, or name its place with --data_dir{listing(data_dir)}"
        )
    train = labelled(class_folders(place / "train"), place / "train")
    val = val_dir or place / "val"
    annotations = val / "val_annotations.txt"
    if annotations.is_file() and any((val / "images").glob("*.*")):
        wnids = dict(line.split("\t")[:2] for line in annotations.read_text().splitlines() if "\t" in line)
        folders: dict[str, list[Path]] = {}
        for file in sorted((val / "images").iterdir()):
            if file.name in wnids:
                folders.setdefault(wnids[file.name], []).append(file)
        test = labelled(folders, val)
    else:
        root = val / "images" if (val / "images").is_dir() else val
        if not root.is_dir() or not any(path.is_dir() for path in root.iterdir()):
            raise UserError(
                f"{val}: cannot tell the classes of the validation images; it needs val_annotations.txt beside images/, or a "
                "folder for each class"
            )
        test = labelled(class_folders(root), root)
    if len(test.classes) == 1 < len(train.classes):
        raise UserError(
            f"{test.where} shows a single class, {test.classes[0]!r}: this reads images/ as a class\n"
            "it needs val_annotations.txt, or a folder for each class"
        )
    return train, test


def decoded(part: Part, workers: int, progress: Callable) -> Part:
    """The same part with its images read into one tensor."""
    return replace(part, pixels=part.pixels.read_all(workers, progress))
