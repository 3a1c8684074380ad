"""What the decoder is trained for: small masks that hide what the classifiers use.

Zolna, Geras and Cho, arXiv 1805.08249, Sec. 3, in the form of their public program.
"""

import torch
from torch.nn import functional as F


def masker_loss(
    clean_logits: torch.Tensor,
    masked_logits: torch.Tensor,
    labels: torch.Tensor,
    masks: torch.Tensor,
    *,
    lambda_r: float,
    adversarial: bool = False,
) -> dict[str, torch.Tensor]:
    """The decoder's loss and what it is made of.

    clean_logits and masked_logits (B, K) of the images and of what the masks leave of them, labels (B,), masks (B, 1,
    H, W) in 0..1. An image that was right and is now wrong is confused, and earns lambda_r * (1 - area of its mask).
    The main term is the entropy of the masked prediction where the clean one was right, to be raised; adversarial: the
    masked cross-entropy instead.

    Returns total, area, main, masked_loss (the masked cross-entropy), each (), and correct, mistaken and confused, each
    (B,) bool.
    """
    correct = clean_logits.argmax(1) == labels
    mistaken = masked_logits.argmax(1) != labels
    confused = correct & mistaken
    shares = masks.flatten(1).mean(1)
    area = -lambda_r * (confused.to(shares.dtype) - shares).clamp_min(0).mean()
    masked_loss = F.cross_entropy(masked_logits, labels)
    if adversarial:
        main = -masked_loss
    else:
        logs = F.log_softmax(masked_logits, 1)
        main = (correct * (logs.exp() * logs).sum(1)).mean()
    return {
        **{"total": area + main, "area": area, "main": main, "masked_loss": masked_loss},
        **{"correct": correct, "mistaken": mistaken, "confused": confused},
    }
