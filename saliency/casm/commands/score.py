"""Hold saliency maps against true boxes: python -m saliency.casm score DATA --annotation-path XML --casms-path FILE"""

from pathlib import Path

from engine.config.option_types import boolean, choice, choices
from engine.config.options import add_single_device_options
from engine.config.parser import Parser
from saliency import ALIASES, SOURCES
from saliency.casm.options import casm_parser, check_scoring, classifier_options, scoring_options, where_options

SCORED = [name for name in SOURCES if name not in ("bank", "casm")]
WITH_BOXES = ("shapes", "tiny-imagenet")  # sets that bring their own
COLUMNS = {  # of the table: key -> title and format
    **{"F1": ("F1", ".3f"), "F1a": ("F1a", ".3f"), "LE": ("LE", ".3f"), "OM": ("OM", ".3f")},
    **{
        "precision": ("prec.", ".3f"),
        "recall": ("recall", ".3f"),
        "avg_mask": ("mask", ".3f"),
        "std_mask": ("std", ".3f"),
    },
    **{"entropy": ("entropy", ".4f"), "tv": ("TV", ".5f"), "SM": ("SM", ".3f"), "accuracy": ("right %", ".1f")},
}


def build_parser() -> Parser:
    parser = casm_parser(
        "score", "Localisation by masks: F1, localisation error (LE), LE and label (OM), mask statistics."
    )
    where_options(parser)
    parser.option(
        "--annotation_path",
        metavar="PLACE",
        shown="that of the data set",
        help="a folder of XML files, a .csv with file,xmin,ymin,xmax,ymax, or a .json; Tiny-ImageNet and shapes have "
        "their own",
    )
    parser.option("--break_ratio", type=boolean, default=False, help="squeeze images into a square; no crop")
    parser.option("--not_normalize", type=boolean, default=False, help="feed pixels in 0..1")
    parser.option("--class_list", metavar="FILE", help="all classes of the network in order, one a line or in a .csv")
    scoring_options(parser)
    parser.group("models")
    parser.option(
        "--sources",
        type=choices(SCORED, ALIASES),
        nargs="+",
        metavar="NAME",
        help=f"other maps, of --classifier or of the first of --casms-path: {', '.join(SCORED)}",
    )
    classifier_options(parser, "the network that they look through")
    parser.option(
        "--rule",
        type=choice(["percentile", "mean"]),
        default="percentile",
        metavar="percentile|mean",
        help="which pixels make the box: as many as the mask has mass, as published, or those above its mean",
    )
    parser.option("--judge", metavar="WORD", help="also the saliency metric (SM), by this classifier: see eval --help")
    add_single_device_options(parser, amp="off")
    return parser


def main(argv: list[str] | None = None) -> list[dict]:
    """Score every model; returns what --output holds."""
    parser = build_parser()
    options = {**parser.defaults, **parser.read(argv)}
    check_scoring(parser, options, others=options["sources"])
    if options["sources"] and not (options["classifier"] or options["casms_path"]):
        parser.error("--sources look through a network: give --classifier FILE")

    from engine.data.annotations import BoxAnnotations, find_boxes
    from engine.drawing import tables
    from engine.runtime.device import choose_device, choose_precision, setup_backends
    from engine.runtime.files import write_json
    from engine.runtime.progress import progress_bar
    from saliency.casm.classifier_eval import load_panel
    from saliency.casm.localization_eval import score
    from saliency.casm.results import ImageSetCache, iter_extractors, read_finished, save_result

    device = choose_device(options["device"])
    setup_backends(device, seed=options["seed"], deterministic=False)
    precision, _ = choose_precision(options["amp"], device)
    judge = load_panel([options["judge"]], device)[0] if options["judge"] else None
    parts, truths, results = ImageSetCache(parser, options), {}, []
    for extractor in iter_extractors(options, device):
        result = read_finished(extractor, options, "LE")
        if result is None:
            part, dataset = parts.of(extractor, squeezed=options["break_ratio"])
            if part.origin not in truths:
                if options["annotation_path"] or dataset in WITH_BOXES:
                    truths[part.origin] = find_boxes(part, dataset, options["annotation_path"], progress=progress_bar)
                else:
                    truths[part.origin] = BoxAnnotations([None] * len(part), [], [])
                    print("note: no --annotation-path, so there are only statistics of the masks")
                for line in truths[part.origin].notes():
                    print(f"note: {line}")
            result = score(extractor, part, truths[part.origin], options, device, judge, precision)
            save_result(result, extractor, options)
        results.append(result)
    print(tables.format_text(results, COLUMNS))
    if options["output"]:
        write_json(Path(options["output"]), {"results": results})
    return results
