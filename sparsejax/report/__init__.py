"""What a run tells: metrics, progress and pictures."""
