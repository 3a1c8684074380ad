"""The order of the classes, which all accuracies and maps go by."""

import torch

from engine.inference.metrics import rank_classes, rank_labels, topk_correct
from saliency.casm.classifier_eval import sum_batch_metrics


def test_classes_are_ranked_by_logits_and_equal_ones_by_index():
    logits = torch.zeros(2, 1000)
    logits[0, 500], logits[0, 700] = 300, 100  # the softmax of all but the first is exactly 0 in float32
    assert rank_classes(logits)[0, :4].tolist() == [500, 700, 0, 1]
    assert rank_classes(logits)[1].tolist() == list(range(1000))
    logits = torch.randn(5, 1000).mul(4).round()  # with many equal logits
    labels = torch.tensor([0, 999, 3, 500, 77])
    assert rank_labels(logits, labels).tolist() == (rank_classes(logits) == labels[:, None]).nonzero()[:, 1].tolist()


def test_topk_takes_equal_logits_in_the_order_of_their_index():
    logits, labels = torch.zeros(1000, 1000), torch.arange(1000)  # a network that tells nothing apart
    assert topk_correct(logits, labels, (1, 5, 1000)).tolist() == [1, 5, 1000]
    assert sum_batch_metrics(logits, labels)[1:3].tolist() == [1, 5]


def test_a_label_without_a_finite_logit_is_never_among_the_highest():
    logits = torch.tensor([[torch.nan, 1.0, 0.0], [torch.nan] * 3])
    assert topk_correct(logits, torch.tensor([0, 0]), (1, 2, 3)).tolist() == [0, 0, 0]
