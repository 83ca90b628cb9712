"""Programs that make the figures of the docs: the demo, ImageNet, Fashion-MNIST, tables of times."""
