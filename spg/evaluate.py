"""`python -m spg.evaluate`: complete and score held-out examples with a model, a run, or from a file."""

from spg.cli.evaluate import main

if __name__ == "__main__":
    main()
