"""Measuring and drawing the sharpness of a trained network."""
