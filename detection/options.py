"""Declare the options of detect.py."""

from detection.recipes import RECIPES
from engine.config.option_types import boolean, choice, float_in_range, int_at_least, positive
from engine.config.options import add_common_options, add_dataset_option, add_device_options
from engine.config.parser import Parser
from engine.config.training_options import (
    add_optimizer_options,
    add_output_options,
    add_resume_options,
    add_step_options,
)


def build_parser() -> Parser:
    parser = Parser(
        "Train Faster R-CNN on PASCAL VOC or on data in COCO format with a classifier of this project as its backbone, "
        "and evaluate it by the VOC and COCO protocols; or draw what a detector finds in pictures (--image_path)."
    )
    add_start_options(parser)
    add_resume_options(parser)
    add_network_options(parser)
    add_image_options(parser)
    add_optimizer_options(parser, momentum=0.9)
    add_step_options(parser)
    add_schedule_options(parser)
    add_detection_options(parser)
    add_picture_options(parser)
    add_output_options(parser, print_freq=20, name_prefix="RECIPE")
    add_device_options(parser)
    return parser


def add_start_options(parser: Parser) -> None:
    """Add the options that select the task and the initial weights."""
    parser.group("run")
    parser.option(
        "--backbone_checkpoint",
        metavar="FILE",
        help="classifier whose ResNet becomes the backbone: a file or a run folder (best.pt)",
    )
    parser.option(
        "--pretrained",
        type=boolean,
        default=False,
        help="use torchvision's ImageNet weights as the backbone: the baseline",
    )
    parser.option(
        "--frcnn_checkpoint",
        metavar="FILE",
        help="detector to start from or to evaluate: file, run folder or torchvision's weights",
    )
    parser.option("--evaluate", "-e", type=boolean, default=False, help="evaluate --frcnn_checkpoint and exit")
    parser.option(
        "--averaged",
        type=boolean,
        default=False,
        help="load the weight average that a run with --ema stored in the file",
    )
    parser.option(
        "--recipe",
        type=choice(["auto", *RECIPES]),
        default="auto",
        help="sets the options that are not given; auto: shapes for the drawn scenes, coco1x for coco, else paper",
    )


def add_network_options(parser: Parser) -> None:
    """Add the options of the architecture and of what is trained."""
    parser.group("network")
    parser.option(
        "--model",
        metavar="NAME",
        shown="from the file",
        help="backbone: resnet18, 34, 50, 101 or 152; with --pretrained resnet50",
    )
    parser.option(
        "--neck",
        type=choice(["fpn", "c5"]),
        shown="recipe",
        help="fpn: feature pyramid; c5: only the last stage, anchors of 32 to 512 pixels",
    )
    parser.option(
        "--trainable_layers",
        type=int_at_least(),
        shown="recipe",
        help="number of backbone stages to train, from the top; 5: all and the stem",
    )
    parser.option(
        "--norm", type=choice(["frozen", "bn", "syncbn"]), shown="recipe", help="batch norm of the trained stages"
    )
    parser.option(
        "--stem",
        type=choice(["embed", "random"]),
        default="embed",
        help="embed: keep the stem, pad 3x3 kernels to 7x7; random: train a new stem",
    )
    parser.option(
        "--rois", type=int_at_least(1), shown="recipe", help="proposals sampled per image to train the box head"
    )
    parser.option(
        "--proposals",
        type=int_at_least(1),
        nargs=2,
        shown="recipe",
        metavar=("TRAIN", "TEST"),
        help="proposals kept per feature map before NMS, and per image after it",
    )


def add_image_options(parser: Parser) -> None:
    """Add the options of the image sets, their size and augmentation."""
    parser.group("data")
    add_dataset_option(parser, ["voc", "coco", "shapes"], aliases={"fake": "shapes"}, dataset="voc")
    add_common_options(parser, "data_dir", "limit", download={"default": False})
    parser.option(
        "--train_sets",
        nargs="+",
        default=["2007_trainval", "2012_trainval"],
        metavar="YEAR_LIST",
        help="training images: lists in VOC<YEAR>/ImageSets/Main",
    )
    parser.option("--test_set", default="2007_test", metavar="YEAR_LIST", help="test images")
    parser.option("--train_annotations", metavar="FILE.json", help="for coco: annotations of the training images")
    parser.option("--test_annotations", metavar="FILE.json", help="for coco: annotations of the test images")
    parser.option(
        "--images",
        nargs="+",
        default=[],
        metavar="DIR",
        shown="the folders of the annotation files",
        help="for coco: folder of the images, or those of the training and of the test images",
    )
    parser.option("--use_difficult", type=boolean, shown="recipe", help="also train on objects marked difficult")
    parser.option(
        "--augment",
        type=choice(["none", "flip", "ssd"]),
        shown="recipe",
        help="ssd: colour distortion, zoom-out, crops and flip",
    )
    parser.option(
        "--min_size",
        type=int_at_least(8),
        nargs="+",
        shown="recipe",
        metavar="PIXELS",
        help="shorter side; of several, one is drawn per training image and the last is for evaluation",
    )
    parser.option("--max_size", type=int_at_least(8), shown="recipe", metavar="PIXELS", help="limit of the longer side")
    parser.option("--export_shapes", metavar="DIR", help="write the drawn scenes to DIR in the layout of VOC, and exit")


def add_schedule_options(parser: Parser) -> None:
    """Add the options of the length, the learning rate (in optimizer steps), the evaluations and the saves of a run."""
    parser.group("schedule")
    parser.option("--iters", type=int_at_least(1), shown="recipe", help="number of optimizer steps; overrides --epochs")
    parser.option("--epochs", type=int_at_least(1), help="length of the run in epochs instead of --iters")
    parser.option(
        "--scale_lr",
        type=boolean,
        default=False,
        help="multiply the recipe's lr by --batch_size / the recipe's batch size",
    )
    parser.option(
        "--schedule",
        type=int_at_least(1),
        nargs="*",
        metavar="ITERATION",
        shown="recipe",
        help="steps at which the lr drops; those of a recipe scale with --iters",
    )
    parser.option("--gammas", type=positive, nargs="+", default=[0.1], help="factor of all drops, or one per drop")
    parser.option("--warmup_iters", type=int_at_least(), shown="recipe", help="steps of linear warm-up from lr / 1000")
    parser.option("--eval_every", type=int_at_least(), default=0, help="evaluate every N epochs; 0: only at the end")
    parser.option("--save_iters", type=int_at_least(), default=0, help="also save last.pt every N steps; 0: never")


def add_detection_options(parser: Parser) -> None:
    """Add the options of the detections and of their evaluation."""
    parser.group("detections")
    parser.option(
        "--score_thr",
        type=float_in_range(0, 1),
        default=0.05,
        help="keep detections with a score above this; with --image_path 0.5 unless given",
    )
    parser.option(
        "--nms_thr",
        type=float_in_range(0, 1),
        default=0.5,
        help="IoU above which NMS removes the detection with the lower score",
    )
    parser.option("--max_dets", type=int_at_least(1), default=100, help="maximum number of detections per image")
    parser.option(
        "--coco_count_difficult",
        type=boolean,
        default=False,
        help="count difficult objects in COCO's metrics, as the replication did",
    )
    parser.option("--vis", type=int_at_least(), default=0, help="draw the detections in N test images")
    parser.option("--predictions", metavar="FILE.json", help="write all detections in COCO's format")


def add_picture_options(parser: Parser) -> None:
    """Add the options of detections in pictures of the user."""
    parser.group("pictures")
    parser.option(
        "--image_path",
        nargs="+",
        metavar="PATH",
        help="detect objects in these pictures with --frcnn_checkpoint, and exit: files, folders, or patterns such as "
        "'*.jpg'",
    )
    parser.option("--output", "-o", default="detect_output", metavar="DIR", help="folder for the drawn pictures")
    parser.option(
        "--labels",
        metavar="FILE",
        shown="from the file",
        help="class names of the detector, one per line, without the background",
    )
    add_common_options(
        parser, on_bad_image={"help": "what to do with a picture that cannot be read; skip: leave it out"}
    )
