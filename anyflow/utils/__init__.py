"""Share what every part of the library needs: files, checks of input, randomness, threads, packages."""
