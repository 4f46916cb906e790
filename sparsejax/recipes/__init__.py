"""Published sparse-training methods, one per file, behind one protocol."""
