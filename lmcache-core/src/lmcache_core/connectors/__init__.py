"""Built-in connectors: the same contract and the same conformance suite as any other."""
