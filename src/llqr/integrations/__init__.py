"""Training loops that are not the user's own: one file a framework, imported by its users alone."""
