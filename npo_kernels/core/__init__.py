"""The mathematics and the modes, on any backend: nothing here imports one."""
