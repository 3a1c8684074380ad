"""Declare the options of the methods that mix inside random shapes, without saliency."""

from engine.config.option_types import choice, float_in_range, int_at_least, positive
from engine.config.parser import Parser

SHAPE_GROUP = "resizemix, fmix, gridmix, hmix"


def add_shape_options(parser: Parser) -> None:
    parser.group(SHAPE_GROUP, folded=True)
    ends = {"nargs": 2, "metavar": ("LOW", "HIGH")}
    parser.option(
        "--resize_range",
        type=float_in_range(0, 1),
        shown="0.1 0.8",
        help="resizemix: sides of the pasted image relative to those of the image",
        **ends,
    )
    parser.option(
        "--resize_mode", type=choice(["nearest", "bilinear"]), shown="nearest", help="resizemix: how images are resized"
    )
    parser.option("--fmix_decay", type=float_in_range(), shown="3", help="fmix: the higher, the smoother the shapes")
    parser.option(
        "--max_soft",
        type=float_in_range(0, 0.5),
        shown="0",
        help="fmix: width of the soft edge on each side, as a share of the pixels",
    )
    parser.option(
        "--fmix_field",
        type=choice(["paper", "released"]),
        shown="paper",
        help="fmix: noise as in the paper, or as the released code computes it",
    )
    parser.option(
        "--grid_holes",
        type=int_at_least(1),
        shown="2 6",
        help="gridmix: holes along the width of the grid, drawn from LOW to HIGH",
        **ends,
    )
    parser.option(
        "--grid_area",
        type=float_in_range(0, 1, exclude=(0,)),
        shown="0.5 1",
        help="gridmix: area of the grid relative to that of the image",
        **ends,
    )
    parser.option(
        "--grid_aspect", type=positive, shown="0.5 2", help="gridmix: height of the grid relative to its width", **ends
    )
    parser.option(
        "--hole_aspect", type=positive, shown="1 1", help="gridmix: height of a hole relative to its width", **ends
    )
    parser.option(
        "--hmix_ratio",
        type=float_in_range(0, 1),
        shown="0.5",
        help="hmix: area of the box relative to the partner's share; 0: mixup, 1: cutmix",
    )
