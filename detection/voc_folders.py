"""Find PASCAL VOC on disk, or download it: its folders, its class names and its lists of images."""

import re
from pathlib import Path

import torchvision

from engine.data.folders import describe_folder
from engine.data.listing import is_visible, list_folders
from engine.errors import UserError, get_first_error_line, suggest_closest

CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow "
    "diningtable dog horse motorbike person pottedplant sheep sofa train tvmonitor"
).split()
SET_SIZES = {"2007_train": 2501, "2007_val": 2510, "2007_trainval": 5011, "2007_test": 4952}
SET_SIZES |= {"2012_train": 5717, "2012_val": 5823, "2012_trainval": 11540}
ARCHIVES = {  # (year, whether it holds the test set) -> published archive
    ("2007", False): "VOCtrainval_06-Nov-2007.tar",
    ("2007", True): "VOCtest_06-Nov-2007.tar",
    ("2012", False): "VOCtrainval_11-May-2012.tar",
}
CLASS_LIST_FLAGS = ("-1", "0", "1")  # in the list of a class: absent, only difficult objects, present
YEAR_FOLDER = re.compile(r"VOC(\d{4})")


# ---- Folders and downloads ----


def list_main_candidates(data_dir: Path) -> list[Path]:
    """Return the folders that usually are the devkit, best first."""
    return [data_dir, data_dir / "VOCdevkit", data_dir / "VOCdevkit" / "VOCdevkit"]


def list_years(folder: Path) -> list[str]:
    """Return the years of its subfolders VOC<year>, sorted."""
    return [match[1] for match in map(YEAR_FOLDER.fullmatch, list_folders(folder)) if match]


def list_devkits(data_dir: Path) -> list[Path]:
    """Return the folders that hold VOC<year>, best first.

    These are data_dir, VOCdevkit in it and a nested VOCdevkit/VOCdevkit, then its other subfolders, such as
    VOCdevkit2007 and VOCdevkit2012, and VOCdevkit in them. If data_dir is itself a VOC<year>, it is its parent.
    """
    if YEAR_FOLDER.fullmatch(data_dir.absolute().name) and (data_dir / "ImageSets").is_dir():
        return [data_dir.absolute().parent if data_dir == Path() else data_dir.parent]
    others = [data_dir / name for name in list_folders(data_dir)]
    candidates = list_main_candidates(data_dir) + [place for other in others for place in (other, other / "VOCdevkit")]
    return list(filter(list_years, dict.fromkeys(candidates)))


def find_devkits(data_dir: Path) -> list[Path]:
    """Return the result of list_devkits(). Raises UserError, with the folders that were searched, if it is empty."""
    if found := list_devkits(data_dir):
        return found
    if (data_dir / "ImageSets" / "Main").is_dir():
        raise UserError(
            f"{data_dir} has the folders of a VOC<year>, but another name\n"
            "rename it to VOC and a year, such as VOC2007; its lists are then 2007_trainval and so on"
        )
    folders, archives = ", ".join(map(str, list_main_candidates(data_dir))), ", ".join(ARCHIVES.values())
    raise UserError(
        f"PASCAL VOC not found: looked for VOC2007/ and VOC2012/, each with JPEGImages/, Annotations/ and "
        f"ImageSets/Main/, in {folders} and the other subfolders of {data_dir}\nunpack {archives} there, download them "
        f"with --download true, or set --data_dir to their folder{describe_folder(data_dir)}"
    )


def get_list_path(devkit: Path, name: str) -> Path:
    """Return the file that lists the images of a set, such as 2007_trainval."""
    year, split = split_set_name(name)
    return devkit / f"VOC{year}" / "ImageSets" / "Main" / f"{split}.txt"


def find_devkit_of_set(devkits: list[Path], name: str) -> Path | None:
    """Return the first devkit that has the list of a set."""
    return next((devkit for devkit in devkits if get_list_path(devkit, name).is_file()), None)


def download_missing_sets(data_dir: Path, sets: list[str]) -> None:
    """Download and unpack the archives of the sets that data_dir does not have."""
    for name in sets:
        devkits = list_devkits(data_dir)
        if not find_devkit_of_set(devkits, name):
            new_devkit = data_dir if data_dir.name == "VOCdevkit" else data_dir / "VOCdevkit"
            download_archive(devkits[0] if devkits else new_devkit, *split_set_name(name))


def download_archive(devkit: Path, year: str, split: str) -> None:
    """Download and unpack the archive that holds this set. Raises UserError if that fails."""
    test = split == "test" or split.endswith("_test")
    archive = ARCHIVES.get((year, test))
    root = devkit.absolute().parent
    if archive is None:
        raise UserError(f"no published archive holds {year}_{split}\nput it into {devkit}/VOC{year} yourself")
    if devkit.absolute().name != "VOCdevkit":
        raise UserError(
            f"{archive} unpacks into a folder named VOCdevkit, but the devkit is {devkit}\nrename it to VOCdevkit, or "
            "unpack the archive elsewhere and move its content there"
        )
    try:
        torchvision.datasets.VOCDetection(str(root), year=year, image_set="test" if test else "trainval", download=True)
    except Exception as error:
        reason = get_first_error_line(error)
        raise UserError(
            f"downloading {archive} failed ({type(error).__name__}: {reason})\nobtain it elsewhere and unpack it in "
            f"{root}, so that {root / 'VOCdevkit' / f'VOC{year}'} exists; --dataset shapes needs no files"
        ) from error


# ---- Classes and lists ----


def read_classes(devkits: list[Path]) -> list[str]:
    """Read classes.txt of the devkits, which must agree. A devkit without this file has the classes of VOC."""
    by_devkit = {devkit: read_devkit_classes(devkit) for devkit in devkits}
    first, *others = by_devkit
    for devkit in others:
        if by_devkit[devkit] != by_devkit[first]:
            raise UserError(
                f"{first} and {devkit} have different classes\nput the same classes.txt into both, or name the data "
                "set that you mean with --data_dir"
            )
    return by_devkit[first]


def read_devkit_classes(devkit: Path) -> list[str]:
    path = devkit / "classes.txt"
    if not path.is_file():
        return list(CLASSES)
    names = [line.strip() for line in read_lines(path) if line.strip()]
    if not names or len(set(names)) < len(names):
        problem = "a class name occurs twice" if names else "the file has no class names"
        raise UserError(f"{path}: {problem}\nwrite one class name per line")
    return names


def split_set_name(name: str) -> tuple[str, str]:
    """Split the name of an image set into year and list: 2007_trainval -> 2007, trainval."""
    match = re.fullmatch(r"(\d{4})_([\w-]+)", name)
    if not match:
        raise UserError(
            f"{name!r} is not the name of an image set\nnames have the form YEAR_LIST, such as {', '.join(SET_SIZES)}"
        )
    return match[1], match[2]


def read_list(devkits: list[Path], name: str) -> dict[str, Path]:
    """Return the images of a set, each once, as VOC2007/000005 -> the devkit that it is in.

    Lines are `id`, or `id flag` in the list of a class. Raises UserError if no devkit has the list.
    """
    year, _ = split_set_name(name)
    devkit = find_devkit_of_set(devkits, name)
    if devkit is None:
        available = list_sets(devkits)
        raise UserError(
            f"no image set {name}: {get_list_path(devkits[0], name)} does not exist{suggest_closest(name, available)}\n"
            f"sets in {', '.join(map(str, devkits))}: {', '.join(available) or 'none'}; --download true downloads "
            "those of 2007 and 2012"
        )
    path, names = get_list_path(devkit, name), []
    for number, line in enumerate(read_lines(path), 1):
        words = line.split()
        if len(words) > 2 or words[1:] and words[1] not in CLASS_LIST_FLAGS:
            raise UserError(f"{path}, line {number}: {line!r} is neither `id` nor `id flag`\ncorrect the line")
        if words and words[1:] != ["-1"] and is_visible(words[0]):  # the ._000005 of macOS are no images
            names.append(f"VOC{year}/{words[0]}")
    if not names:
        raise UserError(f"{path}: the list is empty\nwrite one image id per line")
    return dict.fromkeys(names, devkit)


def list_sets(devkits: list[Path]) -> list[str]:
    """Return the names of the image sets, without the lists of one class, which are too many to show."""
    return [
        f"{year}_{file.stem}"
        for devkit in devkits
        for year in list_years(devkit)
        for file in sorted((devkit / f"VOC{year}" / "ImageSets" / "Main").glob("[!.]*.txt"))
        if not file.stem.startswith(tuple(f"{word}_" for word in CLASSES))
    ]


def read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}\nthe file must be UTF-8 text with one name per line") from error
