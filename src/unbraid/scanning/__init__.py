"""One pass of a network over images, kept as a Scan."""
