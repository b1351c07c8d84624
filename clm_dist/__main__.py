"""`python -m clm_dist` is the `clm-dist` command."""

from clm_dist.cli.app import main

if __name__ == "__main__":
    main()
