"""Images from any source, with labels in the order of the outputs."""
