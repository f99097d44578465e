"""Triton kernels, one file per operator stem; installed as `diwa.kernels`.

Imported only when a Triton variant is asked for. Every module has `aot_examples()`, which
tools/aot_check.py compiles ahead of time for sm_90.
"""
