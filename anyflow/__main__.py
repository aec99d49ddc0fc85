"""Run the command line as ``python -m anyflow``."""

from anyflow.cli import main

if __name__ == "__main__":
    main()
