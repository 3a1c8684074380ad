"""What every mixing method is, and the pieces several of them share: boxes, partners, and methods put together."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch.distributions import Beta


class Mixer:
    """A mixing method: `mixed, soft = mixer(images, targets, source)`.

    images (B, C, H, W) normalised floats and targets (B, K) with rows that sum to 1 are never changed; the results have
    the same shapes. source: callable (images, targets) -> saliency (B, H, W) >= 0, or None where default_source is
    None. The random draws come from torch's global generators: scalars on the host, tensors on the device of the
    images.
    """

    default_source: str | None = None  # the source this method was published with; None: it looks at no saliency
    mixed_weight: float = 1.0  # weight of the mixed loss of the last batch
    wants_mixed_grad: bool = False  # whether after_backward reads the gradient at the mixed images
    mixes_hidden: bool = False  # whether it hooks a stage of the network, which a compiled network ignores
    batch_size: int | None = None  # the only size of batch it does itself justice on, where there is one
    unusable: torch.Tensor | int = 0  # saliency maps so far that were all zero or no numbers

    @property
    def gradient_options(self) -> dict:
        """How a gradient source takes the pixel gradient for this method: parameters of saliency.gradient.Gradient."""
        return {}

    def build_source(self, make):
        """The source of this method, or None if it looks at no saliency. make(mixer) builds one."""
        return make(self) if self.default_source else None

    def look(self, source, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(B, H, W) float32 >= 0: what the source says of the batch. A map that is all zero or no number becomes
        uniform, and is counted in `unusable` without asking the device. Raises ValueError for targets that are labels.
        """
        check_targets(targets)
        saliency, unusable = usable(source(images, targets).detach().float())
        self.unusable = self.unusable + unusable.sum()
        return saliency

    def __call__(self, images: torch.Tensor, targets: torch.Tensor, source=None) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError, with the remedy, if images of this size in pixels cannot be mixed."""

    def during(self, model: torch.nn.Module) -> AbstractContextManager:
        """Around the forward pass of the mixed batch."""
        return nullcontext()

    def after_backward(self, mixed_grad: torch.Tensor | None) -> None:
        """After the backward pass of the mixed batch, with its pixel gradient if wants_mixed_grad."""

    def start_epoch(self, epoch: int, epochs: int, steps: int) -> None:
        """Before epoch number `epoch` (from 0) of `epochs`, which has `steps` batches."""

    def state_dict(self) -> dict:
        """Whatever must survive a resume."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Take back what state_dict gave."""


class NoMix(Mixer):
    """The plain baseline: every batch as it is."""

    def __call__(self, images, targets, source=None):
        return images, targets


class Chain(Mixer):
    """Several mixers one after the other: a hole cut into every image (Cutout), then a method."""

    def __init__(self, mixers: list[Mixer]):
        self.mixers = mixers
        self.default_source = mixers[-1].default_source
        self.wants_mixed_grad = mixers[-1].wants_mixed_grad
        self.mixes_hidden = any(mixer.mixes_hidden for mixer in mixers)

    @property
    def mixed_weight(self) -> float:
        return self.mixers[-1].mixed_weight

    @property
    def batch_size(self) -> int | None:
        return next((mixer.batch_size for mixer in self.mixers if mixer.batch_size), None)

    @property
    def unusable(self) -> torch.Tensor | int:
        return sum(mixer.unusable for mixer in self.mixers)

    def build_source(self, make):
        return self.mixers[-1].build_source(make)

    def check_size(self, height, width):
        for mixer in self.mixers:
            mixer.check_size(height, width)

    def __call__(self, images, targets, source=None):
        for mixer in self.mixers:
            images, targets = mixer(images, targets, source)
        return images, targets

    def during(self, model):
        return self.mixers[-1].during(model)

    def after_backward(self, mixed_grad):
        self.mixers[-1].after_backward(mixed_grad)

    def start_epoch(self, epoch, epochs, steps):
        for mixer in self.mixers:
            mixer.start_epoch(epoch, epochs, steps)

    def state_dict(self):
        return {"mixers": [mixer.state_dict() for mixer in self.mixers]}

    def load_state_dict(self, state):
        for mixer, own in zip(self.mixers, state["mixers"], strict=True):
            mixer.load_state_dict(own)


class Choice(Chain):
    """One of several methods, drawn afresh for every batch. It takes a list of sources, one for each method."""

    def __init__(self, mixers: list[Mixer]):
        super().__init__(mixers)
        self.default_source = None
        self.wants_mixed_grad = any(mixer.wants_mixed_grad for mixer in mixers)
        self.drawn = 0

    @property
    def mixed_weight(self) -> float:
        return self.mixers[self.drawn].mixed_weight

    def build_source(self, make):
        sources = [mixer.build_source(make) for mixer in self.mixers]
        return sources if any(sources) else None

    def __call__(self, images, targets, source=None):
        self.drawn = int(torch.randint(len(self.mixers), ()))
        return self.mixers[self.drawn](images, targets, source and source[self.drawn])

    def during(self, model):
        return self.mixers[self.drawn].during(model)

    def after_backward(self, mixed_grad):
        self.mixers[self.drawn].after_backward(mixed_grad)


class Partly(Chain):
    """Only the last floor(B * share) images of a batch are mixed, among themselves; the share can follow the epochs.

    mix_schedule: `fixed` mix_fraction throughout; `scheduled` a straight ramp from 0 that reaches mix_fraction at
    mix_scheduled_epoch; `delayed` nothing before that epoch. The last mix_off_epoch epochs are never mixed.
    (The options `--prob_mix`, `--mix_schedule` and `--mix_scheduled_epoch` of the SAGE code.)
    """

    def __init__(
        self,
        mixer: Mixer,
        mix_fraction: float = 1.0,
        mix_schedule: str = "fixed",
        mix_scheduled_epoch: int = 0,
        mix_off_epoch: int = 0,
    ):
        super().__init__([mixer])
        if not 0.0 <= mix_fraction <= 1.0:
            raise ValueError(f"mix_fraction must lie between 0 and 1, got {mix_fraction}")
        self.mix_fraction, self.mix_schedule = mix_fraction, mix_schedule
        self.mix_scheduled_epoch, self.mix_off_epoch = mix_scheduled_epoch, mix_off_epoch
        self.share, self.mixed = mix_fraction, 0

    @property
    def mixed_weight(self) -> float:
        return self.mixers[0].mixed_weight if self.mixed else 1.0

    def build_source(self, make):
        source = super().build_source(make)
        partial = self.mix_fraction < 1 or self.mix_schedule == "scheduled"
        for one in source if isinstance(source, list) else [source]:
            if partial and getattr(one, "clean_weight", 0):  # the clean part would weigh less than the rest
                raise ValueError(
                    "mixing a part of each batch excludes training on the clean images too: add --clean_lam 0, or with "
                    "sage --update_ratio 1"
                )
        return source

    def start_epoch(self, epoch, epochs, steps):
        super().start_epoch(epoch, epochs, steps)
        self.share = self.mix_fraction
        if epoch >= epochs - self.mix_off_epoch:
            self.share = 0.0
        elif epoch < self.mix_scheduled_epoch and self.mix_schedule == "delayed":
            self.share = 0.0
        elif epoch < self.mix_scheduled_epoch and self.mix_schedule == "scheduled":
            self.share *= epoch / self.mix_scheduled_epoch

    def __call__(self, images, targets, source=None):
        self.mixed = int(len(images) * self.share)
        if self.mixed == 0:
            return images, targets
        clean = len(images) - self.mixed
        mixed, soft = self.mixers[0](images[clean:], targets[clean:], source)
        if clean == 0:
            return mixed, soft
        return torch.cat([images[:clean], mixed]), torch.cat([targets[:clean], soft])

    def during(self, model):
        return self.mixers[0].during(model) if self.mixed else nullcontext()

    def after_backward(self, mixed_grad):
        if self.mixed:
            self.mixers[0].after_backward(None if mixed_grad is None else mixed_grad[-self.mixed :])


def check_targets(targets: torch.Tensor) -> None:
    """Raise ValueError for anything but soft targets (B, K)."""
    if targets.dim() != 2 or not targets.is_floating_point():
        raise ValueError(
            f"targets must be (B, K) floats whose rows sum to 1, got {tuple(targets.shape)} {targets.dtype}: "
            "F.one_hot(labels, K).float() makes them of labels"
        )


def check_probability(name: str, value: float) -> float:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must lie between 0 and 1, got {value}")
    return value


def usable(saliency: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """saliency (B, H, W) with ones in place of every map whose sum is zero or no number, and which were: (B,) bool."""
    total = saliency.sum((1, 2))
    unusable = ~((total > 0) & total.isfinite())
    return saliency.masked_fill(unusable.view(-1, 1, 1), 1.0), unusable


def unit_sum(saliency: torch.Tensor) -> torch.Tensor:
    """Maps (..., H, W) that each sum to 1."""
    return saliency / saliency.sum((-2, -1), keepdim=True)


def block_means(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """(..., H, W) -> (..., rows, columns): the mean of every block. H and W must be multiples of rows and columns."""
    height, width = values.shape[-2:]
    return values.unflatten(-1, (columns, width // columns)).mean(-1).unflatten(-2, (rows, height // rows)).mean(-2)


def enlarge(blocks: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, rows, columns) -> (B, 1, H, W): every block repeated over its pixels."""
    batch, rows, columns = blocks.shape
    tall, wide = height // rows, width // columns
    return blocks.view(batch, rows, 1, columns, 1).expand(-1, -1, tall, -1, wide).reshape(batch, 1, height, width)


def check_divides(what: str, count: int, height: int, width: int) -> None:
    """Raise ValueError where an image of height x width cannot be cut into count x count blocks."""
    if height % count or width % count:
        fits = [n for n in range(2, min(height, width) + 1) if height % n == 0 and width % n == 0]
        raise ValueError(f"{what}: {height}x{width} pixels cannot be cut into {count}x{count} blocks; {fits} would do")


def draw_lam(alpha: float, images: torch.Tensor, per_image: bool = False) -> torch.Tensor:
    """lam ~ Beta(alpha, alpha): () float64 on the host, or (B,) float32 on the device; 1 where alpha is 0."""
    if per_image:
        device = "cpu" if images.device.type == "mps" else images.device  # MPS has no gamma draws
        parameter = torch.full((len(images),), float(alpha), device=device)
        lam = Beta(parameter, parameter, validate_args=False).sample() if alpha > 0 else torch.ones_like(parameter)
        return lam.to(images.device)
    parameter = torch.tensor(float(alpha), dtype=torch.float64)
    return Beta(parameter, parameter, validate_args=False).sample() if alpha > 0 else torch.ones_like(parameter)


def draw_partner(images: torch.Tensor) -> torch.Tensor:
    """(B,) a uniform permutation of the batch; an image can be its own partner."""
    return torch.randperm(len(images), device=images.device)


def blend(values: torch.Tensor, partner: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """lam * values + (1 - lam) * values[partner] along the first dimension; lam () or (B,)."""
    if lam.dim():
        lam = lam.view(-1, *[1] * (values.dim() - 1))
    return (lam * values + (1 - lam) * values[partner]).to(values.dtype)


def boxes_around(rows: torch.Tensor, columns: torch.Tensor, lam: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Boxes of (1 - lam) of the area around the given pixels, clipped: (B, 4) as y1, y2, x1, x2, half-open.

    CutMix, arXiv 1905.04899, Eq. 2 in the integer form of its code: side int(n sqrt(1 - lam)), centre -+ side // 2, so
    that an odd side loses a pixel. rows, columns (B,) long; lam () or (B,), the share of the image that receives.
    """
    side = (1.0 - lam).sqrt()
    half_height, half_width = (height * side).long() // 2, (width * side).long() // 2
    return clipped(rows, columns, half_height, half_width, height, width)


def clipped(rows, columns, half_height, half_width, height: int, width: int) -> torch.Tensor:
    """Boxes of these half sides around the given points, cut at the edges of the image: (B, 4)."""
    y1, y2 = (rows - half_height).clamp(0, height), (rows + half_height).clamp(0, height)
    x1, x2 = (columns - half_width).clamp(0, width), (columns + half_width).clamp(0, width)
    return torch.stack([y1, y2, x1, x2], dim=-1)


def box_mask(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, 4) boxes y1, y2, x1, x2 -> (B, 1, H, W) bool, true inside."""
    y1, y2, x1, x2 = boxes[:, None, None, :].unbind(-1)  # each (B, 1, 1)
    rows = torch.arange(height, device=boxes.device).view(1, -1, 1)
    columns = torch.arange(width, device=boxes.device).view(1, 1, -1)
    return ((rows >= y1) & (rows < y2) & (columns >= x1) & (columns < x2)).unsqueeze(1)


def paste(images: torch.Tensor, targets: torch.Tensor, partner: torch.Tensor, boxes: torch.Tensor):
    """The partner's pixels inside the box, the image's own outside; targets by the area of the clipped box.

    images (B, C, H, W), targets (B, K), partner (B,), boxes (B, 4) or (1, 4) -> mixed images, soft targets.
    """
    check_targets(targets)
    inside = box_mask(boxes, *images.shape[-2:])
    lam = 1.0 - inside.flatten(1).float().mean(1, keepdim=True)
    return torch.where(inside, images[partner], images), lam * targets + (1.0 - lam) * targets[partner]
