"""`python -m spg.plan`: what a run takes on named hardware, before it starts."""

from spg.cli.plan import main

if __name__ == "__main__":
    main()
