"""The formulas, once: no framework is imported here, the array namespace `xp` is passed in."""
