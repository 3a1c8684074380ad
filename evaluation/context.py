"""What is judged: a classifier with the images it is judged on."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from engine.data.image_set import ImageSet, load_into_memory
from engine.data.loader import DeviceLoader, process_shard
from engine.data.sample_rng import uniform
from engine.data.views import CenterCrop, FixedView
from engine.errors import UserError
from engine.inference.classifier import Classifier, normalize
from engine.inference.predict import predict
from engine.runtime.distributed import all_reduce_sum
from engine.runtime.progress import LINE_SECONDS, Progress, progress_bar, use_progress_bar

Alter = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # (pixels, labels, index) -> pixels
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # pixels in 0..1


class OnPixels(nn.Module):
    """The network behind the normalisation it was trained with: pixels (B, 3, H, W) in 0..1 -> logits (B, K)."""

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.network, self.mean, self.std = network, mean, std

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.network(normalize(pixels, self.mean, self.std))


@dataclass
class EvalContext:
    """A classifier on the device, in evaluation mode and without gradients of its parameters, and a part whose labels
    are among its classes.

    place (k,): which of these each of the k classes of the data set is, -1 for none. held_share: of the images on which
    a temperature or a threshold is chosen. shared: what the subjects of a call need only once.
    """

    name: str
    classifier: Classifier
    part: ImageSet
    dataset: str
    place: torch.Tensor
    device: torch.device
    batch_size: int = 500
    workers: int = 0
    precision: torch.dtype | None = None
    channels_last: bool = True
    held_share: float = 0.2
    seed: int = 0
    shared: dict = field(default_factory=dict)
    kept: dict = field(default_factory=dict)  # predictions made already

    def __post_init__(self):
        memory = torch.channels_last if self.channels_last else torch.contiguous_format
        self.classifier.network.to(self.device, memory_format=memory).eval().requires_grad_(False)

    @property
    def size(self) -> int:
        """Side of the images in pixels."""
        pixels = self.part.pixels
        return pixels.shape[1] if isinstance(pixels, torch.Tensor) else pixels.size

    @property
    def view(self) -> FixedView:
        """How its images are cut out of their files; images that lie in a tensor are seen whole."""
        return CenterCrop(self.size, self.size) if isinstance(self.part.pixels, torch.Tensor) else self.part.pixels.view

    def once(self, key, make: Callable):
        """make(), called by the first of several subjects that ask for `key`."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def note(self, line: str) -> None:
        """Tell the user, once a call."""
        self.once(line, lambda: print(f"note: {line}"))

    def classify(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in 0..1 on the device -> logits (B, K) float32."""
        return self.classifier(pixels)

    def batches(
        self, part: ImageSet, mean: tuple[float, ...], std: tuple[float, ...], *, alone: bool = False
    ) -> DeviceLoader:
        """The images of the part that this process looks at: its share of them, or with `alone` all."""
        layout = {"workers": self.workers, "channels_last": self.channels_last}
        layout |= {} if alone else {"shard": process_shard()}
        return DeviceLoader(part, self.batch_size, device=self.device, mean=mean, std=std, **layout)

    def predict(
        self, title: str = "", *, part: ImageSet | None = None, alter: Alter | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Logits (N, K) and labels (N,) on the host, and the seconds it took; of several processes the first has them.

        part: other images than its own; alter: what becomes of the pixels first. title: of the progress bar. Raises
        ValueError for logits that are not finite, which would count as a wrong answer, or worse.
        """
        part = self.part if part is None else part
        network, statistics = self.classifier.network, {"mean": self.classifier.mean, "std": self.classifier.std}
        if alter is not None:
            network, statistics = OnPixels(network, **statistics).eval(), PLAIN
        batches = self.batches(part, **statistics)
        begin = time.perf_counter()
        with Progress(f"{self.name} {title}".strip(), len(batches), bar=use_progress_bar(False), lines=False) as bar:
            logits, labels = predict(network, batches, precision=self.precision, progress=bar, alter=alter)
        batches.close()
        self.tell_progress(title)
        self.check(logits, title)
        self.tell_skipped(part, batches.skipped)
        return logits, labels, time.perf_counter() - begin

    def check(self, logits: torch.Tensor, title: str) -> None:
        """Raise ValueError for logits (N, K) that are not finite."""
        if broken := int((~logits.isfinite()).any(1).sum()):
            where = f" ({title})" if title else ""
            raise ValueError(f"{broken:,} of {len(logits):,} images{where} have logits that are NaN or infinite")

    def tell_progress(self, title: str) -> None:
        """A line a minute where there is no bar: a card is hundreds of passes."""
        now = time.monotonic()
        if not use_progress_bar(False) and now > self.shared.setdefault("told", now) + LINE_SECONDS:
            self.shared["told"] = now
            print(f"{self.name}: {title or 'the test images'} done", flush=True)

    def tell_skipped(self, part: ImageSet, count: int) -> None:
        """Say how many files of the part could not be read, in all processes. All of them must call it."""
        if not isinstance(part.pixels, torch.Tensor) and (skipped := int(all_reduce_sum(torch.tensor(count)))):
            self.note(f"{skipped:,} files of {part.origin} cannot be read; their neighbours count twice")

    def clean(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """predict() of its own images, done once."""
        if "clean" not in self.kept:
            self.kept["clean"] = self.predict()
        return self.kept["clean"]

    def some(self, most: int) -> ImageSet:
        """At most so many images (0: all) from all over the part, decoded once where they fit into memory."""
        if ("some", most) not in self.kept:
            few = self.part.subsample(most) if most else self.part
            warnings: list[str] = []
            self.kept["some", most] = load_into_memory(few, self.workers, progress_bar, warnings)
            for line in warnings:
                self.note(line)
        return self.kept["some", most]

    def held(self, count: int) -> torch.Tensor:
        """bool (count,): the images on which something is chosen, the same for every classifier."""
        return uniform(torch.arange(count), (), seed=self.seed, purpose="held out") < self.held_share


def check_same_evaluation(subjects: list[EvalContext], what: str) -> None:
    """Raise UserError where classifiers would be compared on different images."""
    first, *others = subjects
    for other in others:
        if (first.part.origin, format_names(first.part)) != (other.part.origin, format_names(other.part)):
            told = [f"{one.name} has {len(one.part):,} images of {one.part.origin}" for one in (first, other)]
            raise UserError(
                f"{what} compares classifiers on the same images: {', '.join(told)}\n"
                "name those of all with --dataset, --data_dir, --num_classes and --limit, or make a call for each"
            )


def format_names(part: ImageSet) -> list[str]:
    return [part.classes[label] for label in part.labels.tolist()]
