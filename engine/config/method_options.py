"""Declare the options of the methods that have a group of their own in --help."""

from engine.config.option_types import (
    boolean,
    choice,
    float_in_range,
    int_at_least,
    int_list,
    positive,
    positive_or_minus_one,
)
from engine.config.parser import Parser

SHAPE_GROUP = "resizemix, fmix, gridmix, hmix, recursivemix"
METHOD_GROUPS = [
    "puzzlemix",
    "comixup",
    "sage",
    "guidedmixup",
    "attentivemix, smmix, maskmix",
    "rmix, rlmix",
    SHAPE_GROUP,
]


def add_group_options(parser: Parser) -> None:
    """Add the groups of single methods, or of a few."""
    add_puzzlemix_options(parser)
    add_comixup_options(parser)
    add_sage_options(parser)
    add_guidedmixup_options(parser)
    add_patch_options(parser)
    add_rmix_options(parser)
    add_shape_options(parser)


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
        "--eval_mode", type=boolean, shown="false", help="saliency pass with the running statistics of batch norm"
    )


def add_guidedmixup_options(parser: Parser) -> None:
    parser.group("guidedmixup", folded=True, topics=["sage", "rmix", "rlmix"])
    parser.option(
        "--pairing",
        type=choice(["random", "reversed", "greedy"]),
        shown="random; guidedmixup: greedy",
        help="partners: a random permutation, the batch reversed (rmix, rlmix), or images whose maps differ most "
        "(guidedmixup)",
    )
    parser.option(
        "--blur_sigma",
        type=float_in_range(),
        shown="1; guidedmixup: 3",
        help="standard deviation of the saliency blur in pixels; 0: no blur",
    )
    parser.option(
        "--kernel_size", type=int_at_least(1), shown="5; guidedmixup: 7", help="side of the blur kernel in pixels, odd"
    )


def add_patch_options(parser: Parser) -> None:
    parser.group("attentivemix, smmix, maskmix", folded=True, topics=["rmix", "rlmix"])
    parser.option(
        "--num_patches",
        type=int_at_least(1),
        shown="8; maskmix 4",
        help="patches per side: attentivemix, smmix, maskmix, the state of rlmix, and rmix if --use_random_patches is "
        "false",
    )
    parser.option(
        "--top_k",
        type=int_at_least(1),
        shown="drawn",
        help="attentivemix: patches that show the image, instead of a share ~ Beta(alpha, alpha)",
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
        "--resize_mode",
        type=choice(["nearest", "bilinear"]),
        shown="nearest",
        help="resizemix, recursivemix: how images are resized",
    )
    parser.option(
        "--history_area",
        type=float_in_range(0, 1, exclude=[0]),
        shown="0.5",
        help="recursivemix: largest share of the image that the last batch covers",
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
