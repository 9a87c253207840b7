"""Rows of any known format to messages, tokens and loss masks."""
