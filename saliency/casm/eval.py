"""Judge masks by what classifiers make of the images without the object, and of the object without the rest:
python -m saliency.casm eval DATA --casms-path FILE
"""

from pathlib import Path

from engine.cli import Parser
from engine.options import one_device_options
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
    parser.option("--class_list", metavar="FILE", help="classes of a network that does not say them, in a .txt or .csv")
    one_device_options(parser, amp="off")
    return parser


def main(argv: list[str] | None = None) -> list[dict]:
    """Evaluate every extractor; returns what --output holds."""
    parser = build_parser()
    options = {**parser.defaults, **parser.read(argv)}
    check_scoring(parser, options)

    from engine.device import choose_device, choose_precision, prepare
    from engine.files import write_json
    from engine.training import pick
    from saliency.casm.common import Parts, finished, keep
    from saliency.casm.judging import Panel, evaluate

    device = choose_device(options["device"])
    precision, _ = choose_precision(options["amp"], device)
    prepare(device, seed=options["seed"], deterministic=False)
    panel = Panel(options["classifiers"], options["resnets_path"], device, options["class_list"])
    settings = {**pick(options, ["batch_size", "pot", "workers", "print_freq", "class_list"]), "precision": precision}
    parts, results = Parts(parser, options), []
    for extractor in every_extractor(options, device):
        result = finished(extractor, options, "masked_in")
        if result is None:
            part, _ = parts.of(extractor, larger=True)
            result = evaluate(extractor, part, panel.of(extractor, part), device=device, **settings)
            keep(result, extractor, options)
        results.append(result)
        print(report(result), flush=True)
    if options["output"]:
        write_json(Path(options["output"]), {"results": results})
    return results


def every_extractor(options: dict, device):
    """Those of the command line, then the naive ones, which see the images as the first of the others does."""
    from saliency.casm.common import extractors_of
    from saliency.casm.judging import TOYS, of_toy

    first = None
    for extractor in extractors_of(options, device, naive=()):
        first = first or extractor
        yield extractor
    for name in TOYS if options["toy"] else ():
        yield of_toy(name, first, options["seed"])


def report(result: dict) -> str:
    """A table with a row for every classifier and kind of image, under the name of the masks."""
    from engine import tables
    from saliency.casm.judging import KINDS

    lines = [f"\n{result['name']}: {result['images']:,} images"]
    for name, count in result["left_out"].items():
        lines.append(f"note: {name} does not know the classes of {count:,} of them, which do not count")
    if result["unreadable"]:
        lines.append(f"note: {result['unreadable']} files could not be read; neighbours served in their place")
    names = list(result["clean"])
    width = max(map(len, names))
    rows = [{"name": f"{name:{width}}  {kind}", **result[kind][name]} for name in names for kind in KINDS]
    return "\n".join([*lines, tables.text(rows, COLUMNS)])
