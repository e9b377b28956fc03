"""How questions of the suite `offline` are made: `python -m lopt_hf.retention.questions.make` writes them again."""
