"""Measures of what a split does: separation, outputs, switching off, semantics, circuits."""
