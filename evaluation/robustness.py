"""Robustness: accuracy under attack, under corruption and under occlusion."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from statistics import fmean

import torch

from engine.data.image_set import ImageSet, select_classes
from engine.data.views import CenterCrop
from engine.drawing import figures, tables
from engine.errors import UserError
from engine.inference.metrics import topk_correct
from engine.runtime.text import format_count
from evaluation import occlusion
from evaluation.attacks import Attack
from evaluation.context import EvalContext, Transform
from evaluation.corruption_benchmarks import ALEXNET_ERRORS, CorruptedSet, find_corrupted_set, mean_corruption_error
from evaluation.corruptions import CORRUPTIONS, FAMILIES, corrupt

Accuracies = dict[str, dict[int, float | None]]  # corruption -> severity -> percent


def measure_robustness(
    context: EvalContext,
    *,
    attacks: Sequence[Attack] = (),
    published: CorruptedSet | None = None,
    severities: Sequence[int] = (),
    occluded: bool = False,
    limit: int = 0,
) -> dict:
    """Return top-1 accuracies in percent; None in all processes but the main one.

    published: a set of corrupted images. severities: of the built-in corruptions, used if `published` is None. limit:
    at most this many images, spread over the set; 0: all. All accuracies are measured on the same images.
    """
    image_set, seed = context.load_subset(limit), context.session.seed
    logits, labels, _ = context.predict("clean", image_set=image_set)
    result = {"images": len(labels), "clean": compute_accuracy(logits, labels), "attacks": {}}
    for attack in attacks:
        transform = attack.make_transform(context.classifier, seed)
        result["attacks"][attack.title] = measure_accuracy(context, image_set, attack.title, transform)
    if published:
        rows = measure_published(context, published, image_set, limit)
        result |= {"corrupted_by": "published", "corruptions": rows}
    elif severities:
        rows = measure_built_in(context, image_set, severities)
        result |= {"corrupted_by": "built-in", "corruptions": rows}
    if "corruptions" in result:
        result["corruption_mean"] = mean_or_none([mean_or_none(list(row.values())) for row in rows.values()])
    if occluded:
        result["occlusion"] = measure_occlusion(context, image_set, result["clean"])
        for kind, curve in result["occlusion"].items():
            if None not in curve["top1"]:
                result[f"area_{kind}"] = occlusion.area_under_curve(curve["share"], curve["top1"])
    return result


def measure_accuracy(
    context: EvalContext, image_set: ImageSet, title: str, transform: Transform | None = None
) -> float | None:
    """Return the top-1 accuracy in percent; None in all processes but the main one."""
    logits, labels, _ = context.predict(title, image_set=image_set, transform=transform)
    return compute_accuracy(logits, labels)


def compute_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float | None:
    """Return the top-1 accuracy in percent; None without images."""
    return 100 * float(topk_correct(logits, labels, (1,))[0]) / len(labels) if len(labels) else None


def mean_or_none(values: list[float | None]) -> float | None:
    """Return the mean of the values; None if there is no value or one of them is None."""
    return sum(values) / len(values) if values and None not in values else None


def measure_built_in(context: EvalContext, image_set: ImageSet, severities: Sequence[int]) -> Accuracies:
    """Return the accuracy under each built-in corruption at each severity."""

    def measure(name: str, severity: int) -> float | None:
        def transform(pixels: torch.Tensor, labels: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return corrupt(pixels, name, severity, index, context.session.seed)

        return measure_accuracy(context, image_set, f"{name} {severity}", transform)

    return {name: {severity: measure(name, severity) for severity in severities} for name in CORRUPTIONS}


def find_published_set(context: EvalContext, path: str, on_bad_image: str) -> CorruptedSet:
    """Return the corrupted set in a folder, and print a note for whatever it lacks.

    Published image files are centre crops already, so they are shown whole. Raises UserError if there is no such set,
    or if the images do not have the size that the classifier is evaluated at.
    """
    view = CenterCrop(context.image_size, context.image_size)
    reading = {"view": view, "on_bad_image": on_bad_image, "resize": context.image_set.resize}
    found = find_corrupted_set(Path(path), context.image_set.classes, **reading)
    for line in found.notes:
        context.session.note(line)
    name, severities = next(iter(found.sources.items()))
    first = found.load(name, next(iter(severities)))
    if first.size != context.image_size:
        raise UserError(
            f"{found.root}: the images have {first.size} pixels a side, but {context.name} is evaluated at "
            f"{context.image_size}\ngive the corrupted images of the data set that it was trained on"
        )
    return found


def measure_published(context: EvalContext, published: CorruptedSet, clean: ImageSet, limit: int) -> Accuracies:
    """Return the accuracy under each corruption of a published set at each severity, on the images of `clean`."""

    def measure(name: str, severity: int) -> float | None:
        image_set = match_published(context, published.load(name, severity), clean, limit)
        return measure_accuracy(context, image_set, f"{name} {severity}")

    return {name: {level: measure(name, level) for level in levels} for name, levels in published.sources.items()}


def match_published(context: EvalContext, corrupted: ImageSet, clean: ImageSet, limit: int) -> ImageSet:
    """Return the corrupted versions of the images in `clean`, which are at most `limit` of the context's images.

    Files are matched by class and name, an array by its labels, in the order of the test set. If that fails, a note
    is printed and the same number of images is taken, spread over the set.
    """
    if corrupted.files is None:
        corrupted = select_classes(corrupted, context.class_map, context.image_set.classes)
        first = corrupted.take(torch.arange(min(len(corrupted), len(context.image_set))))
        if torch.equal(first.labels, context.image_set.labels):
            return first.subsample(limit or len(first))
    elif clean.files is not None:
        index = {key: position for position, key in enumerate(list_file_keys(corrupted))}
        found = [index.get(key) for key in list_file_keys(clean)]
        if None not in found:
            return corrupted.take(torch.tensor(found))
    count = min(len(clean), len(corrupted))
    context.session.note(
        f"the {'labels' if corrupted.files is None else 'file names'} of the corrupted images do not match those of "
        f"the test images; using {count:,} corrupted images spread over the set"
    )
    return corrupted.subsample(count)


def list_file_keys(image_set: ImageSet) -> list[tuple[int, str]]:
    """Return the class of each image and the name of its file, without folder and extension."""
    stems = (PurePosixPath(name).stem for name in image_set.files.names())
    return list(zip(image_set.labels.tolist(), stems, strict=True))


def measure_occlusion(context: EvalContext, image_set: ImageSet, clean: float | None) -> dict[str, dict[str, list]]:
    """Return accuracy against the fraction of the image that is hidden by the mean colour of the normalisation.

    clean: the accuracy with nothing hidden.
    """

    def measure(kind: str, fraction: float) -> float | None:
        def transform(pixels: torch.Tensor, labels: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return occlusion.occlude(pixels, kind, fraction, index, context.classifier.mean, context.session.seed)

        return measure_accuracy(context, image_set, f"{kind} {fraction:.0%}", transform) if fraction else clean

    fractions = list(occlusion.FRACTIONS)
    return {kind: {"share": fractions, "top1": [measure(kind, each) for each in fractions]} for kind in occlusion.KINDS}


def add_mean_corruption_errors(results: list[dict], references: list[dict]) -> None:
    """Add the mean corruption error (mCE) to the results, in percent of the errors of --reference, or of AlexNet's
    published errors. It covers the paper's corruptions, or all if the set has none of these.
    """
    name = references[0]["name"] if references else "AlexNet on ImageNet-C"
    try:
        reference = compute_errors(references[0]) if references else ALEXNET_ERRORS
        for result in (result.get("robustness", result) for result in results):
            mce, by_corruption = mean_corruption_error(compute_errors(result), reference)
            result |= {"mce": mce, "ce": by_corruption, "reference": name}
    except ValueError as error:  # such as a reference that makes no errors: keep the other results
        print(f"note: no mCE: {error}")


def compute_errors(result: dict) -> dict[str, list[float]]:
    """Return the error (0..1) at each severity of each corruption."""
    rows = result["corruptions"]
    names = [name for name in rows if name in ALEXNET_ERRORS] or rows
    return {name: [1 - value / 100 for value in rows[name].values()] for name in names}


def format_report(results: list[dict]) -> str:
    """Return a table with a row for each classifier and, if measured, one with a row for each corruption."""
    columns = {"clean": ("clean", ".2f"), **{title: (title, ".2f") for title in results[0]["attacks"]}}
    columns |= {"corruption_mean": ("corruptions", ".2f"), "mce": ("mCE", ".1f")}
    columns |= {f"area_{kind}": (title, ".2f") for kind, title in occlusion.KINDS.items()}
    table = tables.format_text([result | result["attacks"] for result in results], columns)
    lines = [f"top-1 accuracy in percent, {results[0]['images']:,} images", table, *list_notes(results[0])]
    return "\n".join([*lines, "", format_corruptions(results)] if "corruptions" in results[0] else lines)


def list_notes(result: dict) -> list[str]:
    """Return lines that say how the numbers were computed."""
    lines = []
    if rows := result.get("corruptions"):
        severities, counted = list_severities(rows), "1 corruption" if len(rows) == 1 else f"{len(rows)} corruptions"
        levels = f"severit{'y' if len(severities) == 1 else 'ies'} {', '.join(map(str, severities))}"
        built_in = "; computed by this project's own generators, not the published images"
        lines.append(
            f"corruptions: mean accuracy over {counted} at {levels}"
            + (built_in if result["corrupted_by"] == "built-in" else "")
        )
    if "mce" in result:
        kinds = "1 corruption" if len(result["ce"]) == 1 else f"{len(result['ce'])} corruptions"
        lines.append(f"mCE: mean error over {kinds}, each in percent of the error of {result['reference']}")
    if curves := result.get("occlusion"):
        fractions = next(iter(curves.values()))["share"]
        lines.append(
            f"{' and '.join(occlusion.KINDS.values())}: mean accuracy with {fractions[0]:.0%} to {fractions[-1]:.1%} "
            "of the area hidden"
        )
    return lines


def list_severities(rows: Accuracies) -> list[int]:
    """Return the severities that occur, sorted."""
    return sorted({severity for row in rows.values() for severity in row})


def format_corruptions(results: list[dict]) -> str:
    """Return a table with a row for each corruption and a column for each classifier: the mean over the severities."""
    rows = [[f"{results[0]['corrupted_by']} corruptions", *(result["name"] for result in results)]]
    for kind in results[0]["corruptions"]:
        means = [mean_or_none(list(result["corruptions"][kind].values())) for result in results]
        rows.append([kind, *(format(value, ".2f") for value in means)])
    return tables.align_columns(rows)


def draw_severities(axes, results: list[tuple[str, dict]]) -> None:
    """Plot accuracy against severity, averaged over the corruptions.

    For a single classifier, thin lines show the families of corruptions.
    """
    for colour, (name, result) in zip(figures.list_colours(len(results)), results, strict=True):
        severities, clean = list_severities(result["corruptions"]), result["clean"]
        values = [clean, *average_by_severity(result["corruptions"], severities)]
        axes.plot([0, *severities], values, "o-", label=name, color=colour)
        if len(results) == 1:
            for index, (family, members) in enumerate(FAMILIES.items(), 1):
                names = {member.__name__ for member in members}
                if rows := {kind: row for kind, row in result["corruptions"].items() if kind in names}:
                    values = [clean, *average_by_severity(rows, severities)]
                    axes.plot([0, *severities], values, lw=1, alpha=0.8, color=f"C{index}", label=family)
    axes.set(xlabel="severity (0: clean)", ylabel="top-1 accuracy (%)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.set_ylim(bottom=0)
    figures.place_legend(axes)


def average_by_severity(rows: Accuracies, severities: list[int]) -> list[float]:
    """Return the mean over the corruptions at each severity; NaN where there is no value."""
    columns = [[row[severity] for row in rows.values() if severity in row] for severity in severities]
    return [fmean(column) if column else math.nan for column in columns]


def draw_attacks(axes, results: list[tuple[str, dict]]) -> None:
    """Draw bars of the clean accuracy and of that under each attack, in one colour for each classifier."""
    titles = ["clean", *results[0][1]["attacks"]]
    width = 0.8 / len(results)
    for number, (colour, (name, result)) in enumerate(zip(figures.list_colours(len(results)), results, strict=True)):
        values = [result["clean"], *result["attacks"].values()]
        positions = [x + (number - (len(results) - 1) / 2) * width for x in range(len(titles))]
        bars = axes.bar(positions, values, width, label=name, color=colour)
        if len(results) * len(titles) <= 10:  # more would run into each other
            axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.set(ylabel="top-1 accuracy (%)")
    axes.set_xticks(range(len(titles)), [title.replace(", ", ",\n") for title in titles], fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    figures.place_legend(axes, below=True)


def make_panels(named: list[tuple[str, dict]]) -> list[tuple[str, Callable]]:
    """Return a title and a drawing function for everything that can be drawn of the results, (name, result) each."""
    first, panels = named[0][1], {}
    if first["attacks"]:
        panels["attacks"] = partial(draw_attacks, results=named)
    if first.get("corruptions"):
        panels[f"{first['corrupted_by']} corruptions"] = partial(draw_severities, results=named)
    if first.get("occlusion"):
        curves = [(name, result["occlusion"]) for name, result in named]
        panels["occlusion"] = partial(occlusion.draw_curves, results=curves)
    return [(f"{title}, {format_count(first['images'], 'image')}", panel) for title, panel in panels.items()]
