"""The `clm-dist` command."""
