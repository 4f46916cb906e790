"""Checkpoints: saved whole, restored bit for bit, and the folder of a run."""
