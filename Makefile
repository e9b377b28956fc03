.PHONY: demo test check-fast gpu-check test-changed types quality workflows figures notebooks docs

demo:  ## the main job on this machine: fine-tune SmolLM2-135M, compare before and after
	lopt-hf demo

test:  ## the default test suite
	pytest

gpu-check:  ## memory, speed and equality on this machine's GPU, in eight minutes; without one a test of itself
	python -m lopt_hf.scripts.bench gpu --output-dir out/gpu-check

check-fast:  ## lint, format, types and the tests of what differs from main, in under two minutes
	ruff check .
	ruff format --check .
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target types test-changed

test-changed:
	python tests/changed.py

types:
	mypy

quality: types workflows  ## lint, format, types, the files for GitHub
	ruff check .
	ruff format --check .

workflows:  ## the files for GitHub, against their schemas
	check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	check-jsonschema --builtin-schema vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/idea.yml
	check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

figures:  ## the drawings in the README
	python docs/assets/draw_mechanism.py

notebooks:  ## runs the notebooks and keeps what they show; needs the extra `notebooks`
	python notebooks/execute.py --write

docs:  ## the documentation's pages and their links; needs the extra `docs`
	mkdocs build --strict
