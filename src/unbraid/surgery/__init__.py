"""A split put into a network: concept channels beside the layer, the output unchanged."""
