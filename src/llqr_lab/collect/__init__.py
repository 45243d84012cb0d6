"""Tables, figures and a report of finished runs, beside the paper's numbers."""
