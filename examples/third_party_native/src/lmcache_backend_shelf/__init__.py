"""`shelf:///absolute/directory` over a native library."""
