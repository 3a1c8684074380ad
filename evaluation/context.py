"""An evaluation context: a classifier, the images it is evaluated on, and how its predictions are made."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from engine.data.image_set import ImageSet, load_into_memory
from engine.data.loader import WHOLE_BATCH, DeviceLoader, get_process_shard
from engine.data.sample_rng import uniform
from engine.data.views import CenterCrop, FixedView
from engine.errors import UserError
from engine.inference.classifier import Classifier, normalize
from engine.inference.predict import predict
from engine.runtime.distributed import all_reduce_sum
from engine.runtime.progress import LINE_SECONDS, Progress, progress_bar, use_progress_bar

Transform = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # (pixels, labels, index) -> pixels
UNNORMALIZED = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # pixels in 0..1


@dataclass(frozen=True)
class EvalSession:
    """What all classifiers of a call have in common. shared: what is computed once for all of them."""

    device: torch.device
    precision: torch.dtype | None = None  # of autocast
    batch_size: int = 500
    workers: int = 0
    channels_last: bool = True
    held_out: float = 0.2  # share of the images on which a temperature or a threshold is chosen
    seed: int = 0
    shared: dict = field(default_factory=dict)

    def cached(self, key: str, compute: Callable):
        """compute(), called only by the first classifier that asks for `key`."""
        if key not in self.shared:
            self.shared[key] = compute()
        return self.shared[key]

    def note(self, line: str) -> None:
        """Tell the user, once a call."""
        self.cached(line, lambda: print(f"note: {line}"))

    def print_progress(self, line: str) -> None:
        """Where there is no bar, a line a minute: a card takes hundreds of passes."""
        now = time.monotonic()
        if not use_progress_bar(False) and now > self.shared.setdefault("last line", now) + LINE_SECONDS:
            self.shared["last line"] = now
            print(line, flush=True)


@dataclass
class EvalContext:
    """A classifier, on the device in evaluation mode with frozen parameters, and the images it is evaluated on.

    image_set: labelled with the classifier's classes. class_map (k,): the classifier's class for each of the k classes
    of the data set, -1 where it has none. clean: what predict_clean() gives, once it has been called.
    """

    classifier: Classifier
    image_set: ImageSet
    dataset: str
    class_map: torch.Tensor
    session: EvalSession
    clean: tuple[torch.Tensor, torch.Tensor, float] | None = None

    def __post_init__(self):
        memory = torch.channels_last if self.session.channels_last else torch.contiguous_format
        self.classifier.network.to(self.session.device, memory_format=memory).eval().requires_grad_(False)

    @property
    def name(self) -> str:
        return self.classifier.name

    @property
    def image_size(self) -> int:
        """Side of the images in pixels."""
        pixels = self.image_set.pixels
        return pixels.shape[1] if isinstance(pixels, torch.Tensor) else pixels.size

    @property
    def view(self) -> FixedView:
        """How its images are cut out of their files; images in a tensor are shown whole."""
        in_memory = isinstance(self.image_set.pixels, torch.Tensor)
        return CenterCrop(self.image_size, self.image_size) if in_memory else self.image_set.pixels.view

    @contextmanager
    def named_errors(self) -> Iterator[None]:
        """Turn a ValueError, as for logits that are NaN, into a UserError that names the classifier."""
        try:
            yield
        except ValueError as error:
            raise UserError(f"{self.name}: {error}") from error

    def make_loader(
        self, image_set: ImageSet, mean: tuple[float, ...], std: tuple[float, ...], *, whole: bool = False
    ) -> DeviceLoader:
        """Batches of this process's share of the images, or with `whole` of all of them."""
        return DeviceLoader(
            image_set,
            self.session.batch_size,
            device=self.session.device,
            mean=mean,
            std=std,
            workers=self.session.workers,
            channels_last=self.session.channels_last,
            shard=WHOLE_BATCH if whole else get_process_shard(),
        )

    def predict(
        self, title: str = "", *, image_set: ImageSet | None = None, transform: Transform | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Logits (N, K) and labels (N,) on the CPU, and the seconds it took; of several processes only the first gets
        them, the others get empty tensors.

        image_set: another than its own. transform: applied to the pixels first. title: of the progress bar. Raises
        ValueError for logits that are NaN or infinite.
        """
        image_set = self.image_set if image_set is None else image_set
        statistics = {"mean": self.classifier.mean, "std": self.classifier.std}

        def normalized(*batch: torch.Tensor) -> torch.Tensor:
            return normalize(transform(*batch), **statistics)

        loader = self.make_loader(image_set, **(UNNORMALIZED if transform else statistics))
        begin = time.perf_counter()
        with Progress(f"{self.name} {title}".strip(), len(loader), bar=use_progress_bar(False), lines=False) as bar:
            logits, labels = predict(
                self.classifier.network,
                loader,
                precision=self.session.precision,
                progress=bar,
                transform=normalized if transform else None,
            )
        loader.close()
        self.session.print_progress(f"{self.name}: {title or 'the test images'} done")
        self.check_finite(logits, title)
        self.note_unreadable(image_set, loader.skipped)
        return logits, labels, time.perf_counter() - begin

    def check_finite(self, logits: torch.Tensor, title: str) -> None:
        """Raise ValueError for logits (N, K) that are NaN or infinite."""
        if broken := int((~logits.isfinite()).any(1).sum()):
            where = f" ({title})" if title else ""
            raise ValueError(f"{broken:,} of {len(logits):,} images{where} have logits that are NaN or infinite")

    def note_unreadable(self, image_set: ImageSet, skipped: int) -> None:
        """Note how many image files could not be read, summed over all processes, each of which must call this."""
        if not isinstance(image_set.pixels, torch.Tensor) and (total := int(all_reduce_sum(torch.tensor(skipped)))):
            self.session.note(f"{total:,} files of {image_set.origin} cannot be read; their neighbours count twice")

    def predict_clean(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """predict() of its own images, done once."""
        self.clean = self.clean or self.predict()
        return self.clean

    def load_subset(self, limit: int) -> ImageSet:
        """At most `limit` images (0: all) from all over the set, decoded where they fit into memory."""
        chosen, warnings = self.image_set.subsample(limit) if limit else self.image_set, []
        subset = load_into_memory(chosen, self.session.workers, progress_bar, warnings)
        for line in warnings:
            self.session.note(line)
        return subset

    def heldout_mask(self, count: int) -> torch.Tensor:
        """(count,) bool: the images on which something is chosen, the same for every classifier."""
        drawn = uniform(torch.arange(count), (), seed=self.session.seed, purpose="held out")
        return drawn < self.session.held_out


def check_same_images(contexts: list[EvalContext], task: str) -> None:
    """Raise UserError where a task would compare classifiers on different images; accuracy stands for itself."""
    first, *others = contexts if task != "accuracy" else contexts[:1]
    for other in others:
        own, theirs = ((one.image_set.origin, list_labels(one.image_set)) for one in (first, other))
        if own != theirs:
            found = [
                f"{one.name} has {len(one.image_set):,} images of {one.image_set.origin}" for one in (first, other)
            ]
            raise UserError(
                f"--task {task} compares classifiers on the same images: {', '.join(found)}\n"
                "name those of all with --dataset, --data_dir, --num_classes and --limit, or make a call for each"
            )


def list_labels(image_set: ImageSet) -> list[str]:
    """The class of each image by name."""
    return [image_set.classes[label] for label in image_set.labels.tolist()]
