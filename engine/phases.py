"""What a run does when: phases with images, crops and batches of their own, its steps, and its learning rates."""

from collections.abc import Sequence
from typing import NamedTuple

FOLDERS = ("small", "large", "original")


class Phase(NamedTuple):
    """Epochs up to `end` on the copies `images` (small, large or original), cropped to `crop` pixels."""

    end: int
    images: str
    crop: int
    min_scale: float  # smallest share of the image's area that a crop takes
    batch_size: int  # in total, over all processes


def read_phases(text: str) -> list[Phase]:
    """`end:folder:crop:min_scale:batch,...` as phases. Raises ValueError where it is none, or ends do not rise."""
    phases = []
    for entry in text.replace(" ", "").split(","):
        try:
            end, images, crop, scale, batch = entry.split(":")
            phase = Phase(int(end), images, int(crop), float(scale), int(batch))
            right = images in FOLDERS and min(phase.end, phase.crop, phase.batch_size) > 0 and 0 < phase.min_scale <= 1
        except ValueError:
            right = False
        if not right:
            raise ValueError(
                f"--phases {entry!r}: expected end:folder:crop:min_scale:batch with a folder of "
                f"{', '.join(FOLDERS)}, such as 15:small:128:0.08:1024"
            )
        if phases and phase.end <= phases[-1].end:
            raise ValueError(f"--phases: the one that ends at {phase.end} comes after {phases[-1].end}; ends must rise")
        phases.append(phase)
    return phases


def phases_of(options: dict) -> list[Phase]:
    """Those of --phases, or the one that --epochs, --crop_size, --min_scale and --batch_size describe."""
    if options["phases"]:
        return read_phases(options["phases"])
    images = "large" if options["data_large"] else "original"
    return [Phase(options["epochs"], images, *(options[key] for key in ("crop_size", "min_scale", "batch_size")))]


def large_side(size: int) -> int:
    """The shorter side of an image of which the centre of `size` pixels is evaluated: 256 for 224."""
    return round(size * 256 / 224)


def phase_at(phases: list[Phase], epoch: int) -> int:
    """The number of the phase that an epoch, counted from 0, belongs to."""
    return next((number for number, phase in enumerate(phases) if epoch < phase.end), len(phases) - 1)


class Calendar:
    """Where an optimizer step falls, in a run whose phases may have different numbers of steps an epoch.

    phases: (last epoch, steps an epoch) of each, in order. After its end the last phase goes on.
    """

    def __init__(self, phases: Sequence[tuple[int, int]]):
        self.phases = list(phases)

    def first_step(self, epoch: int) -> int:
        """How many steps come before `epoch`."""
        before, begin = 0, 0
        for end, steps in self.phases[:-1]:
            before += (min(epoch, end) - min(epoch, begin)) * steps
            begin = end
        return before + max(0, epoch - begin) * self.phases[-1][1]

    def place(self, step: int) -> tuple[int, int, int]:
        """The epoch of a step, its number in the epoch, and how many steps that epoch has."""
        begin = 0
        for end, steps in self.phases[:-1]:
            if step < (end - begin) * steps:
                break
            step -= (end - begin) * steps
            begin = end
        else:
            steps = self.phases[-1][1]
        return begin + step // steps, step % steps, steps


def rate_at(points: Sequence[tuple[float, float]], epoch: float, *, before: bool = False) -> float:
    """The learning rate at a real-valued epoch, on straight lines through (epoch, rate) points.

    Where two points share an epoch the rate jumps: the later one counts there, or the earlier one with before=True.
    """
    for (left, low), (right, high) in zip(points, points[1:], strict=False):
        if left < right and (left <= epoch < right or (before and epoch == right)):
            return low + (high - low) * (epoch - left) / (right - left)
    return points[0][1] if epoch < points[0][0] else points[-1][1]


def read_points(text: str) -> list[tuple[float, float]]:
    """`epoch:lr,epoch:lr` as pairs. Raises ValueError where it is none, or where the epochs are out of order."""
    try:
        points = [tuple(map(float, pair.split(":"))) for pair in text.replace(" ", "").split(",")]
        wrong = any(len(point) != 2 or min(point) < 0 for point in points)
    except ValueError:
        wrong = True
    if wrong:
        raise ValueError(f"--lr_points {text}: expected epoch:lr,epoch:lr, such as 0:0.5,8:1.0,15:0.125")
    for (earlier, _), (later, _) in zip(points, points[1:], strict=False):
        if later < earlier:
            raise ValueError(f"--lr_points {text}: epoch {later:g} comes after {earlier:g}; give them in order")
    return points
