"""The demo: one long document, three questions, and the run without a cache as the judge."""
