"""Evaluate masks by how well classifiers do on the images that they alter: masked in, masked out and inpainted."""

import itertools
from collections import Counter
from pathlib import Path

import torch

import models
from engine.data.class_names import map_labels
from engine.data.image_set import ImageSet
from engine.data.listing import is_visible
from engine.data.loader import DeviceLoader
from engine.errors import UserError
from engine.inference.classifier import Classifier, load_classifier, normalize
from engine.inference.metrics import rank_labels
from engine.runtime.device import autocast, disable_tf32
from engine.runtime.progress import Progress, use_progress_bar
from saliency.casm.boxes import binarize
from saliency.casm.extractors import Extractor
from saliency.casm.masking import inpaint, mask_in, mask_out
from saliency.casm.results import ScoringConfig
from saliency.casm.training import count_iterations

PUBLISHED_CLASSIFIERS = [  # the 17 networks of the published program, by their torchvision names
    *(f"densenet{depth}" for depth in (121, 161, 169, 201)),
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    *(f"vgg{depth}{norm}" for norm in ("", "_bn") for depth in (11, 13, 16, 19)),
]
IMAGENET_CLASSES = 1000
KINDS = {  # kind of image -> function of pixels and selected pixels; the published program has no clean images
    "clean": lambda pixels, selected: pixels,
    "masked_in": mask_in,
    "masked_out": mask_out,
    "inpainted": inpaint,
}


def load_classifiers(words: list[str], device: torch.device) -> list[Classifier]:
    """Load the classifiers that words name, and give them unique names.

    A word is torchvision:NAME, timm:NAME or torchvision's NAME (with pretrained weights), NAME=FILE (with weights from
    a file), or a checkpoint or run folder of train.py. Raises UserError for anything else, and if weights are not
    available.
    """
    words = list(dict.fromkeys(words))
    classifiers = [load_classifier(word, models) for word in words]
    counts = Counter(classifier.name for classifier in classifiers)
    for word, classifier in zip(words, classifiers, strict=True):
        classifier.name = word if counts[classifier.name] > 1 else classifier.name
        classifier.network.to(device, memory_format=torch.channels_last).requires_grad_(False)
    return classifiers


def load_resnets(folder: str, device: torch.device) -> list[Classifier]:
    """Load every file of a folder as a ResNet-50 of the PyTorch ImageNet example, named after its file.

    Raises UserError for a folder without files, and for any other file.
    """
    paths = sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []
    files = [path for path in paths if path.is_file() and is_visible(path.name)]
    if not files:
        raise UserError(f"--resnets-path {folder}: no such folder, or it holds no files")
    classifiers = [load_classifier(str(file), models, model="resnet50") for file in files]
    for file, classifier in zip(files, classifiers, strict=True):
        classifier.name = file.name
        classifier.network.to(device, memory_format=torch.channels_last).requires_grad_(False)
    return classifiers


class ClassifierPanel:
    """The classifiers that are evaluated on the altered images.

    They are those that `words` name, plus those of the folder `resnets`. Without words, they are the published ones for
    1000 classes, and otherwise the classifier that the decoder was trained with.
    """

    def __init__(
        self, words: list[str] | None, resnets: str | None, device: torch.device, class_list: str | None = None
    ):
        self.device, self.class_list, self.published = device, class_list, None
        self.named = load_classifiers(words, device) if words else None
        self.resnets = load_resnets(resnets, device) if resnets else []

    def select(self, extractor: Extractor, image_set: ImageSet) -> list[Classifier]:
        """Return the classifiers for the masks of an extractor. Raises UserError if there are none, or if two share a
        name.
        """
        named = self.select_default(extractor, image_set) if self.named is None else self.named
        classifiers = named + self.resnets
        names = [classifier.name for classifier in classifiers]
        if duplicates := [name for name in names if names.count(name) > 1]:
            raise UserError(f"two classifiers have the name {duplicates[0]}\nrename the file of one of them")
        return classifiers

    def select_default(self, extractor: Extractor, image_set: ImageSet) -> list[Classifier]:
        if (extractor.num_classes or len(image_set.classes)) == IMAGENET_CLASSES:
            map_labels(image_set.classes, [], self.class_list)  # raises an error before 3 GB are downloaded
            self.published = self.published or load_classifiers(PUBLISHED_CLASSIFIERS, self.device)
            return self.published
        if extractor.classifier is not None:
            name = f"own {extractor.options.get('model') or 'classifier'}"
            mean, std, count = extractor.mean, extractor.std, extractor.num_classes
            return [Classifier(name, extractor.classifier, mean, std, extractor.classes, count)]
        if self.resnets:
            return []
        raise UserError(
            f"{extractor.name}: there is no default classifier for images of {len(image_set.classes)} classes\n"
            "name one or more with --classifiers"
        )


def sum_batch_metrics(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum cross-entropy, top-1 hits, top-5 hits, prediction entropy (nats) and number of images: (5,) on the device.

    logits (B, K); labels (B,), -1 for images that do not count.
    """
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64  # MPS has no float64
    log_probs = logits.to(dtype).log_softmax(1)
    loss = -log_probs.gather(1, labels.clamp_min(0).unsqueeze(1))[:, 0]
    rank = rank_labels(logits, labels.clamp_min(0))
    entropy = -(log_probs.exp() * log_probs).sum(1)
    rows = torch.stack([loss, rank < 1, rank < 5, entropy, torch.ones_like(loss)])
    return torch.where(labels >= 0, rows, 0).sum(1)


@torch.no_grad()
def evaluate_classifiers(
    extractor: Extractor,
    image_set: ImageSet,
    classifiers: list[Classifier],
    config: ScoringConfig,
    *,
    device: torch.device,
    precision: torch.dtype | None = None,
) -> dict:
    """Return loss, accuracies and entropy of every classifier on every kind of image.

    Raises UserError if a classifier knows the class of none of the images, or takes none of their size.
    """
    for classifier in classifiers:
        classifier.check_size(image_set.size)
    unnormalized = {"mean": (0, 0, 0), "std": (1, 1, 1)}  # masking works on pixels in 0..1
    loader = DeviceLoader(image_set, config.batch_size, device=device, workers=config.workers, **unnormalized)
    iterations = count_iterations(len(loader), config.pot)
    # Unlike map_labels(), this accepts data none of whose classes the extractor knows: masks need no labels.
    positions = {name: position for position, name in enumerate(extractor.classes or image_set.classes)}
    mask_labels = torch.tensor([positions.get(name, -1) for name in image_set.classes], device=device)
    max_images, class_list = iterations * config.batch_size, config.class_list
    label_maps = [map_classifier_labels(one, image_set, max_images, class_list).to(device) for one in classifiers]
    totals, images = torch.zeros((), device=device), 0
    try:
        with Progress(extractor.name, iterations, bar=use_progress_bar(False)) as progress, disable_tf32():
            for step, batch in enumerate(itertools.islice(loader.epoch(), iterations)):
                images += len(batch.labels)
                with autocast(device, precision):
                    normalized = normalize(batch.images, extractor.mean, extractor.std)
                    selected = binarize(extractor.extract(normalized, mask_labels[batch.labels]).masks)
                    labels = [label_map[batch.labels] for label_map in label_maps]
                    totals = totals + sum_image_kinds(batch.images, selected, classifiers, labels)
                progress(step + 1, **(top1_by_kind(totals) if (step + 1) % config.print_freq == 0 else {}))
    finally:
        loader.close()
    unreadable = loader.count_unreadable()
    return {
        "name": extractor.name,
        "path": extractor.path,
        "images": images,
        "left_out": count_left_out(images, classifiers, totals),
        "unreadable": unreadable,
        **{kind: average_by_classifier(classifiers, sums) for kind, sums in zip(KINDS, totals, strict=True)},
    }


def sum_image_kinds(
    pixels: torch.Tensor, selected: torch.Tensor, classifiers: list[Classifier], labels: list[torch.Tensor]
) -> torch.Tensor:
    """Return sum_batch_metrics() of every kind of image and every classifier, (kinds, classifiers, 5).

    pixels (B, 3, H, W) in 0..1; selected (B, H, W) bool; labels: (B,) for each classifier, in its own classes.
    """
    tables = []
    for alter in KINDS.values():
        altered = alter(pixels, selected)
        sums = [sum_batch_metrics(one(altered), own) for one, own in zip(classifiers, labels, strict=True)]
        tables.append(torch.stack(sums))
    return torch.stack(tables)


def map_classifier_labels(
    classifier: Classifier, image_set: ImageSet, max_images: int, class_list: str | None
) -> torch.Tensor:
    """Return map_labels() for a classifier. Raises UserError if it knows the class of none of the first images."""
    try:
        label_map = map_labels(image_set.classes, classifier.classes, class_list, classifier.num_classes)
    except UserError as error:
        raise UserError(f"classifier {classifier.name}: {error}") from error
    if (label_map[image_set.labels[:max_images]] < 0).all():
        count = min(max_images, len(image_set))
        raise UserError(
            f"classifier {classifier.name} knows the class of none of the {count:,} images used\n"
            "name a classifier of these classes with --classifiers, or the classes of this one with --class_list"
        )
    return label_map


def count_left_out(images: int, classifiers: list[Classifier], totals: torch.Tensor) -> dict[str, int]:
    """Return the number of images of unknown classes, for each classifier that has any.

    totals (kinds, classifiers, 5).
    """
    counts = {one.name: images - int(sums[4]) for one, sums in zip(classifiers, totals[0], strict=True)}
    return {name: count for name, count in counts.items() if count}


def average_by_classifier(classifiers: list[Classifier], sums: torch.Tensor) -> dict[str, dict[str, float]]:
    """Turn sums (classifiers, 5) into means: l, cross-entropy; t1 and t5, accuracy in percent; e, entropy in nats."""
    scale = sums.new_tensor([1, 100, 100, 1])
    rows = (sums[:, :4] * scale / sums[:, 4:]).tolist()
    means = [dict(zip(("l", "t1", "t5", "e"), row, strict=True)) for row in rows]
    return {classifier.name: row for classifier, row in zip(classifiers, means, strict=True)}


def top1_by_kind(totals: torch.Tensor) -> dict[str, float]:
    """Return the top-1 accuracy (percent) on each kind of image, over all classifiers. Waits for the device.

    totals (kinds, classifiers, 5).
    """
    hits, images = totals.sum(1)[:, [1, 4]].unbind(1)
    return dict(zip(KINDS, (100 * hits / images.clamp_min(1)).tolist(), strict=True))
