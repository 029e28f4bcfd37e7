"""The report: one self-contained page on the channels that were found and split, and figures."""
