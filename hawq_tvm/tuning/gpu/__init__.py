"""Tuning for a GPU on a machine without TVM: candidate kernels exported as CUDA source with a runner, and its times
made records.
"""
