"""The face of ``llqr demo``: its runs, what is said of them, its pictures, its search."""
