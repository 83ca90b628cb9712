"""What a machine with a GPU needs to check and time packages: NumPy, TVM's runtime libraries and this folder; no
compiler, no `tvm`.
"""
