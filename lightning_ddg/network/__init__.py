"""From a module to stages: find its layers, measure them, cut them. Nothing here imports Lightning."""
