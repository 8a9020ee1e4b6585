"""``gds://``: values in files, moved by kvikio (GPUDirect Storage) or by plain system calls."""
