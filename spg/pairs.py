"""`python -m spg.pairs task=sudoku output=pairs.jsonl`: preference pairs of a model's own completions."""

from spg.cli.pairs import main

if __name__ == "__main__":
    main()
