"""llqr_lab: the paper's experiments, theory and toys, on top of llqr."""
