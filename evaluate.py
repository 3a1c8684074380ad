"""Evaluate trained classifiers: python evaluate.py --model_path runs/cifar10/resnet20/my_run"""

from pathlib import Path

from engine import configure
from engine.cli import Parser, one_of, run, whole, yes_no
from engine.options import DATASETS, data_options, device_options
from models import ALIASES as MODEL_ALIASES
from models import MODELS, build_model, class_count, matching_models

DATA_KEYS = ("dataset", "data_dir", "val_data_dir", "image_size", "norm", "num_classes", "limit", "on_bad_image")
DATA_KEYS += ("eval_resize", "val_labels")
IGNORED = (
    "cutout",
    "trad_augment",
    "log_off",
    "parallel",
    "evaluate",
)  # other codes take them here; they change nothing


def build_parser() -> Parser:
    parser = Parser("Evaluate one or more trained classifiers on the test images, which are never augmented.")
    parser.group("what")
    parser.option(
        "--model_path",
        "--checkpoint",
        "--resume",
        nargs="+",
        metavar="PATH",
        help="files of weights, or run folders (best.pt)",
    )
    parser.option("--info", type=yes_no, default=False, help="tell what the files hold and evaluate nothing")
    parser.option("--task", type=one_of(["accuracy"]), default="accuracy", metavar="NAME", help="accuracy")
    parser.option(
        "--model", "--arch", "--model_name", type=one_of(MODELS, MODEL_ALIASES), metavar="NAME", shown="from the file"
    )
    parser.option("--batch_size", "-b", type=whole(1), default=500)
    parser.option("--topk", type=whole(1), nargs="+", default=[1, 5], metavar="K", help="accuracies to print")
    parser.option("--ema", type=yes_no, default=False, help="use the averaged weights of a run with --ema")
    parser.option("--per_class", type=yes_no, default=False, help="a table of the classes")
    parser.option("--confusion", metavar="FILE.png", help="a picture of what is mistaken for what")
    parser.option(
        "--ece", type=whole(), metavar="BINS", default=15, help="bins of the calibration error; 0: leave it out"
    )
    parser.option("--output", metavar="FILE.json", help="everything as JSON: scores, classes, confusion")
    data_options(parser, DATASETS)
    device_options(parser, amp="off")
    parser.group("taken and ignored")
    for name in IGNORED:
        parser.option(f"--{name}", type=yes_no, help="no effect here")
    return parser


def main(argv: list[str] | None = None) -> list[dict]:
    """Evaluate every file; returns what --output holds."""
    parser = build_parser()
    typed, _ = configure.read(parser, argv)
    if "model_path" not in typed:
        parser.error("--model_path FILE: which classifier shall be evaluated?")
    if "confusion" in typed and len(typed["model_path"]) > 1:
        parser.error("--confusion draws one classifier; give one --model_path")
    if ignored := [f"--{name}" for name in IGNORED if name in typed]:
        print(f"note: without effect on an evaluation: {', '.join(ignored)}")

    from engine import distributed
    from engine.classifier import SavedClassifier
    from engine.data import check_alike, load_data
    from engine.device import choose_device, choose_precision, prepare
    from engine.files import write_json
    from engine.progress import over
    from engine.training import pick

    if typed.get("info"):
        return [print_info(SavedClassifier(path)) for path in typed["model_path"]]
    device = choose_device({**parser.defaults, **typed}["device"])
    distributed.start(device, {**parser.defaults, **typed}["timeout"])
    prepare(device, seed=0, deterministic=False)
    results, loaded = [], {}
    for path in typed["model_path"]:
        file = SavedClassifier((path), averaged=typed.get("ema", False))
        trained_with = {key: file.options[key] for key in ("model", *DATA_KEYS) if key in file.options}
        options = {**parser.defaults, **trained_with, **typed}
        if not options["dataset"]:
            parser.error(f"--dataset: {path} does not say what it was trained on; name it")
        key = str({name: options[name] for name in DATA_KEYS})
        if key not in loaded:
            loaded[key] = load_data(progress=over, **pick(options, load_data))
            check_alike(loaded[key])
            print("\n".join([loaded[key].test.summary("test"), *(f"note: {line}" for line in loaded[key].warnings)]))
        results.append(evaluate(file, loaded[key], options, device, choose_precision(options["amp"], device)[0]))
    distributed.finish()
    if not distributed.is_first():
        return []
    print_table(results, options["topk"])
    if "output" in typed:
        write_json(Path(typed["output"]), {"results": results})
    if len(results) == 1:
        print_details(results[0], options)
    return results


def print_info(file) -> dict:
    """What a file holds, as far as it says or its shapes tell."""
    info = {
        "file": str(file.path),
        "network": file.options.get("model") or " or ".join(matching_models(file.weights)) or "none of ours",
        "classes": class_count(file.weights) or None,
        "epoch": file.epoch,
        "parameters": sum(value.numel() for value in file.weights.values()),
        "entries": len(file.weights),
        "first": ", ".join(list(file.weights)[:3]),
        "trained with": " ".join(
            f"--{key} {file.options[key]}" for key in ("dataset", "method", "recipe") if file.options
        ),
    }
    print("\n".join(f"{key:12} {value}" for key, value in info.items() if value not in (None, "")))
    return info


def evaluate(file, data, options: dict, device, precision) -> dict:
    """All the numbers about one classifier on the test images; under torchrun the first process has them."""
    from engine.classifier import predict_test
    from engine.loop import scores
    from engine.metrics import calibration_error, confusion_matrix
    from engine.progress import Progress, bars_wanted
    from engine.training import pick

    count = len(data.classes)
    model = file.build(
        build_model, matching_models, model=options["model"], num_classes=count, image_size=data.image_size
    )
    batches = -(-len(data.test) // options["batch_size"])
    with Progress(str(file.path), batches, bar=bars_wanted(False), lines=False) as bar:
        layout = pick(options, ["batch_size", "workers", "channels_last"])
        logits, labels, seconds = predict_test(model, data, device=device, precision=precision, progress=bar, **layout)
    if not len(labels):
        return {}
    confusion = confusion_matrix(logits.argmax(1), labels, count).cpu()
    per_class = 100 * confusion.diag().double() / confusion.sum(1).clamp_min(1)
    result = {
        "file": str(file.path),
        "epoch": file.epoch,
        "images": len(labels),
        **scores(logits, labels, tuple(options["topk"])),
    }
    if options["ece"]:
        result["ece"] = 100 * calibration_error(logits, labels, options["ece"])
    return result | {
        "seconds": seconds,
        "classes": data.classes,
        "per_class_top1": per_class.tolist(),
        "confusion": confusion.tolist(),
    }


def print_table(results: list[dict], topk: list[int]) -> None:
    """A row a file; what a file does not have shows as a dash."""
    columns = [("file", "file", "s"), ("epoch", "epoch", "d"), ("images", "images", "d"), ("loss", "loss", ".4f")]
    columns += [(f"top{k}", f"top-{k}", ".2f") for k in topk]
    columns += [("ece", "ECE (%)", ".2f"), ("seconds", "seconds", ".1f")]
    columns = [column for column in columns if any(result.get(column[0]) is not None for result in results)]
    rows = [[title for _, title, _ in columns]]
    for result in results:
        rows.append([format(result[key], form) if result.get(key) is not None else "-" for key, _, form in columns])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *rest in rows:
        print("  ".join([name.ljust(widths[0]), *(text.rjust(w) for text, w in zip(rest, widths[1:], strict=True))]))


def print_details(result: dict, options: dict) -> None:
    """What is shown of a single classifier only; its accuracy comes last."""
    import torch

    from engine.classifier import accuracy_line
    from engine.draw import confusion

    if options["per_class"]:
        width = max(map(len, result["classes"]))
        for name, accuracy in zip(result["classes"], result["per_class_top1"], strict=True):
            print(f"  {name:{width}}  {accuracy:6.2f}")
    if options["confusion"]:
        title = f"{Path(result['file']).name}: percent of each true class"
        confusion(Path(options["confusion"]), torch.tensor(result["confusion"]), result["classes"], title)
        print(f"confusion drawn in {options['confusion']}")
    print(accuracy_line(result))


if __name__ == "__main__":
    run(main)
