"""The mathematics, the plan and the modes, independent of the backend: nothing here imports one."""
