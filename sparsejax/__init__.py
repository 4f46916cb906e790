"""Sparse transformer training in JAX: masks, recipes, Flax modules and a trainer."""
