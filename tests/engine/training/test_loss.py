"""Binary cross-entropy of the sigmoid against timm's."""

import pytest
import torch
from torch.nn import functional as F

from engine.config.parser import Parser
from engine.config.resolve import check_resume_options, fill_in_options
from engine.errors import UserError
from engine.training.loss import build_loss, get_cross_entropy_scale, smooth_labels
from train import build_parser


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sigmoid_bce_equals_that_of_timm(threshold, smoothing):
    """timm smooths labels before they are mixed; of hard labels it does so in its loss."""
    theirs = pytest.importorskip("timm.loss").BinaryCrossEntropy(smoothing, target_threshold=threshold)
    own = build_loss("sigmoid_bce", threshold)
    logits = 3 * torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 5
    hard = F.one_hot(labels, 5).float()
    torch.testing.assert_close(own(logits, smooth_labels(hard, smoothing)), theirs(logits, labels), atol=1e-6, rtol=0)
    soft = smooth_labels(0.7 * hard + 0.3 * hard.flip(0), smoothing)
    torch.testing.assert_close(own(logits, soft), theirs(logits, soft), atol=1e-6, rtol=0)


def test_the_scale_of_the_clean_loss_is_that_of_the_gradients():
    """Where both say the same probabilities, the gradient of the sigmoid BCE is that of the cross-entropy over K."""
    probabilities = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]])
    targets = F.one_hot(torch.tensor([2, 1]), 4).float()
    gradients = []
    for name, logits in (("ce", probabilities.log()), ("sigmoid_bce", probabilities.logit())):
        logits.requires_grad_()
        (gradient,) = torch.autograd.grad(build_loss(name)(logits, targets), logits)
        gradients.append(gradient)
    scale = get_cross_entropy_scale("sigmoid_bce", 4)
    torch.testing.assert_close(gradients[1], scale * gradients[0])
    assert get_cross_entropy_scale("softmax_bce", 4) == 0.5 and get_cross_entropy_scale("ce", 4) == 1


def resolve(parser: Parser, saved: dict, *words: str) -> dict:
    typed = parser.read(words)
    check_resume_options(typed, saved)
    return fill_in_options(typed, saved, parser.defaults)


def test_a_run_that_was_saved_with_bce_is_one_with_softmax_bce():
    parser = build_parser()
    saved = fill_in_options(parser.read(["--recipe", "puzzle"]), {}, parser.defaults) | {"loss": "bce"}
    for words in ([], ["--loss", "bce"], ["--loss", "softmax_bce"]):
        assert resolve(parser, saved, *words)["loss"] == "softmax_bce"
    with pytest.raises(UserError, match="softmax_bce  ->  sigmoid_bce"):
        resolve(parser, saved, "--loss", "sigmoid_bce")


def test_another_optimizer_than_that_of_a_config_has_its_own_defaults():
    parser = build_parser()
    saved = fill_in_options(
        parser.read(["--optimizer", "timm:adan", "--betas", "0.9", "0.9", "0.9"]), {}, parser.defaults
    )
    options = fill_in_options(parser.read(["--optimizer", "sgd"]), saved, parser.defaults)
    assert (options["betas"], options["no_decay_1d"]) == (None, False)
    assert fill_in_options({}, saved, parser.defaults)["betas"] == [0.9, 0.9, 0.9]


def test_an_option_that_a_saved_run_did_not_have_yet_cannot_change_on_a_resume():
    parser = build_parser()
    saved = fill_in_options({}, {}, parser.defaults)
    for key in ("optimizer", "no_decay_1d", "min_lr", "ema_ramp", "freeze", "layer_decay"):
        del saved[key]
    assert resolve(parser, saved, "--optimizer", "sgd", "--min_lr", "0")["no_decay_1d"] is False
    for words in (["--optimizer", "adamw"], ["--freeze", "conv1"], ["--ema_ramp"], ["--min_lr", "0.01"]):
        with pytest.raises(UserError, match=f"{words[0]} .*  ->  "):
            resolve(parser, saved, *words)
