"""Methods that drop and grow weights while training."""
