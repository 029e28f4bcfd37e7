"""A local web app in which to look at a finished run, and to part channels by hand."""
