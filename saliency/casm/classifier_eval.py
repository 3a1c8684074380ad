"""What classifiers make of images once the masks of an extractor have altered them."""

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
from engine.runtime.device import autocast, exact_float32
from engine.runtime.progress import Progress, use_progress_bar
from saliency.casm.boxes import binarize
from saliency.casm.extractors import Extractor
from saliency.casm.masking import inpaint, mask_in, mask_out
from saliency.casm.training import count_iterations

PUBLISHED = (  # torchvision's names of the 17 networks of the published program
    *(f"densenet{depth}" for depth in (121, 161, 169, 201)),
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    *(f"vgg{depth}{norm}" for norm in ("", "_bn") for depth in (11, 13, 16, 19)),
)
IMAGENET_CLASSES = 1000


def load_panel(words: list[str], device: torch.device) -> list[Classifier]:
    """A word is torchvision's NAME, with its ImageNet weights, NAME=FILE, with those of a file, or a file or run folder
    of ours. No two have one name. Raises UserError for anything else, and for weights that cannot be had.
    """
    words = list(dict.fromkeys(words))
    judges = [load_classifier(word, models) for word in words]
    often = Counter(judge.name for judge in judges)
    for word, judge in zip(words, judges, strict=True):
        judge.name = word if often[judge.name] > 1 else judge.name
        judge.network.to(device, memory_format=torch.channels_last).requires_grad_(False)
    return judges


def load_resnets(folder: str, device: torch.device) -> list[Classifier]:
    """Every file of a folder as a ResNet-50 of the PyTorch ImageNet example, called after its file. Raises UserError
    for a folder without files, and for a file of anything else.
    """
    files = [one for one in sorted(Path(folder).iterdir()) if one.is_file()] if Path(folder).is_dir() else []
    if not files:
        raise UserError(f"--resnets-path {folder}: no such folder, or no file in it")
    judges = [load_classifier(str(file), models, model="resnet50") for file in files]
    for file, judge in zip(files, judges, strict=True):
        judge.name = file.name
        judge.network.to(device, memory_format=torch.channels_last).requires_grad_(False)
    return judges


KINDS = {  # of image -> how it is made of pixels and of what is selected; the published program has no clean ones
    "clean": lambda pixels, selected: pixels,
    "masked_in": mask_in,
    "masked_out": mask_out,
    "inpainted": inpaint,
}


class ClassifierPanel:
    """Who judges: the classifiers that words name and those of a folder of ResNets; without words the published ones
    for a network of 1000 classes, for any other the classifier that the masks were trained beside.
    """

    def __init__(
        self, words: list[str] | None, resnets: str | None, device: torch.device, class_list: str | None = None
    ):
        self.device, self.class_list, self.published = device, class_list, None
        self.named = load_panel(words, device) if words else None
        self.resnets = load_resnets(resnets, device) if resnets else []

    def of(self, extractor: Extractor, part: ImageSet) -> list[Classifier]:
        """Raises UserError where nobody is left, or two have one name."""
        judges = (self.usual(extractor, part) if self.named is None else self.named) + self.resnets
        names = [judge.name for judge in judges]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"two classifiers are called {twice[0]}\nrename the file of one of them")
        return judges

    def usual(self, extractor: Extractor, part: ImageSet) -> list[Classifier]:
        own = extractor.classifier
        if (extractor.count or len(part.classes)) == IMAGENET_CLASSES:
            map_labels(part.classes, [], self.class_list)  # an error comes before 3 GB are fetched
            self.published = self.published or load_panel(list(PUBLISHED), self.device)
            return self.published
        if own is not None:
            name = f"own {extractor.options.get('model') or 'classifier'}"
            return [Classifier(name, own, extractor.mean, extractor.std, extractor.classes, extractor.count)]
        if self.resnets:
            return []
        raise UserError(
            f"{extractor.name}: which classifiers shall judge images of {len(part.classes)} classes?\n"
            "name them with --classifiers"
        )


def batch_sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """logits (B, K), labels (B,), -1 where an image does not count -> (5,): over those that do, cross-entropy, right at
    first, right among the first five, entropy of the prediction in nats, and one each. On the device.
    """
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    logs = logits.to(exact).log_softmax(1)
    counts = labels >= 0
    loss = -logs.gather(1, labels.clamp_min(0).unsqueeze(1))[:, 0]
    hits = logits.topk(min(5, logits.shape[1]), 1).indices == labels.unsqueeze(1)
    entropy = -(logs.exp() * logs).sum(1)
    rows = torch.stack([loss, hits[:, 0], hits.any(1), entropy, torch.ones_like(loss)])
    return torch.where(counts, rows, 0).sum(1)


@torch.no_grad()
def evaluate(
    extractor: Extractor,
    part: ImageSet,
    judges: list[Classifier],
    *,
    device: torch.device,
    batch_size: int = 128,
    pot: float = 1.0,
    workers: int = 0,
    print_freq: int = 10,
    class_list: str | None = None,
    precision: torch.dtype | None = None,
) -> dict:
    """The numbers of every judge for every kind of image, over the first iterations_of(batches, pot) batches. Raises
    UserError where a judge knows none of the images.
    """
    batches = DeviceLoader(
        part, batch_size, device=device, mean=(0, 0, 0), std=(1, 1, 1), workers=workers
    )  # plain pixels
    count = count_iterations(len(batches), pot)
    place = {name: position for position, name in enumerate(extractor.classes or part.classes)}
    own = torch.tensor([place.get(name, -1) for name in part.classes], device=device)  # maps need not know any class
    known = [map_panel_labels(judge, part, count * batch_size, class_list).to(device) for judge in judges]
    totals, images = torch.zeros((), device=device), 0
    try:
        with Progress(extractor.name, count, bar=use_progress_bar(False)) as shown, exact_float32():
            for step, batch in enumerate(itertools.islice(batches.epoch(), count)):
                images += len(batch.labels)
                with autocast(device, precision):
                    seen = normalize(batch.images, extractor.mean, extractor.std)
                    selected = binarize(extractor.masks_of(seen, own[batch.labels]).masks)
                    of_judges = [labels[batch.labels] for labels in known]
                    totals = totals + evaluate_masks(batch.images, selected, judges, of_judges)
                shown(step + 1, **(top1_by_kind(totals) if (step + 1) % print_freq == 0 else {}))
    finally:
        batches.close()
    left_out = {judge.name: images - int(row[4]) for judge, row in zip(judges, totals[0], strict=True)}
    return {
        **{"name": extractor.name, "path": extractor.path, "images": images},
        **{"left_out": {name: number for name, number in left_out.items() if number}, "unreadable": batches.skipped},
        **{kind: name_results(judges, table) for kind, table in zip(KINDS, totals, strict=True)},
    }


def evaluate_masks(
    pixels: torch.Tensor, selected: torch.Tensor, judges: list[Classifier], labels: list[torch.Tensor]
) -> torch.Tensor:
    """pixels (B, 3, H, W) in 0..1, selected bool (B, H, W), labels (B,) of each judge -> (kinds, judges, 5): sums."""
    rows = []
    for alter in KINDS.values():
        altered = alter(pixels, selected)
        rows.append(torch.stack([batch_sums(judge(altered), own) for judge, own in zip(judges, labels, strict=True)]))
    return torch.stack(rows)


def map_panel_labels(judge: Classifier, part: ImageSet, images: int, class_list: str | None) -> torch.Tensor:
    """label_map() of a judge. Raises UserError if it knows the class of none of the first so many images."""
    try:
        place = map_labels(part.classes, judge.classes, class_list, judge.count)
    except UserError as error:
        raise UserError(f"classifier {judge.name}: {error}") from error
    if (place[part.labels[:images]] < 0).all():
        raise UserError(
            f"classifier {judge.name} knows the class of none of the {min(images, len(part)):,} images used"
        )
    return place


def name_results(judges: list[Classifier], table: torch.Tensor) -> dict[str, dict[str, float]]:
    """Rows of sums(), (judges, 5), as means: l, cross-entropy; t1 and t5, percent; e, entropy in nats."""
    scale = table.new_tensor([1, 100, 100, 1])
    rows = (table[:, :4] * scale / table[:, 4:]).tolist()
    means = [dict(zip(("l", "t1", "t5", "e"), row, strict=True)) for row in rows]
    return {judge.name: row for judge, row in zip(judges, means, strict=True)}


def top1_by_kind(totals: torch.Tensor) -> dict[str, float]:
    """totals (kinds, judges, 5) -> percent right at first for each kind, over all judges. Waits for the device."""
    right, images = totals.sum(1)[:, [1, 4]].unbind(1)
    return dict(zip(KINDS, (100 * right / images.clamp_min(1)).tolist(), strict=True))
