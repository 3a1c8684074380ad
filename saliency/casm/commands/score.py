"""Hold saliency maps against true boxes: python -m saliency.casm score DATA --annotation-path XML --casms-path FILE"""

from pathlib import Path

from engine.config.option_types import boolean, choice, choices
from engine.config.options import add_common_options, add_single_device_options
from engine.config.parser import Parser
from saliency import ALIASES, SOURCES
from saliency.casm.options import casm_parser, check_scoring, classifier_options, scoring_options, where_options

SCORED = [name for name in SOURCES if name not in ("bank", "casm")]
COLUMNS = {  # of the table: key -> title and format
    "F1": ("F1", ".3f"),
    "F1a": ("F1a", ".3f"),
    "LE": ("LE", ".3f"),
    "OM": ("OM", ".3f"),
    "precision": ("prec.", ".3f"),
    "recall": ("recall", ".3f"),
    "avg_mask": ("mask", ".3f"),
    "std_mask": ("std", ".3f"),
    "entropy": ("entropy", ".4f"),
    "tv": ("TV", ".5f"),
    "SM": ("SM", ".3f"),
    "accuracy": ("right %", ".1f"),
}


def build_parser() -> Parser:
    parser = casm_parser(
        "score", "Localisation by masks: F1, localisation error (LE), LE and label (OM), mask statistics."
    )
    where_options(parser)
    add_common_options(parser, "annotation_path", "class_list")
    parser.option("--break_ratio", type=boolean, default=False, help="squeeze images into a square; no crop")
    parser.option("--not_normalize", type=boolean, default=False, help="feed pixels in 0..1")
    scoring_options(parser)
    parser.group("models")
    parser.option(
        "--sources",
        type=choices(SCORED, ALIASES),
        nargs="+",
        help="other maps, of --classifier or of the first of --casms-path",
    )
    classifier_options(parser, "the network that they look through")
    parser.option(
        "--rule",
        type=choice(["percentile", "mean"]),
        default="percentile",
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

    from engine.config.select import select_kwargs
    from engine.drawing import tables
    from engine.runtime.device import choose_device, choose_precision, setup_backends
    from engine.runtime.files import write_json
    from saliency.casm.classifier_eval import load_classifiers
    from saliency.casm.extractors import NAIVE_MASKS
    from saliency.casm.localization_eval import find_annotations, list_notes, score
    from saliency.casm.results import EXTRACTOR_OPTIONS, ImageSetCache, ResultFolder, ScoringConfig, iter_extractors

    device = choose_device(options["device"])
    setup_backends(device, seed=options["seed"], deterministic=False)
    precision, _ = choose_precision(options["amp"], device)
    judge = load_classifiers([options["judge"]], device)[0] if options["judge"] else None
    config = ScoringConfig(**select_kwargs(options, ScoringConfig))
    images = ImageSetCache(parser, **select_kwargs(options, ImageSetCache))
    folder = ResultFolder(options)
    naive, annotations, results = NAIVE_MASKS if options["toy"] else (), {}, []
    for extractor in iter_extractors(device, naive=naive, **select_kwargs(options, EXTRACTOR_OPTIONS)):
        result = folder.read(extractor, "LE")
        if result is None:
            part, dataset = images.load(extractor, squeezed=config.break_ratio)
            if part.origin not in annotations:
                annotations[part.origin] = find_annotations(part, dataset, options["annotation_path"])
            true = annotations[part.origin]
            result = score(extractor, part, true, config, device=device, judge=judge, precision=precision)
            for note in list_notes(result):
                print(f"note: {note}")
            folder.write(result, extractor)
        results.append(result)
    print(tables.format_text(results, COLUMNS))
    if options["output"]:
        write_json(Path(options["output"]), {"results": results})
    return results
