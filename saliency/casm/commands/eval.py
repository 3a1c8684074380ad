"""Judge masks by what classifiers make of the images without the object, and of the object without the rest:
python -m saliency.casm eval DATA --casms-path FILE
"""

from pathlib import Path

from engine.config.options import add_common_options, add_single_device_options
from engine.config.parser import Parser
from saliency.casm.options import casm_parser, check_scoring, scoring_options, where_options

COLUMNS = {"l": ("loss", ".4f"), "t1": ("top-1 %", ".2f"), "t5": ("top-5 %", ".2f"), "e": ("entropy", ".4f")}


def build_parser() -> Parser:
    parser = casm_parser(
        "eval",
        "Loss, accuracy and entropy of classifiers on images masked in, masked out and inpainted: good masks keep the "
        "first accuracy high and make the other two low.",
    )
    where_options(parser)
    scoring_options(parser)
    parser.group("judges")
    parser.option(
        "--classifiers",
        nargs="+",
        metavar="WORD",
        shown="17 of torchvision's for 1000 classes, else the one trained with the masks",
        help="torchvision's NAME, NAME=FILE for it with weights from FILE, or a file or run folder of ours",
    )
    parser.option("--resnets_path", metavar="DIR", help="besides: every file of it, a ResNet-50 of the PyTorch example")
    add_common_options(parser, "class_list")
    add_single_device_options(parser, amp="off")
    return parser


def main(argv: list[str] | None = None) -> list[dict]:
    """Evaluate every extractor; returns what --output holds."""
    parser = build_parser()
    options = {**parser.defaults, **parser.read(argv)}
    check_scoring(parser, options)

    from engine.config.select import select_kwargs
    from engine.runtime.device import choose_device, choose_precision, setup_backends
    from engine.runtime.files import write_json
    from saliency.casm.classifier_eval import ClassifierPanel, evaluate
    from saliency.casm.extractors import TOY_MASKS
    from saliency.casm.results import EXTRACTOR_OPTIONS, ImageSetCache, ResultFolder, ScoringConfig, iter_extractors

    device = choose_device(options["device"])
    precision, _ = choose_precision(options["amp"], device)
    setup_backends(device, seed=options["seed"], deterministic=False)
    panel = ClassifierPanel(options["classifiers"], options["resnets_path"], device, options["class_list"])
    images = ImageSetCache(parser, **select_kwargs(options, ImageSetCache))
    folder = ResultFolder(options)
    config = ScoringConfig(**select_kwargs(options, ScoringConfig))
    naive, results = TOY_MASKS if options["toy"] else (), []
    for extractor in iter_extractors(device, naive=naive, **select_kwargs(options, EXTRACTOR_OPTIONS)):
        result = folder.read(extractor, "masked_in")
        if result is None:
            part, _ = images.load(extractor, larger=True)
            classifiers = panel.select(extractor, part)
            result = evaluate(extractor, part, classifiers, config, device=device, precision=precision)
            folder.write(result, extractor)
        results.append(result)
        print(format_result(result), flush=True)
    if options["output"]:
        write_json(Path(options["output"]), {"results": results})
    return results


def format_result(result: dict) -> str:
    """A table with a row for every classifier and kind of image, under the name of the masks."""
    from engine.drawing import tables
    from saliency.casm.classifier_eval import KINDS

    lines = [f"\n{result['name']}: {result['images']:,} images"]
    for name, count in result["left_out"].items():
        lines.append(f"note: {name} does not know the classes of {count:,} of them, which do not count")
    if result["unreadable"]:
        lines.append(f"note: {result['unreadable']} files could not be read; neighbours served in their place")
    names = list(result["clean"])
    width = max(map(len, names))
    rows = [{"name": f"{name:{width}}  {kind}", **result[kind][name]} for name in names for kind in KINDS]
    return "\n".join([*lines, tables.format_text(rows, COLUMNS)])
