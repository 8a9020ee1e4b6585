# Two thin lines; the work is in tools/ and noxfile.py.
.PHONY: demo test
demo:
	@python3.11 tools/demo.py $(if $(PD),--pd) $(if $(TINY),--tiny) $(if $(BACKEND),--backend=$(BACKEND))
test:
	@python3.11 tools/test.py
