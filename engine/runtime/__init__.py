"""Devices, processes, files and checkpoints."""
