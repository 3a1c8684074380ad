"""Load the training and the test images of a detector; detection/voc.py reads them, detection/shape_scenes.py draws
them.

Boxes are x0, y0, x1, y1 in pixels and continuous: the pixel in row 0 and column 0 is the box 0, 0, 1, 1.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from detection.dataset import DetectionSet, list_first_names
from detection.shape_scenes import MIN_SIDE, draw_scenes
from detection.voc import prepare_devkit, read_sets
from engine.errors import UserError
from engine.runtime.distributed import main_process_first

SCENES = ((1000, 2), (200, 3))  # training and test: number of scenes, and their seed; the classifier's shapes have 0, 1
SIDE = 160  # pixels of a scene, on average


def load_image_sets(
    *,
    dataset: str,
    data_dir: str = "data",
    train_sets: Sequence[str] = ("2007_trainval", "2012_trainval"),
    test_set: str = "2007_test",
    download: bool = False,
    limit: int = 0,
    image_size: int = 0,
    progress: Callable = lambda items, **kwargs: items,
) -> tuple[DetectionSet, DetectionSet]:
    """The training and the test set.

    dataset: `voc`, or `shapes` for drawn scenes. train_sets, test_set: of voc, as YEAR_LIST; without any train_sets
    the training set is empty. limit: the first N images of each, 0 for all. image_size: of shapes, the mean side of a
    scene, 0 for 160. progress: wraps an iterable in a progress bar (tqdm's signature). Raises UserError with what was
    looked for and the remedy.
    """
    if dataset == "shapes":
        if image_size and image_size < MIN_SIDE:
            raise UserError(f"--image_size {image_size}: scenes have at least {MIN_SIDE} pixels a side")
        totals = [SCENES[0][0] if train_sets else 0, SCENES[1][0]]
        train, test = (
            draw_scenes(min(total, limit or total), size=image_size or SIDE, seed=seed, progress=progress)
            for total, (_, seed) in zip(totals, SCENES, strict=True)
        )
    elif dataset == "voc":
        devkit = main_process_first(lambda: prepare_devkit(Path(data_dir), [*train_sets, test_set], download))
        train, test = (read_sets(devkit, sets, progress=progress) for sets in (list(train_sets), [test_set]))
        totals = [len(train), len(test)]
    else:
        raise ValueError(f"dataset is voc or shapes, got {dataset!r}")
    warn_of_shared_images(train, test)
    if limit:
        train, test = (part.take(range(min(limit, len(part)))) for part in (train, test))
        for part, total, name in zip((train, test), totals, ("training", "test"), strict=True):
            if len(part) < total:
                part.warnings.append(f"--limit {limit}: {len(part):,} of {total:,} {name} images; results are partial")
    return train, test


def warn_of_shared_images(train: DetectionSet, test: DetectionSet) -> None:
    training_names = set(train.names)
    if shared := [name for name in test.names if name in training_names]:
        train.warnings.append(
            f"{len(shared):,} images are in the training and in the test part: {list_first_names(shared)}; results are "
            "those of images seen in training"
        )
