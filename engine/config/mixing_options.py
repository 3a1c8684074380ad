"""Declare the options of mixing and of the saliency sources; method_options.py has those of single methods."""

from types import ModuleType

from engine.config.legacy_options import LEGACY_METHOD_OPTIONS, LEGACY_MIXING_OPTIONS
from engine.config.method_options import METHOD_GROUPS, add_group_options
from engine.config.option_types import boolean, choice, float_in_range, fraction_below_one, int_at_least
from engine.config.options import add_common_options
from engine.config.parser import Parser

SIMPLE_METHODS = ["cutout", "mixup", "manifold", "cutmix", "saliencymix", "guidedmixup", "snapmix", "attentivemix"]
SIMPLE_METHODS += ["smoothmix", "gmix", "smmix", "maskmix", "s2mix"]  # their options, or some, are in shared groups
OPTION_GROUPS = ["mixing", "mix_schedule", "methods", "saliency", *METHOD_GROUPS]


def add_mixing_options(parser: Parser, *, sources: ModuleType) -> None:
    """Add all options of a training run that concern mixing. sources: the package `saliency`."""
    parser.group("mixing", topics=SIMPLE_METHODS)
    parser.option("--mix_prob", type=float_in_range(0, 1), shown="by method", help="probability that a batch is mixed")
    parser.option(
        "--clean_weight",
        type=float_in_range(),
        shown="by method",
        help="also train on the unmixed batch, with this weight of its loss; replaces --clean_lam and --update_ratio",
    )
    parser.option(
        "--method_weights",
        type=float_in_range(),
        nargs="+",
        shown="equal",
        help="for each of several methods: how often it is drawn, relative to the others",
    )
    parser.option("--cutout", type=boolean, default=False, help="also cut holes into every training image")
    parser.hidden_options(LEGACY_MIXING_OPTIONS)
    parser.defaults["method_options"] = {}  # only recipes set it
    add_mix_schedule_options(parser)
    add_method_options(parser, sources=sources)


def add_mix_schedule_options(parser: Parser) -> None:
    """Add the options that mix only a part of each batch or only in some epochs."""
    parser.group("mix_schedule", folded=True, topics=["mixing", *SIMPLE_METHODS])
    parser.option("--mix_fraction", type=float_in_range(0, 1), default=1.0, help="fraction of each batch that is mixed")
    parser.option(
        "--mix_schedule",
        type=choice(["fixed", "scheduled", "delayed"]),
        default="fixed",
        help="--mix_fraction is constant, rises from 0 until --mix_scheduled_epoch, or is 0 before it",
    )
    parser.option(
        "--mix_scheduled_epoch",
        type=int_at_least(),
        default=0,
        metavar="EPOCH",
        help="epoch at which --mix_fraction is reached",
    )
    parser.option("--mix_off_epoch", type=int_at_least(), default=0, help="train without mixing in the last N epochs")


def add_method_options(parser: Parser, *, sources: ModuleType) -> None:
    """Add the hyper-parameters of the methods and of the saliency sources. sources: the package `saliency`."""
    add_common_method_options(parser)
    add_saliency_options(parser, sources)
    add_group_options(parser)
    parser.hidden_options(LEGACY_METHOD_OPTIONS)


def add_common_method_options(parser: Parser) -> None:
    """Add the hyper-parameters of methods that have only a few, or that several methods share."""
    parser.group("methods", topics=SIMPLE_METHODS)
    parser.option(
        "--mixup_alpha",
        type=float_in_range(),
        shown="by method",
        help="alpha of lam ~ Beta(alpha, alpha); comixup: of a Dirichlet distribution",
    )
    parser.option(
        "--in_batch", type=boolean, default=False, help="draw lam, and the mask, per image instead of per batch"
    )
    parser.option("--per_sample", type=boolean, help="cutmix, saliencymix: one box per image instead of one per batch")
    parser.option(
        "--cutmix_box",
        type=choice(["integer", "real"]),
        shown="integer; puzzle: real",
        help="cutmix: whole or fractional pixels for the centre and sides of the box",
    )
    parser.option(
        "--saliency_scope",
        type=choice(["sample", "batch"]),
        default="sample",
        help="saliencymix: one box per image, or one per batch",
    )
    parser.option("--cutout_length", type=int_at_least(1), default=16, help="side of a hole in pixels")
    parser.option("--n_holes", type=int_at_least(1), default=1, help="holes per image")
    parser.option(
        "--labels",
        type=choice(["area", "saliency", "mean"]),
        shown="by method",
        help="weight labels by the area or by the saliency of each image that the mix shows, or by their mean",
    )
    parser.option(
        "--clean_lam",
        type=float_in_range(),
        shown="by method",
        help="puzzlemix, comixup, rmix, guidedmixup: weight of the loss on the unmixed images",
    )
    parser.option(
        "--solver",
        type=choice(["parallel", "gco"]),
        default="parallel",
        help="puzzlemix, comixup: this project's solver, or graph cuts (pip install gco-wrapper)",
    )
    parser.option(
        "--kernels",
        type=choice(["auto", "triton", "torch"]),
        default="auto",
        help="on CUDA: Triton kernels for puzzlemix, comixup, sage and guidedmixup, and CUDA graphs of saliency (auto: "
        "where they run), or torch operations alone",
    )


def add_saliency_options(parser: Parser, sources: ModuleType) -> None:
    """Add the choice of a saliency source, and the options of the sources."""
    parser.group("saliency", topics=["saliencymix", "guidedmixup", "snapmix", "attentivemix", "smmix", "s2mix"])
    parser.option(
        "--saliency",
        type=choice(sources.SOURCES, sources.ALIASES),
        shown="by method",
        help="source of the saliency maps",
    )
    parser.option(
        "--saliency_size",
        type=int_at_least(8),
        metavar="PIXELS",
        help="gradient: side of the images in the saliency pass; a smaller one is faster",
    )
    parser.option(
        "--bank_size", type=int_at_least(1), default=16, help="bank: side of the map stored per training image"
    )
    parser.option(
        "--bank_momentum",
        type=fraction_below_one,
        default=0.5,
        help="bank: weight of the old map when a map is updated",
    )
    add_common_options(parser, "casm")
