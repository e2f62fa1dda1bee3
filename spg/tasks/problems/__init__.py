"""Problems of generated benchmarks: make, solve, split and read them."""
