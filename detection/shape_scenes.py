"""Drawn detection scenes: up to four objects of `shapes` on clutter, over one another. Nothing is downloaded.

Height and width differ from scene to scene; objects are a tenth to half as large as a side, and the border cuts some.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

import torch
from PIL import Image

from detection.dataset import DetectionSet
from detection.voc import CORNERS
from engine.data.shapes import CLASSES, draw_chunk, draw_noise, fill_texture, masks_to_boxes, to_local_frame
from engine.errors import UserError
from engine.runtime.files import write_atomic

CHUNK = 20  # scenes with one seed: the first N do not depend on how many follow
MIN_SIDE = 32  # pixels, on average: in smaller scenes some objects would be no more than a dot
MAX_OBJECTS = 4  # objects of a scene
OBJECT_SIDES = (0.25, 0.35, 0.45, 0.6)  # of the side: the pictures of `shapes` from which the objects are cut
N_DISTRACTORS = 10  # small discs and squares on the background of a scene
MAX_OUTSIDE = 0.2  # share of an object's height and width that may lie outside the scene
MIN_CLEAR, MIN_LISTED = 0.5, 0.2  # visible share of an object: with less it is difficult, or not listed at all


def draw_scenes(
    count: int,
    *,
    size: int = 160,
    seed: int = 0,
    num_classes: int = 10,
    progress: Callable = lambda items, **kwargs: items,
) -> DetectionSet:
    """`count` scenes of about size x size pixels. The global generators are left alone."""
    if not 1 <= num_classes <= len(CLASSES) or size < MIN_SIDE:
        raise ValueError(
            f"1 to {len(CLASSES)} classes and at least {MIN_SIDE} pixels a side, got {num_classes} and {size}"
        )
    scenes = []
    for chunk, _ in enumerate(progress(range(0, count, CHUNK), desc="drawing scenes")):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + chunk) * 2)  # shapes itself takes the odd ones
        scenes += draw_scene_chunk(size, num_classes, generator)
    images, targets = [image for image, _ in scenes[:count]], [target for _, target in scenes[:count]]
    names = [f"scenes/{seed}-{number:05d}" for number in range(count)]
    sizes = [tuple(image.shape[1:]) for image in images]
    return DetectionSet(CLASSES[:num_classes], names, images, targets, sizes, f"the generator of scenes, seed {seed}")


def draw_scene_chunk(
    size: int, num_classes: int, generator: torch.Generator
) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Image and target of CHUNK scenes."""
    sides = (size * (0.75 + 0.5 * torch.rand(CHUNK, 2, generator=generator))).round().long()  # height, width
    canvases = draw_backgrounds(int(sides.max()), size, generator)
    numbers = torch.randint(1, MAX_OBJECTS + 1, (CHUNK,), generator=generator)
    labels = torch.randint(num_classes, (int(numbers.sum()),), generator=generator)
    objects = draw_objects(labels, size, generator)
    places = torch.rand(len(labels), 2, generator=generator)
    scenes, done = [], 0
    for canvas, (height, width), number in zip(canvases, sides.tolist(), numbers.tolist(), strict=True):
        these = slice(done, done + number)
        done += number
        extents = torch.tensor([mask.shape for _, mask in objects[these]])  # (N, 2)
        low = -MAX_OUTSIDE * extents
        high = torch.tensor([height, width]) - (1 - MAX_OUTSIDE) * extents
        corners = (low + places[these] * (high - low)).round().long().tolist()
        image, visible = compose(canvas[:, :height, :width], objects[these], corners)
        whole = torch.stack([mask.sum() for _, mask in objects[these]])
        scenes.append((image, make_target(visible, whole, labels[these] + 1)))
    return scenes


def compose(
    canvas: torch.Tensor, objects: Sequence[tuple[torch.Tensor, torch.Tensor]], corners: Sequence[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Paste objects onto a canvas, later ones over earlier ones. Returns the image (3, H, W) and which of its pixels
    show each object, (N, H, W) bool.

    canvas (3, H, W); objects: pixels (3, h, w) and mask (h, w) bool; corners: row and column of the first pixel of
    each, which may lie outside.
    """
    image = canvas.clone()
    owner = torch.full(canvas.shape[1:], -1)
    for number, ((pixels, mask), (top, left)) in enumerate(zip(objects, corners, strict=True)):
        rows, own_rows = clip_range(top, mask.shape[0], canvas.shape[1])
        columns, own_columns = clip_range(left, mask.shape[1], canvas.shape[2])
        mask = mask[own_rows, own_columns]
        region = image[:, rows, columns]
        region.copy_(torch.where(mask, pixels[:, own_rows, own_columns], region))
        owner[rows, columns].masked_fill_(mask, number)
    return image, owner == torch.arange(len(objects)).view(-1, 1, 1)


def clip_range(start: int, length: int, limit: int) -> tuple[slice, slice]:
    """The part of start..start + length that lies in 0..limit, and the same counted from `start`."""
    first = min(max(start, 0), limit)
    last = max(min(start + length, limit), first)
    return slice(first, last), slice(first - start, last - start)


def make_target(visible: torch.Tensor, whole: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """visible (N, H, W) bool; whole (N,): pixels of each object if nothing covered it; labels (N,)."""
    share = visible.flatten(1).sum(1) / whole
    listed = share >= MIN_LISTED
    boxes = masks_to_boxes(visible[listed])[:, [2, 0, 3, 1]].float()
    return {"boxes": boxes, "labels": labels[listed], "difficult": share[listed] < MIN_CLEAR}


def draw_objects(
    labels: torch.Tensor, size: int, generator: torch.Generator
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pixels uint8 (3, h, w) and mask (h, w) of an object for each label, cut out of pictures of shapes."""
    objects: list = [None] * len(labels)
    kinds = torch.randint(len(OBJECT_SIDES), labels.shape, generator=generator)
    for kind in kinds.unique().tolist():
        index = (kinds == kind).nonzero().flatten()
        images, masks = draw_chunk(labels[index], round(OBJECT_SIDES[kind] * size), generator)
        cuts = zip(index.tolist(), images.permute(0, 3, 1, 2), masks, masks_to_boxes(masks).tolist(), strict=True)
        for place, image, mask, (y1, y2, x1, x2) in cuts:
            objects[place] = image[:, y1:y2, x1:x2], mask[y1:y2, x1:x2]
    return objects


def draw_backgrounds(side: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Coloured noise and distractors: uint8 (CHUNK, 3, side, side). size: of the scenes; a distractor is up to a tenth
    of it.
    """

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    coarse, fine = draw_noise(CHUNK, side, 4, generator), draw_noise(CHUNK, side, 14, generator)
    canvases = 0.4 * coarse + 0.25 * fine + 0.35 * uniform(CHUNK, 3, 1, 1)
    count, edge = CHUNK * N_DISTRACTORS, size // 10
    line = (torch.arange(edge) + 0.5) / edge * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    radius = uniform(count, low=0.3, high=0.8)  # small beside any object
    frame = to_local_frame(y, x, torch.zeros(count, 2), radius, uniform(count, high=7.0))
    masks = torch.where(uniform(count, 1, 1) < 0.5, frame.square().sum(0) < 1, frame.abs().amax(0) < 0.8)
    distractors = list(zip(fill_texture(frame, count, uniform), masks, strict=True))
    corners = torch.randint(side - edge + 1, (count, 2), generator=generator).tolist()
    for number in range(CHUNK):
        these = slice(number * N_DISTRACTORS, (number + 1) * N_DISTRACTORS)
        canvases[number], _ = compose(canvases[number], distractors[these], corners[these])
    canvases += 0.03 * torch.randn(canvases.shape, generator=generator)  # as on the objects
    return (canvases.clamp(0, 1) * 255).round().to(torch.uint8)


def export_voc(folder: Path, parts: dict[str, DetectionSet]) -> None:
    """Write image sets, by the name of their list, as VOC2007 of a VOCdevkit in `folder`.

    Images are PNG files, so that nothing is lost; coordinates are rounded to whole pixels, as in VOC. read_sets()
    reads them back, by the last part of their names. Raises UserError where there is a VOCdevkit already: its other
    years would be read with these classes.
    """
    devkit = Path(folder) / "VOCdevkit"
    classes = next(iter(parts.values())).classes
    identities = [Path(name).name for part in parts.values() for name in part.names]
    if len(set(identities)) < len(identities):
        raise ValueError("two images have the same name: the parts must not share images")
    if any(part.classes != classes for part in parts.values()):
        raise ValueError("the parts have different classes")
    if devkit.exists():
        raise UserError(f"{devkit} exists\ndelete it, or export to another folder")
    root = devkit / "VOC2007"
    try:
        for below in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (root / below).mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot make {root}: {error.strerror}\nexport to another folder") from error
    write_text(devkit / "classes.txt", classes)
    for name, part in parts.items():
        stems = [Path(name).name for name in part.names]
        for index, stem in enumerate(stems):
            pixels = part.read(index)
            picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
            picture.save(root / "JPEGImages" / f"{stem}.png", compress_level=1)
            tree = format_annotation(f"{stem}.png", part.sizes[index], part.targets[index], classes)
            tree.write(root / "Annotations" / f"{stem}.xml", encoding="utf-8")
        write_text(root / "ImageSets" / "Main" / f"{name}.txt", stems)


def write_text(path: Path, lines: list[str]) -> None:
    write_atomic(path, lambda side: side.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8"))


def format_annotation(
    file: str, size: tuple[int, int], target: dict[str, torch.Tensor], classes: list[str]
) -> ElementTree.ElementTree:
    """The content of an XML file."""
    root = ElementTree.Element("annotation")

    def put(parent: ElementTree.Element, values: dict[str, object]) -> None:
        for tag, value in values.items():
            ElementTree.SubElement(parent, tag).text = str(value)

    put(root, {"folder": "VOC2007", "filename": file})
    put(ElementTree.SubElement(root, "size"), {"width": size[1], "height": size[0], "depth": 3})
    columns = (target[key].tolist() for key in ("boxes", "labels", "difficult"))
    for box, label, difficult in zip(*columns, strict=True):
        element = ElementTree.SubElement(root, "object")
        put(element, {"name": classes[label - 1], "difficult": int(difficult)})
        x0, y0, x1, y1 = map(round, box)
        corners = dict(zip(CORNERS, (x0 + 1, y0 + 1, x1, y1), strict=True))
        put(ElementTree.SubElement(element, "bndbox"), corners)
    ElementTree.indent(root)
    return ElementTree.ElementTree(root)
