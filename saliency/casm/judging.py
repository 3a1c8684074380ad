"""What classifiers make of images once the masks of an extractor have altered them."""

import itertools

import torch

from engine.batches import Batches
from engine.classes import label_map
from engine.classifier import Classifier, normalised
from engine.cli import UserError
from engine.data import Part
from engine.device import exact_float32
from engine.loop import autocast
from engine.progress import Progress, bars_wanted
from saliency.casm.alter import inpainted, masked_in, masked_out
from saliency.casm.extractors import Extractor, Masks, sharing
from saliency.casm.judges import IMAGENET_CLASSES, PUBLISHED, load_judges, load_resnets
from saliency.casm.localize import binarize
from saliency.casm.training import iterations_of

KINDS = {  # of image -> how it is made of pixels and of what is selected; the published program has no clean ones
    "clean": lambda pixels, selected: pixels,
    "masked_in": masked_in,
    "masked_out": masked_out,
    "inpainted": inpainted,
}
TOYS = ("zero", "one", "random56", "random224")


def of_toy(name: str, like: Extractor | None, seed: int) -> Extractor:
    """The published naive masks: `zero`, `one`, and a fair coin for each block of a 56th of the side (`random56`) or
    each pixel (`random224`). Sees the images that `like` does.
    """
    generator = torch.Generator().manual_seed(seed)

    def masks_of(images: torch.Tensor, labels: torch.Tensor) -> Masks:
        count, _, height, width = images.shape
        side = max(1, height // 56) if name == "random56" else 1
        if name in ("zero", "one"):
            masks = images.new_full((count, height, width), float(name == "one"))
        else:
            coins = torch.rand(count, -(-height // side), -(-width // side), generator=generator) < 0.5
            masks = coins.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, :height, :width].float()
        return Masks(masks.to(images.device), torch.ones_like(labels, dtype=torch.bool))

    return sharing(like, name, masks_of) if like else Extractor(name, masks_of)


class Panel:
    """Who judges: the classifiers that words name and those of a folder of ResNets; without words the published ones
    for a network of 1000 classes, for any other the classifier that the masks were trained beside.
    """

    def __init__(
        self, words: list[str] | None, resnets: str | None, device: torch.device, class_list: str | None = None
    ):
        self.device, self.class_list, self.published = device, class_list, None
        self.named = load_judges(words, device) if words else None
        self.resnets = load_resnets(resnets, device) if resnets else []

    def of(self, extractor: Extractor, part: Part) -> list[Classifier]:
        """Raises UserError where nobody is left, or two have one name."""
        judges = (self.usual(extractor, part) if self.named is None else self.named) + self.resnets
        names = [judge.name for judge in judges]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"two classifiers are called {twice[0]}\nrename the file of one of them")
        return judges

    def usual(self, extractor: Extractor, part: Part) -> list[Classifier]:
        own = extractor.classifier
        if (extractor.count or len(part.classes)) == IMAGENET_CLASSES:
            label_map(part.classes, [], self.class_list)  # an error comes before 3 GB are fetched
            self.published = self.published or load_judges(list(PUBLISHED), self.device)
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


def sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
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
    part: Part,
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
    batches = Batches(part, batch_size, device=device, mean=(0, 0, 0), std=(1, 1, 1), workers=workers)  # plain pixels
    count = iterations_of(len(batches), pot)
    place = {name: position for position, name in enumerate(extractor.classes or part.classes)}
    own = torch.tensor([place.get(name, -1) for name in part.classes], device=device)  # maps need not know any class
    known = [labels_for(judge, part, count * batch_size, class_list).to(device) for judge in judges]
    totals, images = torch.zeros((), device=device), 0
    try:
        with Progress(extractor.name, count, bar=bars_wanted(False)) as shown, exact_float32():
            for step, batch in enumerate(itertools.islice(batches.epoch(), count)):
                images += len(batch.labels)
                with autocast(device, precision):
                    seen = normalised(batch.images, extractor.mean, extractor.std)
                    selected = binarize(extractor.masks_of(seen, own[batch.labels]).masks)
                    of_judges = [labels[batch.labels] for labels in known]
                    totals = totals + judged(batch.images, selected, judges, of_judges)
                shown(step + 1, **(rights(totals) if (step + 1) % print_freq == 0 else {}))
    finally:
        batches.close()
    left_out = {judge.name: images - int(row[4]) for judge, row in zip(judges, totals[0], strict=True)}
    return {
        **{"name": extractor.name, "path": extractor.path, "images": images},
        **{"left_out": {name: number for name, number in left_out.items() if number}, "unreadable": batches.skipped},
        **{kind: named(judges, table) for kind, table in zip(KINDS, totals, strict=True)},
    }


def judged(
    pixels: torch.Tensor, selected: torch.Tensor, judges: list[Classifier], labels: list[torch.Tensor]
) -> torch.Tensor:
    """pixels (B, 3, H, W) in 0..1, selected bool (B, H, W), labels (B,) of each judge -> (kinds, judges, 5): sums."""
    rows = []
    for alter in KINDS.values():
        altered = alter(pixels, selected)
        rows.append(torch.stack([sums(judge(altered), own) for judge, own in zip(judges, labels, strict=True)]))
    return torch.stack(rows)


def labels_for(judge: Classifier, part: Part, images: int, class_list: str | None) -> torch.Tensor:
    """label_map() of a judge. Raises UserError if it knows the class of none of the first so many images."""
    try:
        place = label_map(part.classes, judge.classes, class_list, judge.count)
    except UserError as error:
        raise UserError(f"classifier {judge.name}: {error}") from error
    if (place[part.labels[:images]] < 0).all():
        raise UserError(
            f"classifier {judge.name} knows the class of none of the {min(images, len(part)):,} images used"
        )
    return place


def named(judges: list[Classifier], table: torch.Tensor) -> dict[str, dict[str, float]]:
    """Rows of sums(), (judges, 5), as means: l, cross-entropy; t1 and t5, percent; e, entropy in nats."""
    scale = table.new_tensor([1, 100, 100, 1])
    rows = (table[:, :4] * scale / table[:, 4:]).tolist()
    means = [dict(zip(("l", "t1", "t5", "e"), row, strict=True)) for row in rows]
    return {judge.name: row for judge, row in zip(judges, means, strict=True)}


def rights(totals: torch.Tensor) -> dict[str, float]:
    """totals (kinds, judges, 5) -> percent right at first for each kind, over all judges. Waits for the device."""
    right, images = totals.sum(1)[:, [1, 4]].unbind(1)
    return dict(zip(KINDS, (100 * right / images.clamp_min(1)).tolist(), strict=True))
