"""Find polysemantic channels in a Scan."""
