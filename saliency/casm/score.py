"""Hold saliency maps against true boxes: python -m saliency.casm score DATA --annotation-path XML --casms-path FILE"""

from pathlib import Path

from engine.cli import Parser, each_of, one_of
from engine.options import one_device_options
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
    parser.option("--break_ratio", action="store_true", default=False, help="squeeze images into a square; no crop")
    parser.option("--not_normalize", action="store_true", default=False, help="feed pixels in 0..1")
    parser.option("--class_list", metavar="FILE", help="all classes of the network in order, one a line or in a .csv")
    scoring_options(parser)
    parser.group("models")
    parser.option(
        "--sources",
        type=each_of(SCORED, ALIASES),
        nargs="+",
        metavar="NAME",
        help=f"other maps, of --classifier or of the first of --casms-path: {', '.join(SCORED)}",
    )
    classifier_options(parser, "the network that they look through")
    parser.option(
        "--rule",
        type=one_of(["percentile", "mean"]),
        default="percentile",
        metavar="percentile|mean",
        help="which pixels make the box: as many as the mask has mass, as published, or those above its mean",
    )
    parser.option("--judge", metavar="WORD", help="also the saliency metric (SM), by this classifier: see eval --help")
    one_device_options(parser, amp="off")
    return parser


def main(argv: list[str] | None = None) -> list[dict]:
    """Score every model; returns what --output holds."""
    parser = build_parser()
    options = {**parser.defaults, **parser.read(argv)}
    check_scoring(parser, options, others=options["sources"])
    if options["sources"] and not (options["classifier"] or options["casms_path"]):
        parser.error("--sources look through a network: give --classifier FILE")

    from engine import tables
    from engine.annotations import Truths, find_truths
    from engine.device import choose_device, choose_precision, prepare
    from engine.files import write_json
    from engine.progress import over
    from saliency.casm.common import Parts, extractors_of, finished, keep
    from saliency.casm.judges import load_judges
    from saliency.casm.scoring import score

    device = choose_device(options["device"])
    prepare(device, seed=options["seed"], deterministic=False)
    precision, _ = choose_precision(options["amp"], device)
    judge = load_judges([options["judge"]], device)[0] if options["judge"] else None
    parts, truths, results = Parts(parser, options), {}, []
    for extractor in extractors_of(options, device):
        result = finished(extractor, options, "LE")
        if result is None:
            part, dataset = parts.of(extractor, squeezed=options["break_ratio"])
            if part.where not in truths:
                if options["annotation_path"] or dataset in WITH_BOXES:
                    truths[part.where] = find_truths(part, dataset, options["annotation_path"], progress=over)
                else:
                    truths[part.where] = Truths([None] * len(part), [], [])
                    print("note: no --annotation-path, so there are only statistics of the masks")
                for line in truths[part.where].notes():
                    print(f"note: {line}")
            result = score(extractor, part, truths[part.where], options, device, judge, precision)
            keep(result, extractor, options)
        results.append(result)
    print(tables.text(results, COLUMNS))
    if options["output"]:
        write_json(Path(options["output"]), {"results": results})
    return results
