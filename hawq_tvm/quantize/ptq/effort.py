"""How long the blocks of a network are learned."""

# Iterations a block.
EFFORTS = {"fast": 60, "good": 250, "best": 2000}
