"""Masks of weights, and the schedules that they follow."""
