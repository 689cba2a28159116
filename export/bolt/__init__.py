"""Bolt: parts of a network as fused GPU kernels, found by a search among templates.

    graph.py, partition.py   an ONNX file, normalised; its parts that one kernel can compute, each as a node of its own
    shapes.py, rewriting.py, layout.py, phases.py, folding.py, standard.py, half.py
                             what these two are made of
    region.py                such a part as values: layers, and what comes behind each
    spec.py                  the same as JSON and arrays
    templates/               CUDA sources for a region, written from parameters
    build.py, bundle.py      sources compiled; one file that has all of it
    host/                    the same sources on the CPU, thread by thread, to test them without a GPU

Source: Xing et al., MLSys 2022, https://arxiv.org/abs/2110.15238.
"""
