"""Training configurations; each file's docstring carries its command and expected result."""
