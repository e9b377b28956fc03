"""The cut of a model into stages: measured costs of its parts, and the most even cut."""
