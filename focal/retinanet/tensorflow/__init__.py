"""The RetinaNet in TensorFlow, with Keras: network, trainer, export."""
