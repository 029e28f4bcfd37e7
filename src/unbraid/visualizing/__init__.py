"""Images made to excite a channel."""
