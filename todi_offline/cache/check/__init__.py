"""What is wrong with a cache, and how two caches differ: verify, repair, diff and summary."""
