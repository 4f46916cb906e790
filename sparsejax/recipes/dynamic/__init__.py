"""Methods that drop and grow weights during training."""
