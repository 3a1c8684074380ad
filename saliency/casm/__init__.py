"""CASM: classifier-agnostic saliency maps, Zolna, Geras and Cho, arXiv 1805.08249."""
