"""Draw images masked in, masked out and inpainted: python -m saliency.casm plot DATA --casm-path FILE"""

from pathlib import Path

from engine.config.option_types import MAX_INT, int_at_least
from engine.config.options import add_common_options, add_single_device_options
from engine.config.parser import Parser
from engine.errors import UserError
from saliency.casm.options import build_casm_parser

FILL_GRAY = 0.35  # of hidden pixels, in 0..1, as published
PUBLISHED_SEED = 931001  # it decides which batches are drawn


def build_parser() -> Parser:
    parser = build_casm_parser(
        "plot",
        "Draw figures of images in four rows: original, masked in (only the object is left), masked out (the object is "
        "gray) and inpainted (the object is filled in from its surroundings).",
        seed=PUBLISHED_SEED,
    )
    parser.group("figures")
    parser.option("--casm_path", metavar="FILE", help="CASM checkpoint (.chk), made by train")
    parser.option("--plots_path", metavar="DIR", default="plots", help="output folder; figures are named BATCH.png")
    add_common_options(parser, "figure_format", dpi={"default": 300})
    parser.option(
        "--plots",
        type=int_at_least(-MAX_INT),
        default=16,
        metavar="N",
        help="number of figures, each of a random batch; 0 or less: one of every batch",
    )
    parser.option("--columns", type=int_at_least(1), default=7, help="images per figure: the first ones of the batch")
    parser.option("--batch_size", "-b", type=int_at_least(1), default=128, help="images per batch")
    parser.option(
        "--resize",
        type=int_at_least(8),
        metavar="PIXELS",
        shown="256 for 224 pixels, image_size for small images",
        help="resize the shorter side of image files to this before the center crop",
    )
    add_single_device_options(parser, amp="off", workers=False)
    return parser


def main(argv: list[str] | None = None) -> list[Path]:
    """Draw the figures. Return the paths of the files written."""
    parser = build_parser()
    options = {**parser.defaults, **parser.read(argv)}
    if not options["casm_path"]:
        parser.error("no masks given: name a checkpoint with --casm-path FILE")

    from engine.config.select import select_kwargs
    from engine.drawing.figures import draw_tight_grid
    from engine.runtime.device import choose_device, choose_precision, setup_backends
    from engine.runtime.text import format_count
    from saliency.casm.extractors import build_casm_extractor
    from saliency.casm.metrics import choose_plot_batches
    from saliency.casm.network import load_casm
    from saliency.casm.results import ImageSetCache

    device = choose_device(options["device"])
    precision, _ = choose_precision(options["amp"], device)
    setup_backends(device, seed=options["seed"], deterministic=False)
    extractor = build_casm_extractor(load_casm(options["casm_path"]), device)
    image_set, _ = ImageSetCache(parser, **select_kwargs(options, ImageSetCache)).load(extractor, margin=True)
    if options["resize"]:
        image_set = resize_images(parser, image_set, options["resize"])
    create_folder(options["plots_path"])
    batch_size, paths = options["batch_size"], []
    for batch in choose_plot_batches(-(-len(image_set) // batch_size), options["plots"], options["seed"]):
        start = batch * batch_size
        stop = min(start + min(options["columns"], batch_size), len(image_set))
        rows, constant = build_image_rows(extractor, image_set, range(start, stop), device, precision)
        paths.append(Path(options["plots_path"]) / f"{batch}.{options['figure_format']}")
        draw_tight_grid(paths[-1], rows, dpi=options["dpi"])
        print(f"wrote {paths[-1]}", flush=True)
        if constant:
            print(f"note: {paths[-1]}: {constant} of {format_count(stop - start, 'mask')} cover nothing or everything")
    return paths


def resize_images(parser: Parser, image_set, resize: int):
    """Return the same images, cropped after their shorter side was resized to `resize` pixels.

    Exits with a usage error for images in memory, and if `resize` is smaller than the crop.
    """
    import torch

    from engine.data.views import CenterCrop

    if isinstance(image_set.pixels, torch.Tensor):
        parser.error(f"--resize {resize}: only for image files; the images of {image_set.origin} have one size")
    if resize < image_set.pixels.size:
        parser.error(f"--resize {resize}: smaller than the crop of {image_set.pixels.size} pixels; give at least that")
    return image_set.with_view(CenterCrop(image_set.pixels.size, resize))


def create_folder(path: str) -> None:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--plots-path {path}: cannot create this folder ({error.strerror})") from error


def build_image_rows(extractor, image_set, positions: range, device, precision=None) -> tuple[list, int]:
    """Return four arrays (n, H, W, 3) in 0..1 of the images at these positions: original, masked in, masked out, and
    masked out with the hole inpainted; and the number of masks that cover nothing or everything.
    """
    import torch

    from engine.data.image_set import describe_unreadable
    from engine.data.loader import DeviceLoader
    from engine.drawing.figures import is_constant
    from engine.inference.classifier import normalize
    from engine.runtime.device import autocast, disable_tf32
    from saliency.casm.boxes import binarize
    from saliency.casm.masking import inpaint, mask_in, mask_out

    shown = image_set.take(torch.tensor(positions))
    loader = DeviceLoader(shown, len(shown), device=device, mean=(0, 0, 0), std=(1, 1, 1))  # pixels in 0..1
    batches = list(loader.epoch())
    if count := loader.count_unreadable():
        print(f"note: {describe_unreadable(count, shown)}")
    (batch,) = batches
    with disable_tf32(), autocast(device, precision):
        images = normalize(batch.images, extractor.mean, extractor.std)
        selected = binarize(extractor.extract(images, batch.labels).masks)
    altered = [alter(batch.images, selected, FILL_GRAY) for alter in (mask_in, mask_out, inpaint)]
    constant = sum(is_constant(mask) for mask in selected)
    return [row.permute(0, 2, 3, 1).cpu().numpy() for row in (batch.images, *altered)], constant
