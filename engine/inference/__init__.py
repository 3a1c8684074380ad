"""Trained classifiers: loading, predictions, metrics."""
