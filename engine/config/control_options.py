"""Declare the options of optimizer, schedule and loss that few runs need. --help shows them on request."""

from engine.config.option_types import boolean, float_in_range, fraction_below_one
from engine.config.parser import Parser


def add_control_options(parser: Parser) -> None:
    """Add them as a folded group, which --help optimizer and --help schedule show, too."""
    parser.group("control", folded=True, topics=["optimizer", "schedule"])
    parser.option(
        "--betas",
        type=fraction_below_one,
        nargs="+",
        metavar="BETA",
        shown="of the optimizer",
        help="adamw and its kin: decay of the running means of the gradient and of its square",
    )
    parser.option(
        "--eps", type=float_in_range(), shown="of the optimizer", help="adamw and its kin: added to the denominator"
    )
    parser.option("--no_decay_bn", type=boolean, default=False, help="no weight decay on batch norm parameters")
    parser.option(
        "--no_decay_1d",
        type=boolean,
        shown="true; sgd: false",
        help="no weight decay on biases, parameters of norms, class token and position embeddings",
    )
    parser.option(
        "--layer_decay",
        type=float_in_range(0, 1, exclude=[0]),
        shown="none",
        help="lower learning rates towards the input, by this factor from layer to layer; networks of timm",
    )
    parser.option(
        "--freeze",
        nargs="+",
        metavar="PATTERN",
        shown="none",
        help="layers or parameters that are not trained; * and ? match as in a shell",
    )
    parser.option(
        "--min_lr",
        type=float_in_range(),
        default=0.0,
        help="cosine, cosine_step, linear: final learning rate; multistep: lowest learning rate",
    )
    parser.option(
        "--warmup_lr", type=float_in_range(), shown="one step above 0", help="learning rate at which the warm-up starts"
    )
    parser.option(
        "--bce_target_thresh",
        type=fraction_below_one,
        shown="none",
        help="sigmoid_bce: targets above X become 1, all others 0",
    )
    parser.option(
        "--ema_ramp",
        type=boolean,
        default=False,
        help="raise the decay of --ema, from there or from 0.999, to 0.999999 along a cosine",
    )
