"""`python -m spg.reproduce file=<run dir>/nonfinite-update-....pt`: see a number that is none again."""

from spg.cli.reproduce import main

if __name__ == "__main__":
    main()
