"""The commands of python -m saliency.casm."""
