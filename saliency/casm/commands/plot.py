"""Draw images, and what the masks leave and hide of them: python -m saliency.casm plot DATA --casm-path FILE"""

from pathlib import Path

from engine.config.option_types import int_at_least
from engine.config.options import add_single_device_options
from engine.config.parser import Parser
from engine.errors import UserError
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
    parser.option("--columns", type=int_at_least(1), default=7, help="images in a picture, the first of the batch")
    parser.option("--batch_size", "-b", type=int_at_least(1), default=128, help="images that are counted as a batch")
    parser.option(
        "--resize",
        type=int_at_least(8),
        metavar="PIXELS",
        shown="256 for 224 pixels, image_size for small images",
        help="shorter side of image files before the centre is cut out",
    )
    add_single_device_options(parser, amp="off", workers=False)
    return parser


def main(argv: list[str] | None = None) -> list[Path]:
    """Draw; returns the files written."""
    parser = build_parser()
    options = {**parser.defaults, **parser.read(argv)}
    if not options["casm_path"]:
        parser.error("--casm-path FILE: which trained maps?")

    from engine.config.select import select_kwargs
    from engine.drawing.figures import draw_tight_grid
    from engine.runtime.device import choose_device, choose_precision, setup_backends
    from saliency.casm.extractors import build_casm_extractor
    from saliency.casm.metrics import choose_plot_batches
    from saliency.casm.network import load_casm
    from saliency.casm.results import ImageSetCache

    device = choose_device(options["device"])
    precision, _ = choose_precision(options["amp"], device)
    setup_backends(device, seed=options["seed"], deterministic=False)
    extractor = build_casm_extractor(load_casm(options["casm_path"]), device)
    part, _ = ImageSetCache(parser, **select_kwargs(options, ImageSetCache)).load(extractor, larger=True)
    if options["resize"]:
        part = resize_images(parser, part, options["resize"])
    make_folder(options["plots_path"])
    size, written = options["batch_size"], []
    for batch in choose_plot_batches(-(-len(part) // size), options["plots"], options["seed"]):
        last = min(batch * size + min(options["columns"], size), len(part))
        rows = make_rows(extractor, part, range(batch * size, last), device, precision)
        written.append(Path(options["plots_path"]) / f"{batch}.png")
        draw_tight_grid(written[-1], rows)
        print(f"written: {written[-1]}", flush=True)
    return written


def resize_images(parser: Parser, part, resize: int):
    """The same images, cut out of ones whose shorter side is `resize`. A usage error where that cannot be."""
    import torch

    from engine.data.views import CenterCrop

    if isinstance(part.pixels, torch.Tensor):
        parser.error(f"--resize {resize}: is for image files, and {part.origin} holds images of one size")
    if resize < part.pixels.size:
        parser.error(f"--resize {resize}: smaller than the {part.pixels.size} pixels that are cut out of it")
    return part.with_view(CenterCrop(part.pixels.size, resize))


def make_folder(path: str) -> None:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--plots-path {path}: cannot be made ({error.strerror})") from error


def make_rows(extractor, part, positions: range, device, precision=None) -> list:
    """Four rows of pictures, each (n, H, W, 3) in 0..1, of the images at these positions: as they are, masked in,
    masked out, and masked out with the hole inpainted.
    """
    import torch

    from engine.data.loader import DeviceLoader
    from engine.inference.classifier import normalize
    from engine.runtime.device import autocast, disable_tf32
    from saliency.casm.boxes import binarize
    from saliency.casm.masking import inpaint, mask_in, mask_out

    shown = part.take(torch.tensor(positions))
    (batch,) = DeviceLoader(shown, len(shown), device=device, mean=(0, 0, 0), std=(1, 1, 1)).epoch()  # plain pixels
    with disable_tf32(), autocast(device, precision):
        images = normalize(batch.images, extractor.mean, extractor.std)
        selected = binarize(extractor.extract(images, batch.labels).masks)
    altered = [alter(batch.images, selected, GREY) for alter in (mask_in, mask_out, inpaint)]
    return [row.permute(0, 2, 3, 1).cpu().numpy() for row in (batch.images, *altered)]
