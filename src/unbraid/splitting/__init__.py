"""Divide a channel's weights among its concepts."""
