"""Score masks against ground-truth boxes: python -m saliency.casm score DATA --annotation-path XML --casms-path FILE"""

from pathlib import Path

from engine.config.option_types import boolean, choice, choices
from engine.config.options import add_common_options, add_single_device_options
from engine.config.parser import Parser
from saliency import ALIASES, SOURCES
from saliency.casm.options import (
    add_classifier_options,
    add_mask_options,
    add_scoring_options,
    build_casm_parser,
    check_scoring_options,
)

SCORED_SOURCES = [name for name in SOURCES if name not in ("bank", "casm")]
COLUMNS = {  # key of a result -> title and format in the table
    "F1": ("F1", ".3f"),
    "F1a": ("F1a", ".3f"),
    "LE": ("LE", ".3f"),
    "OM": ("OM", ".3f"),
    "precision": ("prec.", ".3f"),
    "recall": ("recall", ".3f"),
    "avg_mask": ("area", ".3f"),
    "std_mask": ("std", ".3f"),
    "entropy": ("entropy", ".4f"),
    "tv": ("TV", ".5f"),
    "SM": ("SM", ".3f"),
    "accuracy": ("acc %", ".1f"),
}


def build_parser() -> Parser:
    parser = build_casm_parser(
        "score",
        "Score masks against ground-truth boxes. F1: soft mask against the box. LE, localization error: fraction of "
        "images whose box is missed (IoU of at most 0.5). OM: fraction of images where the box is missed or the "
        "classifier is wrong. LE and OM are better when low, F1 when high. Mask statistics need no boxes.",
    )
    add_common_options(parser, "annotation_path", "class_list")
    parser.option(
        "--break_ratio", type=boolean, default=False, help="squash images to a square instead of cropping the center"
    )
    parser.option(
        "--not_normalize", type=boolean, default=False, help="feed pixels in 0..1, not normalized by mean and std"
    )
    add_mask_options(parser)
    parser.option(
        "--sources",
        type=choices(SCORED_SOURCES, ALIASES),
        nargs="+",
        help="also score these saliency maps, computed with --classifier or the first checkpoint of --casms-path",
    )
    add_classifier_options(parser, "trained classifier that --sources read")
    parser.group("scoring")
    parser.option(
        "--rule",
        type=choice(["percentile", "mean"]),
        default="percentile",
        help="how to binarize a mask for its box: percentile (published) keeps as many pixels as the mask has mass, "
        "mean those above its mean",
    )
    parser.option(
        "--judge",
        metavar="CLASSIFIER",
        help="also report the saliency metric (SM) with this classifier, named as in eval --classifiers",
    )
    add_scoring_options(parser)
    add_single_device_options(parser, amp="off")
    return parser


def main(argv: list[str] | None = None) -> list[dict]:
    """Score the masks of every extractor. Return the results that --output holds."""
    parser = build_parser()
    options = {**parser.defaults, **parser.read(argv)}
    check_scoring_options(parser, options, others=options["sources"])
    if options["sources"] and not (options["classifier"] or options["casms_path"]):
        parser.error("--sources need a network: give --classifier FILE")

    from engine.config.select import select_kwargs
    from engine.drawing import tables
    from engine.runtime.device import choose_device, choose_precision, setup_backends
    from engine.runtime.files import write_json
    from saliency.casm.classifier_eval import load_classifiers
    from saliency.casm.extractors import NAIVE_MASKS
    from saliency.casm.localization_eval import evaluate_localization, find_annotations, list_notes
    from saliency.casm.results import EXTRACTOR_OPTIONS, ImageSetCache, ResultFolder, ScoringConfig, iter_extractors

    device = choose_device(options["device"])
    setup_backends(device, seed=options["seed"], deterministic=False)
    precision, _ = choose_precision(options["amp"], device)
    sm_classifier = load_classifiers([options["judge"]], device)[0] if options["judge"] else None
    config = ScoringConfig(**select_kwargs(options, ScoringConfig))
    images = ImageSetCache(parser, **select_kwargs(options, ImageSetCache))
    folder = ResultFolder("score", options)
    naive, annotations, results = NAIVE_MASKS if options["toy"] else (), {}, []
    for extractor in iter_extractors(device, naive=naive, **select_kwargs(options, EXTRACTOR_OPTIONS)):
        result = folder.read(extractor)
        if result is None:
            image_set, dataset = images.load(extractor, squash=config.break_ratio)
            if image_set.origin not in annotations:
                annotations[image_set.origin] = find_annotations(image_set, dataset, options["annotation_path"])
            boxes = annotations[image_set.origin]
            result = evaluate_localization(
                extractor, image_set, boxes, config, device=device, sm_classifier=sm_classifier, precision=precision
            )
            for note in list_notes(result):
                print(f"note: {note}")
            folder.write(result, extractor)
        results.append(result)
    print(tables.format_text(results, COLUMNS))
    if options["output"]:
        write_json(Path(options["output"]), {"results": results})
    return results
