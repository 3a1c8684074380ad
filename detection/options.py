"""The options of detect.py, its recipes, and what follows from several of them."""

from detection.recipes import RECIPES
from engine.config.options import add_device_options, add_output_options, add_resume_options
from engine.config.parser import Parser, boolean, choice, float_in_range, int_at_least


def build_parser() -> Parser:
    parser = Parser(
        "Train Faster R-CNN on PASCAL VOC with a classifier of this project as its backbone, and evaluate it by every "
        "protocol in use."
    )
    parser.group("run")
    parser.option(
        "--backbone_checkpoint", "--backbone", metavar="FILE", help="classifier whose ResNet becomes the backbone"
    )
    parser.option(
        "--pretrained", type=boolean, default=False, help="torchvision's ImageNet weights instead: the baseline"
    )
    parser.option(
        "--frcnn_checkpoint", metavar="FILE", help="a detector: to evaluate, or to start from; ours or torchvision's"
    )
    parser.option("--evaluate", "-e", type=boolean, default=False, help="evaluate --frcnn_checkpoint and exit")
    parser.option(
        "--averaged",
        type=boolean,
        default=False,
        help="the weight average in the file to start from, of a run with --ema",
    )
    parser.option("--recipe", type=choice(["auto", *RECIPES]), default="auto", metavar="NAME", help=describe_recipes())
    parser.option(
        "--model",
        "--arch",
        metavar="NAME",
        shown="from the file",
        help="resnet18, 34, 50, 101 or 152; --pretrained: 50",
    )
    parser.option(
        "--neck",
        type=choice(["fpn", "c5"]),
        shown="recipe",
        metavar="fpn|c5",
        help="feature pyramid, or the last stage alone with anchors of 32 to 512",
    )
    parser.option(
        "--trainable_layers",
        type=int_at_least(),
        shown="recipe",
        metavar="N",
        help="stages that learn, from the top; 5: all",
    )
    parser.option(
        "--norm",
        type=choice(["frozen", "bn", "syncbn"]),
        shown="recipe",
        metavar="NAME",
        help="batch norm of the stages that learn: frozen, bn or syncbn",
    )
    parser.option(
        "--stem",
        type=choice(["embed", "random"]),
        default="embed",
        metavar="embed|random",
        help="of the backbone: its own, where 3x3 lying within 7x7, or a new one that learns",
    )
    add_resume_options(parser)

    parser.group("data")
    parser.option("--dataset", type=choice(["voc", "shapes"], {"fake": "shapes"}), default="voc", metavar="voc|shapes")
    parser.option("--data_dir", "--data", default="data", help="the folder that holds VOCdevkit, or VOCdevkit itself")
    parser.option(
        "--train_sets",
        nargs="+",
        default=["2007_trainval", "2012_trainval"],
        metavar="YEAR_LIST",
        help="lists in VOC<YEAR>/ImageSets/Main",
    )
    parser.option("--test_set", default="2007_test", metavar="YEAR_LIST")
    parser.option("--download", type=boolean, default=False, help="fetch VOC by torchvision where it is missing")
    parser.option("--use_difficult", type=boolean, shown="recipe", help="train on objects marked difficult too")
    parser.option(
        "--augment",
        type=choice(["none", "flip", "ssd"]),
        shown="recipe",
        metavar="NAME",
        help="none, flip, or ssd: colours, zooming out, crops and flip",
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
    parser.option("--limit", type=int_at_least(), default=0, help="use the first N images of each part only; 0: all")
    parser.option(
        "--export_shapes", metavar="DIR", help="write the drawn scenes in the layout of VOC into DIR, and exit"
    )

    parser.group("training")
    parser.option(
        "--iters", "--iterations", type=int_at_least(1), shown="recipe", help="optimizer steps; wins over --epochs"
    )
    parser.option("--epochs", type=int_at_least(1), help="the same as so many passes over the images")
    parser.option("--batch_size", "-b", type=int_at_least(1), shown="recipe", help="in total, over all processes")
    parser.option("--lr", "--learning_rate", type=float_in_range(), shown="recipe")
    parser.option(
        "--scale_lr", type=boolean, default=False, help="the recipe's lr times --batch_size over the recipe's batch"
    )
    parser.option("--momentum", type=float_in_range(0, 1), default=0.9)
    parser.option("--weight_decay", "--wd", type=float_in_range(), shown="recipe")
    parser.option(
        "--schedule",
        "--milestones",
        type=int_at_least(1),
        nargs="*",
        metavar="ITERATION",
        shown="recipe",
        help="iterations after which the lr drops; those of a recipe shrink and grow with --iters",
    )
    parser.option(
        "--gammas",
        type=float_in_range(),
        nargs="+",
        default=[0.1],
        metavar="G",
        help="one factor for all drops, or one each",
    )
    parser.option(
        "--warmup_iters", type=int_at_least(), shown="recipe", help="straight rise of the lr from a thousandth of it"
    )
    parser.option("--accumulate", type=int_at_least(1), default=1, metavar="N", help="run each batch in N pieces")
    parser.option("--clip_grad", type=float_in_range(), default=0.0, help="largest gradient norm; 0: no limit")
    parser.option(
        "--ema", type=float_in_range(0, 1), default=0.0, help="decay of an average of the weights, evaluated too"
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
        help="proposals kept of a feature map, and of an image",
    )
    parser.option(
        "--eval_every",
        type=int_at_least(),
        default=0,
        metavar="EPOCHS",
        help="epochs between evaluations; 0: at the end only",
    )
    parser.option(
        "--save_iters", type=int_at_least(), default=0, metavar="N", help="save last.pt every N steps too; 0: never"
    )

    parser.group("detections")
    parser.option(
        "--score_thr", type=float_in_range(0, 1), default=0.05, help="detections below this score are not given"
    )
    parser.option(
        "--nms_thr", type=float_in_range(0, 1), default=0.5, help="overlap at which the weaker detection goes"
    )
    parser.option("--max_dets", type=int_at_least(1), default=100, help="detections of an image")
    parser.option(
        "--coco_count_difficult",
        type=boolean,
        default=False,
        help="COCO's numbers: difficult objects are ordinary ones, as the replication had it, instead of ignored",
    )
    parser.option("--vis", type=int_at_least(), default=0, metavar="N", help="draw N test images with boxes")
    parser.option("--predictions", metavar="FILE.json", help="all detections, as COCO's tools read them")
    add_output_options(parser, print_freq=20, named_by="RECIPE")
    add_device_options(parser)
    return parser


def describe_recipes() -> str:
    return f"{', '.join(RECIPES)}: fills in what is not given; auto: paper, or shapes for the drawn scenes"
