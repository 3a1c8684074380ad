"""Compare training runs: python -m evaluation.compare RUN ..."""
