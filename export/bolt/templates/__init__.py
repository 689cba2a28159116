"""CUDA sources for regions, written from parameters; each template is a Python file, most with a `.cuh` beside it."""
