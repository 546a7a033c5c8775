"""The RetinaNet in JAX, with flax.nnx and optax: network, trainer."""
