"""`python -m spg.figures`: table and figures of a multirun, and tables of a page filled again."""

from spg.cli.figures import main

if __name__ == "__main__":
    main()
