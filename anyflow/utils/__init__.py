"""Share files, checks of input, devices, randomness, threads, packages and progress."""
