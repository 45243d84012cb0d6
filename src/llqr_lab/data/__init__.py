"""Data of the experiments; everything is on this machine, nothing is downloaded."""
