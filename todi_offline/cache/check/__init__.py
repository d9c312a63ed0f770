"""Problems of a cache and differences of two: verify, repair, diff and summary."""
