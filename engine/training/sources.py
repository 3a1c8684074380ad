"""Build the saliency sources of a run."""

from collections.abc import Callable

from engine.data.image_set import Data
from engine.training.loss import get_cross_entropy_scale
from engine.training.network_step import StepConfig, find_capture_obstacle
from engine.training.state import TrainingState


class SourceBuilder:
    """Builds the saliency source of a mixer. A source that learns is built once for all methods and phases of a run.

    build_source: saliency.build_source. config: of the training step. loss: name of the training loss. saliency: name
    of the source, or None for the default of the mixer. source_options: the command-line options that sources take
    (saliency.list_source_options).
    """

    def __init__(
        self,
        build_source: Callable,
        state: TrainingState,
        data: Data,
        config: StepConfig,
        *,
        loss: str,
        saliency: str | None,
        **source_options,
    ):
        self.build_source, self.name = build_source, saliency
        self.learning_sources: dict[str, object] = {}
        self.values = source_options | {
            "model": state.model,
            "num_images": len(data.train),
            "device": state.device,
            "mean": data.mean,
            "std": data.std,
            "image_size": data.image_size,
            "precision": config.precision,
            "scaler": state.scaler,
            "training_loss": config.loss_fn,
            "cross_entropy_scale": get_cross_entropy_scale(loss, len(data.classes)),
        }
        self.clean_options = {}
        if config.clean_weight:  # the pass that gives pixel gradients also trains on the unmixed images
            self.clean_options = {"clean_weight": config.clean_weight, "mode": "train", "follows_training_loss": True}
            self.clean_options["training_loss"] = config.compute_loss
        self.graphs, self.graph_step = state.graphs, state.graph_step

    def __call__(self, mixer):
        name = self.name or mixer.default_source
        if name in self.learning_sources:
            return self.learning_sources[name]
        source = self.build_source(name, **self.values | mixer.gradient_options | self.clean_options)
        captures_passes = self.graph_step and not find_capture_obstacle(self.graphs, mixer, [source])
        self.graphs.wrap_source(source, network_passes=captures_passes)
        if source.learns:
            self.learning_sources[name] = source
        return source
