"""What is left of the accuracy under attack, under corruption and where a part of the image is hidden."""

from collections.abc import Callable

import torch

from engine import tables
from engine.data import Part
from engine.evaluation import occlusion
from engine.evaluation.attacks import Attack
from engine.evaluation.corrupted_sets import ALEXNET, CorruptedSet, mean_corruption_error
from engine.evaluation.corruptions import CORRUPTIONS, FAMILIES, corrupt
from engine.evaluation.subject import Alter, Subject
from engine.metrics import topk_correct

AREAS = {"patches": "patches", "centre": "hole"}  # of the curves under occlusion: kind -> how it is called in a table


def measure(
    subject: Subject,
    *,
    attacks: list[Attack],
    corruptions: CorruptedSet | None,
    severities: list[int],
    built_in: bool,
    occluded: bool,
    most: int,
) -> dict:
    """Accuracies in percent; those of several processes in the first, None elsewhere.

    corruptions: a published set; built_in: our own instead, at these severities. most: images that are looked at, from
    all over the part; 0: all. The clean accuracy is of the same images.
    """
    few = subject.some(most)
    result = {"images": len(few), "clean": accuracy(subject, few, "clean")}
    result["attacks"] = {
        attack.title: accuracy(subject, few, attack.title, attack.alter(subject.classify, subject.seed))
        for attack in attacks
    }
    if corruptions or built_in:
        rows = of_published(subject, corruptions, most) if corruptions else of_built_in(subject, few, severities)
        result |= {"corrupted_by": "published" if corruptions else "built-in", "corruptions": rows}
        result["corruption_mean"] = mean_of([mean_of(list(row.values())) for row in rows.values()])
    if occluded:
        curves = of_occlusion(subject, few)
        areas = {
            f"area_{kind}": occlusion.area(one["share"], one["top1"]) for kind, one in curves.items() if complete(one)
        }
        result |= {"occlusion": curves, **areas}
    return result


def complete(curve: dict) -> bool:
    return None not in curve["top1"]


def accuracy(subject: Subject, part: Part, title: str, alter: Alter | None = None) -> float | None:
    """Percent right at first; None in all processes but the first."""
    logits, labels, _ = subject.predict(title, part=part, alter=alter)
    return 100 * float(topk_correct(logits, labels, (1,))[0]) / len(labels) if len(labels) else None


def mean_of(values: list[float | None]) -> float | None:
    return sum(values) / len(values) if values and None not in values else None


def of_built_in(subject: Subject, part: Part, severities: list[int]) -> dict[str, dict[int, float | None]]:
    """Accuracy under each corruption at each severity."""

    def under(name: str, severity: int) -> Alter:
        return lambda pixels, labels, index: corrupt(pixels, name, severity, index, subject.seed)

    return {
        name: {level: accuracy(subject, part, f"{name} {level}", under(name, level)) for level in severities}
        for name in CORRUPTIONS
    }


def of_published(subject: Subject, found: CorruptedSet, most: int) -> dict[str, dict[int, float | None]]:
    """The same from a published set."""
    rows = {}
    for name in found.names:
        rows[name] = {}
        for level in found.severities(name):
            part = found.part(name, level)
            part = part.spread(most) if most else part
            rows[name][level] = accuracy(subject, part, f"{name} {level}")
    return rows


def of_occlusion(subject: Subject, part: Part) -> dict[str, dict[str, list]]:
    """Accuracy against the share of the image that is hidden, by the mean colour of the network's normalisation."""

    def hidden(kind: str, share: float) -> Alter:
        fill = subject.classifier.mean
        return lambda pixels, labels, index: occlusion.hide(pixels, kind, share, index, fill, subject.seed)

    shares = list(occlusion.SHARES)
    return {
        kind: {
            "share": shares,
            "top1": [accuracy(subject, part, f"{kind} {share:.0%}", hidden(kind, share)) for share in shares],
        }
        for kind in occlusion.KINDS
    }


def add_mean_errors(results: list[dict], reference: dict | None, name: str) -> None:
    """Put mCE, percent of the errors of a reference, into each result.

    reference: what measure() gave of it, or None for the published ones of AlexNet. name: how it is called.
    """
    of_reference = errors_of(reference) if reference else ALEXNET
    for result in results:
        mce, each = mean_corruption_error(errors_of(result), of_reference)
        result |= {"mce": mce, "ce": each, "reference": name}


def errors_of(result: dict) -> dict[str, list[float]]:
    """Corruption -> the share of errors at each severity."""
    return {name: [1 - value / 100 for value in row.values()] for name, row in result["corruptions"].items()}


def report(results: list[dict]) -> str:
    """Tables: a row a classifier; and a row a corruption, averaged over severities."""
    columns = {"clean": ("clean", ".2f")}
    rows = []
    for result in results:
        row = {"name": result["name"], "clean": result["clean"], **result["attacks"]}
        row |= {key: result.get(key) for key in ("corruption_mean", "mce", *(f"area_{kind}" for kind in AREAS))}
        rows.append(row)
        columns |= {title: (title, ".2f") for title in result["attacks"]}
    columns |= {"corruption_mean": ("mean corrupted", ".2f"), "mce": ("mCE", ".1f")}
    columns |= {f"area_{kind}": (f"occluded, {title}", ".2f") for kind, title in AREAS.items()}
    lines = [f"top-1 in percent, of {results[0]['images']:,} images", tables.text(rows, columns)]
    lines.append(
        "mean corrupted: mean corruption accuracy, over kinds and severities; occluded: mean over shares hidden"
    )
    if reference := results[0].get("reference"):
        lines.append(f"mCE: errors under corruption, in percent of those of {reference}, averaged over the kinds")
    parts = ["\n".join(lines)]
    if any("corruptions" in result for result in results):
        parts.append(by_corruption(results))
    return "\n\n".join(parts)


def by_corruption(results: list[dict]) -> str:
    """A row a corruption, a column a classifier: accuracy averaged over the severities."""
    names = [result["name"] for result in results]
    kinds = list(dict.fromkeys(name for result in results for name in result.get("corruptions", {})))
    rows = []
    for kind in kinds:
        found = [result.get("corruptions", {}).get(kind) for result in results]
        values = {name: row and mean_of(list(row.values())) for name, row in zip(names, found, strict=True)}
        rows.append({"kind": kind, **values})
    made = results[0].get("corrupted_by", "built-in")
    title = f"{made} corruptions"
    return tables.text(rows, {name: (name, ".2f") for name in names}, name="kind", title=title)


def draw_severities(axes, results: list[tuple[str, dict]]) -> None:
    """Accuracy against severity, over all corruptions; of a single classifier the families too, in thin lines."""
    for number, (name, result) in enumerate(results):
        levels = sorted({level for row in result["corruptions"].values() for level in row})
        look = {"color": f"C{number}"}
        axes.plot([0, *levels], [result["clean"], *at_each(result["corruptions"], levels)], "o-", label=name, **look)
        if len(results) == 1:
            for index, (family, members) in enumerate(FAMILIES.items(), 1):
                rows = {kind: row for kind, row in result["corruptions"].items() if kind in members}
                if rows:
                    values = [result["clean"], *at_each(rows, levels)]
                    axes.plot([0, *levels], values, lw=1, alpha=0.8, color=f"C{index}", label=family)
    axes.set(xlabel="severity (0: clean)", ylabel="top-1 (%)")
    axes.grid(alpha=0.3)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


def at_each(rows: dict[str, dict], levels: list) -> list[float]:
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
