"""Masks as pure functions on arrays: True = kept."""
