"""Settings: what they are, how they are read, and what the command line leaves open."""
