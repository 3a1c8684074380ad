"""The options of detect.py, its recipes, and what follows from several of them."""

from pathlib import Path

from engine.cli import Parser, number, one_of, whole, yes_no
from engine.configure import MAY_DIFFER as MAY_DIFFER_EVERYWHERE
from engine.configure import ONE_CALL as ONE_CALL_EVERYWHERE
from engine.configure import refuse
from engine.options import again_options, device_options, output_options

KIND = "detector"  # of checkpoints and runs
SCALES = list(range(480, 801, 32))  # of multi-scale training
PAPER = {  # Uddin et al., arXiv 2006.01791; length and drop of the rate as remembered, see spec
    "batch_size": 8,
    "lr": 0.004,
    "weight_decay": 5e-4,
    "iters": 41_000,
    "schedule": [33_000],
    "warmup_iters": 1000,
    "neck": "fpn",
    "trainable_layers": 3,
    "norm": "frozen",
    "use_difficult": False,
    "min_size": [600],
    "max_size": 1000,
    "augment": "flip",
    "rois": 512,
    "proposals": [2000, 1000],
}
LARGE_BATCH = {
    "batch_size": 16,
    "lr": 0.02,
    "weight_decay": 1e-4,
    "warmup_iters": 100,
    "use_difficult": True,
    "min_size": SCALES,
    "max_size": 1333,
}
RECIPES = {
    "paper": PAPER,
    "replication": {**PAPER, "iters": 28_966, "schedule": [20_690], "neck": "c5", "use_difficult": True},
    "moco24k": {  # the schedule of He et al., "Momentum Contrast", arXiv 1911.05722, Sec. 4.2.1, whose neck is C4
        **{**PAPER, **LARGE_BATCH},
        **{"iters": 24_000, "schedule": [18_000, 22_000], "trainable_layers": 5, "norm": "syncbn"},
    },
    "fpn18k": {**PAPER, **LARGE_BATCH, "iters": 18_000, "schedule": [12_000, 16_000]},
    "shapes": {  # ours, for a CPU
        **PAPER,
        **{"lr": 0.02, "iters": 500, "schedule": [350, 450], "warmup_iters": 50, "use_difficult": True},
        **{
            "eval_every": 1,
            "min_size": [160],
            "max_size": 320,
            "rois": 64,
            "proposals": [200, 100],
            "trainable_layers": 5,
        },
    },
}
MAY_DIFFER = {  # options that may change when a run is continued
    *MAY_DIFFER_EVERYWHERE,
    *("iters", "eval_every", "save_iters", "test_set", "score_thr", "nms_thr", "max_dets", "coco_count_difficult"),
    *("vis", "predictions", "backbone_checkpoint", "frcnn_checkpoint", "pretrained", "scale_lr"),
}
BUILT_IN = {"model", "neck", "stem", "dataset", "norm", "trainable_layers", "ema", "batch_size", "train_sets", "limit"}
STARTS = {"backbone_checkpoint", "pretrained", "frcnn_checkpoint"}  # what a new detector starts from
OF_TRAINING = {  # what an evaluation does not read
    *("recipe", "trainable_layers", "norm", "stem", "train_sets", "use_difficult", "augment", "iters", "epochs", "lr"),
    *("batch_size", "scale_lr", "momentum", "weight_decay", "schedule", "gammas", "warmup_iters", "accumulate"),
    *("clip_grad", "ema", "rois", "eval_every", "save_iters", "save_every", "print_freq", "checkpoint"),
}
ONE_CALL = {*ONE_CALL_EVERYWHERE, "vis", "predictions", "export_shapes"}


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
        "--pretrained", type=yes_no, default=False, help="torchvision's ImageNet weights instead: the baseline"
    )
    parser.option(
        "--frcnn_checkpoint", metavar="FILE", help="a detector: to evaluate, or to start from; ours or torchvision's"
    )
    parser.option("--evaluate", "-e", type=yes_no, default=False, help="evaluate --frcnn_checkpoint and exit")
    parser.option(
        "--averaged",
        type=yes_no,
        default=False,
        help="the weight average in the file to start from, of a run with --ema",
    )
    parser.option("--recipe", type=one_of(["auto", *RECIPES]), default="auto", metavar="NAME", help=recipes_text())
    parser.option(
        "--model",
        "--arch",
        metavar="NAME",
        shown="from the file",
        help="resnet18, 34, 50, 101 or 152; --pretrained: 50",
    )
    parser.option(
        "--neck",
        type=one_of(["fpn", "c5"]),
        shown="recipe",
        metavar="fpn|c5",
        help="feature pyramid, or the last stage alone with anchors of 32 to 512",
    )
    parser.option(
        "--trainable_layers", type=whole(), shown="recipe", metavar="N", help="stages that learn, from the top; 5: all"
    )
    parser.option(
        "--norm",
        type=one_of(["frozen", "bn", "syncbn"]),
        shown="recipe",
        metavar="NAME",
        help="batch norm of the stages that learn: frozen, bn or syncbn",
    )
    parser.option(
        "--stem",
        type=one_of(["embed", "random"]),
        default="embed",
        metavar="embed|random",
        help="of the backbone: its own, where 3x3 lying within 7x7, or a new one that learns",
    )
    again_options(parser)

    parser.group("data")
    parser.option("--dataset", type=one_of(["voc", "shapes"], {"fake": "shapes"}), default="voc", metavar="voc|shapes")
    parser.option("--data_dir", "--data", default="data", help="the folder that holds VOCdevkit, or VOCdevkit itself")
    parser.option(
        "--train_sets",
        nargs="+",
        default=["2007_trainval", "2012_trainval"],
        metavar="YEAR_LIST",
        help="lists in VOC<YEAR>/ImageSets/Main",
    )
    parser.option("--test_set", default="2007_test", metavar="YEAR_LIST")
    parser.option("--download", type=yes_no, default=False, help="fetch VOC by torchvision where it is missing")
    parser.option("--use_difficult", type=yes_no, shown="recipe", help="train on objects marked difficult too")
    parser.option(
        "--augment",
        type=one_of(["none", "flip", "ssd"]),
        shown="recipe",
        metavar="NAME",
        help="none, flip, or ssd: colours, zooming out, crops and flip",
    )
    parser.option(
        "--min_size",
        type=whole(8),
        nargs="+",
        shown="recipe",
        metavar="PIXELS",
        help="shorter side; of several one is drawn for each training image, and the last is for evaluation",
    )
    parser.option("--max_size", type=whole(8), shown="recipe", metavar="PIXELS", help="of the longer side")
    parser.option("--limit", type=whole(), default=0, help="use the first N images of each part only; 0: all")
    parser.option(
        "--export_shapes", metavar="DIR", help="write the drawn scenes in the layout of VOC into DIR, and exit"
    )

    parser.group("training")
    parser.option("--iters", "--iterations", type=whole(1), shown="recipe", help="optimizer steps; wins over --epochs")
    parser.option("--epochs", type=whole(1), help="the same as so many passes over the images")
    parser.option("--batch_size", "-b", type=whole(1), shown="recipe", help="in total, over all processes")
    parser.option("--lr", "--learning_rate", type=number(), shown="recipe")
    parser.option(
        "--scale_lr", type=yes_no, default=False, help="the recipe's lr times --batch_size over the recipe's batch"
    )
    parser.option("--momentum", type=number(0, 1), default=0.9)
    parser.option("--weight_decay", "--wd", type=number(), shown="recipe")
    parser.option(
        "--schedule",
        "--milestones",
        type=whole(1),
        nargs="*",
        metavar="ITERATION",
        shown="recipe",
        help="iterations after which the lr drops; those of a recipe shrink and grow with --iters",
    )
    parser.option(
        "--gammas", type=number(), nargs="+", default=[0.1], metavar="G", help="one factor for all drops, or one each"
    )
    parser.option(
        "--warmup_iters", type=whole(), shown="recipe", help="straight rise of the lr from a thousandth of it"
    )
    parser.option("--accumulate", type=whole(1), default=1, metavar="N", help="run each batch in N pieces")
    parser.option("--clip_grad", type=number(), default=0.0, help="largest gradient norm; 0: no limit")
    parser.option("--ema", type=number(0, 1), default=0.0, help="decay of an average of the weights, evaluated too")
    parser.option("--rois", type=whole(1), shown="recipe", help="proposals of an image that the head learns from")
    parser.option(
        "--proposals",
        type=whole(1),
        nargs=2,
        shown="recipe",
        metavar=("TRAIN", "TEST"),
        help="proposals kept of a feature map, and of an image",
    )
    parser.option(
        "--eval_every", type=whole(), default=0, metavar="EPOCHS", help="epochs between evaluations; 0: at the end only"
    )
    parser.option("--save_iters", type=whole(), default=0, metavar="N", help="save last.pt every N steps too; 0: never")

    parser.group("detections")
    parser.option("--score_thr", type=number(0, 1), default=0.05, help="detections below this score are not given")
    parser.option("--nms_thr", type=number(0, 1), default=0.5, help="overlap at which the weaker detection goes")
    parser.option("--max_dets", type=whole(1), default=100, help="detections of an image")
    parser.option(
        "--coco_count_difficult",
        type=yes_no,
        default=False,
        help="COCO's numbers: difficult objects are ordinary ones, as the replication had it, instead of ignored",
    )
    parser.option("--vis", type=whole(), default=0, metavar="N", help="draw N test images with boxes")
    parser.option("--predictions", metavar="FILE.json", help="all detections, as COCO's tools read them")
    output_options(parser, print_freq=20, named_by="RECIPE")
    device_options(parser)
    return parser


def recipes_text() -> str:
    return f"{', '.join(RECIPES)}: fills in what is not given; auto: paper, or shapes for the drawn scenes"


def settle(parser: Parser, typed: dict, saved: dict) -> dict:
    """Every option: what was typed, else saved, else the recipe's, else the default; a contradiction ends with a usage
    error. Lengths are still open where --epochs gives them: see schedule_of().
    """
    told = {key: value for key, value in saved.items() if key in parser.defaults.keys() - ONE_CALL}
    if STARTS & typed.keys():  # one of them takes the place of all
        told = {key: value for key, value in told.items() if key not in STARTS}
    given = {**told, **typed}
    name = given.get("recipe", "auto")
    if name == "auto":
        name = saved.get("recipe") or ("shapes" if given.get("dataset") == "shapes" else "paper")
    recipe = RECIPES[name]
    options = {**parser.defaults, **recipe, **given, "recipe": name}
    if options["scale_lr"] and "lr" not in given:
        options["lr"] = recipe["lr"] * options["batch_size"] / recipe["batch_size"]
    try:
        check_together(options, typed)
    except ValueError as error:
        parser.error(str(error))
    if not (saved or options["evaluate"] or options["checkpoint"] or options["export_shapes"]):
        check_start(parser, options)
    if not saved:  # of a run that goes on all is settled
        options |= {key: None for key in ("iters", "schedule", "warmup_iters") if key not in typed}
    elif "epochs" in typed and "iters" not in typed:
        options["iters"] = None
    return options


def settle_again(parser: Parser, typed: dict, saved: dict) -> dict:
    """The same of a run that goes on, and so starts from nothing else."""
    return settle(parser, {key: value for key, value in typed.items() if key not in STARTS}, saved)


def check_together(options: dict, typed: dict) -> None:
    """Raise ValueError, with the remedy, for options that exclude each other."""
    if options["config"] and "recipe" in typed:
        raise ValueError("--recipe: the file of --config brings every option with it; leave one of them out")
    if options["trainable_layers"] > 5:
        raise ValueError(
            f"--trainable_layers {options['trainable_layers']}: a ResNet has a stem and 4 stages; 5 is all"
        )
    if len(options["gammas"]) not in (1, len(options["schedule"])):
        raise ValueError(
            f"--gammas has {len(options['gammas'])} factors for the {len(options['schedule'])} drops of --schedule; "
            "give one for all, or one each"
        )
    if max(options["min_size"]) > options["max_size"]:
        raise ValueError(f"--min_size {max(options['min_size'])} is more than --max_size {options['max_size']}")
    if options["stem"] == "random" and options["frcnn_checkpoint"]:
        raise ValueError("--stem random: it says how a classifier becomes a backbone; --frcnn_checkpoint has one")
    if options["averaged"] and not (options["frcnn_checkpoint"] or options["backbone_checkpoint"]):
        raise ValueError("--averaged: of which file? give --backbone_checkpoint or --frcnn_checkpoint")
    if options["evaluate"] and not options["frcnn_checkpoint"]:
        raise ValueError("--evaluate needs --frcnn_checkpoint FILE: a backbone alone detects nothing")


def check_start(parser: Parser, options: dict) -> None:
    """A usage error unless exactly one option says what a new detector starts from."""
    starts = [f"--{key}" for key in sorted(STARTS) if options[key]]
    if not starts:
        parser.error(
            "--backbone_checkpoint FILE: which classifier shall be the backbone? --pretrained takes torchvision's, "
            "--frcnn_checkpoint FILE starts from a detector"
        )
    if len(starts) > 1:
        parser.error(f"{' and '.join(starts)} both say what to start from; give one of them")


def schedule_of(options: dict, steps_per_epoch: int) -> dict:
    """iters, schedule and warmup_iters of a run, in optimizer steps.

    The drops of a recipe keep their share of the run where its length is another one; its warm-up then takes a tenth of
    the run at most.
    """
    recipe = RECIPES[options["recipe"]]
    length = options["iters"] or (options["epochs"] and options["epochs"] * steps_per_epoch) or recipe["iters"]
    drops, warmup = options["schedule"], options["warmup_iters"]
    if drops is None:
        drops = [max(1, round(drop * length / recipe["iters"])) for drop in recipe["schedule"]]
    if warmup is None:
        warmup = recipe["warmup_iters"] if length >= recipe["iters"] else min(recipe["warmup_iters"], length // 10)
    return {"iters": length, "schedule": drops, "warmup_iters": warmup}


def notes_on(options: dict, typed: dict, going_on: bool = False) -> list[str]:
    """What was typed and nothing reads."""
    idle = set()
    if options["dataset"] == "shapes":
        idle |= {"data_dir", "train_sets", "test_set", "download", "workers"}
    if "lr" in typed or going_on:
        idle |= {"scale_lr"}
    if "iters" in typed:
        idle |= {"epochs"}
    if options["log_off"]:
        idle |= {"vis", "name", "save_every", "save_iters"}
    if going_on:
        idle |= STARTS
    if options["evaluate"]:
        idle |= OF_TRAINING | {"amp", "backbone_checkpoint", "pretrained"}
    found = sorted(f"--{key}" for key in typed.keys() & idle)
    return [f"without effect here: {', '.join(found)}"] if found else []


def check_resume(typed: dict, saved: dict, force: bool = False) -> None:
    """Raise UserError, with both values of each, where typed options differ from those a run was started with."""
    differ = {key for key in typed.keys() & saved.keys() if saved[key] != typed[key] and typed[key] != "auto"}
    refuse(differ, typed, saved, may_differ=MAY_DIFFER, built_in=BUILT_IN, force=force)


def runs_of(options: dict) -> tuple[Path, str]:
    """Where the detectors of this data set are kept, and how unnamed ones begin."""
    return Path(options["root_dir"]) / options["dataset"] / "frcnn", options["recipe"]
