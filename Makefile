.PHONY: demo test quality figures notebooks

demo:  ## the main job on this machine: fine-tune SmolLM2-135M with LoPT, compare before and after
	lopt-hf demo

test:  ## the default test suite
	pytest

quality:  ## lint, format, types
	ruff check .
	ruff format --check .
	mypy

figures:  ## the drawings in the README
	python assets/draw_mechanism.py

notebooks:  ## runs the notebooks and keeps what they show; needs the extra `notebooks`
	python notebooks/execute.py --write
