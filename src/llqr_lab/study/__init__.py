"""The study: problems, methods and their tuning, at equal steps, equal seconds and to a target."""
