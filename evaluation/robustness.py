"""What is left of the accuracy under attack, under corruption and where a part of the image is hidden."""

from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import torch

from engine.data.image_set import ImageSet, select_classes
from engine.data.views import CenterCrop
from engine.drawing import tables
from engine.errors import UserError
from engine.inference.metrics import topk_correct
from evaluation import occlusion
from evaluation.attacks import Attack
from evaluation.context import Alter, EvalContext
from evaluation.corruption_benchmarks import ALEXNET, CorruptedSet, find_corrupted, mean_corruption_error
from evaluation.corruptions import CORRUPTIONS, FAMILIES, corrupt

AREAS = {"patches": "patches", "centre": "hole"}  # of the curves under occlusion: kind -> how it is called in a table


def measure(
    subject: EvalContext,
    *,
    attacks: Sequence[Attack] = (),
    published: CorruptedSet | None = None,
    severities: Sequence[int] = (),
    occluded: bool = False,
    most: int = 0,
) -> dict:
    """Accuracies in percent; those of several processes in the first, None elsewhere.

    published: a set of corrupted images; severities: of our own corruptions, made where there is none. most: images
    that are looked at, from all over the part; 0: all. All figures are of the same images.
    """
    few = subject.some(most)
    result = {"images": len(few), "clean": accuracy(subject, few, "clean")}
    result["attacks"] = {
        attack.title: accuracy(subject, few, attack.title, attack.alter(subject.classify, subject.seed))
        for attack in attacks
    }
    if published or severities:
        rows = (
            measure_published(subject, published, few, most)
            if published
            else measure_built_in(subject, few, severities)
        )
        result |= {"corrupted_by": "published" if published else "built-in", "corruptions": rows}
        result["corruption_mean"] = average([average(list(row.values())) for row in rows.values()])
    if occluded:
        curves = measure_occlusion(subject, few, result["clean"])
        areas = {
            f"area_{kind}": occlusion.area(one["share"], one["top1"]) for kind, one in curves.items() if complete(one)
        }
        result |= {"occlusion": curves, **areas}
    return result


def complete(curve: dict) -> bool:
    return None not in curve["top1"]


def accuracy(subject: EvalContext, part: ImageSet, title: str, alter: Alter | None = None) -> float | None:
    """Percent right at first; None in all processes but the first."""
    logits, labels, _ = subject.predict(title, part=part, alter=alter)
    return 100 * float(topk_correct(logits, labels, (1,))[0]) / len(labels) if len(labels) else None


def average(values: list[float | None]) -> float | None:
    return sum(values) / len(values) if values and None not in values else None


def measure_built_in(
    subject: EvalContext, part: ImageSet, severities: Sequence[int]
) -> dict[str, dict[int, float | None]]:
    """Accuracy under each corruption at each severity."""

    def under(name: str, severity: int) -> Alter:
        return lambda pixels, labels, index: corrupt(pixels, name, severity, index, subject.seed)

    return {
        name: {level: accuracy(subject, part, f"{name} {level}", under(name, level)) for level in severities}
        for name in CORRUPTIONS
    }


def find_published(subject: EvalContext, place: str, on_bad_image: str) -> CorruptedSet:
    """The corrupted set in a folder, with a note for what it lacks. Raises UserError for what is none, and for images
    of another size than the subject's. Published files are centres already, and are shown whole.
    """
    view = CenterCrop(subject.size, subject.size)
    found = find_corrupted(Path(place), subject.part.classes, view=view, on_bad_image=on_bad_image)
    for line in found.notes:
        subject.note(line)
    name = found.names[0]
    part = found.part(name, found.severities(name)[0])
    if part.files is None and part.pixels.shape[1] != subject.size:
        raise UserError(
            f"{found.place}: images of {part.pixels.shape[1]} pixels a side, where {subject.name} is shown "
            f"{subject.size}\nname the corrupted images of the data set that it was trained on"
        )
    return found


def measure_published(
    subject: EvalContext, found: CorruptedSet, few: ImageSet, most: int
) -> dict[str, dict[int, float | None]]:
    """The same from a published set."""
    rows = {}
    for name in found.names:
        rows[name] = {}
        for level in found.severities(name):
            part = corrupted_results(subject, found.part(name, level), few, most)
            rows[name][level] = accuracy(subject, part, f"{name} {level}")
    return rows


def corrupted_results(subject: EvalContext, part: ImageSet, few: ImageSet, most: int) -> ImageSet:
    """The images of a published part that `few`, at most `most` of the subject's, shows clean.

    Files are known by their class and name, an array by its labels, which stand in the order of the test set. Where
    that fails there is a note, and as many images from all over the part.
    """
    if part.files is None:
        part = select_classes(part, subject.place, subject.part.classes)
        first = part.take(torch.arange(min(len(part), len(subject.part))))
        if torch.equal(first.labels, subject.part.labels):
            return first.subsample(most or len(first))
    elif few.files is not None:
        places = {name: place for place, name in enumerate(list_names(part))}
        found = [places.get(name) for name in list_names(few)]
        if None not in found:
            return part.take(torch.tensor(found))
    count = min(len(few), len(part))
    subject.note(
        f"the corrupted images have other {'labels' if part.files is None else 'names'} than the test images: which is "
        f"which cannot be told, and {count:,} from all over are taken"
    )
    return part.subsample(count)


def list_names(part: ImageSet) -> list[tuple[int, str]]:
    """The class of each image and the name of its file, without folders and ending."""
    return list(zip(part.labels.tolist(), (PurePosixPath(name).stem for name in part.files.names()), strict=True))


def measure_occlusion(subject: EvalContext, part: ImageSet, clean: float | None) -> dict[str, dict[str, list]]:
    """Accuracy against the share of the image that is hidden, by the mean colour of the network's normalisation. clean:
    where nothing is.
    """

    def hidden(kind: str, share: float) -> Alter:
        fill = subject.classifier.mean
        return lambda pixels, labels, index: occlusion.hide(pixels, kind, share, index, fill, subject.seed)

    shares = list(occlusion.SHARES)
    return {
        kind: {
            "share": shares,
            "top1": [
                accuracy(subject, part, f"{kind} {share:.0%}", hidden(kind, share)) if share else clean
                for share in shares
            ],
        }
        for kind in occlusion.KINDS
    }


def add_mean_errors(results: list[dict], reference: dict | None, name: str) -> None:
    """Put mCE, percent of the errors of a reference, into each result: of the paper's corruptions, where there are any.

    reference: what measure() gave of it, or None for the published ones of AlexNet. name: how it is called. Raises
    ValueError where there is nothing to divide by.
    """
    of_reference = list_errors(reference) if reference else ALEXNET
    for result in results:
        mce, each = mean_corruption_error(list_errors(result), of_reference)
        result |= {"mce": mce, "ce": each, "reference": name}


def list_errors(result: dict) -> dict[str, list[float]]:
    """Corruption -> the share of errors at each severity."""
    rows = result["corruptions"]
    names = [name for name in rows if name in ALEXNET] or rows
    return {name: [1 - value / 100 for value in rows[name].values()] for name in names}


def report(results: list[dict]) -> str:
    """Tables: a row a classifier; and a row a corruption, averaged over severities."""
    columns = {"clean": ("clean", ".2f"), **{title: (title, ".2f") for title in results[0]["attacks"]}}
    columns |= {"corruption_mean": ("mean corrupted", ".2f"), "mce": ("mCE", ".1f")}
    columns |= {f"area_{kind}": (f"occluded, {title}", ".2f") for kind, title in AREAS.items()}
    table = tables.format_text([result | result["attacks"] for result in results], columns)
    lines = [f"top-1 in percent, of {results[0]['images']:,} images", table, *notes(results[0])]
    return "\n".join([*lines, "", by_corruption(results)] if "corruptions" in results[0] else lines)


def notes(result: dict) -> list[str]:
    """What the figures of measure() mean."""
    lines = []
    if rows := result.get("corruptions"):
        levels = sorted({level for row in rows.values() for level in row})
        lines.append(
            f"mean corrupted: mean corruption accuracy, over {len(rows)} kinds and severities "
            f"{', '.join(map(str, levels))}"
            + (
                "; made by this project's generators, not the published images"
                if result["corrupted_by"] == "built-in"
                else ""
            )
        )
    if "mce" in result:
        lines.append(
            f"mCE: errors under corruption, in percent of those of {result['reference']}, averaged over "
            f"{len(result['ce'])} kinds"
        )
    if curves := result.get("occlusion"):
        shares = next(iter(curves.values()))["share"]
        lines.append(f"occluded: mean accuracy while {shares[0]:.0%} to {shares[-1]:.1%} of the area is hidden")
    return lines


def by_corruption(results: list[dict]) -> str:
    """A row a corruption, a column a classifier: accuracy averaged over the severities."""
    rows = [[f"{results[0]['corrupted_by']} corruptions", *(result["name"] for result in results)]]
    for kind in results[0]["corruptions"]:
        means = [average(list(result["corruptions"][kind].values())) for result in results]
        rows.append([kind, *(format(mean, ".2f") for mean in means)])
    return tables.align_columns(rows)


def draw_severities(axes, results: list[tuple[str, dict]]) -> None:
    """Accuracy against severity, over all corruptions; of a single classifier the families too, in thin lines."""
    for number, (name, result) in enumerate(results):
        levels = sorted({level for row in result["corruptions"].values() for level in row})
        look = {"color": f"C{number}"}
        axes.plot(
            [0, *levels],
            [result["clean"], *values_per_severity(result["corruptions"], levels)],
            "o-",
            label=name,
            **look,
        )
        if len(results) == 1:
            for index, (family, members) in enumerate(FAMILIES.items(), 1):
                rows = {kind: row for kind, row in result["corruptions"].items() if kind in members}
                if rows:
                    values = [result["clean"], *values_per_severity(rows, levels)]
                    axes.plot([0, *levels], values, lw=1, alpha=0.8, color=f"C{index}", label=family)
    axes.set(xlabel="severity (0: clean)", ylabel="top-1 (%)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


def values_per_severity(rows: dict[str, dict], levels: list) -> list[float]:
    """The mean over corruptions at each severity."""
    return [float(torch.tensor([row[level] for row in rows.values() if level in row]).mean()) for level in levels]


def draw_attacks(axes, results: list[tuple[str, dict]]) -> None:
    """Bars: clean accuracy and that under each attack, a colour a classifier."""
    titles = ["clean", *results[0][1]["attacks"]]
    width = 0.8 / len(results)
    for number, (name, result) in enumerate(results):
        values = [result["clean"], *result["attacks"].values()]
        places = [place + (number - (len(results) - 1) / 2) * width for place in range(len(titles))]
        bars = axes.bar(places, values, width, label=name)
        if len(results) <= 3:
            axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.set(ylabel="top-1 (%)")
    axes.set_xticks(range(len(titles)), [title.replace(", ", ",\n") for title in titles], fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def panels(named: list[tuple[str, dict]]) -> list[tuple[str, Callable]]:
    """What can be drawn of results (name, what measure() gave), each a title and a function of the axes."""
    first, found = named[0][1], []
    if first["attacks"]:
        found.append(("attacks", lambda axes: draw_attacks(axes, named)))
    if first.get("corruptions"):
        found.append((f"{first['corrupted_by']} corruptions", lambda axes: draw_severities(axes, named)))
    if first.get("occlusion"):
        curves = [(name, one["occlusion"]) for name, one in named]
        found.append(("occlusion", lambda axes: occlusion.draw(axes, curves)))
    return found
