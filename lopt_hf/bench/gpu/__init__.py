"""The GPU check: what the package claims about CUDA, measured in a few minutes by anyone who has one."""
