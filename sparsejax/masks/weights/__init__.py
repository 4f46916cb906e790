"""Masks of weights, and their schedules."""
