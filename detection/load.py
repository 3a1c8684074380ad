"""Detection data: images, and what objects are where in them. detection/voc.py reads them, detection/shape_scenes.py
draws them.

Boxes are x0, y0, x1, y1 in pixels and continuous: the pixel of row 0 and column 0 is the box 0, 0, 1, 1.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from detection.dataset import DetectionSet, list_first_names
from engine.errors import UserError
from engine.runtime.distributed import main_process_first

SCENES = ((1000, 2), (200, 3))  # train and test: how many, and their seed; the classifier's shapes have 0 and 1
SIDE = 160  # of a scene, on average


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
    """The training and the test part.

    dataset: `voc`, or `shapes` for drawn scenes. train_sets, test_set: of voc, as YEAR_LIST; without any train_sets
    the training part is empty. limit: the first N images of each part, 0 for all. image_size: of shapes, the mean side
    of a scene, 0 for 160. progress: wraps an iterable in a progress bar (tqdm's signature). Raises UserError with what
    was looked for and the remedy.
    """
    from detection import shape_scenes, voc  # they make Parts, so this file comes first

    if dataset == "shapes":
        if image_size and image_size < shape_scenes.MIN_SIDE:
            raise UserError(f"--image_size {image_size}: scenes have at least {shape_scenes.MIN_SIDE} pixels a side")
        totals = [SCENES[0][0] if train_sets else 0, SCENES[1][0]]
        train, test = (
            shape_scenes.draw_scenes(min(total, limit or total), size=image_size or SIDE, seed=seed, progress=progress)
            for total, (_, seed) in zip(totals, SCENES, strict=True)
        )
    elif dataset == "voc":
        devkit = main_process_first(lambda: voc.find_sets(Path(data_dir), [*train_sets, test_set], download))
        train, test = (voc.read_part(devkit, sets, progress=progress) for sets in (list(train_sets), [test_set]))
        totals = [len(train), len(test)]
    else:
        raise ValueError(f"dataset is voc or shapes, got {dataset!r}")
    both = set(test.names) & set(train.names)
    shared = [name for name in test.names if name in both]
    if shared:
        train.warnings.append(
            f"{len(shared):,} images are in the training and in the test part: {list_first_names(shared)}; results are "
            "those of images seen in training"
        )
    if limit:
        train, test = (part.take(range(min(limit, len(part)))) for part in (train, test))
        for part, total, name in zip((train, test), totals, ("training", "test"), strict=True):
            if len(part) < total:
                part.warnings.append(f"--limit {limit}: {len(part):,} of {total:,} {name} images; results are partial")
    return train, test
