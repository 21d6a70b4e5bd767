# Every target makes the virtual environment it needs: Python 3.11 or later and make are enough.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

.PHONY: demo test test-adapterhub lint bench static clean

demo: $(VENV)/.installed
	$(RUN) -W ignore -m bench demo

test: $(VENV)/.installed
	$(RUN) -m pytest -n 2 --dist worksteal

# AdapterHub's package needs an older transformers, hence an environment of its own.
test-adapterhub: $(VENV)-adapterhub/.installed
	TRITON_INTERPRET= $(VENV)-adapterhub/bin/python -m pytest tests/adapterhub

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/.installed
	$(RUN) -W ignore -m bench speed

static: $(VENV)/.installed
	$(RUN) -W ignore -m bench static $(ARGS)

# timm and torchvision stand apart, because transformers would use a torchvision whose compiled operators do not load.
$(VENV)/.installed: setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt -e '.[test]'
	$(RUN) -m pip install -q --no-deps -c constraints.txt --target $(VENV)/vision timm torchvision
	touch $@

$(VENV)-adapterhub/.installed: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)-adapterhub
	$(VENV)-adapterhub/bin/python -m pip install -q torch==2.13.0 -e . adapters==1.3.0 pytest
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-adapterhub out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
