"""Declare the options of the mixing methods and of the saliency sources. A method with many has its own group."""

from types import ModuleType

from engine.config.legacy_options import LEGACY_METHOD_OPTIONS, LEGACY_MIXING_OPTIONS
from engine.config.option_types import (
    boolean,
    choice,
    float_in_range,
    fraction_below_one,
    int_at_least,
    int_list,
    positive,
    positive_or_minus_one,
)
from engine.config.options import add_common_options
from engine.config.parser import Parser

# methods whose options, or some of them, are in the groups of all methods
SIMPLE_METHODS = ("cutout", "mixup", "manifold", "cutmix", "saliencymix", "smmix", "maskmix", "s2mix")
OPTION_GROUPS = ["mixing", "methods", "saliency", "puzzlemix", "comixup", "sage", "smmix, maskmix", "rmix, rlmix"]


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
    parser.option("--cutout", type=boolean, default=False, help="also cut holes into every training image")
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
    parser.hidden_options(LEGACY_MIXING_OPTIONS)
    parser.defaults["method_options"] = {}  # only recipes set it
    add_method_options(parser, sources=sources)


def add_method_options(parser: Parser, *, sources: ModuleType) -> None:
    """Add the hyper-parameters of the methods and of the saliency sources. sources: the package `saliency`."""
    add_common_method_options(parser)
    add_saliency_options(parser, sources)
    add_puzzlemix_options(parser)
    add_comixup_options(parser)
    add_sage_options(parser)
    add_patch_options(parser)
    add_rmix_options(parser)


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
        "--in_batch",
        type=boolean,
        default=False,
        help="draw one lam per image (smmix: one side of the window) instead of one per batch",
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
        "--clean_lam",
        type=float_in_range(),
        shown="by method",
        help="puzzlemix, comixup, rmix: weight of the loss on the unmixed images",
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
        help="on CUDA: Triton kernels for puzzlemix, comixup and sage, and CUDA graphs of saliency (auto: where they "
        "run), or torch operations alone",
    )


def add_saliency_options(parser: Parser, sources: ModuleType) -> None:
    """Add the choice of a saliency source, and the options of the sources."""
    parser.group("saliency", topics=["saliencymix", "smmix", "s2mix"])
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


def add_puzzlemix_options(parser: Parser) -> None:
    parser.group("puzzlemix", folded=True)
    parser.option(
        "--block_num", type=int_list, nargs="+", shown="2 4 8 16", help="blocks per side; one value is drawn per batch"
    )
    parser.option("--n_labels", type=int_at_least(2, 4), shown="3", help="number of mask values: 2, 3 or 4")
    parser.option("--beta", type=float_in_range(), shown="1.2", help="weight of the smoothness of the mask")
    parser.option(
        "--gamma",
        type=float_in_range(0, 1),
        shown="0.5",
        help="weight of the differences across block borders, relative to --beta",
    )
    parser.option("--eta", type=float_in_range(), shown="0.2", help="weight of the prior of the mask")
    parser.option(
        "--neigh_size",
        type=int_at_least(1),
        shown="4",
        help="side in pixels of the cells compared across block borders",
    )
    parser.option("--transport", type=boolean, shown="true", help="move salient blocks to places that the mask shows")
    parser.option("--t_eps", type=float_in_range(), shown="0.8", help="cost of moving a block")
    parser.option(
        "--t_size",
        type=positive_or_minus_one,
        shown="4; tiny-imagenet and folder -1",
        metavar="PIXELS",
        help="side of the moved blocks in pixels; -1: that of the mask blocks",
    )
    parser.option("--adv_p", type=float_in_range(0, 1), shown="0", help="probability of adversarial noise")
    parser.option("--adv_eps", type=float_in_range(), shown="10", help="size of the adversarial noise, in 1/255")


def add_comixup_options(parser: Parser) -> None:
    parser.group("comixup", folded=True)
    parser.option(
        "--m_part", type=int_at_least(2), shown="20", help="images per part; only images of the same part are mixed"
    )
    parser.option("--m_block_num", type=positive_or_minus_one, shown="4", help="blocks per side; -1: drawn per batch")
    parser.option("--m_beta", type=float_in_range(), shown="0.32", help="weight of the smoothness of the masks")
    parser.option("--m_gamma", type=float_in_range(), shown="1", help="weight of the diversity of the outputs")
    parser.option(
        "--m_thres",
        type=float_in_range(),
        shown="0.83",
        help="share of blocks that other outputs may take from an image before it costs",
    )
    parser.option(
        "--m_thres_type",
        type=choice(["hard", "soft"]),
        shown="hard",
        help="above --m_thres, the whole share costs, or only the excess",
    )
    parser.option("--m_eta", type=float_in_range(), shown="0.05", help="weight of the prior of the masks")
    parser.option(
        "--m_omega", type=float_in_range(0, 1), shown="0.001", help="weight of the distance between salient regions"
    )
    parser.option("--m_niter", type=int_at_least(1), shown="4", help="sweeps of the solver")
    parser.option(
        "--m_stride",
        type=int_at_least(1),
        shown="1",
        help="stride in pixels of the windows that locate salient regions",
    )
    parser.option("--set_resolve", type=boolean, shown="true", help="separate outputs that consist of the same images")


def add_sage_options(parser: Parser) -> None:
    parser.group("sage", folded=True)
    parser.option("--upper_lambda", type=float_in_range(0, 1), shown="recipe", help="upper bound of lam")
    parser.option("--rand_pos", type=float_in_range(0, 1), shown="0.01", help="fraction of all offsets that is tried")
    parser.option(
        "--search",
        type=choice(["random", "grid", "exhaustive"]),
        shown="random",
        help="offsets that are tried: random ones, an even grid, or all",
    )
    parser.option(
        "--update_ratio",
        type=float_in_range(0, 1),
        shown="recipe",
        help="weight of the loss on mixed images; that on unmixed images gets the rest",
    )
    parser.option(
        "--blur_sigma",
        type=float_in_range(),
        shown="1",
        help="standard deviation of the saliency blur in pixels; 0: no blur",
    )
    parser.option("--kernel_size", type=int_at_least(1), shown="5", help="side of the blur kernel in pixels, odd")
    parser.option(
        "--eval_mode", type=boolean, shown="false", help="saliency pass with the running statistics of batch norm"
    )


def add_patch_options(parser: Parser) -> None:
    parser.group("smmix, maskmix", folded=True, topics=["rmix", "rlmix"])
    parser.option(
        "--num_patches",
        type=int_at_least(1),
        shown="8; maskmix 4",
        help="patches per side: smmix, maskmix, the state of rlmix, and rmix if --use_random_patches is false",
    )
    parser.option(
        "--min_side_ratio",
        type=float_in_range(0, 1),
        shown="0.25",
        help="smmix: smallest side of a window, relative to the image",
    )
    parser.option(
        "--max_side_ratio",
        type=float_in_range(0, 1),
        shown="0.75",
        help="smmix: largest side of a window, relative to the image",
    )


def add_rmix_options(parser: Parser) -> None:
    parser.group("rmix, rlmix", folded=True)
    parser.option(
        "--dirichlet_alpha",
        type=float_in_range(),
        shown="1",
        help="Dirichlet alpha of the weight where both images are salient, or neither",
    )
    parser.option(
        "--random_patches",
        type=int_list,
        nargs="+",
        metavar="PIXELS",
        shown="8 16",
        help="patch sides; one is drawn per batch",
    )
    parser.option("--use_random_patches", type=boolean, shown="true", help="false: use --num_patches instead")
    parser.option(
        "--patches_per_side",
        type=int_list,
        nargs="+",
        help="patches per side, one drawn per batch, instead of --random_patches; on ImageNet 2 4",
    )
    parser.option("--num_action", type=int_at_least(2), shown="10", help="number of saliency percentiles to draw from")
    parser.option(
        "--pairing",
        type=choice(["random", "reversed"]),
        shown="random",
        help="partners: a random permutation, or the batch reversed",
    )
    parser.option("--agent_lr", type=positive, shown="3e-4", help="rlmix: learning rate of the agent")
    parser.option(
        "--agent_batch_size", type=int_at_least(1), shown="250", help="rlmix: steps per minibatch of the agent"
    )
    parser.option(
        "--agent_trajectory_size",
        type=int_at_least(2),
        shown="1000",
        help="rlmix: training steps between updates of the agent",
    )
    parser.option("--agent_epochs", type=int_at_least(1), shown="10", help="rlmix: epochs per update of the agent")
    parser.option("--reward_step", type=int_at_least(1), shown="1", help="rlmix: reward every N-th step")
    parser.option("--reward_scaling", type=float_in_range(1e-9), shown="1", help="rlmix: divisor of the rewards")
    parser.hidden_options(LEGACY_METHOD_OPTIONS)
