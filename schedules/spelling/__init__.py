"""Intrinsics: what each one means, as TIR, and how the target spells it."""
