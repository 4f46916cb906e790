"""Masks of attention blocks."""
