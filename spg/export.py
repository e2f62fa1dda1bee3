"""`python -m spg.export run=<run dir> merge=true`: a run's model as a folder that others load."""

from spg.cli.export import main

if __name__ == "__main__":
    main()
