"""The commands of python -m saliency.casm: train, score, eval and plot."""
