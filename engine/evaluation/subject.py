"""What is judged: a classifier with the images it is judged on."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from engine.batches import Batches
from engine.classifier import Classifier, normalised
from engine.data import Part, in_memory
from engine.distributed import rank, ranks
from engine.draws import uniform
from engine.image_files import CentreView, StillView
from engine.loop import predict
from engine.progress import Progress, bars_wanted, over

Alter = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # (pixels, labels, index) -> pixels
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # pixels in 0..1


class OnPixels(nn.Module):
    """The network behind the normalisation it was trained with: pixels (B, 3, H, W) in 0..1 -> logits (B, K)."""

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.network, self.mean, self.std = network, mean, std

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.network(normalised(pixels, self.mean, self.std))


@dataclass
class Subject:
    """A classifier on the device, in evaluation mode and without gradients of its parameters, and a part whose labels
    are among its classes. held_share: of the images on which a temperature or a threshold is chosen.
    """

    name: str
    classifier: Classifier
    part: Part
    dataset: str
    device: torch.device
    batch_size: int = 500
    workers: int = 0
    precision: torch.dtype | None = None
    channels_last: bool = True
    held_share: float = 0.2
    seed: int = 0
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
    def view(self) -> StillView:
        """How its images are cut out of their files; images that lie in a tensor are seen whole."""
        return CentreView(self.size, self.size) if isinstance(self.part.pixels, torch.Tensor) else self.part.pixels.view

    def classify(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) in 0..1 on the device -> logits (B, K) float32."""
        return self.classifier(pixels)

    def batches(self, part: Part, mean: tuple[float, ...], std: tuple[float, ...], *, alone: bool = False) -> Batches:
        """The images of the part that this process looks at: its share of them, or with `alone` all."""
        layout = {"workers": self.workers, "channels_last": self.channels_last}
        layout |= {} if alone else {"rank": rank(), "ranks": ranks()}
        return Batches(part, self.batch_size, device=self.device, mean=mean, std=std, **layout)

    def predict(
        self, title: str = "", *, part: Part | None = None, alter: Alter | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Logits (N, K) and labels (N,) on the host, and the seconds it took; of several processes the first has them.

        part: other images than its own; alter: what becomes of the pixels first. title: of the progress bar.
        """
        part = self.part if part is None else part
        network, statistics = self.classifier.network, {"mean": self.classifier.mean, "std": self.classifier.std}
        if alter is not None:
            network, statistics = OnPixels(network, **statistics).eval(), PLAIN
        batches = self.batches(part, **statistics)
        begin = time.perf_counter()
        with Progress(f"{self.name} {title}".strip(), len(batches), bar=bars_wanted(False), lines=False) as bar:
            logits, labels = predict(network, batches, precision=self.precision, progress=bar, alter=alter)
        batches.close()
        return logits, labels, time.perf_counter() - begin

    def clean(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """predict() of its own images, done once."""
        if "clean" not in self.kept:
            self.kept["clean"] = self.predict()
        return self.kept["clean"]

    def some(self, most: int) -> Part:
        """At most so many images (0: all) from all over the part, decoded once where they fit into memory."""
        if ("some", most) not in self.kept:
            few = self.part.spread(most) if most else self.part
            self.kept["some", most] = in_memory(few, self.workers, over)
        return self.kept["some", most]

    def held(self, count: int) -> torch.Tensor:
        """bool (count,): the images on which something is chosen, the same for every classifier."""
        return uniform(torch.arange(count), (), seed=self.seed, purpose="held out") < self.held_share
