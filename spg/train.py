"""`python -m spg.train`: reinforcement learning of a masked diffusion language model."""

from spg.cli.train import main

if __name__ == "__main__":
    main()
