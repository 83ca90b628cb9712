"""How long the blocks of a network are learned behind the fit of their layers."""

# Iterations a block.
EFFORTS = {"fast": 0, "good": 250, "best": 2000}
