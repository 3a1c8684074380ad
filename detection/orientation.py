"""EXIF orientation of images with annotated boxes: which images are turned upright.

Tools of today show an image upright and draw boxes on it as it is shown; older ones, and the readers of torchvision and
of most detectors, leave the pixels as they are stored. Where turning swaps the sides, the size in the annotation
shows which of the two its boxes are for.
"""

from detection.dataset import format_first_names
from engine.errors import UserError
from engine.runtime.text import format_count

Header = tuple[int, int, int]  # height and width as stored, EXIF orientation (1: upright)
Size = tuple[int, int]  # height, width


def get_upright_size(header: Header) -> Size:
    """Return the size of an image after turning it upright."""
    height, width, orientation = header
    return (width, height) if orientation > 4 else (height, width)


def choose_upright(names: list[str], headers: list[Header], annotated: list[Size | None]) -> tuple[set[str], list[str]]:
    """Return the names of the images to turn upright, and a note if any image has an EXIF orientation.

    annotated: the sizes in the annotations. An image whose size does not decide is treated like the majority of those
    whose size does; without those it is turned. Raises UserError for an annotated size that an image has neither as it
    is stored nor turned.
    """
    turned, stored, open_cases, wrong = [], [], [], []
    for name, header, size in zip(names, headers, annotated, strict=True):
        as_stored, upright = header[:2], get_upright_size(header)
        if size not in (None, as_stored, upright):
            wrong.append(f"{name} ({describe(header)}, annotation {size[1]} x {size[0]})")
        elif header[2] > 1:
            case = open_cases if size is None or as_stored == upright else turned if size == upright else stored
            case.append(name)
    if wrong:
        raise UserError(
            f"{format_count(len(wrong), 'image')} of another size than annotated: {format_first_names(wrong)}\n"
            "check that image and annotation belong together; correct the size in the annotation, or remove the image "
            "from the data set"
        )
    if not turned + stored + open_cases:
        return set(), []
    turn_open = len(turned) >= len(stored)
    parts = [f"{len(turned):,} turned and {len(stored):,} left as stored, as the size in their annotation says"]
    if open_cases:
        action, other = "turned, as labelling tools show them", "without EXIF orientation"
        if not turn_open:
            action, other = "left as stored, like most others", "turned"
        parts.append(
            f"{len(open_cases):,} whose annotation does not decide ({format_first_names(open_cases)}): {action}; if "
            f"their boxes do not fit, save them {other}"
        )
    note = f"images with an EXIF orientation: {'; '.join(parts)}"
    return {*turned, *(open_cases if turn_open else [])}, [note]


def describe(header: Header) -> str:
    height, width, orientation = header
    return f"{width} x {height} pixels" + (f", EXIF orientation {orientation}" if orientation > 1 else "")
