"""Multi-tier KV cache for LLM inference engines, with pluggable backends."""
