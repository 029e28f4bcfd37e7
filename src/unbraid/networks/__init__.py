"""Networks as they come: loading, layers, outputs, relevance."""
