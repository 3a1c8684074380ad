"""Declare the options for random changes of the training images, other than mixing."""

from engine.config.option_types import boolean, choice, float_in_range, int_at_least
from engine.config.parser import Parser

RAND_AUGMENT_OPTIONS = {"rand_augment_ops", "rand_augment_magnitude", "rand_augment_std", "rand_augment_prob"}


def add_augmentation_options(parser: Parser, *, large_images: bool) -> None:
    """Add the options of engine.data.augment.build_augmentation(). large_images: random resized crops by default."""
    parser.group("augmentation")
    parser.option("--trad_augment", type=boolean, shown="recipe", help="random crop and horizontal flip")
    parser.option(
        "--crop_padding",
        type=int_at_least(),
        shown="recipe",
        help="border around the image before the random crop, in pixels",
    )
    parser.option(
        "--crop_padding_mode",
        type=choice(["constant", "reflect"]),
        default="constant",
        help="constant: the border is black; reflect: it mirrors the image",
    )
    parser.option(
        "--min_scale",
        type=float_in_range(1e-6, 1),
        default=0.08 if large_images else None,
        shown="none, but --crop_padding",
        help="minimum area of a random resized crop as a fraction of the image",
    )
    if large_images:
        jitter = "jitter of brightness, contrast and saturation"
        parser.option("--color_jitter", type=float_in_range(0, 1), default=0.0, help=jitter)
        noise = "standard deviation of the PCA colour noise"
        parser.option("--lighting", type=float_in_range(), default=0.0, help=noise)
    parser.option(
        "--random_erasing",
        type=float_in_range(0, 1),
        default=0.0,
        help="probability that a rectangle of the normalised image is replaced by noise",
    )
    add_policy_options(parser)


def add_policy_options(parser: Parser) -> None:
    """Add the options of engine.data.auto_augment.AutoAugment."""
    parser.option(
        "--auto_augment",
        type=choice(["none", "rand", "trivial"]),
        default="none",
        help="RandAugment or TrivialAugment of torchvision, after crop and flip; also with --trad_augment false",
    )
    parser.group("randaugment", folded=True)
    parser.option("--rand_augment_ops", type=int_at_least(1), default=2, help="rand: operations on an image")
    parser.option(
        "--rand_augment_magnitude",
        type=float_in_range(0, 10),
        default=9.0,
        help="rand: strength of the operations, from 0 to 10 as in timm (torchvision's 0 to 30, divided by 3)",
    )
    parser.option(
        "--rand_augment_std",
        type=float_in_range(),
        default=0.0,
        help="rand: standard deviation of the magnitude, drawn for each operation",
    )
    parser.option(
        "--rand_augment_prob",
        type=float_in_range(0, 1),
        default=1.0,
        help="rand: probability of each operation (timm: 0.5)",
    )
