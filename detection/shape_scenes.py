"""Draw synthetic detection scenes: up to four objects of `shapes`, overlapping, on a cluttered background.

Height and width vary between scenes. Objects are a tenth to half as large as a side, and the border cuts off some.
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

CHUNK_SIZE = 20  # scenes drawn from one seed, so that the first N scenes do not depend on how many follow
MIN_SIDE = 32  # minimum mean side in pixels: in smaller scenes some objects would be a mere dot
MAX_OBJECTS = 4  # objects per scene
OBJECT_SIDES = (0.25, 0.35, 0.45, 0.6)  # sides of the `shapes` images that objects are cut from, relative to the scene
N_DISTRACTORS = 10  # small discs and squares on the background of a scene
MAX_OUTSIDE = 0.2  # share of an object's height and width that may lie outside the scene
DIFFICULT_BELOW, OMITTED_BELOW = 0.5, 0.2  # visible share below which an object is difficult, or is not annotated


def draw_scenes(
    count: int,
    *,
    size: int = 160,
    seed: int = 0,
    num_classes: int = 10,
    progress: Callable = lambda items, **kwargs: items,
) -> DetectionSet:
    """Draw `count` scenes of about size x size pixels. The global random generators are not used.

    Raises ValueError for num_classes outside 1..10 and for size below MIN_SIDE.
    """
    if not 1 <= num_classes <= len(CLASSES) or size < MIN_SIDE:
        raise ValueError(
            f"num_classes must be 1 to {len(CLASSES)} and size at least {MIN_SIDE} pixels, got {num_classes} and {size}"
        )
    scenes = []
    for chunk, _ in enumerate(progress(range(0, count, CHUNK_SIZE), desc="drawing scenes")):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + chunk) * 2)  # shapes itself uses the odd seeds
        scenes += draw_scene_chunk(size, num_classes, generator)
    images, targets = [image for image, _ in scenes[:count]], [target for _, target in scenes[:count]]
    names = [f"scenes/{seed}-{number:05d}" for number in range(count)]
    sizes = [tuple(image.shape[1:]) for image in images]
    return DetectionSet(CLASSES[:num_classes], names, images, targets, sizes, f"drawn scenes, seed {seed}")


def draw_scene_chunk(
    size: int, num_classes: int, generator: torch.Generator
) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Draw CHUNK_SIZE scenes and return the image and target of each."""
    sides = (size * (0.75 + 0.5 * torch.rand(CHUNK_SIZE, 2, generator=generator))).round().long()  # height, width
    canvases = draw_backgrounds(int(sides.max()), size, generator)
    numbers = torch.randint(1, MAX_OBJECTS + 1, (CHUNK_SIZE,), generator=generator)
    labels = torch.randint(num_classes, (int(numbers.sum()),), generator=generator)
    objects = draw_objects(labels, size, generator)
    positions = torch.rand(len(labels), 2, generator=generator)
    scenes, done = [], 0
    for canvas, (height, width), number in zip(canvases, sides.tolist(), numbers.tolist(), strict=True):
        own = slice(done, done + number)  # the objects of this scene
        done += number
        extents = torch.tensor([mask.shape for _, mask in objects[own]])  # (N, 2)
        low = -MAX_OUTSIDE * extents
        high = torch.tensor([height, width]) - (1 - MAX_OUTSIDE) * extents
        corners = (low + positions[own] * (high - low)).round().long().tolist()
        image, visible = paste_objects(canvas[:, :height, :width], objects[own], corners)
        areas = torch.stack([mask.sum() for _, mask in objects[own]])
        scenes.append((image, make_target(visible, areas, labels[own] + 1)))
    return scenes


def paste_objects(
    canvas: torch.Tensor, objects: Sequence[tuple[torch.Tensor, torch.Tensor]], corners: Sequence[tuple[int, int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Paste objects onto a canvas, later ones over earlier ones.

    canvas (3, H, W). objects: pixels (3, h, w) and mask (h, w) bool of each. corners: row and column of the top left
    pixel of each, which may lie outside. Returns the image (3, H, W) and the visible pixels of each object, (N, H, W)
    bool.
    """
    image = canvas.clone()
    owner = torch.full(canvas.shape[1:], -1)
    for number, ((pixels, mask), (top, left)) in enumerate(zip(objects, corners, strict=True)):
        rows, object_rows = clip_range(top, mask.shape[0], canvas.shape[1])
        columns, object_columns = clip_range(left, mask.shape[1], canvas.shape[2])
        mask = mask[object_rows, object_columns]
        region = image[:, rows, columns]
        region.copy_(torch.where(mask, pixels[:, object_rows, object_columns], region))
        owner[rows, columns].masked_fill_(mask, number)
    return image, owner == torch.arange(len(objects)).view(-1, 1, 1)


def clip_range(start: int, length: int, limit: int) -> tuple[slice, slice]:
    """Return the part of the range start..start + length that lies in 0..limit, and the same relative to `start`."""
    first = min(max(start, 0), limit)
    last = max(min(start + length, limit), first)
    return slice(first, last), slice(first - start, last - start)


def make_target(visible: torch.Tensor, areas: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the target of a scene: boxes around the visible pixels, labels, and which objects are difficult.

    visible (N, H, W) bool. areas (N,): number of pixels of each whole object. labels (N,).
    """
    share = visible.flatten(1).sum(1) / areas
    annotated = share >= OMITTED_BELOW
    boxes = masks_to_boxes(visible[annotated])[:, [2, 0, 3, 1]].float()
    return {"boxes": boxes, "labels": labels[annotated], "difficult": share[annotated] < DIFFICULT_BELOW}


def draw_objects(
    labels: torch.Tensor, size: int, generator: torch.Generator
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Draw an object for each label, cut out of an image of `shapes`: pixels uint8 (3, h, w) and mask (h, w) bool."""
    objects: list = [None] * len(labels)
    side_index = torch.randint(len(OBJECT_SIDES), labels.shape, generator=generator)
    for number in side_index.unique().tolist():
        indices = (side_index == number).nonzero().flatten()
        images, masks = draw_chunk(labels[indices], round(OBJECT_SIDES[number] * size), generator)
        crops = zip(indices.tolist(), images.permute(0, 3, 1, 2), masks, masks_to_boxes(masks).tolist(), strict=True)
        for index, image, mask, (y1, y2, x1, x2) in crops:
            objects[index] = image[:, y1:y2, x1:x2], mask[y1:y2, x1:x2]
    return objects


def draw_backgrounds(side: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Draw coloured noise and distractors: uint8 (CHUNK_SIZE, 3, side, side).

    size: mean side of the scenes; a distractor is at most a tenth of it.
    """

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    coarse, fine = draw_noise(CHUNK_SIZE, side, 4, generator), draw_noise(CHUNK_SIZE, side, 14, generator)
    canvases = 0.4 * coarse + 0.25 * fine + 0.35 * uniform(CHUNK_SIZE, 3, 1, 1)
    count, edge = CHUNK_SIZE * N_DISTRACTORS, size // 10
    line = (torch.arange(edge) + 0.5) / edge * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    radius = uniform(count, low=0.3, high=0.8)  # small compared with any object
    frame = to_local_frame(y, x, torch.zeros(count, 2), radius, uniform(count, high=7.0))
    masks = torch.where(uniform(count, 1, 1) < 0.5, frame.square().sum(0) < 1, frame.abs().amax(0) < 0.8)
    distractors = list(zip(fill_texture(frame, count, uniform), masks, strict=True))
    corners = torch.randint(side - edge + 1, (count, 2), generator=generator).tolist()
    for number in range(CHUNK_SIZE):
        own = slice(number * N_DISTRACTORS, (number + 1) * N_DISTRACTORS)
        canvases[number], _ = paste_objects(canvases[number], distractors[own], corners[own])
    canvases += 0.03 * torch.randn(canvases.shape, generator=generator)  # the objects have the same noise
    return (canvases.clamp(0, 1) * 255).round().to(torch.uint8)


def export_voc(folder: Path, image_sets: dict[str, DetectionSet]) -> None:
    """Write image sets as VOC2007 of a new VOCdevkit in `folder`. image_sets: name of the list -> set.

    Images are lossless PNG files; coordinates are rounded to whole pixels, as in VOC. voc.read_sets() reads the sets
    back; the last component of an image name becomes its id. Raises UserError if a VOCdevkit exists already, because
    its other years would be read with these classes, and ValueError for sets that share images or differ in classes.
    """
    devkit = Path(folder) / "VOCdevkit"
    classes = next(iter(image_sets.values())).classes
    image_ids = [Path(name).name for image_set in image_sets.values() for name in image_set.names]
    if len(set(image_ids)) < len(image_ids):
        raise ValueError("two images have the same name: the image sets must not share images")
    if any(image_set.classes != classes for image_set in image_sets.values()):
        raise ValueError("the image sets must have the same classes")
    if devkit.exists():
        raise UserError(f"{devkit} already exists\ndelete it, or export to another folder")
    root = devkit / "VOC2007"
    try:
        for subfolder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (root / subfolder).mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot create {root}: {error.strerror}\nexport to another folder") from error
    write_text(devkit / "classes.txt", classes)
    for name, image_set in image_sets.items():
        stems = [Path(name).name for name in image_set.names]
        for index, stem in enumerate(stems):
            pixels = image_set.read(index)
            image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
            image.save(root / "JPEGImages" / f"{stem}.png", compress_level=1)
            tree = format_annotation(f"{stem}.png", image_set.sizes[index], image_set.targets[index], classes)
            tree.write(root / "Annotations" / f"{stem}.xml", encoding="utf-8")
        write_text(root / "ImageSets" / "Main" / f"{name}.txt", stems)


def write_text(path: Path, lines: list[str]) -> None:
    write_atomic(path, lambda side: side.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8"))


def format_annotation(
    file: str, size: tuple[int, int], target: dict[str, torch.Tensor], classes: list[str]
) -> ElementTree.ElementTree:
    """Return the annotation of an image as XML. size: height and width."""
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
