"""Training phases with their own images, crops and batch size (--phases), and piecewise linear learning rates."""

import math
from typing import NamedTuple

IMAGE_COPIES = ("small", "large", "original")
# networks for images larger than this side in pixels see a centre crop; those for smaller ones see the whole image
LARGE_SIDE = 128


class Phase(NamedTuple):
    """The epochs up to `end`, trained on one kind of copies of the images."""

    end: int
    images: str  # small, large or original
    crop: int  # side of the crops in pixels
    min_scale: float  # minimum area of a crop as a fraction of the image
    batch_size: int  # over all processes


def parse_phases(text: str) -> list[Phase]:
    """Parse `end:folder:crop:min_scale:batch,...`. Raises ValueError for other text and if the ends do not increase."""
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
                f"--phases {entry!r}: expected end:folder:crop:min_scale:batch, with a folder of "
                f"{', '.join(IMAGE_COPIES)}; for example 15:small:128:0.08:1024"
            )
        if phases and phase.end <= phases[-1].end:
            raise ValueError(f"--phases: end epochs must increase, but {phase.end} follows {phases[-1].end}")
        phases.append(phase)
    return phases


def build_phases(options: dict) -> list[Phase]:
    """Return the phases of --phases, or the one of --epochs, --crop_size, --min_scale and --batch_size."""
    if options["phases"]:
        return parse_phases(options["phases"])
    images = "large" if options["data_large"] else "original"
    return [Phase(options["epochs"], images, options["crop_size"], options["min_scale"], options["batch_size"])]


def default_eval_resize(size: int) -> int:
    """Return the shorter side to which an image is resized before the centre crop of `size` pixels: 256 for 224."""
    return round(size * 256 / 224)


def find_phase(phases: list[Phase], epoch: int) -> int:
    """Return the index of the phase of an epoch, both counted from 0."""
    return next((number for number, phase in enumerate(phases) if epoch < phase.end), len(phases) - 1)


def parse_lr_points(text: str) -> list[tuple[float, float]]:
    """Parse `epoch:lr,epoch:lr` as pairs. Raises ValueError for other text and for epochs out of order."""
    try:
        points = [tuple(map(float, pair.split(":"))) for pair in text.replace(" ", "").split(",")]
        valid = all(len(point) == 2 and all(0 <= value < math.inf for value in point) for point in points)
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"--lr_points {text}: expected epoch:lr,epoch:lr, for example 0:0.5,8:1.0,15:0.125")
    for (earlier, _), (later, _) in zip(points, points[1:], strict=False):
        if later < earlier:
            raise ValueError(f"--lr_points {text}: epochs must be in order, but {later:g} follows {earlier:g}")
    return points
