"""`python -m spg.pretrain`: supervised base weights for a small model, with a model card."""

from spg.cli.pretrain import main

if __name__ == "__main__":
    main()
