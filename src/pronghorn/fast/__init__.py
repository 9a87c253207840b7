"""Names that notebooks already use."""
