"""Methods that make attention sparse."""
