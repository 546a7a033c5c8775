"""The reference RetinaNet: one detector, the same in every framework."""
