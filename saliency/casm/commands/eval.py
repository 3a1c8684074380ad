"""Evaluate masks by how classifiers do on the altered images: python -m saliency.casm eval DATA --casms-path FILE"""

from pathlib import Path

from engine.config.options import add_common_options, add_single_device_options
from engine.config.parser import Parser
from saliency.casm.options import add_mask_options, add_scoring_options, build_casm_parser, check_scoring_options

COLUMNS = {"l": ("loss", ".4f"), "t1": ("top-1 %", ".2f"), "t5": ("top-5 %", ".2f"), "e": ("entropy", ".4f")}


def build_parser() -> Parser:
    parser = build_casm_parser(
        "eval",
        "Report loss, accuracy and entropy of classifiers on altered images: masked in (only the masked object is "
        "left), masked out (the object is black) and inpainted (the object is filled in from its surroundings). Good "
        "masks keep the masked-in accuracy high and make the other two low.",
    )
    add_mask_options(parser)
    parser.group("classifiers")
    parser.option(
        "--classifiers",
        nargs="+",
        metavar="NAME",
        shown="the 17 published torchvision networks for 1000 classes, else the checkpoint's classifier",
        help="torchvision:NAME, timm:NAME or torchvision's NAME (with pretrained weights), NAME=FILE (with weights "
        "from FILE), or a checkpoint or run folder of train.py",
    )
    parser.option(
        "--resnets_path",
        metavar="DIR",
        help="in addition: every file in DIR, a ResNet-50 saved by the PyTorch ImageNet example",
    )
    add_common_options(parser, "class_list")
    parser.group("scoring")
    add_scoring_options(parser)
    add_single_device_options(parser, amp="off")
    return parser


def main(argv: list[str] | None = None) -> list[dict]:
    """Evaluate the masks of every extractor. Return the results that --output holds."""
    parser = build_parser()
    options = {**parser.defaults, **parser.read(argv)}
    check_scoring_options(parser, options)

    from engine.config.select import select_kwargs
    from engine.runtime.device import choose_device, choose_precision, setup_backends
    from engine.runtime.files import write_json
    from saliency.casm.classifier_eval import ClassifierPanel, evaluate_classifiers
    from saliency.casm.extractors import TOY_MASKS
    from saliency.casm.results import EXTRACTOR_OPTIONS, ImageSetCache, ResultFolder, ScoringConfig, iter_extractors

    device = choose_device(options["device"])
    precision, _ = choose_precision(options["amp"], device)
    setup_backends(device, seed=options["seed"], deterministic=False)
    panel = ClassifierPanel(options["classifiers"], options["resnets_path"], device, options["class_list"])
    images = ImageSetCache(parser, **select_kwargs(options, ImageSetCache))
    folder = ResultFolder("eval", options)
    config = ScoringConfig(**select_kwargs(options, ScoringConfig))
    naive, results = TOY_MASKS if options["toy"] else (), []
    for extractor in iter_extractors(device, naive=naive, **select_kwargs(options, EXTRACTOR_OPTIONS)):
        result = folder.read(extractor)
        if result is None:
            image_set, _ = images.load(extractor, margin=True)
            classifiers = panel.select(extractor, image_set)
            result = evaluate_classifiers(extractor, image_set, classifiers, config, device=device, precision=precision)
            folder.write(result, extractor)
        results.append(result)
        print(format_result(result), flush=True)
    if options["output"]:
        write_json(Path(options["output"]), {"results": results})
    return results


def format_result(result: dict) -> str:
    """Return a table with one row per classifier and kind of image, under the name of the extractor."""
    from engine.drawing import tables
    from engine.inference.metrics import list_unreadable
    from engine.runtime.text import format_count
    from saliency.casm.classifier_eval import KINDS

    lines = [f"\n{result['name']}: {format_count(result['images'], 'image')}"]
    for name, count in result["left_out"].items():
        lines.append(f"note: {name}: left out {format_count(count, 'image')} of classes that it does not know")
    lines += [f"note: {text}" for text in list_unreadable(result, {"unreadable": ""})]
    names = list(result["clean"])
    width = max(map(len, names))
    rows = [{"name": f"{name:{width}}  {kind}", **result[kind][name]} for name in names for kind in KINDS]
    return "\n".join([*lines, tables.format_text(rows, COLUMNS)])
