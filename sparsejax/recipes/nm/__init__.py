"""Methods that keep n of every m consecutive weights."""
