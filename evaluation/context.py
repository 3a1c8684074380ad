"""Evaluation context: a classifier, the images it is evaluated on, and how its predictions are computed."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from engine.data.image_set import ImageSet, describe_unreadable, load_into_memory
from engine.data.loader import WHOLE_BATCH, DeviceLoader, get_process_shard
from engine.data.sample_rng import uniform
from engine.data.views import CenterCrop, FixedView
from engine.errors import UserError
from engine.inference.classifier import Classifier, normalize
from engine.inference.predict import predict
from engine.runtime.progress import LINE_SECONDS, Progress, progress_bar, use_progress_bar

Transform = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # (pixels, labels, index) -> pixels
UNNORMALIZED = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # pixels in 0..1


@dataclass(frozen=True)
class EvalSession:
    """Settings that all classifiers of one call share. shared: values that are computed once for all of them."""

    device: torch.device
    precision: torch.dtype | None = None  # autocast dtype; None: float32
    batch_size: int = 500
    workers: int = 0
    channels_last: bool = True
    held_out: float = 0.2  # fraction of the images on which the temperature and thresholds are chosen
    seed: int = 0
    shared: dict = field(default_factory=dict)

    def cached(self, key: str, compute: Callable):
        """Return compute(), calling it only for the first classifier that asks for `key`."""
        if key not in self.shared:
            self.shared[key] = compute()
        return self.shared[key]

    def note(self, line: str) -> None:
        """Print a note, once per call of the command."""
        self.cached(line, lambda: print(f"note: {line}"))

    def print_progress(self, line: str) -> None:
        """Print a line at most once a minute where there is no progress bar: a card takes hundreds of passes."""
        now = time.monotonic()
        if not use_progress_bar(False) and now > self.shared.setdefault("last line", now) + LINE_SECONDS:
            self.shared["last line"] = now
            print(line, flush=True)


@dataclass
class EvalContext:
    """A classifier, on the device in evaluation mode with frozen parameters, and the images it is evaluated on.

    image_set: labelled with the classifier's classes. class_map (k,): the classifier's index of each of the k classes
    of the data set, -1 where it has no such class. clean: the cached result of predict_clean().
    """

    classifier: Classifier
    image_set: ImageSet
    dataset: str
    class_map: torch.Tensor
    session: EvalSession
    clean: tuple[torch.Tensor, torch.Tensor, float] | None = None

    def __post_init__(self):
        layout = torch.channels_last if self.session.channels_last else torch.contiguous_format
        self.classifier.network.to(self.session.device, memory_format=layout).eval().requires_grad_(False)

    @property
    def name(self) -> str:
        return self.classifier.name

    @property
    def image_size(self) -> int:
        """The side of the images in pixels."""
        return self.image_set.size

    @property
    def view(self) -> FixedView:
        """How images are resized and cropped when they are read from files; images in a tensor are shown whole."""
        in_memory = isinstance(self.image_set.pixels, torch.Tensor)
        return CenterCrop(self.image_size, self.image_size) if in_memory else self.image_set.pixels.view

    @contextmanager
    def named_errors(self) -> Iterator[None]:
        """Turn a ValueError, such as for NaN logits, into a UserError that names the classifier."""
        try:
            yield
        except ValueError as error:
            raise UserError(f"{self.name}: {error}") from error

    def make_loader(
        self, image_set: ImageSet, mean: tuple[float, ...], std: tuple[float, ...], *, whole: bool = False
    ) -> DeviceLoader:
        """Return a loader for this process's shard of the images; whole: for all images."""
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
        """Return logits (N, K) and labels (N,) of the readable images on the CPU, and the seconds taken. With several
        processes only the main one receives the predictions; the others get empty tensors.

        image_set: the images to use instead of the context's own. transform: applied to the pixels (0..1) before they
        are normalised. title: shown by the progress bar. Raises ValueError for logits that are NaN or infinite.
        """
        image_set = self.image_set if image_set is None else image_set
        statistics = {"mean": self.classifier.mean, "std": self.classifier.std}

        def transform_and_normalize(*batch: torch.Tensor) -> torch.Tensor:
            return normalize(transform(*batch), **statistics)

        loader = self.make_loader(image_set, **(UNNORMALIZED if transform else statistics))
        start_time = time.perf_counter()
        with Progress(f"{self.name} {title}".strip(), len(loader), bar=use_progress_bar(False), lines=False) as bar:
            logits, labels = predict(
                self.classifier.network,
                loader,
                precision=self.session.precision,
                progress=bar,
                transform=transform_and_normalize if transform else None,
            )
        loader.close()
        self.session.print_progress(f"{self.name}: {title or 'test images'} done")
        self.check_finite(logits, title)
        self.note_unreadable(loader)
        return logits, labels, time.perf_counter() - start_time

    def check_finite(self, logits: torch.Tensor, title: str) -> None:
        """Raise ValueError if logits (N, K) are NaN or infinite."""
        if bad := int((~logits.isfinite()).any(1).sum()):
            where = f" ({title})" if title else ""
            raise ValueError(f"{bad:,} of {len(logits):,} images{where} have logits that are NaN or infinite")

    def note_unreadable(self, loader: DeviceLoader) -> None:
        """Print how many files of the last epoch could not be read. All processes must call this."""
        if count := loader.count_unreadable():
            self.session.note(describe_unreadable(count, loader.image_set))

    def predict_clean(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Return predict() of the context's own images, computed once."""
        self.clean = self.clean or self.predict()
        return self.clean

    def load_subset(self, limit: int) -> ImageSet:
        """Return at most `limit` images (0: all), spread over the set, decoded into memory if they fit."""
        image_set, warnings = self.image_set.subsample(limit) if limit else self.image_set, []
        subset = load_into_memory(image_set, self.session.workers, progress_bar, warnings)
        for line in warnings:
            self.session.note(line)
        return subset

    def heldout_mask(self, count: int) -> torch.Tensor:
        """Return a (count,) bool mask of the held-out images, the same for every classifier."""
        drawn = uniform(torch.arange(count), (), seed=self.session.seed, purpose="held out")
        return drawn < self.session.held_out


def check_same_images(contexts: list[EvalContext], task: str) -> None:
    """Raise UserError if the task compares classifiers but their images differ. Accuracy compares nothing."""
    first, *others = contexts if task != "accuracy" else contexts[:1]
    for other in others:
        pair = (first, other)
        ours, theirs = ((context.image_set.origin, list_labels(context.image_set)) for context in pair)
        if ours != theirs:
            found = [
                f"{context.name} has {len(context.image_set):,} images of {context.image_set.origin}"
                for context in pair
            ]
            raise UserError(
                f"--task {task} compares classifiers on the same images, but {', '.join(found)}\n"
                "set --dataset, --data_dir, --num_classes and --limit for all, or evaluate each in a call of its own"
            )


def list_labels(image_set: ImageSet) -> list[str]:
    """Return the class name of each image."""
    return [image_set.classes[label] for label in image_set.labels.tolist()]
