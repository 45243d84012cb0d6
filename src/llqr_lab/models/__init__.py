"""The networks of the paper's experiments, as plain torch modules."""
