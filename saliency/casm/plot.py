"""Draw images, and what the masks leave and hide of them: python -m saliency.casm plot DATA --casm-path FILE"""

from pathlib import Path

from engine.cli import Parser, UserError, whole
from engine.options import one_device_options
from saliency.casm.options import casm_parser, where_options

GREY, SEED = 0.35, 931001  # of what is hidden; of the order of the batches: both published


def build_parser() -> Parser:
    parser = casm_parser("plot", "Pictures of images: as they are, masked in, masked out and inpainted.")
    where_options(parser, seed=SEED)
    parser.group("pictures")
    parser.option("--casm_path", metavar="FILE", help="trained maps, a .chk file")
    parser.option(
        "--plots_path", metavar="DIR", default="plots", help="where they are written, each called after its batch"
    )
    parser.option("--plots", type=int, default=16, help="how many, of a random batch each; 0 or less: all batches")
    parser.option("--columns", type=whole(1), default=7, help="images in a picture, the first of the batch")
    parser.option("--batch_size", "-b", type=whole(1), default=128, help="images that are counted as a batch")
    parser.option(
        "--resize",
        type=whole(8),
        metavar="PIXELS",
        shown="256 for 224 pixels, image_size for small images",
        help="shorter side of image files before the centre is cut out",
    )
    one_device_options(parser, amp="off", workers=False)
    return parser


def main(argv: list[str] | None = None) -> list[Path]:
    """Draw; returns the files written."""
    parser = build_parser()
    options = {**parser.defaults, **parser.read(argv)}
    if not options["casm_path"]:
        parser.error("--casm-path FILE: which trained maps?")

    from engine.device import choose_device, choose_precision, prepare
    from engine.draw import tight_grid
    from saliency.casm.common import Parts
    from saliency.casm.extractors import of_casm
    from saliency.casm.metrics import plot_order
    from saliency.casm.network import load_casm

    device = choose_device(options["device"])
    precision, _ = choose_precision(options["amp"], device)
    prepare(device, seed=options["seed"], deterministic=False)
    extractor = of_casm(load_casm(options["casm_path"]), device)
    part, _ = Parts(parser, options).of(extractor, larger=True)
    if options["resize"]:
        part = resized(parser, part, options["resize"])
    make_folder(options["plots_path"])
    size, written = options["batch_size"], []
    for batch in plot_order(-(-len(part) // size), options["plots"], options["seed"]):
        last = min(batch * size + min(options["columns"], size), len(part))
        rows = rows_of(extractor, part, range(batch * size, last), device, precision)
        written.append(Path(options["plots_path"]) / f"{batch}.png")
        tight_grid(written[-1], rows)
        print(f"written: {written[-1]}", flush=True)
    return written


def resized(parser: Parser, part, resize: int):
    """The same images, cut out of ones whose shorter side is `resize`. A usage error where that cannot be."""
    import torch

    from engine.image_files import CentreView

    if isinstance(part.pixels, torch.Tensor):
        parser.error(f"--resize {resize}: is for image files, and {part.where} holds images of one size")
    if resize < part.pixels.size:
        parser.error(f"--resize {resize}: smaller than the {part.pixels.size} pixels that are cut out of it")
    return part.seen_as(CentreView(part.pixels.size, resize))


def make_folder(place: str) -> None:
    try:
        Path(place).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--plots-path {place}: cannot be made ({error.strerror})") from error


def rows_of(extractor, part, places: range, device, precision=None) -> list:
    """Four rows of pictures, each (n, H, W, 3) in 0..1, of the images at these places: as they are, masked in, masked
    out, and the last one inpainted.
    """
    import torch

    from engine.batches import Batches
    from engine.classifier import normalised
    from engine.device import exact_float32
    from engine.loop import autocast
    from saliency.casm.alter import inpainted, masked_in, masked_out
    from saliency.casm.localize import binarize

    few = part.take(torch.tensor(places))
    (batch,) = Batches(few, len(few), device=device, mean=(0, 0, 0), std=(1, 1, 1)).epoch()  # plain pixels
    with exact_float32(), autocast(device, precision):
        images = normalised(batch.images, extractor.mean, extractor.std)
        selected = binarize(extractor.masks_of(images, batch.labels).masks)
    changed = [alter(batch.images, selected, GREY) for alter in (masked_in, masked_out, inpainted)]
    return [one.permute(0, 2, 3, 1).cpu().numpy() for one in (batch.images, *changed)]
