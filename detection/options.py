"""The options of detect.py."""

from detection.recipes import RECIPES
from engine.config.option_types import boolean, choice, float_in_range, int_at_least
from engine.config.options import (
    add_common_options,
    add_dataset_option,
    add_device_options,
    add_optimizer_options,
    add_output_options,
    add_resume_options,
    add_step_options,
)
from engine.config.parser import Parser


def build_parser() -> Parser:
    parser = Parser(
        "Train Faster R-CNN on PASCAL VOC with a classifier of this project as its backbone, and evaluate it by every "
        "protocol in use."
    )
    add_start_options(parser)
    add_resume_options(parser)
    add_network_options(parser)
    add_image_options(parser)
    add_optimizer_options(parser, momentum=0.9)
    add_step_options(parser)
    add_schedule_options(parser)
    add_detection_options(parser)
    add_output_options(parser, print_freq=20, name_prefix="RECIPE")
    add_device_options(parser)
    return parser


def add_start_options(parser: Parser) -> None:
    """What is run, and from which weights it starts."""
    parser.group("run")
    parser.option("--backbone_checkpoint", metavar="FILE", help="classifier whose ResNet becomes the backbone")
    parser.option(
        "--pretrained", type=boolean, default=False, help="torchvision's ImageNet weights instead: the baseline"
    )
    parser.option(
        "--frcnn_checkpoint", metavar="FILE", help="a detector: to evaluate, or to start from; ours or torchvision's"
    )
    parser.option("--evaluate", "-e", type=boolean, default=False, help="evaluate --frcnn_checkpoint and exit")
    parser.option(
        "--averaged", type=boolean, default=False, help="take the weight average of the file, of a run with --ema"
    )
    parser.option(
        "--recipe",
        type=choice(["auto", *RECIPES]),
        default="auto",
        help="fills in what is not given; auto: paper, or shapes for the drawn scenes",
    )


def add_network_options(parser: Parser) -> None:
    parser.group("network")
    parser.option(
        "--model", metavar="NAME", shown="from the file", help="resnet18, 34, 50, 101 or 152; --pretrained: 50"
    )
    parser.option(
        "--neck",
        type=choice(["fpn", "c5"]),
        shown="recipe",
        help="feature pyramid, or the last stage with anchors 32-512",
    )
    parser.option(
        "--trainable_layers", type=int_at_least(), shown="recipe", help="stages that learn, from the top; 5: all"
    )
    parser.option(
        "--norm", type=choice(["frozen", "bn", "syncbn"]), shown="recipe", help="batch norm of the stages that learn"
    )
    parser.option(
        "--stem",
        type=choice(["embed", "random"]),
        default="embed",
        help="the backbone's, its 3x3 in a 7x7 convolution, or a new one that learns",
    )
    parser.option(
        "--rois", type=int_at_least(1), shown="recipe", help="proposals of an image that the head learns from"
    )
    parser.option(
        "--proposals",
        type=int_at_least(1),
        nargs=2,
        shown="recipe",
        metavar=("TRAIN", "TEST"),
        help="kept of a feature map, and of an image",
    )


def add_image_options(parser: Parser) -> None:
    parser.group("data")
    add_dataset_option(parser, ["voc", "shapes"], aliases={"fake": "shapes"}, dataset="voc")
    add_common_options(parser, "data_dir", "limit", download={"default": False})
    parser.option(
        "--train_sets",
        nargs="+",
        default=["2007_trainval", "2012_trainval"],
        metavar="YEAR_LIST",
        help="lists in VOC<YEAR>/ImageSets/Main",
    )
    parser.option("--test_set", default="2007_test", metavar="YEAR_LIST")
    parser.option("--use_difficult", type=boolean, shown="recipe", help="train on objects marked difficult too")
    parser.option(
        "--augment", type=choice(["none", "flip", "ssd"]), shown="recipe", help="ssd: colours, zoom out, crops, flip"
    )
    parser.option(
        "--min_size",
        type=int_at_least(8),
        nargs="+",
        shown="recipe",
        metavar="PIXELS",
        help="shorter side; of several one is drawn for each training image, and the last is for evaluation",
    )
    parser.option("--max_size", type=int_at_least(8), shown="recipe", metavar="PIXELS", help="of the longer side")
    parser.option(
        "--export_shapes", metavar="DIR", help="write the drawn scenes in the layout of VOC into DIR, and exit"
    )


def add_schedule_options(parser: Parser) -> None:
    """The length of a run and its learning rate, in optimizer steps, and when it is evaluated and saved."""
    parser.group("schedule")
    parser.option("--iters", type=int_at_least(1), shown="recipe", help="optimizer steps; wins over --epochs")
    parser.option("--epochs", type=int_at_least(1), help="the same as so many passes over the images")
    parser.option(
        "--scale_lr", type=boolean, default=False, help="the recipe's lr times --batch_size over the recipe's batch"
    )
    parser.option(
        "--schedule",
        type=int_at_least(1),
        nargs="*",
        metavar="ITERATION",
        shown="recipe",
        help="where the lr drops; in a recipe it scales with --iters",
    )
    parser.option(
        "--gammas", type=float_in_range(), nargs="+", default=[0.1], help="one factor for all drops, or one each"
    )
    parser.option(
        "--warmup_iters", type=int_at_least(), shown="recipe", help="linear rise of the lr from a thousandth of it"
    )
    parser.option("--eval_every", type=int_at_least(), default=0, help="epochs between evaluations; 0: at the end only")
    parser.option("--save_iters", type=int_at_least(), default=0, help="save last.pt every N steps too; 0: never")


def add_detection_options(parser: Parser) -> None:
    """What counts as a detection, and what is kept of them."""
    parser.group("detections")
    parser.option(
        "--score_thr", type=float_in_range(0, 1), default=0.05, help="detections below this score are left out"
    )
    parser.option(
        "--nms_thr", type=float_in_range(0, 1), default=0.5, help="overlap at which the weaker detection goes"
    )
    parser.option("--max_dets", type=int_at_least(1), default=100, help="detections of an image")
    parser.option(
        "--coco_count_difficult",
        type=boolean,
        default=False,
        help="COCO's numbers: count difficult objects, as the replication had it",
    )
    parser.option("--vis", type=int_at_least(), default=0, help="draw N test images with boxes")
    parser.option("--predictions", metavar="FILE.json", help="all detections, as COCO's tools read them")
