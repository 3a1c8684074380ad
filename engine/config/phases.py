"""Phases of a run, each with its own images, crops and batch size, and learning rates at points in time."""

from typing import NamedTuple

IMAGE_COPIES = ("small", "large", "original")
LARGE_SIDE = 128  # side in pixels above which a network sees the centre of a larger image, not all of a smaller one


class Phase(NamedTuple):
    """Epochs up to `end` on the copies `images` (small, large or original), cropped to `crop` pixels."""

    end: int
    images: str
    crop: int
    min_scale: float  # smallest share of the image's area that a crop takes
    batch_size: int  # in total, over all processes


def parse_phases(text: str) -> list[Phase]:
    """`end:folder:crop:min_scale:batch,...` as phases. Raises ValueError for other text, and where the ends do not
    rise."""
    phases = []
    for entry in text.replace(" ", "").split(","):
        try:
            end, images, crop, scale, batch = entry.split(":")
            phase = Phase(int(end), images, int(crop), float(scale), int(batch))
            positive = min(phase.end, phase.crop, phase.batch_size, phase.min_scale) > 0
            valid = positive and images in IMAGE_COPIES and phase.min_scale <= 1
        except ValueError:
            valid = False
        if not valid:
            raise ValueError(
                f"--phases {entry!r}: expected end:folder:crop:min_scale:batch with a folder of "
                f"{', '.join(IMAGE_COPIES)}, such as 15:small:128:0.08:1024"
            )
        if phases and phase.end <= phases[-1].end:
            raise ValueError(f"--phases: the one that ends at {phase.end} comes after {phases[-1].end}; ends must rise")
        phases.append(phase)
    return phases


def build_phases(options: dict) -> list[Phase]:
    """Those of --phases, or the one that --epochs, --crop_size, --min_scale and --batch_size describe."""
    if options["phases"]:
        return parse_phases(options["phases"])
    images = "large" if options["data_large"] else "original"
    return [Phase(options["epochs"], images, options["crop_size"], options["min_scale"], options["batch_size"])]


def default_eval_resize(size: int) -> int:
    """The shorter side of an image of which the centre of `size` pixels is evaluated: 256 for 224."""
    return round(size * 256 / 224)


def find_phase(phases: list[Phase], epoch: int) -> int:
    """The number of the phase that an epoch, counted from 0, belongs to."""
    return next((number for number, phase in enumerate(phases) if epoch < phase.end), len(phases) - 1)


def parse_lr_points(text: str) -> list[tuple[float, float]]:
    """`epoch:lr,epoch:lr` as pairs. Raises ValueError for other text, and for epochs out of order."""
    try:
        points = [tuple(map(float, pair.split(":"))) for pair in text.replace(" ", "").split(",")]
        valid = all(len(point) == 2 and min(point) >= 0 for point in points)
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"--lr_points {text}: expected epoch:lr,epoch:lr, such as 0:0.5,8:1.0,15:0.125")
    for (earlier, _), (later, _) in zip(points, points[1:], strict=False):
        if later < earlier:
            raise ValueError(f"--lr_points {text}: epoch {later:g} comes after {earlier:g}; give them in order")
    return points
