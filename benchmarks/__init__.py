"""Measurements: one harness, one file per question, results beside them."""
