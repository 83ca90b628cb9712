"""The C interface of a CPU library: what the generated part of it says, how it is linked, and how it is run,
natively or emulated.
"""
