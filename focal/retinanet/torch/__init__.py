"""The RetinaNet in PyTorch: network, trainer, export."""
