"""`python -m spg.reproduce file=<run dir>/nonfinite-update-....pt`: compute again what was not finite."""

from spg.cli.reproduce import main

if __name__ == "__main__":
    main()
