"""The formats in which a classifier is exported: how a file is written, and how it is read again."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import models
from engine.inference.classifier import Classifier, SavedClassifier, build_saved
from engine.runtime.checkpoint import read_safetensors, write_safetensors

MAX_ONNX_BYTES = 2**31 - 2**20  # of the weights: the file is one message of protobuf, which holds 2 GiB
PROGRAM_TEXTS = {
    "input": "pixels: float32 (N, 3, image_size, image_size), RGB in 0..1; mean and std are applied inside",
    "output": "logits: float32 (N, num_classes); softmax makes probabilities of them",
}
Network = Callable[[torch.Tensor], torch.Tensor]  # pixels (N, 3, H, W) in 0..1 -> logits (N, K)


class PixelNetwork(nn.Module):
    """The network of a classifier with its normalisation inside: pixels (N, 3, H, W) in 0..1 -> logits (N, K)."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.network = classifier.network
        for name, values in (("mean", classifier.mean), ("std", classifier.std)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.network((pixels - self.mean) / self.std)


class ExportFormat(NamedTuple):
    """How a classifier is written in one format, and how the file is read again for its check.

    convert(classifier, size, texts): returns a function that writes the file, and what to say about it. texts: what
    describe() returned. size: side of the images in pixels.
    """

    packages: tuple[str, ...]
    convert: Callable[[Classifier, int, dict[str, str]], tuple[Callable[[Path], None], str]]
    open: Callable[[Path], Network]
    reader: str  # the package that opens the file


def trace(classifier: Classifier, size: int) -> torch.export.ExportedProgram:
    """Return the program of a classifier for any number of images of size x size pixels."""
    network, example = PixelNetwork(classifier).eval().requires_grad_(False), torch.zeros(2, 3, size, size)
    return torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)


def convert_to_onnx(classifier: Classifier, size: int, texts: dict[str, str]):
    """Convert to ONNX, with the opset that this version of torch recommends and the weights in the same file."""
    weights = sum(value.nbytes for value in classifier.network.state_dict().values())
    if weights > MAX_ONNX_BYTES:
        raise ValueError(f"its weights have {weights / 2**30:.1f} GiB, but a file of ONNX holds 2 GiB")
    names = {"input_names": ["pixels"], "output_names": ["logits"], "dynamic_shapes": ({0: "batch"},)}
    program = torch.onnx.export(trace(classifier, size), dynamo=True, verbose=False, **names)
    program.model.metadata_props.update(texts | PROGRAM_TEXTS)
    return partial(program.save, external_data=False), f"opset {program.model.opset_imports['']}"


def open_onnx(path: Path) -> Network:
    """Open an ONNX file with onnxruntime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors alone
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(["logits"], {"pixels": pixels.numpy()})[0])


def convert_to_pt2(classifier: Classifier, size: int, texts: dict[str, str]):
    """Convert to a program of torch.export, with the description in the extra file metadata.json."""
    program = trace(classifier, size)
    extra_files = {"metadata.json": json.dumps(texts | PROGRAM_TEXTS, indent=1)}

    def save(path: Path) -> None:
        with open(path, "wb") as file:
            torch.export.save(program, file, extra_files=extra_files)

    return save, f"program of torch {torch.__version__}"


def open_pt2(path: Path) -> Network:
    """Open a program of torch.export."""
    with open(path, "rb") as file:
        return torch.export.load(file).module()


def convert_to_safetensors(classifier: Classifier, size: int, texts: dict[str, str]):
    """Take the weights alone, with the key names of our checkpoints. Their network takes normalised images."""
    return partial(write_safetensors, weights=classifier.network.state_dict(), texts=texts), "weights alone"


def open_safetensors(path: Path) -> Network:
    """Build the network of a file of weights, as --model_path does."""
    saved = SavedClassifier(path, content=read_safetensors(path))
    return build_saved(saved, models, model=None, model_args=None, image_size=None, title=path.name)


FORMATS = {  # ending of the file -> its format
    ".onnx": ExportFormat(("onnx", "onnxscript", "onnxruntime"), convert_to_onnx, open_onnx, "onnxruntime"),
    ".pt2": ExportFormat((), convert_to_pt2, open_pt2, "torch"),
    ".safetensors": ExportFormat(("safetensors",), convert_to_safetensors, open_safetensors, "safetensors"),
}
