"""How well classifiers do on images that the masks of an extractor have altered."""

import itertools
from collections import Counter
from pathlib import Path

import torch

import models
from engine.data.class_names import map_labels
from engine.data.image_set import ImageSet
from engine.data.loader import DeviceLoader
from engine.errors import UserError
from engine.inference.classifier import Classifier, load_classifier, normalize
from engine.runtime.device import autocast, disable_tf32
from engine.runtime.progress import Progress, use_progress_bar
from saliency.casm.boxes import binarize
from saliency.casm.extractors import Extractor
from saliency.casm.masking import inpaint, mask_in, mask_out
from saliency.casm.results import ScoringConfig
from saliency.casm.training import count_iterations

PUBLISHED_CLASSIFIERS = [  # torchvision's names of the 17 networks of the published program
    *(f"densenet{depth}" for depth in (121, 161, 169, 201)),
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    *(f"vgg{depth}{norm}" for norm in ("", "_bn") for depth in (11, 13, 16, 19)),
]
IMAGENET_CLASSES = 1000
KINDS = {  # of image -> how it is made of pixels and of what is selected; the published program has no clean ones
    "clean": lambda pixels, selected: pixels,
    "masked_in": mask_in,
    "masked_out": mask_out,
    "inpainted": inpaint,
}


def load_classifiers(words: list[str], device: torch.device) -> list[Classifier]:
    """The classifiers that words name: torchvision's NAME, with its ImageNet weights, NAME=FILE, with those of a file,
    or a file or run folder of ours. No two have one name. Raises UserError for anything else, and for weights that
    cannot be had.
    """
    words = list(dict.fromkeys(words))
    classifiers = [load_classifier(word, models) for word in words]
    counts = Counter(classifier.name for classifier in classifiers)
    for word, classifier in zip(words, classifiers, strict=True):
        classifier.name = word if counts[classifier.name] > 1 else classifier.name
        classifier.network.to(device, memory_format=torch.channels_last).requires_grad_(False)
    return classifiers


def load_resnets(folder: str, device: torch.device) -> list[Classifier]:
    """Every file of a folder as a ResNet-50 of the PyTorch ImageNet example, named after its file. Raises UserError
    for a folder without files, and for a file of anything else.
    """
    files = [path for path in sorted(Path(folder).iterdir()) if path.is_file()] if Path(folder).is_dir() else []
    if not files:
        raise UserError(f"--resnets-path {folder}: no such folder, or no file in it")
    classifiers = [load_classifier(str(file), models, model="resnet50") for file in files]
    for file, classifier in zip(files, classifiers, strict=True):
        classifier.name = file.name
        classifier.network.to(device, memory_format=torch.channels_last).requires_grad_(False)
    return classifiers


class ClassifierPanel:
    """The classifiers that images are shown to: those that words name and those of a folder of ResNets; without words
    the published ones for a network of 1000 classes, for any other the classifier that the masks were trained with.
    """

    def __init__(
        self, words: list[str] | None, resnets: str | None, device: torch.device, class_list: str | None = None
    ):
        self.device, self.class_list, self.published = device, class_list, None
        self.named = load_classifiers(words, device) if words else None
        self.resnets = load_resnets(resnets, device) if resnets else []

    def select(self, extractor: Extractor, part: ImageSet) -> list[Classifier]:
        """Those for the masks of an extractor. Raises UserError where there are none, or two of one name."""
        named = self.select_default(extractor, part) if self.named is None else self.named
        classifiers = named + self.resnets
        names = [classifier.name for classifier in classifiers]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"two classifiers are called {twice[0]}\nrename the file of one of them")
        return classifiers

    def select_default(self, extractor: Extractor, part: ImageSet) -> list[Classifier]:
        if (extractor.num_classes or len(part.classes)) == IMAGENET_CLASSES:
            map_labels(part.classes, [], self.class_list)  # raises before 3 GB are fetched
            self.published = self.published or load_classifiers(PUBLISHED_CLASSIFIERS, self.device)
            return self.published
        if extractor.classifier is not None:
            name = f"own {extractor.options.get('model') or 'classifier'}"
            mean, std, count = extractor.mean, extractor.std, extractor.num_classes
            return [Classifier(name, extractor.classifier, mean, std, extractor.classes, count)]
        if self.resnets:
            return []
        raise UserError(
            f"{extractor.name}: which classifiers shall judge images of {len(part.classes)} classes?\n"
            "name them with --classifiers"
        )


def sum_batch(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """logits (B, K), labels (B,), -1 where an image does not count -> (5,) on the device: sums over those that do of
    cross-entropy, top-1 and top-5 hits, entropy of the prediction in nats, and their number.
    """
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    logs = logits.to(exact).log_softmax(1)
    loss = -logs.gather(1, labels.clamp_min(0).unsqueeze(1))[:, 0]
    hits = logits.topk(min(5, logits.shape[1]), 1).indices == labels.unsqueeze(1)
    entropy = -(logs.exp() * logs).sum(1)
    rows = torch.stack([loss, hits[:, 0], hits.any(1), entropy, torch.ones_like(loss)])
    return torch.where(labels >= 0, rows, 0).sum(1)


@torch.no_grad()
def evaluate(
    extractor: Extractor,
    part: ImageSet,
    classifiers: list[Classifier],
    config: ScoringConfig,
    *,
    device: torch.device,
    precision: torch.dtype | None = None,
) -> dict:
    """The numbers of every classifier for every kind of image. Raises UserError where a classifier knows the class of
    none of the images.
    """
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1)}  # pixels in 0..1
    batches = DeviceLoader(part, config.batch_size, device=device, workers=config.workers, **plain)
    iterations = count_iterations(len(batches), config.pot)
    positions = {name: position for position, name in enumerate(extractor.classes or part.classes)}
    mask_labels = torch.tensor([positions.get(name, -1) for name in part.classes], device=device)  # none need be known
    read, class_list = iterations * config.batch_size, config.class_list
    maps = [map_classifier_labels(one, part, read, class_list).to(device) for one in classifiers]
    totals, images = torch.zeros((), device=device), 0
    try:
        with Progress(extractor.name, iterations, bar=use_progress_bar(False)) as progress, disable_tf32():
            for step, batch in enumerate(itertools.islice(batches.epoch(), iterations)):
                images += len(batch.labels)
                with autocast(device, precision):
                    normalized = normalize(batch.images, extractor.mean, extractor.std)
                    selected = binarize(extractor.extract(normalized, mask_labels[batch.labels]).masks)
                    labels = [label_map[batch.labels] for label_map in maps]
                    totals = totals + sum_altered(batch.images, selected, classifiers, labels)
                progress(step + 1, **(top1_by_kind(totals) if (step + 1) % config.print_freq == 0 else {}))
    finally:
        batches.close()
    return {
        "name": extractor.name,
        "path": extractor.path,
        "images": images,
        "left_out": count_left_out(images, classifiers, totals),
        "unreadable": batches.skipped,
        **{kind: average_by_classifier(classifiers, table) for kind, table in zip(KINDS, totals, strict=True)},
    }


def sum_altered(
    pixels: torch.Tensor, selected: torch.Tensor, classifiers: list[Classifier], labels: list[torch.Tensor]
) -> torch.Tensor:
    """sum_batch for every kind of image and classifier: (kinds, classifiers, 5).

    pixels (B, 3, H, W) in 0..1, selected bool (B, H, W), labels (B,) in the classes of each classifier.
    """
    tables = []
    for alter in KINDS.values():
        altered = alter(pixels, selected)
        rows = [sum_batch(classifier(altered), own) for classifier, own in zip(classifiers, labels, strict=True)]
        tables.append(torch.stack(rows))
    return torch.stack(tables)


def map_classifier_labels(classifier: Classifier, part: ImageSet, images: int, class_list: str | None) -> torch.Tensor:
    """map_labels() of a classifier. Raises UserError if it knows the class of none of the first so many images."""
    try:
        label_map = map_labels(part.classes, classifier.classes, class_list, classifier.num_classes)
    except UserError as error:
        raise UserError(f"classifier {classifier.name}: {error}") from error
    if (label_map[part.labels[:images]] < 0).all():
        raise UserError(
            f"classifier {classifier.name} knows the class of none of the {min(images, len(part)):,} images used"
        )
    return label_map


def count_left_out(images: int, classifiers: list[Classifier], totals: torch.Tensor) -> dict[str, int]:
    """Images of classes that a classifier does not know, where there are any. totals (kinds, classifiers, 5)."""
    counts = {one.name: images - int(row[4]) for one, row in zip(classifiers, totals[0], strict=True)}
    return {name: count for name, count in counts.items() if count}


def average_by_classifier(classifiers: list[Classifier], table: torch.Tensor) -> dict[str, dict[str, float]]:
    """Rows of sum_batch(), (classifiers, 5), as means: l, cross-entropy; t1 and t5, percent; e, entropy in nats."""
    scale = table.new_tensor([1, 100, 100, 1])
    rows = (table[:, :4] * scale / table[:, 4:]).tolist()
    means = [dict(zip(("l", "t1", "t5", "e"), row, strict=True)) for row in rows]
    return {classifier.name: row for classifier, row in zip(classifiers, means, strict=True)}


def top1_by_kind(totals: torch.Tensor) -> dict[str, float]:
    """totals (kinds, classifiers, 5) -> top-1 percent of each kind over all classifiers. Waits for the device."""
    hits, images = totals.sum(1)[:, [1, 4]].unbind(1)
    return dict(zip(KINDS, (100 * hits / images.clamp_min(1)).tolist(), strict=True))
