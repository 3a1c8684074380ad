"""CASM: classifier-agnostic saliency map extraction, Zolna, Geras and Cho, arXiv 1805.08249."""
