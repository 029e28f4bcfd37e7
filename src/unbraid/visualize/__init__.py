"""What a channel looks at, in images."""
