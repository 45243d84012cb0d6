"""The command line ``llqr``: one file per command."""
