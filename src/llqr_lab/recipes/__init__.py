"""Every run of the paper's tables and figures: ``llqr list``, ``llqr run``."""
