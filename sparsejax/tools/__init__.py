"""What `train.py` does beside training: evaluate, plan, find a decay rate."""
