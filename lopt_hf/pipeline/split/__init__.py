"""Where to cut a model into stages: measured costs of its parts, and the fairest cut."""
