"""The Distribution v2 protocol: pull and push."""
