"""The options of the mixing methods and of what guides them; those of a method stand under its name."""

from types import ModuleType

from engine.config.legacy_options import LEGACY_METHOD_OPTIONS, LEGACY_MIXING_OPTIONS
from engine.config.option_types import boolean, choice, float_in_range, int_at_least, int_list, positive_or_minus_one
from engine.config.options import add_common_options
from engine.config.parser import Parser

OPTION_GROUPS = ["mixing", "methods", "saliency", "puzzlemix", "comixup", "sage", "rmix, rlmix"]


def add_mixing_options(parser: Parser, *, sources: ModuleType) -> None:
    """Everything about mixing that a training run can be told. sources: the package `saliency`."""
    parser.group("mixing")
    parser.option("--mix_prob", type=float_in_range(0, 1), shown="by method", help="chance that a batch is mixed")
    parser.option("--cutout", type=boolean, default=False, help="a hole in every training image, with any method")
    parser.option("--mix_fraction", type=float_in_range(0, 1), default=1.0, help="share of a batch that is mixed")
    parser.option(
        "--mix_schedule",
        type=choice(["fixed", "scheduled", "delayed"]),
        default="fixed",
        help="mix_fraction throughout, on a ramp up to --mix_scheduled_epoch, or only after it",
    )
    parser.option(
        "--mix_scheduled_epoch", type=int_at_least(), default=0, metavar="EPOCH", help="the epoch of --mix_schedule"
    )
    parser.option("--mix_off_epoch", type=int_at_least(), default=0, help="no mixing in the last N epochs")
    parser.hidden_options(LEGACY_MIXING_OPTIONS)
    parser.defaults["method_options"] = {}  # set by recipes only
    add_method_options(parser, sources=sources)


def add_method_options(parser: Parser, *, sources: ModuleType) -> None:
    """The hyper-parameters of the methods and of the sources."""
    add_common_method_options(parser)
    add_saliency_options(parser, sources)
    add_puzzlemix_options(parser)
    add_comixup_options(parser)
    add_sage_options(parser)
    add_rmix_options(parser)


def add_common_method_options(parser: Parser) -> None:
    """Of methods that have few of their own, or share them."""
    parser.group("methods")
    parser.option(
        "--mixup_alpha",
        type=float_in_range(),
        shown="by method",
        help="of lam ~ Beta(alpha, alpha); comixup: Dirichlet",
    )
    parser.option("--in_batch", type=boolean, default=False, help="an own lam for each image instead of one a batch")
    parser.option("--per_sample", type=boolean, help="cutmix, saliencymix: an own box for each image")
    parser.option(
        "--cutmix_box",
        type=choice(["integer", "real"]),
        shown="integer; puzzle: real",
        help="cutmix: rounding of the edges",
    )
    parser.option(
        "--saliency_scope",
        type=choice(["sample", "batch"]),
        default="sample",
        help="saliencymix: a box for each image, or one for the batch",
    )
    parser.option("--cutout_length", type=int_at_least(1), default=16, help="side of the hole in pixels")
    parser.option("--n_holes", type=int_at_least(1), default=1, help="holes an image")
    parser.option(
        "--clean_lam",
        type=float_in_range(),
        shown="by method",
        help="puzzlemix, comixup, rmix: weight of the loss of the clean images",
    )
    parser.option(
        "--solver",
        type=choice(["parallel", "gco"]),
        default="parallel",
        help="puzzlemix, comixup: ours, or gco-wrapper's",
    )


def add_saliency_options(parser: Parser, sources: ModuleType) -> None:
    parser.group("saliency")
    parser.option("--saliency", type=choice(sources.SOURCES, sources.ALIASES), shown="by method")
    parser.option(
        "--saliency_size",
        type=int_at_least(8),
        metavar="PIXELS",
        help="gradient: side of the images in the saliency pass; smaller is cheaper",
    )
    parser.option(
        "--bank_size", type=int_at_least(1), default=16, help="bank: side of the map kept of each image, in cells"
    )
    parser.option(
        "--bank_momentum", type=float_in_range(0, 1), default=0.5, help="bank: share of the old map in the new one"
    )
    add_common_options(parser, "casm")


def add_puzzlemix_options(parser: Parser) -> None:
    parser.group("puzzlemix", folded=True)
    parser.option("--block_num", type=int_list, nargs="+", shown="2 4 8 16", help="blocks a side, drawn")
    parser.option("--n_labels", type=int_at_least(2), shown="3", help="values of the mask: 2, 3 or 4")
    parser.option("--beta", type=float_in_range(), shown="1.2", help="smoothness of the mask")
    parser.option(
        "--gamma", type=float_in_range(), shown="0.5", help="differences across block borders, relative to --beta"
    )
    parser.option("--eta", type=float_in_range(), shown="0.2", help="weight of the prior")
    parser.option("--neigh_size", type=int_at_least(1), shown="4", help="cells of the border differences, in pixels")
    parser.option("--transport", type=boolean, shown="true", help="move salient blocks to where they show")
    parser.option("--t_eps", type=float_in_range(), shown="0.8", help="price of moving")
    parser.option(
        "--t_size",
        type=positive_or_minus_one,
        shown="4; tiny-imagenet and folder -1",
        metavar="PIXELS",
        help="side of the blocks that move in pixels; -1: the mask's",
    )
    parser.option("--adv_p", type=float_in_range(0, 1), shown="0", help="chance of adversarial noise")
    parser.option("--adv_eps", type=float_in_range(), shown="10", help="its size, of 255")


def add_comixup_options(parser: Parser) -> None:
    parser.group("comixup", folded=True)
    parser.option("--m_part", type=int_at_least(1), shown="20", help="images mixed with each other")
    parser.option("--m_block_num", type=positive_or_minus_one, shown="4", help="blocks a side; -1: drawn")
    parser.option("--m_beta", type=float_in_range(), shown="0.32", help="smoothness")
    parser.option("--m_gamma", type=float_in_range(), shown="1", help="diversity")
    parser.option("--m_thres", type=float_in_range(), shown="0.83", help="share of blocks from which likeness costs")
    parser.option("--m_thres_type", type=choice(["hard", "soft"]), shown="hard", help="how it costs")
    parser.option("--m_eta", type=float_in_range(), shown="0.05", help="weight of the prior")
    parser.option(
        "--m_omega", type=float_in_range(0, 1), shown="0.001", help="weight of the distance of the salient places"
    )
    parser.option("--m_niter", type=int_at_least(1), shown="4", help="sweeps")
    parser.option(
        "--m_stride", type=int_at_least(1), shown="1", help="pixels between the windows that find salient places"
    )
    parser.option("--set_resolve", type=boolean, shown="true", help="part outputs of the same images")


def add_sage_options(parser: Parser) -> None:
    parser.group("sage", folded=True)
    parser.option("--upper_lambda", type=float_in_range(0, 1), shown="recipe", help="lam is at most this")
    parser.option("--rand_pos", type=float_in_range(0, 1), shown="0.01", help="share of the offsets that is tried")
    parser.option(
        "--search", type=choice(["random", "grid", "exhaustive"]), shown="random", help="random offsets, a grid, or all"
    )
    parser.option(
        "--update_ratio", type=float_in_range(0, 1), shown="recipe", help="weight of the mixed loss; the rest: clean"
    )
    parser.option("--blur_sigma", type=float_in_range(), shown="1", help="blur of the saliency, in pixels")
    parser.option("--kernel_size", type=int_at_least(1), shown="5", help="of the blur, odd")
    parser.option("--eval_mode", type=boolean, shown="false", help="saliency with batch norm's running statistics")


def add_rmix_options(parser: Parser) -> None:
    parser.group("rmix, rlmix", folded=True)
    parser.option(
        "--dirichlet_alpha", type=float_in_range(), shown="1", help="of the weight where both images are salient"
    )
    parser.option(
        "--random_patches", type=int_list, nargs="+", metavar="PIXELS", shown="8 16", help="sides of patches, drawn"
    )
    parser.option("--use_random_patches", type=boolean, shown="true", help="false: --num_patches a side")
    parser.option("--num_patches", type=int_at_least(1), shown="8", help="patches a side of the agent's state")
    parser.option("--patches_per_side", type=int_list, nargs="+", help="in place of --random_patches (ImageNet: 2 4)")
    parser.option("--num_action", type=int_at_least(2), shown="10", help="percentiles to draw from")
    parser.option(
        "--pairing", type=choice(["random", "reversed"]), shown="random", help="random, or the batch from its end"
    )
    parser.option("--agent_lr", type=float_in_range(), shown="3e-4", help="rlmix: learning rate of the agent")
    parser.option("--agent_batch_size", type=int_at_least(1), shown="250", help="rlmix: steps in its minibatch")
    parser.option(
        "--agent_trajectory_size", type=int_at_least(2), shown="1000", help="rlmix: steps between its updates"
    )
    parser.option("--agent_epochs", type=int_at_least(1), shown="10", help="rlmix: passes over them")
    parser.option("--reward_step", type=int_at_least(1), shown="1", help="rlmix: steps between rewards")
    parser.option("--reward_scaling", type=float_in_range(1e-9), shown="1", help="rlmix: what rewards are divided by")
    parser.hidden_options(LEGACY_METHOD_OPTIONS)
